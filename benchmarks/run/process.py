"""The process of a case: `pool` hands it a module and the arguments of its `build`.

It answers that it is ready, and what it measured whenever it is told to go.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
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


def serve(pipe: Connection, log: str) -> None:
    """Build the cases that come in, one after the other; time each as often as it is told to."""
    os.setpgrp()  # Ctrl-C is the parent's to handle
    with open(log, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    with contextlib.suppress(EOFError):
        while True:
            _one(pipe, *pipe.recv())


def _one(pipe: Connection, module: str, arguments: dict[str, Any]) -> None:
    try:
        program: Program = importlib.import_module(module).build(**arguments)
        timed = program.measure is not None
        pipe.send(program.notes | {"output": program.output, "timed": timed})
        while program.measure and pipe.recv() == "go":
            pipe.send(program.measure())
    except (NotRunError, ImportError) as error:
        pipe.send({"not_run": _one_line(error)})
    except EOFError:
        raise
    except Exception as error:  # a case may not fit or not compile: the table says so
        traceback.print_exc()
        pipe.send({"not_run": f"{type(error).__name__}: {_one_line(error)}", "failed": True})


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
