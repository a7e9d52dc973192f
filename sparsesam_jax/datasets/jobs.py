"""What a job is: a data set, what is made of each photo, and how a shard of results is written.

A job is a value that pickles and imports no JAX; whoever runs its shards makes a worker of it,
which has the model. What a worker makes of a shard depends on the job and on the shard alone:
photos go through the model in batches of the shard's own, in the order of their rows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparsesam_jax.checkpoints.sources import locate
from sparsesam_jax.choices import Dtype, Implementation, Padding, Products
from sparsesam_jax.config import SamConfig, Sparsity
from sparsesam_jax.datasets.loading import LoadedPhoto, LoadPhoto
from sparsesam_jax.datasets.sources import Source
from sparsesam_jax.datasets.store import PhotoRecord, Store
from sparsesam_jax.predict.image_files import PhotoReader

if TYPE_CHECKING:
    from sparsesam_jax.datasets.encoder import BatchEncoder, Launched
    from sparsesam_jax.predict.predictor import SamPredictor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is called.

    Attributes:
        weights: Name or path.
        density: What the encoder keeps; None is dense.
        dtype: What is computed in.
        implementation: As for `Sam`.
        products: As for `Sam`.
        image_size: Side of the padded input; None is the model's own.
        padding: As for `SamPredictor`.
        batch: Photos of a device's encoder call.
    """

    weights: str = "vit_t"
    density: float | None = None
    dtype: Dtype = "float32"
    implementation: Implementation = "auto"
    products: Products = "dtype"
    image_size: int | None = None
    padding: Padding = "square"
    batch: int = 8

    def __post_init__(self) -> None:
        locate(self.weights)
        if self.density is not None:
            Sparsity(self.density)
        if self.batch < 1:
            raise ValueError(f"batch must be positive, got {self.batch}")

    @functools.cached_property
    def config(self) -> SamConfig:
        """The model's shape.

        Raises:
            ValueError: The weights are no checkpoint, or `image_size` does not fit them.
        """
        from sparsesam_jax.checkpoints import open_checkpoint

        config = open_checkpoint(locate(self.weights)).config
        patch, size = config.image_encoder.patch_size, self.image_size
        if size is not None and (size < 1 or size % patch):
            raise ValueError(f"image_size must be a multiple of {patch}, got {size}")
        return config

    @property
    def side(self) -> int:
        """Side of the padded input."""
        return self.image_size or self.config.image_encoder.image_size

    def settings(self) -> dict[str, Any]:
        """What results of one store share; the weights by what is in their files."""
        digest = hashlib.sha256()
        path = locate(self.weights)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
        named = dataclasses.asdict(self) | {"weights": digest.hexdigest(), "image_size": self.side}
        return named | {"patch_size": self.config.image_encoder.patch_size}

    def predictor(self) -> SamPredictor:
        """The model, loaded once a process."""
        return _predictor(self)


@functools.lru_cache(maxsize=1)
def _predictor(options: ModelOptions) -> SamPredictor:
    from sparsesam_jax.checkpoints.pretrained import Sam
    from sparsesam_jax.predict.predictor import SamPredictor

    sam = Sam.from_pretrained(
        options.weights,
        sparsity=None if options.density is None else Sparsity(options.density),
        dtype=options.dtype,
        implementation=options.implementation,
        products=options.products,
    )
    return SamPredictor(sam, options.image_size, padding=options.padding)


class Output(Protocol):
    """A shard's results, which are being written."""

    def add(self, row: int, result: Any, /) -> None:
        """Write what was made of a photo."""
        ...

    def commit(self) -> None:
        """Give the files their names."""
        ...

    def abort(self, error: BaseException) -> None:
        """Leave nothing behind."""
        ...


class Worker(Protocol):
    """Who runs a job's shards."""

    @property
    def batch(self) -> int:
        """Photos that go through the model together."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a shard's index says of the whole shard."""
        ...

    @property
    def busy_s(self) -> float | None:
        """Seconds in which the devices had a batch; None where it is not known."""
        ...

    def group(self, photo: LoadedPhoto, /) -> Hashable:
        """Photos that may share a batch have the same."""
        ...

    def launch(self, photos: Sequence[LoadedPhoto], /) -> Any:
        """Hand a batch to the devices, and wait for nothing."""
        ...

    def wait(self, launched: Any, /) -> Any:
        """Wait for the devices."""
        ...

    def finish(
        self, photos: Sequence[LoadedPhoto], launched: Any
    ) -> Iterator[tuple[PhotoRecord, Any]]:
        """What the index says of each photo, and its result. Runs in a thread of its own."""
        ...

    def open(self, store: Store, shard: int) -> Output:
        """Begin to write a shard."""
        ...


class EncodingWorker:
    """The part of a `Worker` that an encoder of batches does."""

    def __init__(self, encoder: BatchEncoder):
        self.encoder = encoder

    @property
    def batch(self) -> int:
        """Photos of a call, on all devices."""
        return self.encoder.batch

    def group(self, photo: LoadedPhoto, /) -> Hashable:
        """Photos of one grid go together."""
        return self.encoder.crop(photo)

    def launch(self, photos: Sequence[LoadedPhoto], /) -> Launched:
        """Begin to encode."""
        return self.encoder.launch(photos)

    def wait(self, launched: Launched, /) -> Launched:
        """Wait for the features."""
        return self.encoder.wait(launched)


class Job(Protocol):
    """What is made of a data set."""

    @property
    def source(self) -> Source:
        """The photos."""
        ...

    def loader(self) -> LoadPhoto:
        """How a photo is read."""
        ...

    def store(self, path: str | Path) -> Store:
        """The job's store, which is made if there is none."""
        ...

    def worker(self, store: Store) -> Worker:
        """The model at work."""
        ...


def source_settings(source: Source, reader: PhotoReader) -> dict[str, Any]:
    """What a store says of its data set and of how the photos are read."""
    return {
        "rows": source.num_rows,
        "shards": source.num_shards,
        "shard_size": source.shard_size,
        "source": source.digest,
        "reader": dataclasses.asdict(reader),
    }
