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

from benchmarks.cases import shapes
from benchmarks.cases.kernel_cases import INPUT, OPS, Case, check
from benchmarks.records import Record
from benchmarks.run import machine
from benchmarks.run.pool import Job, RunOptions, labels
from benchmarks.suites import ceilings

OURS = ("mosaic_gpu", "xla")
TORCH = {
    "stripe": ("eager", "sdpa", "compile", "flex", "segment-anything-fast"),
    "window": ("eager", "sdpa", "compile"),
    "mlp": ("eager", "compile"),
}
TORCH_SPARSE = {"stripe": ("flex",), "window": ("sdpa", "compile"), "mlp": ("eager", "compile")}
MAX_ERROR = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """What to measure: every combination; of each op all that computes it.

    Attributes:
        models: Names of `shapes.MODELS`.
        batches: Images.
        densities: 1 is dense.
        ops: Of `kernel_cases.OPS`.
        implementations: Of all that there are; None is all.
        dtype: Of inputs and outputs.
        loops: Runs of the function that are timed together.
    """

    models: Sequence[str] = ("vit_l",)
    batches: Sequence[int] = (8, 1)
    densities: Sequence[float] = (1.0, 0.3)
    ops: Sequence[str] = OPS
    implementations: Sequence[str] | None = None
    dtype: str = "bfloat16"
    loops: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for case in self.cases():
            check(case)
        known = {*OURS, *itertools.chain(*TORCH.values())}
        for name in self.implementations or ():
            if name not in known:
                expected = ", ".join(sorted(known))
                raise ValueError(f"implementation must be one of {expected}; got {name!r}")
        if self.loops < 1:
            raise ValueError(f"loops must be positive, got {self.loops}")
        if self.dtype not in MAX_ERROR:
            raise ValueError(f"dtype must be one of {', '.join(MAX_ERROR)}; got {self.dtype!r}")

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


QUICK = Options(
    models=(shapes.QUICK_MODEL,),
    batches=(1,),
    densities=(0.3,),
    dtype="float32",
    runs=3,
    loops=1,
    width=1,
)


def jobs(options: Options) -> list[Job]:
    """All cases; the ceilings and each case's reference first."""
    rates: dict[tuple[str, int], list[Record]] = {}
    found = []
    for model, batch in itertools.product(options.models, options.batches):
        job = ceilings.job(
            model, batch, dtype=options.dtype, runs=options.runs, loops=options.loops
        )

        def keep(record: Record, key: tuple[str, int] = (model, batch)) -> None:
            if not record["not_run"]:
                rates.setdefault(key, []).append(record)

        found.append(dataclasses.replace(job, finish=keep))
    for case in options.cases():
        torch = TORCH[case.op] if case.density == 1 else TORCH_SPARSE[case.op]
        if case.order == "tiles":  # for PyTorch the same as groups
            torch = ()
        names = [
            name
            for name in (*OURS, *torch)
            if options.implementations is None or name in options.implementations
        ]
        found.append(_reference(case))
        found += [_job(options, case, name, rates) for name in names]
    return found


def _reference(case: Case) -> Job:
    arguments = dict(
        case=dataclasses.asdict(case), implementation="xla", runs=0, loops=1, reference=True
    )
    return Job(
        label=f"{case} float32 xla",
        module="benchmarks.peers.kernels_jax",
        arguments=arguments,
        environment=machine.reference_environment(),
        known={"suite": "kernels", "peer": "reference"},
        name=str(case),
    )


def _job(
    options: Options, case: Case, name: str, rates: dict[tuple[str, int], list[Record]]
) -> Job:
    ours = name in OURS

    def finish(record: Record) -> None:
        if record["not_run"] or record["median_ms"] is None:
            return
        record["ms_per_image"] = record["median_ms"] / case.batch
        record["tflops"] = case.flops / record["median_ms"] / 1e9
        if found := rates.get((case.model, case.batch)):
            ceiling = ceilings.summary(found)
            rate = ceiling["products" if case.op == "mlp" else "attention"]
            record["ceiling"] = ceiling
            record["ceiling_tflops"] = rate
            record["share_of_ceiling"] = record["tflops"] / rate

    return Job(
        label=labels([case, name]),
        module="benchmarks.peers.kernels_jax" if ours else "benchmarks.peers.kernels_torch",
        arguments=dict(
            case=dataclasses.asdict(case),
            implementation=name,
            runs=options.runs,
            loops=options.loops,
        ),
        environment=machine.jax_environment() if ours else machine.torch_environment(),
        known={
            "suite": "kernels",
            "peer": "sparsesam_jax" if ours else "torch",
            **dataclasses.asdict(case),
            "implementation": name,
            "input": INPUT,
            "median_ms": None,
        },
        reference=str(case),
        max_error=MAX_ERROR[case.dtype],
        finish=finish,
    )
