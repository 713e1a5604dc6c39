"""A cache of a tensor's slices that the run needs again."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from hsa.engine.buffer_pool import BufferPool
from hsa.methods.tensors import TensorTask
from hsa.planning.file_layout import Computed
from hsa.sources.roles import Role
from hsa.system.dtypes import Array

Buffers = Mapping[Role, Array]
"""A slice of every source: uint8. Sources that are equal in it may share one buffer."""


class KeptSlices:
    """A thread-safe cache of slices, by their first element; only one thread at a time uses a given slice.

    A slice that is equal in all sources is kept once, up to `room` bytes of the tensor. Slices that do not fit are not
    kept and have to be read again.
    """

    def __init__(self, task: TensorTask, pool: BufferPool, room: int) -> None:
        self._task, self._pool, self._room = task, pool, room
        self._kept: dict[int, Buffers] = {}
        self._lock = threading.Lock()
        self.shared_bytes = 0

    def keep(self, piece: Computed, buffers: Buffers) -> None:
        """Keep a slice of every source as it is."""
        with self._lock:
            self._kept[piece.first] = buffers

    def keep_once(self, piece: Computed, buffers: Buffers) -> None:
        """Keep a slice that is equal in all sources; the buffers that are not kept go back to the pool."""
        buffer = buffers[self._task.anchor]
        with self._lock:
            fits = self.shared_bytes + buffer.nbytes <= self._room
            if fits:
                self.shared_bytes += buffer.nbytes
                self._kept[piece.first] = dict.fromkeys(buffers, buffer)
        self._pool.give_back_all(other for other in buffers.values() if not fits or other is not buffer)

    def look_at(self, piece: Computed) -> Buffers | None:
        """Return a kept slice without removing it; None if it is not kept."""
        with self._lock:
            return self._kept.get(piece.first)

    def take(self, piece: Computed) -> Buffers | None:
        """Remove a kept slice and hand it over to the caller; None if it is not kept."""
        with self._lock:
            return self._kept.pop(piece.first, None)
