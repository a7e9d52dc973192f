"""What sparsity costs: mIoU of box prompts on photos with masks, paired with the dense encoder.

SAM's protocol: one mask a box (no multimask output), compared at the photo's own resolution.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from benchmarks import records
from benchmarks.records import Record, Write
from benchmarks.suites.quality import Options, SweepOptions
from benchmarks.suites.quality.variants import DENSE, Variant
from sparsesam_jax import Sam, SamPredictor
from sparsesam_jax.evaluation.datasets import Photo, folder_pairs, limited, read_photo
from sparsesam_jax.evaluation.metrics import bootstrap_interval, iou, relative_error
from sparsesam_jax.evaluation.predict import Predictions, predict
from sparsesam_jax.evaluation.protocols import Protocol


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
        self._pool, device = pool, jax.devices()[0]
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
        names = ("limit", "dtype", "implementation", "threads")
        self._common = {"suite": suite, "peer": "sparsesam_jax", "model": options.weights} | {
            "batch": self._size,
            **{name: getattr(options, name) for name in names},
            "device": records.cpu_name() if device.platform == "cpu" else device.device_kind,
            "versions": records.versions(),
            "commit": records.commit(),
        }

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

    def _iou(self, outcome: Sequence[Predictions], others: Iterable[np.ndarray]) -> np.ndarray:
        return np.array(list(self._pool.map(iou, _masks(outcome), others)))

    def _measure(self, variant: Variant, predictor: SamPredictor) -> tuple[Record, Record]:
        first_batch_s, count = self.first_batch(predictor), len(self._photos)
        start = time.perf_counter()
        outcome = list(self._pool.map(partial(self._predict, predictor), self._batches))
        seconds = time.perf_counter() - start
        ious = self._iou(outcome, [photo.mask for photo in self._photos])
        self._dense = self._dense or (outcome, ious)
        dense, change = self._dense[0], ious - self._dense[1]
        errors = [
            error
            for a, b in zip(outcome, dense, strict=True)
            for error in map(relative_error, a.features, b.features)
        ]
        rows = {
            "iou": ious,
            "agreement": self._iou(outcome, _masks(dense)),
            "feature_error": np.concatenate(errors),
        }
        photos = {"suite": self._common["suite"], "variant": variant.name, "kind": "per_photo"}
        photos["ids"] = [photo.name for photo in self._photos]
        photos |= {k: np.round(v.astype(np.float64), 5).tolist() for k, v in rows.items()}
        compared = variant != DENSE
        summary = self._common | {"variant": variant.name} | variant.definition
        summary |= {
            "kind": "summary",
            "density": variant.density,
            "images": count,
            "miou": float(ious.mean()),
            "difference": float(change.mean()) if compared else None,
            "difference_ci95": bootstrap_interval(change) if compared else None,
            "agreement": float(rows["agreement"].mean()),
            "feature_error": float(rows["feature_error"].mean()),
            "gmacs": variant.gmacs(self.sam.config.image_encoder),
        }
        if summary["suite"] == "quality":  # a sweep's programs say nothing about speed
            speeds = {"images_per_s": count / seconds, "ms_per_image": 1e3 * seconds / count}
            summary |= speeds | {"first_batch_s": first_batch_s}
        return photos, summary


def _masks(outcome: Sequence[Predictions]) -> list[np.ndarray]:
    """One a photo."""
    return [mask for batch in outcome for mask in batch.masks]


def quality(
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


def sweep(
    options: SweepOptions, variants: Sequence[Variant], out: Path, console: Console
) -> list[str]:
    """Measure dense and every variant that `out` does not hold yet; append to `out`.

    On a GPU a variant's own program takes tens of seconds to compile and few to run. So sparsities
    that rank alike share one (`simulated`), and programs compile several at a time while variants
    that are ready are measured one after another. It says nothing about speed.

    Returns:
        Names of the variants that are still missing, because of the time or of a failure.

    Raises:
        ValueError: `out` holds a sweep of other weights or another limit, or another variant of the
            same name; photos or weights are not as they must be.
    """
    done = _finished(out, options, variants)
    todo = [variant for variant in variants if variant.name not in done]
    if not todo and done:
        return []
    # Autotuning would measure kernels one after another on the GPU, and takes most of the time.
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {os.environ.get('XLA_FLAGS', '')}"
    deadline = time.monotonic() + options.seconds
    compilers = ThreadPoolExecutor(options.compilers)

    def add(record: Record) -> None:
        if record["variant"] not in done:  # dense masks are not kept, but made again
            write(record)

    with ThreadPoolExecutor(options.threads) as pool, records.writer(out, append=True) as write:
        try:
            bench = Bench("sweep", options, pool)
            ready = _ready(todo, bench, compilers, deadline, options.timeout, console)
            dense = (DENSE, SamPredictor(bench.sam, transforms="host"))
            bench.compare(itertools.chain([dense], ready), add, console)
        finally:
            compilers.shutdown(wait=False, cancel_futures=True)
    measured = {record["variant"] for record in bench.found}
    return [variant.name for variant in todo if variant.name not in measured]


def _finished(out: Path, options: SweepOptions, variants: Sequence[Variant]) -> set[str]:
    """Names of what an earlier sweep measured; a ValueError if its settings were others."""
    found = [r for r in records.read(out) if r["kind"] == "summary"] if out.exists() else []
    wanted = {variant.name: variant.definition for variant in variants}
    for record in found:
        name = record["variant"]
        for key, value in (("model", options.weights), ("limit", options.limit)):
            if record[key] != value:
                raise ValueError(f"{out} must hold {key}={value!r} throughout, got {record[key]!r}")
        definition = json.loads(json.dumps(wanted.get(name, {})))
        if any(record[key] != value for key, value in definition.items()):
            raise ValueError(f"{out} holds another variant of the name {name!r}")
    return {record["variant"] for record in found}


def _ready(
    variants: Sequence[Variant],
    bench: Bench,
    compilers: Executor,
    deadline: float,
    timeout: float,
    console: Console,
) -> Iterator[tuple[Variant, SamPredictor]]:
    """Variants as their programs are compiled, until the time is over."""
    programs: dict[nnx.GraphDef, Future[float]] = {}
    waiting: dict[Future[float], list[tuple[Variant, SamPredictor]]] = {}
    for variant in variants:
        model = variant.masked(bench.sam)
        predictor, program = SamPredictor(model, transforms="host"), nnx.graphdef(model)
        if program not in programs:
            programs[program] = compilers.submit(bench.first_batch, predictor)
        waiting.setdefault(programs[program], []).append((variant, predictor))
    while waiting and (left := deadline - time.monotonic()) > 0:
        done, _ = wait(waiting, min(timeout, left), FIRST_COMPLETED)
        if not done:
            return
        for future in done:
            for variant, predictor in waiting.pop(future):
                if (error := future.exception()) is not None:
                    console.print(f"{variant.name}: not measured: {error}", markup=False)
                elif time.monotonic() < deadline:
                    yield variant, predictor
