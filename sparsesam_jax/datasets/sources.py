"""Photos of a data set and the rows that they have in a store: files, or members of tars."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from PIL import Image

FILES_A_SHARD = 512
_LISTS = (".txt", ".lst", ".list")


class PhotoData(NamedTuple):
    """A photo as it lies on disk, and its name in the data set."""

    name: str
    data: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Photos by row. Shard i has the rows from `i * shard_size` on, whatever was done before.

    Files fill the rows one after the other. A tar is a shard of its own, so that nobody has to list
    the tars of a billion photos before the first is read; the rows behind its last photo are empty.

    Attributes:
        root: What the names lie in.
        names: Files, or tars.
        in_tars: Whether `names` are tars.
        shard_size: Rows of a shard.
        limit: Only the rows below it.
    """

    root: Path
    names: tuple[str, ...]
    in_tars: bool
    shard_size: int
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("shard_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of the data set; those of tars may be empty."""
        rows = len(self.names) * (self.shard_size if self.in_tars else 1)
        return rows if self.limit is None else min(rows, self.limit)

    @property
    def num_shards(self) -> int:
        """Shards of the data set."""
        return -(-self.num_rows // self.shard_size)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_rows))

    def read(self, row: int) -> PhotoData | None:
        """The photo of a row; None where there is none.

        Raises:
            ValueError: Its tar is broken or has more photos than a shard has rows.
            OSError: It cannot be read.
        """
        if not self.in_tars:
            name = self.names[row]
            return PhotoData(_text(name), (self.root / name).read_bytes())
        tar, place = divmod(row, self.shard_size)
        path = self.root / self.names[tar]
        members = _photos_in(path)
        if len(members) > self.shard_size:
            raise ValueError(
                f"shard_size (--shard-size) must be at least the photos of a tar, got "
                f"{self.shard_size} for {path} with {len(members)}"
            )
        if place >= len(members):
            return None
        name, offset, size = members[place]
        with open(path, "rb") as file:
            file.seek(offset)
            return PhotoData(_text(f"{self.names[tar]}/{name}"), file.read(size))

    def name(self, row: int) -> str:
        """What a row is called where its photo cannot be read."""
        return _text(self.names[row // self.shard_size if self.in_tars else row])

    @functools.cached_property
    def digest(self) -> str:
        """Of the names in their order, which say what is in a shard."""
        digest = hashlib.sha256(b"tars" if self.in_tars else b"files")
        for name in self.names:
            digest.update(b"\0" + os.fsencode(name))
        return digest.hexdigest()


class Rows(Sequence[int]):
    """The rows of some shards, which are too many to be listed."""

    def __init__(self, source: Source, shards: Sequence[int]):
        self._source, self._shards = source, shards
        # Only the data set's last shard may be shorter.
        self._len = sum(len(source.rows(shard)) for shard in shards)

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < self._len:
            raise IndexError(index)
        shard, place = divmod(index, self._source.shard_size)
        return self._shards[shard] * self._source.shard_size + place


def find_source(source: str, *, shard_size: int | None = None, limit: int | None = None) -> Source:
    """The photos that a text stands for.

    Args:
        source: A folder with photos in it and in its folders, or with tars; a pattern (`*`, `?`,
            `[...]`, `**`) of either; a tar of webdataset; or a list, a `.txt` with a file or a tar
            a line, relative to it.
        shard_size: Rows of a shard; None is 512 for files and the first tar's photos for tars.
        limit: Only so many rows.

    Raises:
        ValueError: There are no photos, or photos and tars, or tars that are no plain ones.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(_below(path))
        tars = [name for name in found if name.endswith(".tar")]
        root, names = path, tars or [name for name in found if _is_photo(name)]
    elif path.suffix in _LISTS and path.is_file():
        lines = path.read_text("utf-8", "surrogateescape").splitlines()
        root, names = path.parent, [line for line in lines if line.strip()]
    elif path.is_file():
        root, names = path.parent, [path.name]
    elif glob.has_magic(source):
        root, names = (
            Path(),
            sorted(p for p in glob.glob(source, recursive=True) if Path(p).is_file()),
        )
    else:
        raise ValueError(f"source must be a folder, a pattern, a tar or a list, got {source!r}")
    in_tars = {name.endswith(".tar") for name in names}
    if not names or len(in_tars) > 1:
        got = "photos and tars" if names else "none"
        raise ValueError(f"source must hold photos or tars of photos, got {got} in {source!r}")
    if in_tars == {True}:
        shard_size = shard_size or max(1, len(_photos_in(root / names[0])))
    elif len(names) == 1 and not _is_photo(names[0]):
        raise ValueError(f"source must be a tar or a list (.txt) if it is a file, got {source!r}")
    return Source(
        root=root,
        names=tuple(names),
        in_tars=in_tars == {True},
        shard_size=shard_size or FILES_A_SHARD,
        limit=limit,
    )


def part_of(shards: int, part: tuple[int, int]) -> range:
    """The shards of part i of n: as many as the others have, next to each other."""
    index, count = part
    return range(index * shards // count, (index + 1) * shards // count)


def _below(folder: Path) -> Iterator[str]:
    """Files in a folder and its folders, relative to it; hidden ones left out."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = os.path.relpath(place, folder)
        for name in files:
            if not name.startswith("."):
                yield name if base == "." else f"{base}/{name}"


def _is_photo(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _suffixes()


@functools.cache
def _suffixes() -> frozenset[str]:
    return frozenset(Image.registered_extensions())


@functools.lru_cache(maxsize=4)
def _photos_in(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, place and size of the photos in a tar, in its order.

    Raises:
        ValueError: It is no tar, a broken or a compressed one.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return tuple(
                (member.name, member.offset_data, member.size)
                for member in _files(tar)
                if _is_photo(member.name) and not os.path.basename(member.name).startswith(".")
            )
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} must be an uncompressed tar that is whole: {error}") from error


def _files(tar: Iterable[tarfile.TarInfo]) -> Iterator[tarfile.TarInfo]:
    return (member for member in tar if member.isfile())


def _text(name: str) -> str:
    """A file's name as text, which names need not be."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
