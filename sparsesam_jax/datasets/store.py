"""A store: what a run makes of a data set, shard by shard, and what is known of every photo.

    STORE/store.json            what was run on what; a run that continues is compared with it
    STORE/index/00000017.parquet  the photos of a shard: names, sizes, checksums, what was wrong
    STORE/...                   the results, one file a shard, see `embedding_store`, `mask_store`
    STORE/lock                  an empty file, of which a run locks its shards' bytes

A shard's index is written last, so a shard is done when it has one. All files are written under
temporary names that depend on the shard alone, so what a killed run leaves is overwritten by the
next, and a store holds the same bytes whatever happened on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsesam_jax.checkpoints.atomic import atomic_path, check_folder

if TYPE_CHECKING:
    import pyarrow

FORMAT, VERSION = "sparsesam_jax.store", 1
_MARK = "shard"  # of temporary files
# The lock file is empty: a byte stands for a shard that a run has, and another for one that is
# being written, so that two machines never write the same file. One more is for `create`.
_CREATING, _RUNS, _SHARDS = 0, 2**40, 2**41


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotoRecord:
    """A photo's line in the index; what is not known of it is None.

    Attributes:
        row: Its row in the store.
        name: Its name in the data set.
        image_id: COCO's, of masks.
        height: Of the photo.
        width: Of the photo.
        resized_height: As it lies in the model's padded input.
        resized_width: Likewise.
        grid_rows: Rows of its features.
        grid_columns: Columns of its features.
        masks: How many were found.
        photo_sha256: Of the photo's file.
        sha256: Of its results: its features' bytes, or its masks' text.
        error: Why it was left out.
    """

    row: int
    name: str
    image_id: int | None = None
    height: int | None = None
    width: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    grid_rows: int | None = None
    grid_columns: int | None = None
    masks: int | None = None
    photo_sha256: str | None = None
    sha256: str | None = None
    error: str | None = None


_TEXTS = {"name", "photo_sha256", "sha256", "error"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """A shard that is done.

    Attributes:
        shard: Its number.
        photos: How many have results.
        failed: How many were left out.
    """

    shard: int
    photos: int
    failed: int


def check_pyarrow() -> None:
    """Raise ValueError where pyarrow, an optional dependency, is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("a store needs pyarrow: pip install 'sparsesam-jax[datasets]'")


