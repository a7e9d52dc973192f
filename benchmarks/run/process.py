"""The process of a case: `pool` hands it a module and the arguments of its `build`.

It answers in JSON lines: that it is ready, and once it is told to go, what it measured.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.records import Record


class NotRunError(Exception):
    """A case cannot run here; the message says why."""


class Program(NamedTuple):
    """What `build` returns.

    Attributes:
        output: What is compared with the reference, float32; None compares nothing.
        measure: Times, and returns what goes into the record; None for references. What it returns
            as `several` is a record each.
        notes: What the record says even where the case is not timed.
    """

    output: np.ndarray | None
    measure: Callable[[], Record] | None
    notes: Record


def serve() -> None:
    """Build the cases that come in, one after the other; time each when its turn comes."""
    # Libraries print to standard output too; the protocol keeps it for itself.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: Record) -> None:
        protocol.write(json.dumps(answer) + "\n")
        protocol.flush()

    for line in sys.stdin:
        request = json.loads(line)
        program = _built(request["module"], request["arguments"], send)
        if program is None or program.measure is None or sys.stdin.readline().strip() != "go":
            continue
        try:
            send(program.measure())
        except Exception as error:
            send({"not_run": f"{type(error).__name__}: {_one_line(error)}", "failed": True})


def _built(
    module: str, arguments: dict[str, Any], send: Callable[[Record], None]
) -> Program | None:
    """The case, after its output is written and the parent knows; None where it cannot run."""
    output = arguments.pop("output")
    try:
        program: Program = importlib.import_module(module).build(**arguments)
    except (NotRunError, ImportError) as error:
        send({"not_run": _one_line(error)})
        return None
    except Exception as error:  # a case may not fit or not compile: the table says so
        sys.excepthook(type(error), error, error.__traceback__)
        send({"not_run": f"{type(error).__name__}: {_one_line(error)}", "failed": True})
        return None
    if program.output is not None:
        np.save(output, program.output)
    send({**program.notes, "timed": program.measure is not None})
    return program


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    # By its name, so that what is raised and what is caught here are the same class.
    importlib.import_module("benchmarks.run.process").serve()
