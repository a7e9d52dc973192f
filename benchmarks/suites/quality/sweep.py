"""Many variants of the encoder's sparsity in one run: quality of box prompts at counted work.

On a GPU a variant's own program takes tens of seconds to compile and few to run. So sparsities that
rank alike share one (`simulated`), programs compile several at a time while variants that are ready
are measured one after another, and photos and prompts stay on the device. What is measured is at
once a record of the output file: a sweep that is cut continues from it and measures what is
missing. It says nothing about speed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from rich.console import Console

from benchmarks import records
from benchmarks.records import Record
from benchmarks.suites.quality import measure, simulated
from benchmarks.suites.quality.variants import DENSE, Variant
from sparsesam_jax import Sam
from sparsesam_jax.evaluation.datasets import Photo
from sparsesam_jax.evaluation.metrics import relative_error
from sparsesam_jax.evaluation.prompts import mask_box
from sparsesam_jax.model.image_encoder import ImageEncoder
from sparsesam_jax.model.sam import ImageEmbedding
from sparsesam_jax.model.transforms import (
    MASK_THRESHOLD,
    normalise,
    resize_and_pad,
    resize_mask_logits,
    resized_shape,
)

# Autotuning would measure kernels one after another on the GPU, and takes most of the time.
_XLA_FLAGS = "--xla_gpu_autotune_level=0"
_BOX_LABELS = (2, 3)  # the corners of a box

Encode = Callable[["Batch"], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure on, and how much at a time.

    Attributes:
        images: Folder of photos.
        masks: Folder of their masks.
        weights: Name or path of the weights.
        batch: Photos an encoder call.
        limit: Only the first so many photos.
        threads: Programs that compile at a time.
        seconds: After that many no further variant is measured.
        timeout: The sweep ends when no variant gets ready for so long.
    """

    images: Path
    masks: Path
    weights: str = "vit_t"
    batch: int = 20
    limit: int | None = None
    threads: int = 12
    seconds: float = 270.0
    timeout: float = 240.0

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "seconds", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def quality(self) -> measure.Options:
        """The same for `quality`."""
        return measure.Options(
            images=self.images,
            masks=self.masks,
            weights=self.weights,
            batch=self.batch,
            limit=self.limit,
            implementation="xla",
            threads=min(8, records.available_cpus()),
        )

    @property
    def key(self) -> dict[str, Any]:
        """What two sweeps must share to be one."""
        return {"model": self.weights, "limit": self.limit}


class Batch(NamedTuple):
    """Photos as the model takes them; a short last batch is filled up with its first photos."""

    photos: list[Photo]
    pixels: Array  # padded, uint8
    sizes: Array
    points: Array
    labels: Array


def run(options: Options, variants: Sequence[Variant], out: Path, console: Console) -> list[str]:
    """Measure dense and every variant that `out` does not hold yet; append to `out`.

    Returns:
        Names of the variants that are still missing, because of the time or of a failure.

    Raises:
        ValueError: `out` holds a sweep of other weights or another limit, or another variant of the
            same name; photos or weights are not as they must be.
    """
    done = finished(out, options, variants)
    todo = [variant for variant in variants if variant.name not in done]
    if not todo and done:
        return []
    os.environ["XLA_FLAGS"] = f"{_XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    missing = [variant.name for variant in todo]
    start = time.monotonic()
    compilers = ThreadPoolExecutor(options.threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.quality.threads) as pool, open(out, "a", encoding="utf-8") as f:
        try:
            sweep = _Sweep(options, pool)
            futures = sweep.start(todo, compilers)
            for record in sweep.dense():  # its masks are not kept, so it is measured anyway
                if DENSE.name not in done:
                    f.write(json.dumps(record | options.key) + "\n")
            f.flush()
            for variant, future in _as_ready(futures, start + options.seconds, options.timeout):
                elapsed = f"{time.monotonic() - start:4.0f} s"
                error = future.exception()
                if error is not None:
                    console.print(f"{elapsed}  {variant.name}: not measured: {error}", markup=False)
                    continue
                found = sweep.measure(variant, future.result()(variant))
                f.writelines(json.dumps(record | options.key) + "\n" for record in found)
                f.flush()
                missing.remove(variant.name)
                console.print(f"[dim]{elapsed}  {variant.name}: mIoU {found[-1]['miou']:.4f}")
        except KeyboardInterrupt:
            console.print("Interrupted.")
        finally:
            compilers.shutdown(wait=False, cancel_futures=True)
    return missing


