"""What sparsity costs: mIoU of box prompts on photos with masks, paired with the dense encoder.

SAM's protocol: one mask a box (no multimask output), compared at the photo's own resolution.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.metrics import bootstrap_interval, iou
from benchmarks.photos import Photo, read_photos
from benchmarks.records import Record, Write
from benchmarks.variants import DENSE, Variant
from pallas_kernels.implementation import Implementation
from sparsesam_jax import Sam, SamPredictor
from sparsesam_jax.weights import DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure on.

    Attributes:
        images: Folder of photos.
        masks: Folder of their masks.
        manifest: CSV with their ids and boxes.
        weights: Name or path of the weights.
        batch: Photos an encoder call.
        dtype: Compute and parameter dtype.
        implementation: As for `Sam`.
        limit: Only the first so many photos.
        threads: Batches in flight: one resizes on the host while another is on the device.
    """

    images: Path
    masks: Path
    manifest: Path
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


class _Batch(NamedTuple):
    """Results of the photos of one batch, without its filling."""

    masks: list[np.ndarray]
    features: Array


class _Outcome(NamedTuple):
    """Results of one variant on all photos."""

    batches: list[_Batch]
    seconds: float
    first_batch_s: float

    @property
    def masks(self) -> list[np.ndarray]:
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
    sam = Sam.from_pretrained(
        options.weights, dtype=options.dtype, implementation=options.implementation
    )
    models = [(variant, sam.with_sparsity(variant.sparsity)) for variant in (DENSE, *variants)]
    photos = read_photos(
        options.images, options.masks, options.manifest, limit=options.limit, pool=pool
    )
    common = {
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
    write(common | {"kind": "photos", "ids": [photo.name for photo in photos]})
    dense: _Outcome | None = None
    dense_iou = np.empty(0)
    for variant, model in models:
        outcome = _predict(model, photos, options.batch, pool)
        dense = dense or outcome
        scores = _map_iou(pool, outcome.masks, [photo.mask for photo in photos])
        dense_iou = scores if variant is DENSE else dense_iou
        rows = {
            "iou": scores,
            "agreement": _map_iou(pool, outcome.masks, dense.masks),
            "feature_error": _feature_errors(outcome.batches, dense.batches),
        }
        name = {"variant": variant.name}
        write(
            {"suite": "quality", "kind": "per_photo"}
            | name
            | {key: np.round(values.astype(np.float64), 5).tolist() for key, values in rows.items()}
        )
        summary = common | {"kind": "summary"} | name | _summary(variant, outcome, rows, dense_iou)
        write(summary)
        summaries.append(summary)
        console.print(
            f"[dim]{variant.name}: mIoU {summary['miou']:.4f}, "
            f"{summary['images_per_s']:.1f} images/s"
        )


def _predict(sam: Sam, photos: Sequence[Photo], batch: int, pool: Executor) -> _Outcome:
    """Masks and features of all photos; the first batch runs once before, to compile."""
    batches = [photos[i : i + batch] for i in range(0, len(photos), batch)]
    size = len(batches[0])
    start = time.perf_counter()
    _predict_batch(sam, batches[0], size)
    first_batch_s = time.perf_counter() - start
    start = time.perf_counter()
    results = list(pool.map(lambda photos: _predict_batch(sam, photos, size), batches))
    return _Outcome(results, time.perf_counter() - start, first_batch_s)


def _predict_batch(sam: Sam, photos: Sequence[Photo], size: int) -> _Batch:
    # A short last batch is filled up, because another size would compile again.
    filled = list(itertools.islice(itertools.cycle(photos), size))
    predictor = SamPredictor(sam)
    predictor.set_image_batch([photo.image for photo in filled])
    masks, _, _ = predictor.predict_batch(
        box_batch=[photo.box for photo in filled], multimask_output=False
    )
    features = predictor.get_image_embedding()
    return _Batch([mask[0] for mask in masks[: len(photos)]], features[: len(photos)])


def _map_iou(
    pool: Executor, masks: Sequence[np.ndarray], others: Sequence[np.ndarray]
) -> Float[np.ndarray, " images"]:
    return np.array(list(pool.map(iou, masks, others)))


def _feature_errors(
    batches: Sequence[_Batch], dense: Sequence[_Batch]
) -> Float[np.ndarray, " images"]:
    pairs = zip(batches, dense, strict=True)
    return np.concatenate([np.asarray(_relative_error(a.features, b.features)) for a, b in pairs])


@jax.jit
def _relative_error(
    features: Float[Array, "B H W C"], dense: Float[Array, "B H W C"]
) -> Float[Array, " B"]:
    """`||F - F_dense|| / ||F_dense||` of each image, float32."""
    features, dense = features.astype(jnp.float32), dense.astype(jnp.float32)
    axes = (1, 2, 3)
    difference = jnp.sqrt(((features - dense) ** 2).sum(axes))
    return difference / jnp.sqrt((dense**2).sum(axes))


def _summary(
    variant: Variant, outcome: _Outcome, rows: dict[str, np.ndarray], dense_iou: np.ndarray
) -> dict[str, Any]:
    sparsity = variant.sparsity
    differences = rows["iou"] - dense_iou
    count = len(differences)
    return {
        "density": 1.0 if sparsity is None else sparsity.density,
        "sparsity": None if sparsity is None else dataclasses.asdict(sparsity),
        "images": count,
        "miou": float(rows["iou"].mean()),
        "difference": None if sparsity is None else float(differences.mean()),
        "difference_ci95": None if sparsity is None else bootstrap_interval(differences),
        "agreement": float(rows["agreement"].mean()),
        "feature_error": float(rows["feature_error"].mean()),
        "images_per_s": count / outcome.seconds,
        "ms_per_image": 1e3 * outcome.seconds / count,
        "first_batch_s": outcome.first_batch_s,
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
