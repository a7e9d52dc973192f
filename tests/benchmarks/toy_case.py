"""A case for the tests of `benchmarks.run.pool`: no framework, and everything that can go wrong."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from typing import Any

import numpy as np

from benchmarks.run.jobs import Job, NotRunError, Program
from benchmarks.suites.cpu import CpuJob


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy(Job):
    scale: float
    timed: bool = True
    sleeps: float = 0

    label = name = property(lambda self: self.fields["name"])
    environment = property(lambda self: dict(os.environ))

    def build(self) -> Program:
        time.sleep(self.sleeps)
        if self.scale == 0:
            raise ZeroDivisionError("scale must not be zero")
        if self.scale == -1:
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        if self.scale == -2:
            raise NotRunError("no such device")
        spread = {name: self.scale for name in ("median_ms", "q1_ms", "q3_ms", "ms")}
        measure = (lambda: dict(spread)) if self.timed else None
        return Program(np.full(4, self.scale, np.float32), measure, {"process": os.getpid()})


class ToyCpu(Toy):
    errors = CpuJob.errors


def toy(name: str, scale: float, kind: type[Toy] = Toy, **fields: Any) -> Toy:
    """It agrees with the output of `one` where nothing else is said."""
    given = {"reference": "one", "max_error": 1e-2} | fields
    own = {"name": name, "implementation": name}
    return kind(
        suite="toy", what=name, options=None, implementation="xla", fields=own, scale=scale, **given
    )
