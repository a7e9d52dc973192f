"""Raw results: JSON lines, each with where and with what it was measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Write = Callable[[Record], None]  # the record is on disk when the call returns

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


@contextlib.contextmanager
def writer(path: Path | None, *, append: bool = False) -> Iterator[Write]:
    """Records into a JSON-lines file, which the first record replaces; None keeps none.

    With `append` they go behind what the file holds.

    Every record is flushed at once: what was measured outlives an interrupt.
    """
    with contextlib.ExitStack() as stack:
        file = None

        def write(record: Record) -> None:
            nonlocal file
            if path is None:
                return
            if file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, "a" if append else "w", encoding="utf-8"))
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield write


def read(path: Path) -> list[Record]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit(given: str | None = None) -> str | None:
    """The commit: as given, of the environment (for copies), or of the checkout.

    The checkout's has `+` behind it if files differ; None outside of a checkout.
    """
    if own := given or os.environ.get("SPARSESAM_COMMIT"):
        return own
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+" if _git("status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """The processor's model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_cpus() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
