"""Copies of large arrays by several threads.

New memory is slow to write to, for the system makes its pages one by one: 4 GB/s a thread beside an
H100, less than the masks of many prompts come with.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 2**22  # that a thread copies at once
_THREADS = 8


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, for arrays of one shape and dtype without gaps."""
    target, source = target.reshape(-1), source.reshape(-1)
    length = _BYTES // source.itemsize
    starts = range(0, len(source), length)

    def copy_piece(start: int) -> None:
        target[start : start + length] = source[start : start + length]

    # A list, so that all is copied when this returns, and what fails is raised.
    list(map(copy_piece, starts) if len(starts) < 2 else _threads().map(copy_piece, starts))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "copying")
