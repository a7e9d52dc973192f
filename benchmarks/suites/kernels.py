"""The kernels one by one: stripe attention, window attention and the MLP, ours beside PyTorch's.

    python -m benchmarks kernels --model vit_l --batch 8 --density 1 --density 0.3 --out FILE

Everything from a packed QKV (or the residual stream) to the same in raster order, position bias,
LayerNorm and residual included. The last image's output is first compared with float32 of the same
rounded inputs. Times are of launches one behind the other (ours) or of a CUDA graph (PyTorch's).
TFLOP/s count both products on what is computed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import typer

from benchmarks import peers
from benchmarks.cases.kernel_cases import INPUT, OPS, Case
from benchmarks.records import Record
from benchmarks.run.options import (
    Batches,
    Densities,
    Dtype,
    Implementations,
    Loops,
    Models,
    SuiteOptions,
    check_name,
)
from benchmarks.run.pool import Job
from benchmarks.run.process import Program
from benchmarks.suites import jobs as jobs_of
from benchmarks.suites.ceilings import Rates

MAX_ERROR = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
KEYS = ("op", "model", "batch", "density", "order", "peer", "implementation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure: every combination; of each op all that computes it."""

    quick_fields: ClassVar = {"densities": (0.3,)}
    implementation_names = tuple(dict.fromkeys(itertools.chain(*map(peers.names, OPS))))

    models: Models = ("vit_l",)
    batches: Batches = (8, 1)
    densities: Densities = (1.0, 0.3)
    ops: Annotated[
        Sequence[str], typer.Option("--op", help="stripe, window or mlp. Without it: all.")
    ] = OPS
    implementations: Implementations = implementation_names
    dtype: Dtype = "bfloat16"
    loops: Loops = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for op in self.ops:
            check_name("op", op, OPS)

    def cases(self) -> list[Case]:
        """The functions and shapes."""
        found = []
        for model, batch, op, density in itertools.product(
            self.models, self.batches, self.ops, self.densities
        ):
            sparse_stripe = op == "stripe" and density < 1
            for order in ("groups", "tiles") if sparse_stripe else (None,):
                case = Case(op=op, model=model, batch=batch, density=density, order=order)
                found.append(dataclasses.replace(case, dtype=self.dtype))
        return found


def jobs(options: Options) -> list[Job]:
    """All cases; the ceilings and each case's reference first."""
    rates = Rates()
    found = rates.jobs(options)
    for case in options.cases():
        found.append(reference(case, "kernels"))
        for name in peers.names(case.op, case.density):
            tiles = case.order == "tiles"  # for PyTorch the same as groups
            if name in options.implementations and (peers.PEERS[name].ours or not tiles):
                found.append(_job(options, case, name, rates))
    return found


def reference(case: Case, suite: str) -> Job:
    """A function in float32 by XLA, which cases are compared with."""
    arguments = dict(case=dataclasses.asdict(case))
    return jobs_of.reference(suite, str(case), __name__, arguments)


def _job(options: Options, case: Case, name: str, rates: Rates) -> Job:
    found = job(case, name, "kernels", runs=options.runs, loops=options.loops)

    def finish(record: Record) -> None:
        found.finish(record)
        ceiling = rates.get(case.model, case.batch)
        if not record["not_run"] and ceiling:
            rate = ceiling["products" if case.op == "mlp" else "attention"]
            record["ceiling"] = ceiling
            record["ceiling_tflops"] = rate
            record["share_of_ceiling"] = record["tflops"] / rate

    return dataclasses.replace(found, finish=finish)


def job(case: Case, name: str, suite: str, *, known: Record | None = None, **arguments: Any) -> Job:
    """A peer's function, timed; `arguments` are those of `build`."""

    def finish(record: Record) -> None:
        if not record["not_run"]:
            ms = record.get("kernel_median_ms", record["median_ms"])
            record["ms_per_image"] = record["median_ms"] / case.batch
            record["tflops"] = case.flops / ms / 1e9 or None

    given = dataclasses.asdict(case)
    return jobs_of.timed(
        suite,
        name,
        __name__,
        case,
        {"case": given} | arguments,
        given | {"input": INPUT} | (known or {}),
        reference=str(case),
        max_error=MAX_ERROR[case.dtype],
        finish=finish,
    )


def build(
    case: Record,
    implementation: str | None = None,
    runs: int = 0,
    loops: int | None = None,
    config: Record | None = None,
) -> Program:
    """One function; its output is the last image's.

    Without an implementation it is the reference, without loops a task of tuning.
    """
    what = Case(**case)
    if implementation is None:
        from benchmarks.peers import jax_kernels

        return Program(jax_kernels.reference_output(what), None, {})
    if loops is None:
        return _tuned(what, implementation, runs, config)
    kernel = peers.builder(implementation, what.op)(implementation, what, loops)
    return Program(kernel.output, lambda: kernel.measure_queued(runs, loops), kernel.notes)


def _tuned(case: Case, implementation: str, runs: int, config: Record | None) -> Program:
    from benchmarks.peers import jax_kernels

    whole, kernel = jax_kernels.tuned(implementation, case, config)

    def measure() -> Record:
        alone = kernel.measure_queued(runs, kernel.runs) if kernel else {}
        names = "median_ms", "q1_ms", "q3_ms"
        own = {f"kernel_{name}": alone[name] for name in names if alone}
        return whole.measure_queued(runs, whole.runs) | own

    return Program(whole.output, measure, whole.notes)
