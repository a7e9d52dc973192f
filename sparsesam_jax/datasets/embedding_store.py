"""A store of image embeddings: a Zarr v3 array that is read photo by photo.

    STORE/zarr.json, STORE/features/zarr.json      a Zarr group with the array `features`
    STORE/features/c/17/0/0/0                      shard 17, see `array_file`
    STORE/early_features/...                       SAM-HQ's second array

Zarr v3 with sharding was chosen since micro-sam and other readers of embeddings use Zarr, one file
holds many photos, and a photo is read by itself. HDF5 has one writer and no repair after a crash;
webdataset's tars and Parquet are read front to back; a file a photo is a billion files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.config import SamConfig
from sparsesam_jax.datasets.array_file import ArrayLayout, ArrayShard
from sparsesam_jax.datasets.store import Store
from sparsesam_jax.predict.embedding import Embedding
from sparsesam_jax.predict.prompt_arrays import ImageSizes

KIND = "embeddings"
_CACHE_BYTES = 2**26  # of the shards' tables, 16 bytes a chunk, beside some photos


def layouts(
    config: SamConfig, image_size: int, dtype: str, rows: int, shard_size: int
) -> dict[str, ArrayLayout]:
    """The arrays of a model's embeddings, by their names in `ImageEmbedding`."""
    encoder = config.image_encoder
    channels = {"features": encoder.out_chans}
    if config.hq:
        channels["early_features"] = encoder.embed_dim
    return {
        name: ArrayLayout(
            rows=rows,
            shard_size=shard_size,
            side=image_size // encoder.patch_size,
            channels=count,
            dtype=dtype,
        )
        for name, count in channels.items()
    }


def metadata_files(arrays: dict[str, ArrayLayout]) -> dict[str, Any]:
    """The `zarr.json` of the group and of its arrays."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    return {"zarr.json": group} | {
        f"{name}/zarr.json": layout.metadata() for name, layout in arrays.items()
    }


class EmbeddingShard:
    """A shard that is being written: its arrays' files, which get their names together.

    Args:
        store: Where to.
        shard: Its number.
        arrays: The store's arrays.
    """

    def __init__(self, store: Store, shard: int, arrays: dict[str, ArrayLayout]):
        self._store, self._shard, self._layouts = store, shard, arrays
        self._files = contextlib.ExitStack()
        self._open: dict[str, ArrayShard] = {}

    def add(self, row: int, photo: dict[str, np.ndarray], /) -> None:
        """Write a photo's arrays, chunked."""
        if not self._open:  # a shard without photos has no file
            for name, layout in self._layouts.items():
                path = shard_path(self._store, name, self._shard)
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self._files.enter_context(atomic_path(path, mark="shard"))
                file = self._files.enter_context(open(temporary, "wb"))  # noqa: SIM115
                self._open[name] = ArrayShard(file, layout)
        for name, array in self._open.items():
            with self._named_errors(name):
                array.add(row % self._store.shard_size, photo[name])

    def commit(self) -> None:
        """Give the files their names."""
        for name, array in self._open.items():
            with self._named_errors(name):
                array.finish()
        self._files.close()

    def abort(self, error: BaseException) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(type(error)):
            self._files.__exit__(type(error), error, error.__traceback__)

    @contextlib.contextmanager
    def _named_errors(self, name: str) -> Iterator[None]:
        """A full disk is said without the file's name."""
        try:
            yield
        except OSError as error:
            path = str(shard_path(self._store, name, self._shard))
            raise OSError(error.errno, error.strerror, path) from error


def shard_path(store: Store, name: str, shard: int) -> Path:
    """The file of an array's shard."""
    return store.path / name / "c" / str(shard) / "0" / "0" / "0"


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of a photo's arrays as they are, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


class EmbeddingStore:
    """The embeddings that `sparsesam embed` wrote, for `SamPredictor.set_embedding`.

    ```python
    store = EmbeddingStore("store")
    predictor.set_embedding(store[0])
    predictor.set_embedding(store["folder/photo.jpg"])
    ```

    Args:
        path: The store's folder.

    Attributes:
        store: What is known of it.

    Raises:
        ValueError: It is no store of embeddings, or a library is missing.
    """

    def __init__(self, path: str | Path):
        self.store = Store(path)
        if self.store.kind != KIND:
            raise ValueError(f"store must be one of {KIND}, got one of {self.store.kind} in {path}")

    def __len__(self) -> int:
        """Rows, those without a photo included."""
        return self.store.num_rows

    def __getitem__(self, row: int | str) -> Embedding:
        """The embedding of a row, or of a photo by its name.

        Raises:
            IndexError: There is no such row.
            KeyError: There is no photo of that name.
            ValueError: The row has no photo, a broken one, is not written yet, or is damaged.
        """
        if isinstance(row, str):
            row = self._rows[row]
        row = row + len(self) if row < 0 else row
        if not 0 <= row < len(self):
            raise IndexError(f"row must be below {len(self)}, got {row}")
        record = self._records(row // self.store.shard_size).get(row)
        if record is None or record["error"] is not None:
            why = "there is no photo" if record is None else record["error"]
            raise ValueError(f"row {row} of {self.store.path} has no embedding: {why}")
        arrays = self.read(record)
        if checksum(arrays) != record["sha256"]:
            raise ValueError(f"row {row} of {self.store.path} is damaged")
        sizes = ImageSizes(
            (record["height"], record["width"]),
            (record["resized_height"], record["resized_width"]),
        )
        features = arrays["features"][None]
        early = arrays["early_features"][None] if "early_features" in arrays else None
        side = self.store.settings["image_size"] // self.store.settings["patch_size"]
        frame = None if features.shape[1:3] == (side, side) else (side, side)
        fingerprint = self.store.metadata(row // self.store.shard_size)["fingerprint"]
        return Embedding(features, early, (sizes,), fingerprint, frame)

    def read(self, record: dict[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a photo, [rows, columns, channels], as they are on disk."""
        place = np.s_[record["row"], : record["grid_rows"], : record["grid_columns"]]
        try:
            futures = {name: array[place].read() for name, array in self._arrays.items()}
            return {name: np.asarray(future.result()) for name, future in futures.items()}
        except ValueError as error:  # as tensorstore has it for files that are broken or gone
            text = str(error).split(" [")[0]
            raise ValueError(f"row {record['row']} of {self.store.path}: {text}") from error

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        # It comes with flax, reads bfloat16 too, and keeps the shards' tables.
        import tensorstore

        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        names = [n for n in ("features", "early_features") if (self.store.path / n).is_dir()]
        folder = self.store.path.resolve()
        specs = {
            name: {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / name}/"}}
            for name in names
        }
        return {
            name: tensorstore.open(spec, open=True, read=True, context=context).result()
            for name, spec in specs.items()
        }

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _records(self, shard: int) -> dict[int, dict[str, Any]]:
        if not self.store.is_done(shard):
            raise ValueError(f"shard {shard} of {self.store.path} is not written yet")
        return {record["row"]: record for record in self.store.index(shard).to_pylist()}

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        index = self.store.index()
        return dict(zip(index["name"].to_pylist(), index["row"].to_pylist(), strict=True))


def damaged(store: Store, shard: int) -> Iterator[str]:
    """What of a shard is not as its index says."""
    embeddings = EmbeddingStore(store.path)
    for record in store.index(shard).to_pylist():
        if record["error"] is None:
            try:
                if checksum(embeddings.read(record)) == record["sha256"]:
                    continue
                yield f"row {record['row']} ({record['name']}): other bytes than were written"
            except ValueError as error:
                yield str(error)
