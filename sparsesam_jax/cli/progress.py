"""A bar that shows how many photos are done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(what: str, count: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where it is a terminal and the reports themselves go elsewhere.

    Args:
        what: What is done with photos.
        count: How many there are; one alone has no bar.
    """
    if count == 1 or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # rich would send to its own console what goes to standard output.
    with Progress(console=console, transient=True, redirect_stdout=False) as shown:
        task = shown.add_task(what, total=count)
        yield lambda: shown.advance(task)
