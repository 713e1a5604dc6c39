"""Choose the default number of threads for a merge, and run work in threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hsa.errors import MachineError, RequestError, shown
from hsa.option_names import option, with_current_spelling

EXTRA_THREADS = 1
"""Threads beyond the cores: while one waits for the disk, another computes."""

MAX_THREADS = 8
"""The most threads by default. More would wait on the disk and hold memory without finishing sooner."""

MOST_ALLOWED = 256
"""The most threads that a caller may ask for."""

WATCH_SECONDS = 0.02
"""Seconds between two checks on running threads."""


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def default_threads() -> int:
    """Return the number of cores that this process may use plus one, at most 8."""
    return min(usable_cores() + EXTRA_THREADS, MAX_THREADS)


def check_threads(threads: int | None) -> None:
    """Raise RequestError unless it is a valid number of threads, or None."""
    is_integer = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (is_integer and 1 <= threads <= MOST_ALLOWED):
        raise RequestError(f"{option('threads')} must be a whole number from 1 to {MOST_ALLOWED}, got {shown(threads)}")


def out_of_memory() -> str:
    """Return the message for running out of memory."""
    return f"out of memory; give {option('threads', 1)}, or free some"


def supervise(
    count: int, work: Callable[[], None], stop: Callable[[BaseException], None], watch: Callable[[], None]
) -> None:
    """Run `work` in `count` threads until all have ended. Meanwhile, this thread calls `watch` repeatedly.

    `work` must not raise. If this thread is interrupted or `watch` raises, `stop` gets the error and must make the
    threads end; the error is raised again once they have ended. MachineError if they cannot be started.
    """
    threads = [threading.Thread(target=with_current_spelling(work), daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(WATCH_SECONDS)
                watch()
    except BaseException as error:
        stop(error)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if isinstance(error, RuntimeError) and not all(thread.ident is not None for thread in threads):
            raise MachineError(f"cannot start {count} threads: {error}; lower {option('threads')}") from error
        raise
