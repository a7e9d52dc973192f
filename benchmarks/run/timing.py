"""How runs are timed and summarised: median and quartiles, never the mean."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.records import Record


class Spread(NamedTuple):
    """Median and quartiles of timed runs, in milliseconds."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    runs: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Spread:
        """Summarise at least one run.

        Raises:
            ValueError: There is no run.
        """
        if not times_ms:
            raise ValueError("times_ms must hold at least one run, got none")
        if len(times_ms) == 1:
            return cls(times_ms[0], times_ms[0], times_ms[0], 1)
        q1, median, q3 = statistics.quantiles(times_ms, n=4, method="inclusive")
        return cls(median, q1, q3, len(times_ms))


class Runnable(NamedTuple):
    """What a peer builds: a program that has run once, whatever its framework.

    Attributes:
        device: Of a framework; has `name`, `wait` for a result, `start_peak` and `peak` of memory.
        launch: Starts a launch and returns its result, which may not be there yet.
        output: Of the first run, float32: what is compared.
        notes: What the record says even where nothing is timed.
        runs: Runs of the function in a launch.
        peak: The peak of memory, where it is not that of the launches.
    """

    device: Any
    launch: Callable[[], Any]
    output: np.ndarray
    notes: Record
    runs: int = 1
    peak: Record | None = None

    def call(self) -> Any:
        """Launch and wait."""
        return self.device.wait(self.launch())

    def queued_ms(self, launches: int) -> float:
        """Wall time of a run where every launch comes before the one before it has ended."""
        start = time.perf_counter()
        for _ in range(launches - 1):
            self.launch()
        self.call()
        return (time.perf_counter() - start) * 1e3 / launches / self.runs

    def measure_queued(self, runs: int, loops: int) -> Record:
        """Spread over `runs` times of about `loops` queued runs each, and the peak of memory."""
        launches = max(1, loops // self.runs)
        self.device.start_peak()
        for _ in range(2):
            self.queued_ms(launches)
        spread = Spread.of([self.queued_ms(launches) for _ in range(runs)])
        return spread._asdict() | (self.peak or self.device.peak())


def time_ms(call: Callable[[], Any]) -> float:
    """Wall time of one call; the call itself must wait for its result."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def median_ms(call: Callable[[], Any], runs: int) -> float:
    """Median wall time of calls that wait for their results, after one that is not timed."""
    call()
    return Spread.of([time_ms(call) for _ in range(runs)]).median_ms
