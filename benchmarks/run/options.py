"""Options of a suite: one dataclass that checks itself and is the command's options too."""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import inspect
import typing
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

import typer
from typer.models import ParameterInfo

from benchmarks.cases import shapes

Models = Annotated[
    Sequence[str], typer.Option("--model", help="vit_t, vit_b, vit_l or vit_h; may be repeated.")
]
Batches = Annotated[Sequence[int], typer.Option("--batch", help="Images a run; may be repeated.")]
Densities = Annotated[
    Sequence[float], typer.Option("--density", help="1 is dense; may be repeated.")
]
Implementations = Annotated[
    Sequence[str],
    typer.Option("--implementation", help="Who is measured; may be repeated. Without it: all."),
]
Dtype = Annotated[str, typer.Option(help="Of all but the references.")]
Warmups = Annotated[int, typer.Option(help="Untimed runs of each.")]
Loops = Annotated[int, typer.Option(help="Runs that are launched together.")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """How a suite runs its cases, whatever they are; suites add what they measure.

    What is annotated with `typer.Option` is an option of the command.
    """

    implementation_names: ClassVar[tuple[str, ...]] = ()  # that the suite knows
    turns: ClassVar[bool] = False  # cases are timed in turns, see `pool.run`
    quick_fields: ClassVar[dict[str, Any]] = {}  # of `quick`, beside the common ones

    runs: Annotated[int, typer.Option(help="Timed runs of each case.")] = 20
    width: Annotated[int, typer.Option(help="Processes that compile at a time.")] = 6
    limit: Annotated[float, typer.Option(help="Seconds until the rest is given up.")] = 3600
    commit: Annotated[
        str | None, typer.Option(help="Of a tree that is no checkout; or SPARSESAM_COMMIT.")
    ] = None

    def __post_init__(self) -> None:
        for name in ("runs", "width", "batch", "batches", "loops", "threads"):
            for value in self._values(name):
                if value < 1:
                    raise ValueError(f"{name} must be positive, got {value}")
        if any(value < 0 for value in self._values("warmups")):
            raise ValueError(f"warmups must not be negative, got {self._values('warmups')[0]}")
        for name in ("model", "models"):
            for value in self._values(name):
                shapes.model_config(value)
        for name in ("densities", "density_points", "decomposition"):
            for value in self._values(name):
                if not 0 < value <= 1:
                    raise ValueError(f"density must lie in (0, 1], got {value}")
        known = {"implementations": self.implementation_names, "dtype": shapes.DTYPES}
        for field, names in known.items():
            for value in self._values(field):
                check_name(field.removesuffix("s"), value, names)

    @classmethod
    def quick(cls) -> Self:
        """A tiny model and a few runs, on a CPU too."""
        common: dict[str, Any] = dict(
            models=(shapes.QUICK_MODEL,), batches=(1,), dtype="float32", runs=3
        )
        common |= dict(model=shapes.QUICK_MODEL, warmups=1, loops=1, width=1)
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{n: x for n, x in common.items() if n in names} | cls.quick_fields)

    def _values(self, name: str) -> Sequence[Any]:
        """A field's value, or its values; none if there is no such field or it is None."""
        value = getattr(self, name, None)
        return value if isinstance(value, tuple | list) else () if value is None else (value,)


def check_name(what: str, value: str, names: Sequence[str]) -> None:
    """Raise ValueError unless a name is one of those that there are."""
    if value not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}; got {value!r}")


def parameters(options: type[SuiteOptions]) -> list[inspect.Parameter]:
    """A command's parameters from the annotated fields of its options; what is not given is None.

    A sequence is an option that may be repeated.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    found = []
    for field in dataclasses.fields(options):
        hint, *extras = typing.get_args(hints[field.name]) or (None,)
        if not extras or not isinstance(extras[0], ParameterInfo):
            continue
        if typing.get_origin(hint) is collections.abc.Sequence:
            hint = list[typing.get_args(hint)[0]]
        default = field.default
        info = copy.copy(extras[0])
        if default not in (None, (), False, dataclasses.MISSING):
            info.show_default = (
                ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            )
        given = Annotated[typing.Optional[hint], info]  # noqa: UP045 - the hint is a value
        kind = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(field.name, kind, default=None, annotation=given))
    return found