def finished(out: Path, options: Options, variants: Sequence[Variant]) -> dict[str, Record]:
    """Summaries that an earlier sweep left, by the variant's name.

    Raises:
        ValueError: They are of other settings than these.
    """
    done = {record["variant"]: record for record in _summaries(out)}
    wanted = {variant.name: variant for variant in variants}
    for name, record in done.items():
        for key, value in options.key.items():
            if record[key] != value:
                raise ValueError(f"{out} must hold {key}={value!r} throughout, got {record[key]!r}")
        definition = json.loads(json.dumps(wanted[name].definition)) if name in wanted else None
        if definition is not None and any(record[k] != v for k, v in definition.items()):
            raise ValueError(f"{out} holds another variant of the name {name!r}")
    return done


class _Sweep:
    """The photos, the dense model and what it says of them."""

    def __init__(self, options: Options, pool: Executor):
        self._options = options.quality
        self._pool = pool
        self._sam = measure.load(self._options)
        if self._sam.config.hq:
            raise ValueError("a sweep needs weights of SAM, got SAM-HQ's")
        self._photos = measure.read_photos(self._options, pool)
        size = min(self._options.batch, len(self._photos))
        groups = [self._photos[i : i + size] for i in range(0, len(self._photos), size)]
        self._batches = [self._batch(photos, size) for photos in groups]
        self._decode = nnx.jit(_decode)
        self._encode = nnx.jit(_encode)
        self._simulate = nnx.jit(_simulate, static_argnums=1)
        self._dense: _Outcome | None = None

    def start(
        self, variants: Sequence[Variant], compilers: Executor
    ) -> list[tuple[Variant, Future[Callable[[Variant], Encode]]]]:
        """Compile what the variants need; a future gives the encoder of its variant."""
        programs: dict[simulated.Program, Future[Callable[[Variant], Encode]]] = {}
        futures = []
        for variant in variants:
            program = variant.program
            if program is None:
                future = compilers.submit(self._ready, self._method, variant)
            elif program in programs:
                future = programs[program]
            else:
                future = compilers.submit(self._ready, self._masked, variant)
                programs[program] = future
            futures.append((variant, future))
        return futures

    def dense(self) -> list[Record]:
        """Measure the dense encoder, which all others are compared with."""
        encoder = self._sam.image_encoder
        self._dense = self._outcome(lambda batch: self._encode(encoder, batch.pixels, batch.sizes))
        return self._records(DENSE, self._dense)

    def measure(self, variant: Variant, encode: Encode) -> list[Record]:
        """A `per_photo` and a `summary` record of a variant."""
        return self._records(variant, self._outcome(encode))

    def _ready(
        self, make: Callable[[Variant], Encode], variant: Variant
    ) -> Callable[[Variant], Encode]:
        """`make` once its program for this variant is compiled."""
        jax.block_until_ready(make(variant)(self._batches[0]))
        return make

    def _method(self, variant: Variant) -> Encode:
        encoder = variant.model(self._sam).image_encoder
        return lambda batch: self._encode(encoder, batch.pixels, batch.sizes)

    def _masked(self, variant: Variant) -> Encode:
        encoder, program = self._sam.image_encoder, variant.program
        assert program is not None
        knobs = variant.knobs(self._sam.config.image_encoder)
        return lambda batch: self._simulate(encoder, program, batch.pixels, batch.sizes, knobs)

    def _batch(self, photos: list[Photo], size: int) -> Batch:
        model_size = self._sam.config.image_encoder.image_size
        padded = list(self._pool.map(lambda p: resize_and_pad(p.image, model_size), photos))
        corners = []
        for photo, (_, resized) in zip(photos, padded, strict=True):
            scale = np.divide(resized[::-1], photo.size[::-1])
            corners.append(mask_box(photo.mask).reshape(1, 2, 2) * scale)
        filled = [index % len(photos) for index in range(size)]
        pixels = np.stack([padded[index][0] for index in filled])
        sizes = np.array([padded[index][1] for index in filled], np.int32)
        points = np.stack([corners[index] for index in filled]).astype(np.float32)
        labels = np.broadcast_to(np.array(_BOX_LABELS, np.int32), points.shape[:3])
        return Batch(photos, *(jnp.asarray(x) for x in (pixels, sizes, points, labels)))

    def _outcome(self, encode: Encode) -> _Outcome:
        """Masks and features of all photos."""
        features = [encode(batch) for batch in self._batches]
        logits = [
            self._decode(self._sam, x, batch.points, batch.labels)
            for x, batch in zip(features, self._batches, strict=True)
        ]
        masks = []
        for batch, values in zip(self._batches, logits, strict=True):
            masks += list(self._pool.map(self._mask, batch.photos, np.asarray(values)))
        return _Outcome(masks, features)

    def _mask(self, photo: Photo, logits: np.ndarray) -> np.ndarray:
        side = self._sam.config.image_encoder.image_size
        resized = resized_shape(*photo.size, side)
        return resize_mask_logits(logits, (side, side), resized, photo.size) > MASK_THRESHOLD

    def _records(self, variant: Variant, outcome: _Outcome) -> list[Record]:
        assert self._dense is not None
        dense, pool = self._dense, self._pool
        truth = [photo.mask for photo in self._photos]
        errors = [
            np.asarray(relative_error(x, y))[: len(batch.photos)]
            for x, y, batch in zip(outcome.features, dense.features, self._batches, strict=True)
        ]
        rows = {
            "iou": measure.map_iou(pool, outcome.masks, truth),
            "agreement": measure.map_iou(pool, outcome.masks, dense.masks),
            "feature_error": np.concatenate(errors),
        }
        common = {"suite": "sweep", "variant": variant.name}
        ids = [photo.name for photo in self._photos]
        summary = measure.describe(self._options, self._photos) | common | {"kind": "summary"}
        dense_iou = measure.map_iou(pool, dense.masks, truth)
        summary |= measure.scores(variant, rows, dense_iou)
        summary["gmacs"] = variant.gmacs(self._sam.config.image_encoder)
        return [common | {"kind": "per_photo", "ids": ids} | measure.rounded(rows), summary]


