"""Options that commands share, options of several values, and checks that need no JAX."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sparsesam_jax import methods
from sparsesam_jax.choices import Dtype, Implementation, Padding, Products

# Options that take any number of values, `--density 1 0.5`, as long as they are of that type.
_LISTS = {
    "--density": float,
    "--label": int,
    "--method": str,
    "--stage": str,
    "--train": str,
    "--weight": str,
}
# Options of several numbers, which may be repeated; for typer, which has none, they are one text.
_NUMBERS = {"--point": "X Y", "--box": "X0 Y0 X1 Y1"}

WeightsOption = Annotated[
    str, typer.Option(help="vit_t (embedded), or a checkpoint: a file or a folder.")
]
DensitiesOption = Annotated[
    list[float],
    typer.Option(metavar="R ...", help="What the encoder keeps, (0, 1]; several may follow."),
]
MethodsOption = Annotated[
    list[str],
    typer.Option(metavar="NAME ...", help=f"Several may follow: {', '.join(methods.NAMES)}."),
]
SparsityFileOption = Annotated[
    Path | None, typer.Option(help="Also: a JSON of Sparsity's fields, as calibrate writes it.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run that OUT holds.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="What is computed in; the GPU kernels need 16 bits.")
]
ImplementationOption = Annotated[
    Implementation, typer.Option(help="xla, the GPU kernels, or auto: those where they run.")
]
ProductsOption = Annotated[
    Products, typer.Option(help="What the encoder's blocks multiply in: dtype, or 8-bit floats.")
]
PaddingOption = Annotated[
    Padding, typer.Option(help="crop leaves out what of the padded square would be padding alone.")
]
LimitOption = Annotated[int | None, typer.Option(help="Only the first N photos.")]
BitsOption = Annotated[
    int | None,
    typer.Option(help="Bits of a value in photos of more than 8 bits that do not say it."),
]
ValueRangeOption = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LO HI", help="Instead: the values that are black and white."),
]
MaxPixelsOption = Annotated[
    int | None, typer.Option(help="Take photos of up to so many pixels. [178956970]")
]


class Command(TyperCommand):
    """A command whose options may take several values: `--density 1 0.5`, `--point 40 30`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat a list's option before each value, and join the numbers of the others.

        Raises:
            ValueError: An option stands where another's value should.
        """
        options = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        names = {name for option in options for name in option.opts}
        flags = {name for option in options if vars(option).get("is_flag") for name in option.opts}
        rest, parsed = deque(args), []
        while rest:
            option = rest.popleft()
            parsed.append(option)
            if option == "--":
                break
            if option in names - flags and rest and rest[0] in names:
                raise ValueError(f"{option} needs a value, got the option {rest[0]}")
            if option in _NUMBERS:
                values = []
                while rest and len(values) < len(_NUMBERS[option].split()):
                    if rest[0].startswith("--"):
                        break
                    values.append(rest.popleft())
                parsed.append(" ".join(values))
            elif option in _LISTS and rest:
                parsed.append(rest.popleft())
                while rest and _is_value(rest[0], _LISTS[option]):
                    parsed += [option, rest.popleft()]
        return super().parse_args(ctx, [*parsed, *rest])


def _is_value(text: str, kind: type) -> bool:
    if kind is str:
        return not text.startswith("-")
    try:
        kind(text)
    except ValueError:
        return False
    return True


def numbers(option: str, texts: list[str] | None) -> list[tuple[float, ...]]:
    """The values of `--point` or `--box`.

    Raises:
        ValueError: One is not as many numbers as it takes.
    """
    expected = _NUMBERS[option]
    values = []
    for text in texts or []:
        try:
            values.append(tuple(float(number) for number in text.split()))
        except ValueError:
            values.append(())
        if len(values[-1]) != len(expected.split()):
            raise ValueError(f"{option} must be {expected} in pixels, got {text!r}")
    return values


def check_positive(**counts: int) -> None:
    """Raise ValueError unless the named numbers are positive."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")


def check_implementation(implementation: Implementation, command: str) -> None:
    """Raise ValueError where the GPU kernels are asked for and cannot run; imports JAX."""
    if implementation != "auto":
        from pallas_kernels.implementation import resolve

        resolve(implementation, function=f"sparsesam {command}")