class Store:
    """A store on disk.

    Args:
        path: Its folder.

    Attributes:
        path: Its folder.
        settings: What `store.json` says.

    Raises:
        ValueError: There is none, or one of another version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_pyarrow()
        file = self.path / "store.json"
        try:
            self.settings: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"store must be a folder with a store.json, got {path}") from error
        found = (self.settings.get("format"), self.settings.get("version"))
        if found != (FORMAT, VERSION):
            raise ValueError(f"store must be of {FORMAT} {VERSION}, got {found[0]} {found[1]}")

    @classmethod
    def create(
        cls, path: str | Path, settings: Mapping[str, Any], files: Mapping[str, Any]
    ) -> Store:
        """Make a store, or open the one that is there if it was made with the same settings.

        Args:
            path: Its folder.
            settings: What all its results have in common.
            files: Further JSON files by their names below the folder.

        Raises:
            ValueError: There is a store with other settings, or there can be none.
        """
        check_pyarrow()
        folder = Path(path)
        check_folder(folder, "out")
        folder.mkdir(exist_ok=True)
        settings = {"format": FORMAT, "version": VERSION, **settings}
        if not (folder / "store.json").exists():
            own = {"lock", *(Path(name).parts[0] for name in files)}
            others = [p.name for p in folder.iterdir() if p.suffix != ".partial"]
            if strange := sorted({*others} - own):
                raise ValueError(
                    f"out must be a store or an empty folder, got {path}: {strange[0]}"
                )
            with _locked(_lock_file(folder), _CREATING, 1, None):
                for name, content in {**files, "store.json": settings}.items():
                    (folder / name).parent.mkdir(exist_ok=True)
                    with atomic_path(folder / name, mark=_MARK) as temporary:
                        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        store = cls(folder)
        for name, value in json.loads(json.dumps(settings)).items():
            if store.settings.get(name) != value:
                raise ValueError(
                    f"out must be a new store or one with the same {name}, got "
                    f"{value!r} instead of {store.settings.get(name)!r} in {path}"
                )
        return store

    @property
    def kind(self) -> str:
        """`embeddings` or `masks`."""
        return self.settings["kind"]

    @property
    def num_shards(self) -> int:
        """Shards of the data set, done or not."""
        return self.settings["shards"]

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return self.settings["rows"]

    @property
    def shard_size(self) -> int:
        """Rows of a shard."""
        return self.settings["shard_size"]

    def index_path(self, shard: int) -> Path:
        """Where a shard's index lies."""
        return self.path / "index" / f"{shard:08d}.parquet"

    def is_done(self, shard: int) -> bool:
        """Whether a shard is written."""
        return self.index_path(shard).exists()

    def summary(self, shard: int) -> ShardSummary:
        """What is in a shard that is done, from its index's last bytes."""
        metadata = self.metadata(shard)
        return ShardSummary(
            shard=shard, photos=int(metadata["photos"]), failed=int(metadata["failed"])
        )

    def metadata(self, shard: int) -> dict[str, str]:
        """What a shard's index says of the whole shard."""
        import pyarrow.parquet

        found = self._read(lambda path: pyarrow.parquet.read_schema(path).metadata, shard)
        return {key.decode(): value.decode() for key, value in found.items()}

    def index(self, shard: int | None = None) -> pyarrow.Table:
        """A shard's photos, or all photos of the shards that are done.

        Raises:
            ValueError: The index is damaged.
        """
        import pyarrow
        import pyarrow.parquet

        if shard is not None:
            read = functools.partial(pyarrow.parquet.read_table, page_checksum_verification=True)
            return self._read(read, shard)
        done = [self.index(shard) for shard in range(self.num_shards) if self.is_done(shard)]
        return pyarrow.concat_tables(done) if done else _table([], {})

    def write_index(
        self, shard: int, records: Iterable[PhotoRecord], metadata: Mapping[str, str]
    ) -> ShardSummary:
        """Write a shard's index, with which the shard is done."""
        import pyarrow.parquet

        records = sorted(records, key=lambda record: record.row)
        failed = sum(record.error is not None for record in records)
        summary = ShardSummary(shard=shard, photos=len(records) - failed, failed=failed)
        known = {**metadata, "photos": str(summary.photos), "failed": str(summary.failed)}
        path = self.index_path(shard)
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path, mark=_MARK) as temporary:
            table = _table(records, known)
            pyarrow.parquet.write_table(table, temporary, write_page_checksum=True)
        return summary

    @contextlib.contextmanager
    def locked(self, shards: range) -> Iterator[None]:
        """Have some shards for oneself, as long as the process lives.

        Raises:
            ValueError: Another run has one of them.
        """
        message = f"store {self.path} is being written by another run"
        if not shards:
            yield
            return
        with _locked(_lock_file(self.path), _RUNS + shards.start, len(shards), message):
            yield

    @contextlib.contextmanager
    def writing(self, shard: int) -> Iterator[None]:
        """Write a shard. Engines may give it to two workers when they believe one is lost."""
        message = f"shard {shard} of {self.path} is being written by another process"
        with _locked(_lock_file(self.path), _SHARDS + shard, 1, message):
            yield

    def _read(self, read: Any, shard: int) -> Any:
        import pyarrow

        try:
            return read(self.index_path(shard))
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.index_path(shard)} is damaged: {error}") from error


def _table(records: Sequence[PhotoRecord], metadata: Mapping[str, str]) -> pyarrow.Table:
    import pyarrow

    fields = [field.name for field in dataclasses.fields(PhotoRecord)]
    types = {name: pyarrow.string() if name in _TEXTS else pyarrow.int64() for name in fields}
    schema = pyarrow.schema(list(types.items()), metadata=dict(metadata))
    columns = {name: [getattr(record, name) for record in records] for name in fields}
    return pyarrow.table(columns, schema=schema)


_lock_files: dict[Path, Any] = {}


def _lock_file(folder: Path) -> Any:
    """The lock file, which a process opens once: closing it anywhere would end all its locks."""
    path = folder.resolve() / "lock"
    if path not in _lock_files:
        _lock_files[path] = open(path, "ab")  # noqa: SIM115
    return _lock_files[path]


@contextlib.contextmanager
def _locked(file: Any, start: int, length: int, taken: str | None) -> Iterator[None]:
    """Lock bytes of a file; where another process has them, wait or raise `taken`."""
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if taken else 0), length, start)
    except OSError as error:
        if taken and error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(taken) from error
        raise OSError(error.errno, f"no lock can be had: {error.strerror}", file.name) from error
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, length, start)
