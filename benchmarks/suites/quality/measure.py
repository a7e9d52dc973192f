"""What sparsity costs: mIoU of box prompts on photos with masks, paired with the dense encoder.

SAM's protocol: one mask a box (no multimask output), compared at the photo's own resolution.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

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
        for name in ("batch", "threads", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")


class Outcome(NamedTuple):
    """Results of one variant on all photos, batch after batch."""

    batches: list[Predictions]
    seconds: float
    first_batch_s: float

    @property
    def masks(self) -> list[np.ndarray]:
        """One a photo."""
        return [mask for batch in self.batches for mask in batch.masks]


def run(options: Options, variants: Sequence[Variant], write: Write, console: Console) -> bool:
    """Measure dense, then every variant; write records as each is done, print the table.

    Returns:
        Whether all was measured; False after Ctrl-C, which keeps the variants done until then.

    Raises:
        ValueError: Photos or weights are not as they must be, or a variant does not fit the model.
    """
    summaries: list[Record] = []
    complete = True
    with ThreadPoolExecutor(options.threads) as pool:
        try:
            _measure_all(options, variants, write, console, pool, summaries)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            complete = False
    if summaries:
        console.print(_table(options, summaries))
    if not complete:
        console.print(f"Interrupted after {len(summaries)} of {len(variants) + 1} variants.")
    return complete


def _measure_all(
    options: Options,
    variants: Sequence[Variant],
    write: Write,
    console: Console,
    pool: Executor,
    summaries: list[Record],
) -> None:
    sam = load(options)
    models = [(variant, variant.model(sam)) for variant in (DENSE, *variants)]
    photos = read_photos(options, pool)
    common = describe(options, photos)
    write(common | {"kind": "photos", "ids": [photo.name for photo in photos]})
    dense: Outcome | None = None
    dense_iou = np.empty(0)
    for variant, model in models:
        outcome = predict_all(model, photos, options.batch, pool)
        dense = dense or outcome
        rows = {
            "iou": map_iou(pool, outcome.masks, [photo.mask for photo in photos]),
            "agreement": map_iou(pool, outcome.masks, dense.masks),
            "feature_error": feature_errors(outcome, dense),
        }
        dense_iou = rows["iou"] if variant is DENSE else dense_iou
        name = {"variant": variant.name}
        write({"suite": "quality", "kind": "per_photo"} | name | rounded(rows))
        summary = common | {"kind": "summary"} | name | summarise(variant, outcome, rows, dense_iou)
        summary["gmacs"] = variant.gmacs(sam.config.image_encoder)
        write(summary)
        summaries.append(summary)
        console.print(
            f"[dim]{variant.name}: mIoU {summary['miou']:.4f}, "
            f"{summary['images_per_s']:.1f} images/s"
        )


def load(options: Options) -> Sam:
    """The dense model."""
    return Sam.from_pretrained(
        options.weights, dtype=options.dtype, implementation=options.implementation
    )


def read_photos(options: Options, pool: Executor) -> list[Photo]:
    """All photos; unlike `sparsesam evaluate` this stops at the first that is broken."""
    pairs = limited(folder_pairs(options.images, options.masks), options.limit)
    return list(pool.map(read_photo, pairs))


def describe(options: Options, photos: Sequence[Photo]) -> Record:
    """What every record of a run has in common."""
    return {
        "suite": "quality",
        "peer": "sparsesam_jax",
        "model": options.weights,
        "batch": min(options.batch, len(photos)),
        "dtype": options.dtype,
        "implementation": options.implementation,
        "device": _device(),
        "threads": options.threads,
        "versions": records.versions(),
        "commit": records.commit(),
    }


def rounded(rows: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Values as a record keeps them."""
    return {key: np.round(values.astype(np.float64), 5).tolist() for key, values in rows.items()}


def predict_all(sam: Sam, photos: Sequence[Photo], batch: int, pool: Executor) -> Outcome:
    """Masks and features of all photos; the first batch runs once before, to compile."""
    protocol = Protocol("sam", sam.config.image_encoder.image_size)
    batches = [photos[i : i + batch] for i in range(0, len(photos), batch)]
    size = len(batches[0])
    predictor = SamPredictor(sam)

    def run(photos: Sequence[Photo]) -> Predictions:
        queries = [protocol.query(photo, "box") for photo in photos]
        return predict(predictor, photos, queries, protocol=protocol, batch=size)

    start = time.perf_counter()
    run(batches[0])
    first_batch_s = time.perf_counter() - start
    start = time.perf_counter()
    results = list(pool.map(run, batches))
    return Outcome(results, time.perf_counter() - start, first_batch_s)


def map_iou(
    pool: Executor, masks: Sequence[np.ndarray], others: Sequence[np.ndarray]
) -> Float[np.ndarray, " images"]:
    """IoU of each pair."""
    return np.array(list(pool.map(iou, masks, others)))


def feature_errors(outcome: Outcome, dense: Outcome) -> Float[np.ndarray, " images"]:
    """Relative error of each photo's features."""
    pairs = zip(outcome.batches, dense.batches, strict=True)
    return np.concatenate([np.asarray(relative_error(a.features, b.features)) for a, b in pairs])


def summarise(
    variant: Variant, outcome: Outcome, rows: dict[str, np.ndarray], dense_iou: np.ndarray
) -> dict[str, Any]:
    """A variant's record beside what `describe` says."""
    count = len(dense_iou)
    return scores(variant, rows, dense_iou) | {
        "images_per_s": count / outcome.seconds,
        "ms_per_image": 1e3 * outcome.seconds / count,
        "first_batch_s": outcome.first_batch_s,
    }


def scores(variant: Variant, rows: dict[str, np.ndarray], dense_iou: np.ndarray) -> dict[str, Any]:
    """A variant's definition and its quality."""
    differences = rows["iou"] - dense_iou
    dense = variant == DENSE
    return variant.definition | {
        "density": variant.density,
        "images": len(differences),
        "miou": float(rows["iou"].mean()),
        "difference": None if dense else float(differences.mean()),
        "difference_ci95": None if dense else bootstrap_interval(differences),
        "agreement": float(rows["agreement"].mean()),
        "feature_error": float(rows["feature_error"].mean()),
    }


def _device() -> str:
    device = jax.devices()[0]
    return records.cpu_name() if device.platform == "cpu" else device.device_kind


def _table(options: Options, summaries: Sequence[Record]) -> Table:
    first = summaries[0]
    table = Table(
        title=f"{options.weights}, {first['images']} photos, box prompts, {options.dtype}, "
        f"{options.implementation}; {first['device']}",
        caption="Difference of mIoU to dense, paired, with its bootstrap 95 % interval. Agree: "
        "IoU with the dense masks. Features: relative difference to the dense ones.",
        box=box.SIMPLE,
        padding=0,
    )
    table.add_column("variant", no_wrap=True)
    for column in ("mIoU", "difference", "95 %", "agree", "features", "img/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in summaries:
        dense = s["difference"] is None
        table.add_row(
            s["variant"],
            f"{s['miou']:.4f}",
            "-" if dense else f"{s['difference']:+.4f}",
            "-" if dense else "{:+.4f} {:+.4f}".format(*s["difference_ci95"]),
            f"{s['agreement']:.4f}",
            f"{s['feature_error']:.3f}",
            f"{s['images_per_s']:.1f}",
        )
    return table
