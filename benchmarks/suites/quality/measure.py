"""What sparsity costs: mIoU of box prompts on photos with masks, paired with the dense encoder.

SAM's protocol: one mask a box (no multimask output), compared at the photo's own resolution.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from benchmarks import records
from benchmarks.records import Record, Write
from benchmarks.suites.quality.variants import DENSE, Variant
from pallas_kernels.implementation import Implementation
from sparsesam_jax import Sam, SamPredictor
from sparsesam_jax.checkpoints.native import DTYPES
from sparsesam_jax.evaluation.datasets import Photo, folder_pairs, limited, read_photo
from sparsesam_jax.evaluation.metrics import bootstrap_interval, iou, relative_error
from sparsesam_jax.evaluation.predict import Predictions, predict
from sparsesam_jax.evaluation.protocols import Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure on.

    Attributes:
        images: Folder of photos.
        masks: Folder of their masks, equal stems; the boxes are the masks' own.
        weights: Name or path of the weights.
        batch: Photos an encoder call.
        dtype: Compute and parameter dtype.
        implementation: As for `Sam`.
        limit: Only the first so many photos.
        threads: Batches in flight: one resizes on the host while another is on the device.
    """

    images: Path
    masks: Path
    weights: str = "vit_t"
    batch: int = 8
    dtype: str = "float32"
    implementation: Implementation = "auto"
    limit: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")


class Bench:
    """The photos, the dense model, and what was found on them.

    Args:
        suite: What the records name.
        options: What to measure on.
        pool: Threads that read, resize and compare.

    Attributes:
        sam: The dense model.
        found: The records.

    Raises:
        ValueError: Photos or weights are not as they must be; unlike `sparsesam evaluate` this
            stops at the first photo that is broken.
    """

    def __init__(self, suite: str, options: Options, pool: Executor):
        self._suite, self._options, self._pool = suite, options, pool
        self.sam = Sam.from_pretrained(
            options.weights, dtype=options.dtype, implementation=options.implementation
        )
        self.found: list[Record] = []
        pairs = limited(folder_pairs(options.images, options.masks), options.limit)
        self._photos = list(pool.map(read_photo, pairs))
        self._size = min(options.batch, len(self._photos))
        starts = range(0, len(self._photos), self._size)
        self._batches = [self._photos[start : start + self._size] for start in starts]
        self._dense: tuple[list[Predictions], np.ndarray] | None = None

    def compare(
        self, ready: Iterable[tuple[Variant, SamPredictor]], write: Write, console: Console
    ) -> None:
        """Compare variants with the first of them, the dense one; Ctrl-C keeps what is done.

        Args:
            ready: Variants as they get ready.
            write: Takes a `per_photo` and a `summary` record of each.
            console: Gets a line of each.
        """
        start = time.monotonic()
        try:
            for variant, predictor in ready:
                for record in self._measure(variant, predictor):
                    write(record)
                    self.found.append(record)
                told = f"{variant.name}: mIoU {self.found[-1]['miou']:.4f}"
                console.print(f"{time.monotonic() - start:4.0f} s  {told}", style="dim")
        except KeyboardInterrupt:
            console.print(f"Interrupted after {len(self.found) // 2} variants.")

    def first_batch(self, predictor: SamPredictor) -> float:
        """Seconds of the first batch, compilation included."""
        return self._predict(predictor, self._batches[0]).seconds

    def _predict(self, predictor: SamPredictor, photos: Sequence[Photo]) -> Predictions:
        protocol = Protocol("sam", predictor.image_size)
        queries = [protocol.query(photo, "box") for photo in photos]
        return predict(predictor, photos, queries, protocol=protocol, batch=self._size)

    def _iou(self, masks: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(list(self._pool.map(iou, masks, others)))

    def _measure(self, variant: Variant, predictor: SamPredictor) -> list[Record]:
        first_batch_s, count = self.first_batch(predictor), len(self._photos)
        start = time.perf_counter()
        outcome = list(self._pool.map(partial(self._predict, predictor), self._batches))
        seconds = time.perf_counter() - start
        ious = self._iou(_masks(outcome), [photo.mask for photo in self._photos])
        self._dense = self._dense or (outcome, ious)
        dense, dense_ious = self._dense
        errors = [
            error
            for a, b in zip(outcome, dense, strict=True)
            for error in map(relative_error, a.features, b.features)
        ]
        rows = {
            "iou": ious,
            "agreement": self._iou(_masks(outcome), _masks(dense)),
            "feature_error": np.concatenate(errors),
        }
        common = {"suite": self._suite, "variant": variant.name}
        photos = common | {"kind": "per_photo", "ids": [photo.name for photo in self._photos]}
        photos |= {k: np.round(v.astype(np.float64), 5).tolist() for k, v in rows.items()}
        compared = variant != DENSE
        summary = self._described() | common | variant.definition
        summary |= {
            "kind": "summary",
            "density": variant.density,
            "images": count,
            "miou": float(ious.mean()),
            "difference": float((ious - dense_ious).mean()) if compared else None,
            "difference_ci95": bootstrap_interval(ious - dense_ious) if compared else None,
            "agreement": float(rows["agreement"].mean()),
            "feature_error": float(rows["feature_error"].mean()),
            "gmacs": variant.gmacs(self.sam.config.image_encoder),
        }
        if self._suite == "quality":  # a sweep's programs say nothing about speed
            summary |= {
                "images_per_s": count / seconds,
                "ms_per_image": 1e3 * seconds / count,
                "first_batch_s": first_batch_s,
            }
        return [photos, summary]

    def _described(self) -> Record:
        """What every summary of a run has in common."""
        options, device = self._options, jax.devices()[0]
        return {
            "peer": "sparsesam_jax",
            "model": options.weights,
            "limit": options.limit,
            "batch": self._size,
            "dtype": options.dtype,
            "implementation": options.implementation,
            "device": records.cpu_name() if device.platform == "cpu" else device.device_kind,
            "threads": options.threads,
            "versions": records.versions(),
            "commit": records.commit(),
        }


def _masks(outcome: Sequence[Predictions]) -> list[np.ndarray]:
    """One a photo."""
    return [mask for batch in outcome for mask in batch.masks]


def run(
    options: Options, variants: Sequence[Variant], write: Write, console: Console
) -> list[Record]:
    """Measure dense, then every variant, each by its own program; the records, as written.

    Raises:
        ValueError: Photos or weights are not as they must be, or a variant does not fit the model.
    """
    with ThreadPoolExecutor(options.threads) as pool:
        bench = Bench("quality", options, pool)
        models = [(variant, variant.model(bench.sam)) for variant in (DENSE, *variants)]
        bench.compare(((v, SamPredictor(model)) for v, model in models), write, console)
    return bench.found