class _Outcome(NamedTuple):
    """What a variant gives: one mask a photo, and features a batch."""

    masks: list[np.ndarray]
    features: list[Array]


def _as_ready(
    futures: Sequence[tuple[Variant, Future[Any]]], deadline: float, timeout: float
) -> Iterator[tuple[Variant, Future[Any]]]:
    """Variants as they get ready, the first of those that are; until the time is over."""
    pending = list(futures)
    while pending and time.monotonic() < deadline:
        left = min(timeout, deadline - time.monotonic())
        done, _ = wait({future for _, future in pending}, left, FIRST_COMPLETED)
        if not done:
            return
        index = next(i for i, (_, future) in enumerate(pending) if future in done)
        yield pending.pop(index)


def _encode(encoder: ImageEncoder, pixels: Array, sizes: Array) -> Array:
    return encoder(normalise(pixels, sizes))


def _simulate(
    encoder: ImageEncoder,
    program: simulated.Program,
    pixels: Array,
    sizes: Array,
    knobs: simulated.Knobs,
) -> Array:
    return simulated.encode(encoder, program, normalise(pixels, sizes), knobs)


def _decode(sam: Sam, features: Array, points: Array, labels: Array) -> Array:
    """Mask logits of one box an image, [B, h, w]."""
    embedding = ImageEmbedding(features, None)
    return sam.decode(embedding, points, labels, multimask_output=False)[0][:, 0, 0]


def _summaries(out: Path) -> Iterator[Record]:
    for record in records.read(out) if out.exists() else ():
        if record["kind"] == "summary":
            yield record
