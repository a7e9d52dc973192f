"""`sparsesam` as a program. Its commands are put together in `commands`.

Whatever is wrong with the input is said in one line on standard error, with exit code 2, and then
nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sparsesam_jax.cli.program import run


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: What follows the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 1 where photos were left out; 2 for wrong input; 130 when interrupted.
    """
    return run("sparsesam_jax.cli.commands", args, "sparsesam")


if __name__ == "__main__":
    sys.exit(main())
