"""The encoder on a CPU: XLA, dense and sparse, beside transformers' PyTorch on the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.cases import shapes
from benchmarks.records import Record, Write
from benchmarks.run.timing import Spread
from benchmarks.worker import CheckError, Job, NotRunError, Worker

TORCH_IMPLEMENTATIONS = ("eager", "sdpa")
# Share of the largest feature: float32 through a whole encoder, its sums in another order.
MAX_DENSE_ERROR = 2e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        model: A name of `shapes.MODELS`.
        densities: Densities of our encoder beside the dense one.
        batch: Images a run.
        threads: Processors and threads of every peer.
        runs: Timed runs of each peer; the peers take turns.
        warmups: Untimed runs of each.
        keep_memory: Whether every peer's allocator keeps freed memory, see `worker.Job`.
    """

    model: str = "vit_b"
    densities: tuple[float, ...] = (0.3,)
    batch: int = 1
    threads: int = 1
    runs: int = 9
    warmups: int = 2
    keep_memory: bool = False

    def __post_init__(self) -> None:
        shapes.model_config(self.model)
        for name in ("batch", "threads", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.threads > records.available_cpus():
            raise ValueError(
                f"threads must be at most the processors at hand ({records.available_cpus()}), "
                f"got {self.threads}"
            )
        if self.warmups < 0:
            raise ValueError(f"warmups must not be negative, got {self.warmups}")
        for density in self.densities:
            if not 0 < density < 1:
                raise ValueError(f"density must lie in (0, 1) beside dense, got {density}")


@dataclasses.dataclass
class Case:
    """One peer in one setting: its job, and what became of it."""

    job: Job
    worker: Worker | None = None
    output: np.ndarray | None = None
    not_run: str | None = None
    reference: str | None = None
    max_error: float | None = None
    relative_error: float | None = None
    peak_mib: float | None = None
    times_ms: list[float] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """What the table calls it."""
        job = self.job
        return f"{job.peer} {job.implementation}" + ("" if job.density == 1 else f" {job.density}")


def run(options: Options, write: Write, console: Console) -> bool:
    """Measure, write one record a peer, print the table.

    Returns:
        Whether all was measured; False after Ctrl-C, which keeps what was measured until then.

    Raises:
        CheckError: Outputs differ by more than float32 explains, so nothing is timed.
    """
    complete = True
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cases = _cases(options, Path(folder))
        try:
            _start(options, cases, Path(folder), stack, console)
            check(cases)
            _time(options, cases, console)
        except KeyboardInterrupt:
            # An impatient second Ctrl-C must not lose what was measured.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            complete = False
    results = _records(options, cases)
    for record in results:
        write(record)
    console.print(_table(options, results))
    for record in results:
        if record["not_run"] is not None:
            console.print(f"{record['name']}: not run: {record['not_run']}", markup=False)
    if not complete:
        console.print("Interrupted: the medians are over the runs until then.")
    return complete


def _cases(options: Options, folder: Path) -> list[Case]:
    """PyTorch first, since ours is checked against it."""

    def case(peer: str, implementation: str, weights: str, density: float = 1.0) -> Case:
        output = folder / f"{peer}-{implementation}-{density}.npy"
        job = Job(
            peer=peer,
            implementation=implementation,
            weights=str(folder / weights),
            pixels=str(folder / "pixels.npy"),
            output=str(output),
            threads=options.threads,
            warmups=options.warmups,
            density=density,
            keep_memory=options.keep_memory,
        )
        return Case(job)

    return [
        *(case("transformers", name, "huggingface") for name in TORCH_IMPLEMENTATIONS),
        *(case("sparsesam_jax", "xla", "native.safetensors", r) for r in (1.0, *options.densities)),
    ]


def _start(
    options: Options,
    cases: list[Case],
    folder: Path,
    stack: contextlib.ExitStack,
    console: Console,
) -> None:
    """Write the inputs; then one peer after another compiles, runs once and warms up."""
    from sparsesam_jax.checkpoints import convert_checkpoint, native

    config = shapes.model_config(options.model)
    weights = folder / "native.safetensors"
    native.write(weights, config, shapes.random_weights(config))
    convert_checkpoint(weights, folder / "huggingface", to="huggingface")
    np.save(folder / "pixels.npy", shapes.random_pixels(config, options.batch))
    for case in cases:
        console.print(f"[dim]starting {case.name}")
        try:
            case.worker = Worker(case.job)
        except NotRunError as error:
            case.not_run = str(error)
            continue
        stack.callback(case.worker.close)
        case.output = np.load(case.job.output)


def check(cases: list[Case]) -> None:
    """Compare outputs: dense with PyTorch; sparse must be finite, and is compared with our dense.

    Raises:
        CheckError: A feature is not finite, or dense differs by more than `MAX_DENSE_ERROR`.
    """
    outputs = {case.name: case.output for case in cases if case.output is not None}
    dense = [case for case in cases if case.name in outputs and case.job.density == 1]
    for case in cases:
        output = outputs.get(case.name)
        if output is None:
            continue
        if not np.isfinite(output).all():
            raise CheckError(f"{case.name} must return finite features, got others; nothing timed")
        comparable = dense[:1] if case.job.density == 1 else dense[-1:]
        reference = next((c.name for c in comparable if c is not case), None)
        if reference is None:
            continue
        expected = outputs[reference]
        difference = output - expected
        case.reference = reference
        case.max_error = float(np.abs(difference).max() / np.abs(expected).max())
        case.relative_error = float(np.linalg.norm(difference) / np.linalg.norm(expected))
        if case.job.density == 1 and case.max_error > MAX_DENSE_ERROR:
            raise CheckError(
                f"{case.name} must agree with {reference} within {MAX_DENSE_ERROR} of the "
                f"maximum, got {case.max_error:.2e}; nothing timed"
            )


def _time(options: Options, cases: list[Case], console: Console) -> None:
    console.print(f"[dim]timing {options.runs} rounds")
    for _ in range(options.runs):
        for case in cases:
            if case.worker:
                case.times_ms.append(case.worker.run_ms())
    for case in cases:
        case.peak_mib = case.worker.peak_mib() if case.worker else None


def _records(options: Options, cases: list[Case]) -> list[Record]:
    common = {
        "suite": "cpu",
        "model": options.model,
        "batch": options.batch,
        "dtype": "float32",
        "image_size": shapes.model_config(options.model).image_encoder.image_size,
        "weights": shapes.WEIGHTS_DISTRIBUTION,
        "pixels": shapes.PIXELS_DISTRIBUTION,
        "device": records.cpu_name(),
        "threads": options.threads,
        "warmups": options.warmups,
        "keep_memory": options.keep_memory,
        "versions": records.versions(),
        "commit": records.commit(),
    }
    medians = {c.name: Spread.of(c.times_ms).median_ms for c in cases if c.times_ms}
    torch_ms = min(
        (medians[c.name] for c in cases if c.job.peer == "transformers" and c.times_ms),
        default=None,
    )
    dense_ms = next(
        (
            medians[c.name]
            for c in cases
            if c.job.peer == "sparsesam_jax" and c.job.density == 1 and c.times_ms
        ),
        None,
    )
    return [_record(options, case, common, torch_ms, dense_ms) for case in cases]


def _record(
    options: Options,
    case: Case,
    common: dict[str, Any],
    torch_ms: float | None,
    dense_ms: float | None,
) -> Record:
    ours = case.job.peer == "sparsesam_jax"
    spread = Spread.of(case.times_ms) if case.times_ms else None
    median = spread.median_ms if spread else None
    not_run = case.not_run or (None if spread else "interrupted before its first timed run")
    ready = case.worker.ready if case.worker else {}
    return {
        **common,
        "name": case.name,
        "peer": case.job.peer,
        "implementation": case.job.implementation,
        "density": case.job.density,
        "not_run": not_run,
        "median_ms": median,
        "q1_ms": spread.q1_ms if spread else None,
        "q3_ms": spread.q3_ms if spread else None,
        "ms_per_image": median / options.batch if median else None,
        "runs": len(case.times_ms),
        "times_ms": case.times_ms,
        "compile_s": ready.get("compile_s"),
        "peak_mib": case.peak_mib,
        "reference": case.reference,
        "max_error": case.max_error,
        "relative_error": case.relative_error,
        "ratio_to_pytorch": median / torch_ms if ours and median and torch_ms else None,
        "speedup_over_dense": dense_ms / median if ours and median and dense_ms else None,
        **ready.get("notes", {}),
    }


def _table(options: Options, results: list[Record]) -> Table:
    first = results[0]
    table = Table(
        title=f"{options.model}, batch {options.batch}, float32, {first['image_size']} pixels; "
        f"{first['device']}, {options.threads} threads",
        caption="x torch: the median over that of the faster PyTorch peer. Faster: than our dense. "
        "MiB: peak resident memory of the process in the timed runs. Error: of the largest "
        "feature, dense against PyTorch, sparse against our dense.",
        box=box.SIMPLE,
        padding=0,
    )
    table.add_column("peer", no_wrap=True)
    for column in ("median ms", "quartiles", "x torch", "faster", "compile s", "MiB", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        if r["not_run"] is None:
            table.add_row(
                r["name"],
                _milliseconds(r["median_ms"]),
                f"{_milliseconds(r['q1_ms'])}-{_milliseconds(r['q3_ms'])}",
                _number(r["ratio_to_pytorch"], ".2f"),
                _number(r["speedup_over_dense"], ".2f"),
                _number(r["compile_s"], ".1f"),
                _number(r["peak_mib"], ".0f"),
                _number(r["max_error"], ".0e"),
            )
    return table


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _milliseconds(value: float) -> str:
    return format(value, ".1f" if value < 100 else ".0f")
