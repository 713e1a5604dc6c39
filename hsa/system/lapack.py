"""Identify the library behind numpy's linear algebra, and run it with one thread, so that results are deterministic.

A BLAS adds in a different order with another number of threads, and on another kind of processor.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any


class _OneThread:
    """A context in which BLAS has one thread.

    Most libraries have one thread count for the whole process: the first thread that enters saves it, and the last one
    that leaves restores it. Libraries with OpenMP have one count per thread, and each thread restores its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[int] = []
        self._own = threading.local()

    def __enter__(self) -> None:
        with self._lock:
            own = [library.num_threads for library in _libraries()]
            first = self._inside == 0
            if first:
                self._before = own
            self._inside += 1
            self._own.before = [*getattr(self._own, "before", ()), own]
            for library in _libraries():
                if first or _has_own(library):
                    _set_threads(library, 1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            own = self._own.before.pop()
            for library, threads, threads_here in zip(_libraries(), self._before, own, strict=True):
                if _has_own(library):
                    _set_threads(library, threads_here)
                elif self._inside == 0:
                    _set_threads(library, threads)


one_thread = _OneThread()
"""A context in which numpy's linear algebra runs with one thread per caller; several threads may be in it at once.

Example:
    >>> import numpy as np
    >>> with one_thread:
    ...     np.linalg.svd(np.eye(2), compute_uv=False).tolist()
    [1.0, 1.0]
"""


def description() -> str:
    """Name the library behind numpy's linear algebra, its version, and the kind of processor that it computes for.

    Example:
        >>> description()  # doctest: +SKIP
        'openblas 0.3.31 SkylakeX'
    """
    import numpy as np

    built = np.show_config(mode="dicts")["Build Dependencies"]["lapack"]
    loaded: dict[str, Any] = _libraries()[0].info() if _libraries() else {}
    name = loaded.get("internal_api") or built.get("name", "lapack")
    said = (name, loaded.get("version") or built.get("version"), loaded.get("architecture"))
    return " ".join(str(each) for each in said if each)


@cache
def _libraries() -> tuple[Any, ...]:
    """Return the controllers of numpy's BLAS threads, usually of one library."""
    import numpy  # noqa: F401  (its BLAS must be loaded)
    from threadpoolctl import ThreadpoolController

    blas = ThreadpoolController().select(user_api="blas").lib_controllers
    return tuple(library for library in blas if "numpy" in library.filepath) or tuple(blas)


def _has_own(library: Any) -> bool:
    """Whether a library has a separate thread count for each thread."""
    return getattr(library, "threading_layer", None) == "openmp"


def _set_threads(library: Any, threads: int) -> None:
    """Set a library's thread count. From version 3.8 on, threadpoolctl lets only one thread at a time control a library
    and silently ignores the others. Threads inside `one_thread` take turns, so each of them may."""
    release = getattr(library, "clear_controlling_thread", None)
    if release is not None:
        release(force=True)
    library.set_num_threads(threads)
    if release is not None:
        release(force=True)
