"""A case for the tests of `benchmarks.run.pool`: no framework, and everything that can go wrong."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from benchmarks.run.process import NotRunError, Program


def build(scale: float, timed: bool = True, seconds: float = 0) -> Program:
    time.sleep(seconds)
    if scale == 0:
        raise ZeroDivisionError("scale must not be zero")
    if scale == -1:
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    if scale == -2:
        raise NotRunError("no such device")
    spread = {"median_ms": scale, "q1_ms": scale, "q3_ms": scale, "ms": scale}
    measure = (lambda: dict(spread)) if timed else None
    return Program(np.full(4, scale, np.float32), measure, {"note": "a toy"})
