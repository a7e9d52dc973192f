"""Kernels with the configurations that they can have: correctness, then speed, on one GPU.

    python -m benchmarks tune stripe window --configs --only r0.3 --out FILE

Each task is compared with float32 XLA of the same rounded inputs, then timed as a loop inside one
program: the whole function, and of attention the kernel alone, without its position bias. TFLOP/s
are those of the kernel on computed products. `peers.jax_tuning` says what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import typer

from benchmarks.cases.kernel_cases import OPS, PARTS, Case
from benchmarks.records import Record
from benchmarks.run.options import SuiteOptions, check_name
from benchmarks.run.pool import Job, labels
from benchmarks.suites import kernels

ALL = (*OPS, *PARTS)
KEYS = ("case", "implementation", "tiling", "kernel_median_ms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SuiteOptions):
    """What to measure."""

    quick_fields: ClassVar = {"runs": 2}
    kernels: Annotated[
        Sequence[str], typer.Argument(help=f"{', '.join(ALL)}. Without it: all.")
    ] = ALL
    configs: Annotated[
        bool, typer.Option("--configs", help="Every configuration that fits, not the tuned one.")
    ] = False
    only: Annotated[
        Sequence[str], typer.Option(help="A word of the cases' labels; may be repeated.")
    ] = ()
    model: str | None = None  # instead of the models of the table
    runs: Annotated[int, typer.Option(help="Timed runs of each loop.")] = 7
    width: Annotated[int, typer.Option(help="Processes that compile at a time.")] = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.kernels:
            check_name("kernel", name, ALL)


def _cases(op: str) -> list[Case]:
    """The shapes of an op, what matters most first: ViT-L, and ViT-H for its head_dim of 80."""

    def case(**fields: Any) -> Case:
        given: dict[str, Any] = dict(op=op, model="vit_l", batch=8, density=1.0) | fields
        return Case(**given)

    one: dict[str, Any] = dict(batch=1)
    if op == "bias":
        return [case(), case(**one), case(model="vit_h")]
    if op not in ("stripe", "window"):
        found = [case(density=r, **own) for own in ({}, one) for r in (0.3, 1.0, 0.4)]
        found += [case(model=m, density=r) for m in ("vit_b", "vit_h") for r in (0.3, 1.0)]
        return [*found, case(density=0.3, dtype="float16")]
    sparse = dict(density=0.3, order="static" if op == "window" else "tiles")
    found = [case(), case(**sparse), case(**one), case(**one, **sparse), case(model="vit_h")]
    found += [case(model="vit_h", **sparse), case(dtype="float16"), case(**one, grid=128)]
    found.append(case(density=0.3, order="heads"))
    if op == "stripe":
        found += [case(density=r, order="tiles") for r in (0.5, 0.25)]
        found += [case(density=0.3, order=order) for order in ("groups", "blocks")]
        found += [case(**one, grid=128, **sparse), case(grid=32)]
    return found


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
        configs = (
            *tuning.H200.windows,
            dataclasses.replace(tuning.H200.windows[0], take_turns=False),
        )
    elif op in ("lin1", "lin2"):
        shape = case.encoder.mlp_dim, case.encoder.embed_dim
        n, k = shape if op == "lin1" else shape[::-1]
        rows = tuning.padded(case.batch * case.num_routed)
        configs = [Config(**fields) for fields in (_SMALL if case.batch == 1 else _LARGE)]
        configs = [config for config in configs if config.fits(rows, n, k)]
    else:
        return [None]
    return [dataclasses.asdict(config) for config in configs]


_PAIR = dict(cluster=2)
_SHARED = dict(take_turns=False)
_LARGE: list[dict[str, Any]] = [
    {},
    _PAIR,
    _PAIR | dict(num_stages=5, num_slots=1),
    _PAIR | dict(tile_k=128, num_stages=2),
    _PAIR | dict(group_m=8),
    _PAIR | dict(group_m=32),
    _PAIR | dict(tile_m=64, tile_n=256),
    dict(tile_m=64, tile_n=256, num_stages=5, num_slots=1),
    *(_SHARED | own | dict(tile_n=256, num_slots=1) for own in ({}, _PAIR)),
    *(_SHARED | own | dict(tile_m=256, num_stages=3) for own in ({}, _PAIR)),
]
_SMALL: list[dict[str, Any]] = [
    *({} | own for own in ({}, _PAIR)),
    *(_SHARED | own | dict(num_stages=6, num_slots=1) for own in ({}, _PAIR)),
    *(own | dict(tile_m=64, num_stages=6) for own in ({}, _PAIR)),
    *(own | dict(tile_n=64, num_stages=6, num_slots=1) for own in ({}, _PAIR)),
    dict(tile_m=64, tile_n=64, num_stages=8, num_slots=1),
    *(_SHARED | own | dict(tile_n=64, num_stages=8, num_slots=1) for own in ({}, _PAIR)),
]


def jobs(options: Options) -> list[Job]:
    """The chosen cases with each configuration, each behind what it is compared with."""
    found: dict[str, Job] = {}
    for op in options.kernels:
        for case in _cases(op):
            if options.model:
                case = dataclasses.replace(case, model=options.model, batch=1, grid=None)
            configs = configs_of(case) if options.configs else [None]
            for name, config in [("xla", None), *(("mosaic_gpu", config) for config in configs)]:
                tiling = None if config is None else _changes(op, config)
                known = {"config": config, "tiling": tiling, "case": str(case)}
                job = kernels.job(case, name, "tune", known=known, runs=options.runs, config=config)
                label = labels([job.label, tiling])
                if set(options.only) <= set(label.split()):
                    found.setdefault(str(case), kernels.reference(case, "tune"))
                    found.setdefault(label, dataclasses.replace(job, label=label))
    return list(found.values())


def _changes(op: str, config: Record) -> str:
    """The fields of a configuration that differ from their defaults."""
    from benchmarks.peers.jax_kernels import MODULES

    kind = MODULES[op.split("-")[0]][1]
    default = {field.name: field.default for field in dataclasses.fields(kind)} if kind else {}
    changed = [f"{name}={x}" for name, x in config.items() if default.get(name) != x]
    return " ".join(changed) or "default"
