"""Kernels with the configurations that they can have: correctness, then speed, on one GPU.

    python -m benchmarks tune stripe window --configs --only r0.3 --out FILE

Each task is compared with float32 XLA of the same rounded inputs, then timed as a loop inside one
program: the whole function, and of attention the kernel alone, without its position bias. TFLOP/s
are those of the kernel on computed products. `peers.jax_kernels` says what runs.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from typer import Argument, Option

from benchmarks.cases.kernel_cases import OPS, PARTS, Case, listed
from benchmarks.records import Record
from benchmarks.run.jobs import Job, Program, labels
from benchmarks.run.options import SuiteOptions
from benchmarks.suites import kernels

ALL = (*OPS, *PARTS)
KEYS = ("case", "implementation", "tiling", "kernel_median_ms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure."""

    quick_fields: ClassVar = {"runs": 2}
    choices: ClassVar = {"kernels": ALL}

    kernels: Annotated[Sequence[str], Argument(help=f"{', '.join(ALL)}. Without it: all.")] = ALL
    configs: Annotated[
        bool, Option("--configs", help="Every configuration that fits, not the tuned one.")
    ] = False
    only: Annotated[
        Sequence[str], Option(help="A word of the cases' labels; may be repeated.")
    ] = ()
    model: str | None = None  # instead of the models of the list
    runs: Annotated[int, Option(help="Timed runs of each loop.")] = 7
    width: Annotated[int, Option(help="Processes that compile at a time.")] = 12


def configs_of(case: Case) -> Sequence[Record | None]:
    """The configurations that a case's kernel is tried with."""
    from pallas_kernels import tuning
    from pallas_kernels.matmul_kernel import Config

    op = case.op.split("-")[0]
    if op == "norm":
        return [{"block_rows": rows} for rows in (8, 16, 32)]
    if op == "stripe":
        tiles = case.order in (None, "tiles", "blocks")
        configs = tuning.H200.tiles if tiles else tuning.H200.sequences
    elif op == "window":  # turns have no effect where an operand has one stage
        shared = dataclasses.replace(tuning.H200.windows[0], take_turns=False)
        configs = (*tuning.H200.windows, shared)
    elif op in ("lin1", "lin2"):
        shape = case.encoder.mlp_dim, case.encoder.embed_dim
        n, k = shape if op == "lin1" else shape[::-1]
        rows = tuning.padded(case.batch * case.num_routed)
        products = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
        configs = [Config(**own) for own in products["small" if case.batch == 1 else "large"]]
        configs = [config for config in configs if config.fits(rows, n, k)]
    else:
        return [None]
    return [dataclasses.asdict(config) for config in configs]


def jobs(options: Options) -> list[Job]:
    """The chosen cases with each configuration, each behind what it is compared with."""
    found: dict[str, Job] = {}
    for op in options.kernels:
        for case in listed("tune", op, model="vit_l", batch=8, density=1.0):
            if options.model:
                case = dataclasses.replace(case, model=options.model, batch=1, grid=None)
            configs = configs_of(case) if options.configs else [None]
            own: dict[str, Any] = dict(suite="tune", what=case, options=options)
            for name, config in [("xla", None), *(("mosaic_gpu", config) for config in configs)]:
                given = kernels.timed(case)
                tiling = None if config is None else _changes(op, config)
                given["fields"] |= {"config": config, "tiling": tiling, "case": str(case)}
                job = TuneJob(implementation=name, **own, **given)
                if set(options.only) <= set(job.label.split()):
                    reference = kernels.KernelJob(implementation=None, **own)
                    found.setdefault(str(case), reference)
                    found.setdefault(job.label, job)
    return list(found.values())


def _changes(op: str, config: Record) -> str:
    """The fields of a configuration that differ from their defaults."""
    from benchmarks.peers.jax_kernels import CONFIGS

    kind = CONFIGS.get(op.split("-")[0])
    default = {field.name: field.default for field in dataclasses.fields(kind)} if kind else {}
    changed = [f"{name}={x}" for name, x in config.items() if default.get(name) != x]
    return " ".join(changed) or "default"


class TuneJob(kernels.KernelJob):
    """A function in a loop, with a configuration."""

    @property
    def label(self) -> str:
        """With the tiling."""
        return labels([self.what, self.implementation, self.fields["tiling"]])

    def build(self) -> Program:
        """The whole function, and of attention its kernel alone."""
        from benchmarks.peers import jax_kernels

        given = str(self.implementation), self.what, self.fields["config"]
        whole, kernel = jax_kernels.tuned(*given)
        runs = self.options.runs

        def measure() -> Record:
            alone = kernel.measure_queued(runs, kernel.runs) if kernel else {}
            names = "median_ms", "q1_ms", "q3_ms"
            own = {f"kernel_{name}": alone[name] for name in names if alone}
            return whole.measure_queued(runs, whole.runs) | own

        return Program(whole.output, measure, whole.notes)
