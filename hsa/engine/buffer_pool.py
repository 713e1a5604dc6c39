"""Memory shared by threads: a pool of reusable buffers, and a budget for computations in progress."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from hsa.backends.base import Backend
from hsa.system.dtypes import Array

BUDGET_BYTES = 80 << 20
"""Memory of all computations in progress: four float32 targets of large-v3, whatever the number of threads."""

SPARE_BYTES = 48 << 20
"""Memory of buffers kept for reuse."""


class BufferPool:
    """Memory shared by threads: reusable buffers by size, and a budget of bytes for computations in progress."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._lock = threading.Condition()
        self._in_use = 0
        self._budget = BUDGET_BYTES
        self._spare: list[Array] = []

    def buffer(self, nbytes: int) -> Array:
        """Return an uninitialised buffer, reusing a spare one of that size if there is one."""
        with self._lock:
            for position, spare in enumerate(self._spare):
                if spare.size == nbytes:
                    return self._spare.pop(position)
        return self.backend.empty(nbytes)

    def give_back(self, buffer: Array) -> None:
        with self._lock:
            self._spare.append(buffer)
            while sum(spare.size for spare in self._spare) > SPARE_BYTES:
                del self._spare[0]

    def give_back_all(self, buffers: Iterable[Array]) -> None:
        """Take back these buffers; a buffer that several sources share is taken back once."""
        for buffer in {id(buffer): buffer for buffer in buffers}.values():
            self.give_back(buffer)

    @contextmanager
    def reserve(self, cost: int) -> Iterator[None]:
        """Wait until the budget has room for one more computation; one that exceeds the budget runs alone."""
        self.take(cost)
        try:
            yield
        finally:
            self.release(cost)

    def widen(self, budget: int) -> None:
        """Raise the budget to this many bytes, unless it is larger already."""
        with self._lock:
            self._budget = max(self._budget, budget)
            self._lock.notify_all()

    def take(self, cost: int) -> None:
        """Like `reserve`, but held until `release` is called."""
        with self._lock:
            while cost and self._in_use and self._in_use + cost > self._budget:
                self._lock.wait()
            self._in_use += cost

    def release(self, cost: int) -> None:
        with self._lock:
            self._in_use -= cost
            self._lock.notify_all()
