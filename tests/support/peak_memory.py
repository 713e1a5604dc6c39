"""How much memory some work holds at a time, as Python and numpy allocate it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

RUNS = 3
"""Runs of which the least peak counts."""


def with_peak(work: Callable[[], Result], enough: float) -> tuple[Result, int]:
    """What `work` returns, and the most bytes that it held at a time beside what was held before.

    Everything that the process allocates is counted, also by threads that earlier tests left. So where a run holds more
    than `enough`, the work runs again, and the least of RUNS peaks is given.
    """
    peaks: list[int] = []
    while True:
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            result = work()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
        if peaks[-1] <= enough or len(peaks) == RUNS:
            return result, min(peaks)
