"""Options of the command line that take any number of values."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_LISTS = ("--density", "--method")


class ListsCommand(TyperCommand):
    """A command whose `--density` and `--method` take any number of values: `--density 1 0.5`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value."""
        repeated: list[str] = []
        option = None
        for arg in args:
            if arg in _LISTS:
                option = arg
            elif arg.startswith("-"):
                option = None
                repeated.append(arg)
            elif option is not None:
                repeated += [option, arg]
            else:
                repeated.append(arg)
        return super().parse_args(ctx, repeated)
