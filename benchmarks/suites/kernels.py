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

from typer import Option

from benchmarks import peers
from benchmarks.cases.kernel_cases import INPUT, OPS, Case
from benchmarks.records import Record
from benchmarks.run import options as common
from benchmarks.run.jobs import Job, Program
from benchmarks.suites import ceilings

MAX_ERROR = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
IMPLEMENTATIONS = tuple(dict.fromkeys(itertools.chain(*map(peers.names, OPS))))
KEYS = ("op", "model", "batch", "density", "order", "peer", "implementation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(common.SuiteOptions):
    """What to measure: every combination; of each op all that computes it."""

    quick_fields: ClassVar = {"densities": (0.3,)}
    choices: ClassVar = {"implementations": IMPLEMENTATIONS, "ops": OPS}

    models: common.Models = ("vit_l",)
    batches: common.Batches = (8, 1)
    densities: common.Densities = (1.0, 0.3)
    ops: Annotated[
        Sequence[str], Option("--op", help="stripe, window or mlp. Without it: all.")
    ] = OPS
    implementations: common.Implementations = IMPLEMENTATIONS
    dtype: common.Dtype = "bfloat16"
    loops: common.Loops = 10


def jobs(options: Options) -> list[Job]:
    """All cases; the ceilings and each case's reference first."""
    found = ceilings.jobs(options)
    for model, batch, op, density in itertools.product(
        options.models, options.batches, options.ops, options.densities
    ):
        for order in ("groups", "tiles") if op == "stripe" and density < 1 else (None,):
            case = Case(
                op=op, model=model, batch=batch, density=density, order=order, dtype=options.dtype
            )
            known = [n for n in peers.names(op, density) if n in options.implementations]
            if order == "tiles":  # for PyTorch the same as groups
                known = [name for name in known if peers.PEERS[name].ours]
            own: dict[str, Any] = dict(suite="kernels", what=case, options=options)
            found.append(KernelJob(implementation=None, **own))
            found += [KernelJob(implementation=n, **own, **timed(case)) for n in known]
    return found


def timed(case: Case) -> dict[str, Any]:
    """What the timed jobs of a case have in common."""
    fields = dataclasses.asdict(case) | {"input": INPUT}
    return {"fields": fields, "reference": str(case), "max_error": MAX_ERROR[case.dtype]}


class KernelJob(Job):
    """A peer's function; its output is the last image's."""

    def build(self) -> Program:
        """It has run once."""
        if self.implementation is None:
            from benchmarks.peers import jax_kernels

            return Program(jax_kernels.reference_output(self.what), None, {})
        runs, loops = self.options.runs, self.options.loops
        kernel = peers.builder(self.implementation, self.what.op)(
            self.implementation, self.what, loops
        )
        return Program(kernel.output, lambda: kernel.measure_queued(runs, loops), kernel.notes)

    def finish(self, record: Record, found: Sequence[Record]) -> None:
        """Rates, and the share of the ceiling where it was measured."""
        case, ms = self.what, record.get("kernel_median_ms", record["median_ms"])
        record["ms_per_image"] = record["median_ms"] / case.batch
        record["tflops"] = case.flops / ms / 1e9 or None
        if ceiling := ceilings.ceiling(found, case.model, case.batch):
            rate = ceiling["products" if case.op == "mlp" else "attention"]
            record |= {"ceiling": ceiling, "ceiling_tflops": rate}
            record["share_of_ceiling"] = record["tflops"] / rate
