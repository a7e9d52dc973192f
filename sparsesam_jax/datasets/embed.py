"""`sparsesam embed`: the embedding of every photo of a data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparsesam_jax.choices import check_choice
from sparsesam_jax.datasets.array_file import ArrayLayout, chunked
from sparsesam_jax.datasets.jobs import EncodingWorker, ModelOptions, source_settings
from sparsesam_jax.datasets.loading import LoadedPhoto, LoadPhoto
from sparsesam_jax.datasets.sources import Source
from sparsesam_jax.datasets.store import PhotoRecord, Store
from sparsesam_jax.predict.image_files import DEFAULT_READER, PhotoReader

if TYPE_CHECKING:
    from sparsesam_jax.datasets.embedding_store import EmbeddingShard
    from sparsesam_jax.datasets.encoder import Launched

StoreDtype = Literal["float16", "bfloat16"]
_THREADS = 4  # that sort features into chunks and hash them


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """Embeddings of a data set.

    Attributes:
        source: The photos.
        model: The model.
        store_dtype: Dtype of the features in the store. Every library reads float16; SAM's
            features are small enough for it.
        reader: How photos are read.
    """

    source: Source
    model: ModelOptions
    store_dtype: StoreDtype = "float16"
    reader: PhotoReader = DEFAULT_READER

    def __post_init__(self) -> None:
        check_choice("store_dtype", self.store_dtype, StoreDtype)

    def loader(self) -> LoadPhoto:
        """How a photo is read: at the size that the model takes."""
        return LoadPhoto(source=self.source, reader=self.reader, long_side=self.model.side)

    def store(self, path: str | Path) -> Store:
        """The job's store, which is made if there is none."""
        from sparsesam_jax.datasets import embedding_store

        settings = {
            "kind": embedding_store.KIND,
            "store_dtype": self.store_dtype,
            **self.model.settings(),
            **source_settings(self.source, self.reader),
        }
        return Store.create(path, settings, embedding_store.metadata_files(self.layouts))

    def worker(self, store: Store) -> EmbedWorker:
        """The encoder."""
        return EmbedWorker(self, store)

    @functools.cached_property
    def layouts(self) -> dict[str, ArrayLayout]:
        """The store's arrays."""
        from sparsesam_jax.datasets.embedding_store import layouts

        rows, size = self.source.num_rows, self.source.shard_size
        return layouts(self.model.config, self.model.side, self.store_dtype, rows, size)


class EmbedWorker(EncodingWorker):
    """Runs an `EmbedJob`, see `jobs.Worker`."""

    def __init__(self, job: EmbedJob, store: Store):
        from sparsesam_jax.datasets.encoder import BatchEncoder

        predictor, memory = job.model.predictor(), store.path / "batch_sizes.json"
        super().__init__(BatchEncoder(predictor, job.model.batch, memory, job.store_dtype))
        self._job = job
        self.metadata = {"fingerprint": predictor.fingerprint}
        self._pool = ThreadPoolExecutor(_THREADS, "chunks")

    @property
    def busy_s(self) -> float:
        """Seconds in which the devices had a batch."""
        return self.encoder.busy_s

    def finish(
        self, photos: Sequence[LoadedPhoto], launched: Launched
    ) -> Iterator[tuple[PhotoRecord, Any]]:
        """Each photo's record, and its arrays in chunks."""
        arrays = {name: x for name, x in launched.arrays()._asdict().items() if x is not None}
        count = range(len(photos))
        each = [{name: x[place] for name, x in arrays.items()} for place in count]
        return iter(list(self._pool.map(self._photo, photos, each)))

    def open(self, store: Store, shard: int) -> EmbeddingShard:
        """Begin to write a shard."""
        from sparsesam_jax.datasets.embedding_store import EmbeddingShard

        return EmbeddingShard(store, shard, self._job.layouts)

    def _photo(
        self, photo: LoadedPhoto, arrays: dict[str, np.ndarray]
    ) -> tuple[PhotoRecord, dict[str, np.ndarray]]:
        from sparsesam_jax.datasets.embedding_store import checksum

        if not all(np.isfinite(x).all() for x in arrays.values()):
            raise ValueError(
                f"features must be finite in {self._job.store_dtype}, got NaN or an infinity for "
                f"{photo.name}: other weights, --dtype or --store-dtype may do"
            )
        rows, cols = arrays["features"].shape[:2]
        record = PhotoRecord(
            row=photo.row,
            name=photo.name,
            height=photo.size[0],
            width=photo.size[1],
            resized_height=photo.pixels.shape[0],
            resized_width=photo.pixels.shape[1],
            grid_rows=rows,
            grid_columns=cols,
            photo_sha256=photo.sha256,
            sha256=checksum(arrays),
        )
        layouts = self._job.layouts
        return record, {name: chunked(x, layouts[name]) for name, x in arrays.items()}
