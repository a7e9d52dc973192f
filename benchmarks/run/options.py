"""Options of a suite: one dataclass that checks itself and is the command's options too."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from typer import Option

from benchmarks.cases import shapes

Models = Annotated[
    Sequence[str], Option("--model", help="vit_t, vit_b, vit_l or vit_h; may be repeated.")
]
Batches = Annotated[Sequence[int], Option("--batch", help="Images a run; may be repeated.")]
Densities = Annotated[Sequence[float], Option("--density", help="1 is dense; may be repeated.")]
Implementations = Annotated[
    Sequence[str],
    Option("--implementation", help="Who is measured; may be repeated. Without it: all."),
]
Dtype = Annotated[str, Option(help="Of all but the references.")]
Warmups = Annotated[int, Option(help="Untimed runs of each.")]
Loops = Annotated[int, Option(help="Runs that are launched together.")]
_POSITIVE = ("runs", "width", "batch", "batches", "loops", "threads", "limit", "count")
_QUICK: dict[str, Any] = dict(runs=3, warmups=1, loops=1, width=1, batches=(1,), dtype="float32")
_QUICK |= dict(models=(shapes.QUICK_MODEL,), model=shapes.QUICK_MODEL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """How a suite runs its cases, whatever they are; suites add what they measure.

    What is annotated with `typer.Option` is an option of the command.
    """

    choices: ClassVar[dict[str, Sequence[str]]] = {}  # of fields that hold names
    turns: ClassVar[bool] = False  # cases are timed in turns, see `Pool.run`
    quick_fields: ClassVar[dict[str, Any]] = {}  # of `quick`, beside the common ones

    runs: Annotated[int, Option(help="Timed runs of each case.")] = 20
    width: Annotated[int, Option(help="Processes that compile at a time.")] = 6
    limit: Annotated[float, Option(help="Seconds until the rest is given up.")] = 3600
    commit: Annotated[
        str | None, Option(help="Of a tree that is no checkout; or SPARSESAM_COMMIT.")
    ] = None

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def quick(cls) -> Self:
        """A tiny model and a few runs, on a CPU too."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{n: x for n, x in _QUICK.items() if n in names} | cls.quick_fields)


def check(options: Any) -> None:
    """Raise ValueError, in one line, unless the fields are what their names say."""

    def values(name: str) -> Sequence[Any]:
        value = getattr(options, name, None)
        return value if isinstance(value, tuple | list) else () if value is None else (value,)

    for name in _POSITIVE:
        for value in values(name):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
    for value in values("warmups"):
        if value < 0:
            raise ValueError(f"warmups must not be negative, got {value}")
    for value in (*values("model"), *values("models")):
        shapes.model_config(value)
    for value in (*values("densities"), *values("density_points"), *values("decomposition")):
        if not 0 < value <= 1:
            raise ValueError(f"density must lie in (0, 1], got {value}")
    for field, names in (options.choices | {"dtype": shapes.DTYPES}).items():
        for value in values(field):
            check_name("axis" if field == "axes" else field.removesuffix("s"), value, names)


def check_name(what: str, value: str, names: Sequence[str]) -> None:
    """Raise ValueError unless a name is one of those that there are."""
    if value not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}; got {value!r}")
