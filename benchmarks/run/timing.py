"""How timed runs are summarised: median and quartiles, never the mean."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


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


def time_ms(call: Callable[[], Any]) -> float:
    """Wall time of one call; the call itself must wait for its result."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def queued_ms(launch: Callable[[], Any], wait: Callable[[Any], Any], runs: int) -> float:
    """Wall time of a run where every run is launched before the one before it has ended."""
    start = time.perf_counter()
    for _ in range(runs - 1):
        launch()
    wait(launch())
    return (time.perf_counter() - start) * 1e3 / runs
