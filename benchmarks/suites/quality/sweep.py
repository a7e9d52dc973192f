"""Many variants of the encoder's sparsity in one run: quality of box prompts at counted work.

On a GPU a variant's own program takes tens of seconds to compile and few to run. So sparsities that
rank alike share one (`simulated`), programs compile several at a time while variants that are ready
are measured one after another. What is measured is at once a record of the output file: a sweep
that is cut continues from it and measures what is missing. It says nothing about speed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from flax import nnx
from rich.console import Console

from benchmarks import records
from benchmarks.records import Record
from benchmarks.suites.quality import measure
from benchmarks.suites.quality.variants import DENSE, Variant
from pallas_kernels.implementation import Implementation
from sparsesam_jax import SamPredictor

# Autotuning would measure kernels one after another on the GPU, and takes most of the time.
_XLA_FLAGS = "--xla_gpu_autotune_level=0"

Pending = list[tuple[Variant, SamPredictor, Future[float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measure.Options):
    """What to measure on, and how much at a time.

    Attributes:
        compilers: Programs that compile at a time.
        seconds: After that many no further variant is measured.
        timeout: The sweep ends when no variant gets ready for so long, in seconds.
    """

    batch: int = 20
    implementation: Implementation = "xla"
    threads: int = dataclasses.field(default_factory=lambda: min(8, records.available_cpus()))
    compilers: int = 12
    seconds: float = 270.0
    timeout: float = 240.0


def run(options: Options, variants: Sequence[Variant], out: Path, console: Console) -> list[str]:
    """Measure dense and every variant that `out` does not hold yet; append to `out`.

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
    os.environ["XLA_FLAGS"] = f"{_XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    deadline = time.monotonic() + options.seconds
    compilers = ThreadPoolExecutor(options.compilers)
    with ThreadPoolExecutor(options.threads) as pool, records.writer(out, append=True) as write:

        def add(record: Record) -> None:
            if record["variant"] not in done:  # dense masks are not kept, but made again
                write(record)

        try:
            bench = measure.Bench("sweep", options, pool)
            pending = _compiled(todo, bench, compilers)
            ready = _as_ready(pending, deadline, options.timeout, console)
            dense = (DENSE, SamPredictor(bench.sam, transforms="host"))
            bench.compare(itertools.chain([dense], ready), add, console)
        finally:
            compilers.shutdown(wait=False, cancel_futures=True)
    measured = {record["variant"] for record in bench.found}
    return [variant.name for variant in todo if variant.name not in measured]


def _finished(out: Path, options: Options, variants: Sequence[Variant]) -> set[str]:
    """Names of what an earlier sweep measured; a ValueError if its settings were others."""
    found = [r for r in records.read(out) if r["kind"] == "summary"] if out.exists() else []
    wanted = {variant.name: variant for variant in variants}
    for record in found:
        name = record["variant"]
        for key, value in (("model", options.weights), ("limit", options.limit)):
            if record[key] != value:
                raise ValueError(f"{out} must hold {key}={value!r} throughout, got {record[key]!r}")
        definition = json.loads(json.dumps(wanted[name].definition)) if name in wanted else {}
        if any(record[key] != value for key, value in definition.items()):
            raise ValueError(f"{out} holds another variant of the name {name!r}")
    return {record["variant"] for record in found}


def _compiled(
    variants: Sequence[Variant], bench: measure.Bench, compilers: ThreadPoolExecutor
) -> Pending:
    """Compile what the variants need; a future is done when the program of its variant is."""
    programs: dict[nnx.GraphDef, Future[float]] = {}
    pending = []
    for variant in variants:
        model = variant.masked(bench.sam)
        predictor = SamPredictor(model, transforms="host")
        program = nnx.graphdef(model)
        if program not in programs:
            programs[program] = compilers.submit(bench.first_batch, predictor)
        pending.append((variant, predictor, programs[program]))
    return pending


def _as_ready(
    pending: Pending, deadline: float, timeout: float, console: Console
) -> Iterator[tuple[Variant, SamPredictor]]:
    """Variants as they get ready, the first of those that are; until the time is over."""
    while pending and time.monotonic() < deadline:
        left = min(timeout, deadline - time.monotonic())
        done, _ = wait({future for *_, future in pending}, left, FIRST_COMPLETED)
        if not done:
            return
        index = next(i for i, (*_, future) in enumerate(pending) if future in done)
        variant, predictor, future = pending.pop(index)
        if (error := future.exception()) is None:
            yield variant, predictor
        else:
            console.print(f"{variant.name}: not measured: {error}", markup=False)
