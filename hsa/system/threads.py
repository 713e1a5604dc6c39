"""The number of threads that a merge uses by default, and running work in them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from hsa.errors import MachineError, RequestError, shown
from hsa.option_names import option, with_current_spelling

EXTRA_THREADS = 1
"""Threads beyond the cores: while one waits for the disk, another computes."""

MAX_THREADS = 8
"""More wait on the disk and hold memory without finishing sooner."""

MOST_ALLOWED = 256
"""Threads that a caller may ask for."""

WATCH_SECONDS = 0.02
"""Between two looks at threads that work."""


def usable_cores() -> int:
    """The cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def default_threads() -> int:
    """The cores this process may use and one more, at most 8."""
    return min(usable_cores() + EXTRA_THREADS, MAX_THREADS)


def check_threads(threads: int | None) -> None:
    """RequestError unless it is a number of threads, or None."""
    is_integer = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (is_integer and 1 <= threads <= MOST_ALLOWED):
        raise RequestError(f"{option('threads')} must be a whole number from 1 to {MOST_ALLOWED}, got {shown(threads)}")


def out_of_memory() -> str:
    """What a message says where memory ran out."""
    return f"out of memory; give {option('threads', 1)}, or free some"


def supervise(
    count: int, work: Callable[[], None], stop: Callable[[BaseException], None], watch: Callable[[], None]
) -> None:
    """Run `work` in `count` threads until all have ended; meanwhile `watch` is called from this one, again and again.

    `work` raises nothing. When this thread is interrupted, or `watch` raises, `stop` gets the error, must make the
    threads end, and the error goes on when they have. MachineError where they cannot be started.
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
