"""Batches of photos through the image encoder, on all devices of this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sparsesam_jax.checkpoints.atomic import atomic_path
from sparsesam_jax.config import Grid
from sparsesam_jax.datasets.loading import LoadedPhoto
from sparsesam_jax.model.sam import ImageEmbedding
from sparsesam_jax.model.transforms import crop_shape
from sparsesam_jax.predict.predictor import SamPredictor

Encode = Callable[[np.ndarray, np.ndarray, tuple[int, int] | None], ImageEmbedding]


class Launched(NamedTuple):
    """A batch that the devices are working on.

    Attributes:
        photos: The batch.
        crop: What is encoded of the square.
        parts: Embeddings of the batch's parts, each ready or not.
        ready: When all are; their failure is its failure.
    """

    photos: Sequence[LoadedPhoto]
    crop: tuple[int, int]
    parts: list[ImageEmbedding]
    ready: Future[None]

    def arrays(self) -> ImageEmbedding:
        """The features of the photos on the host."""
        count = len(self.photos)
        return jax.tree.map(lambda *x: np.concatenate(jax.device_get(x))[:count], *self.parts)


class BatchEncoder:
    """Encodes batches of photos of one grid, and cuts batches in half that do not fit in memory.

    A batch is `batch` photos a device. What a photo's features are depends on the photo and on the
    size of its device's batch, not on how many devices there are.

    Args:
        predictor: Whose model, image size and padding these are.
        batch: Photos of a device.
        memory: A file that remembers the sizes that fit, for runs to come; None forgets them.
        dtype: Of the features that come back; None is the decoder's.
        devices: Where to; None is all that this process has.
        encode: What encodes padded images; None is the predictor's model.

    Attributes:
        busy_s: Seconds in which the devices had a batch.
    """

    def __init__(
        self,
        predictor: SamPredictor,
        batch: int,
        memory: Path | None = None,
        dtype: str | None = None,
        devices: Sequence[Any] | None = None,
        encode: Encode | None = None,
    ):
        self.devices = jax.local_devices() if devices is None else devices
        self.image_size, self.padding = predictor.image_size, predictor.padding
        self.patch = predictor.compiled.config.image_encoder.patch_size
        self.batch = batch * len(self.devices)
        self.busy_s = 0.0
        self._encode = encode or predictor.compiled.on_devices(self.devices).encode_padded
        self._memory, self._dtype = memory, dtype
        self._sizes: dict[str, int] = {}
        if memory is not None and memory.exists():
            self._sizes = json.loads(memory.read_text("utf-8"))
        self._watcher = ThreadPoolExecutor(1, "watcher")
        self._last_ready = 0.0

    def crop(self, photo: LoadedPhoto) -> tuple[int, int]:
        """Height and width of what is encoded of the photo's square; photos of one go together."""
        if self.padding == "square":
            return (self.image_size, self.image_size)
        height, width = photo.pixels.shape[:2]
        return crop_shape((height, width), self.image_size, self.patch)

    def frame(self, crop: tuple[int, int]) -> Grid | None:
        """The square's grid where less than it is encoded, as `Embedding` has it."""
        side = self.image_size // self.patch
        return None if crop == (self.image_size, self.image_size) else (side, side)

    def launch(self, photos: Sequence[LoadedPhoto]) -> Launched:
        """Begin to encode at most a batch of photos with one crop."""
        crop = self.crop(photos[0])
        while True:
            parts: list[ImageEmbedding] = []
            began = time.perf_counter()
            try:
                size = self._size(crop)
                for start in range(0, len(photos), size):
                    parts.append(self._launch(photos[start : start + size], size, crop))
            except jax.errors.JaxRuntimeError as error:
                self._halve(crop, error)
                continue
            return Launched(photos, crop, parts, self._watcher.submit(self._watch, began, parts))

    def wait(self, launched: Launched) -> Launched:
        """The batch once it is encoded, which may take other parts than were launched."""
        while True:
            try:
                launched.ready.result()
                return launched
            except jax.errors.JaxRuntimeError as error:
                self._halve(launched.crop, error)
                launched = self.launch(launched.photos)

    def _launch(
        self, photos: Sequence[LoadedPhoto], size: int, crop: tuple[int, int]
    ) -> ImageEmbedding:
        # Filled up, because another number would compile again.
        padded = np.zeros((size, self.image_size, self.image_size, 3), np.uint8)
        sizes = np.full((size, 2), crop, np.int32)
        for place, photo in enumerate(photos):
            height, width = photo.pixels.shape[:2]
            padded[place, :height, :width] = photo.pixels
            sizes[place] = height, width
        whole = crop == (self.image_size, self.image_size)
        embedding = self._encode(padded, sizes, None if whole else crop)
        if self._dtype is not None:
            embedding = jax.tree.map(lambda x: x.astype(self._dtype), embedding)
        for array in jax.tree.leaves(embedding):
            array.copy_to_host_async()
        return embedding

    def _watch(self, began: float, parts: list[ImageEmbedding]) -> None:
        jax.block_until_ready(parts)
        now = time.perf_counter()
        self.busy_s += now - max(began, self._last_ready)
        self._last_ready = now

    def _size(self, crop: tuple[int, int]) -> int:
        """Photos of a call: the batch, or what of it fits in memory."""
        return min(self._sizes.get(_key(crop), self.batch), self.batch)

    def _halve(self, crop: tuple[int, int], error: Exception) -> None:
        each = self._size(crop) // len(self.devices)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise error
        if each == 1:
            raise ValueError(
                f"batch must fit in the device's memory, but one photo of {crop[0]} x {crop[1]} "
                "does not"
            ) from error
        self._sizes[_key(crop)] = each // 2 * len(self.devices)
        if self._memory is not None:
            with atomic_path(self._memory, mark="shard") as temporary:
                temporary.write_text(json.dumps(self._sizes, sort_keys=True) + "\n", "utf-8")


def _key(crop: tuple[int, int]) -> str:
    return f"{crop[0]}x{crop[1]}"
