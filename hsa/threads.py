"""How many threads a merge uses unless it is told."""

from __future__ import annotations

import os

EXTRA_THREADS = 1
"""Threads beyond the cores: while one waits for the disk, another computes."""

MAX_THREADS = 8
"""More wait on the disk and hold memory without finishing sooner."""


def default_threads() -> int:
    """The cores this process may use and one more, at most 8."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return min(cores + EXTRA_THREADS, MAX_THREADS)
