"""Slices of a tensor that are kept because the run needs them again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from hsa.engine.buffer_pool import BufferPool
from hsa.methods.tensors import TensorTask
from hsa.planning.file_layout import Computed
from hsa.sources.roles import Role
from hsa.system.dtypes import Array, size
from hsa.system.scratch_file import ScratchFile

Buffers = Mapping[Role, Array]
"""A slice of every source: uint8. Sources that are equal in it may share one buffer."""

NewScratchFile = Callable[[], ScratchFile]


class KeptSlices:
    """Slices that are kept, by their first element; from several threads, of which one at a time has a slice.

    A slice that is equal in all sources is kept once: in memory up to `room` bytes of the tensor, then in a scratch
    file where there is one. What does not fit is not kept, and has to be read again.
    """

    def __init__(self, task: TensorTask, pool: BufferPool, room: int, scratch: NewScratchFile | None) -> None:
        self._task, self._pool, self._room, self._new_scratch = task, pool, room, scratch
        self._width = size(task.stored.code)
        self._in_memory: dict[int, Buffers] = {}
        self._in_file: set[int] = set()
        self._scratch: ScratchFile | None = None
        self._lock = threading.Lock()
        self.shared_bytes = 0

    def keep(self, piece: Computed, buffers: Buffers) -> None:
        """Keep a slice of every source as it is."""
        with self._lock:
            self._in_memory[piece.first] = buffers

    def keep_once(self, piece: Computed, buffers: Buffers) -> None:
        """Keep a slice that is equal in all sources; what is not kept goes back to the pool."""
        buffer = buffers[self._task.anchor]
        self._pool.give_back_all(other for other in buffers.values() if other is not buffer)
        with self._lock:
            fits = self.shared_bytes + buffer.nbytes <= self._room
            if fits:
                self.shared_bytes += buffer.nbytes
                self._in_memory[piece.first] = dict.fromkeys(buffers, buffer)
        if not fits:
            self._write(piece, buffer)
            self._pool.give_back(buffer)

    def look_at(self, piece: Computed) -> Buffers | None:
        """A slice that stays kept, until `put_back`; None where it is not kept."""
        with self._lock:
            buffers = self._in_memory.get(piece.first)
        return self._read(piece) if buffers is None else buffers

    def put_back(self, piece: Computed, buffers: Buffers) -> None:
        """The end of `look_at`."""
        with self._lock:
            stays = self._in_memory.get(piece.first) is buffers
        if not stays:
            self._pool.give_back_all(buffers.values())

    def take(self, piece: Computed) -> Buffers | None:
        """A slice that is the caller's from now on; None where it is not kept."""
        with self._lock:
            buffers = self._in_memory.pop(piece.first, None)
        return self._read(piece) if buffers is None else buffers

    def close(self) -> None:
        """Let go of the scratch file; nothing is kept in it any more."""
        with self._lock:
            scratch, self._scratch = self._scratch, None
            self._in_file.clear()
        if scratch is not None:
            scratch.close()

    def _write(self, piece: Computed, buffer: Array) -> None:
        """Keep a slice in the scratch file; a filesystem that does not take it is not asked again."""
        try:
            scratch = self._open()
            if scratch is None:
                return
            scratch.write(buffer.data, piece.first * self._width)
        except OSError:
            self._new_scratch = None
            return
        with self._lock:
            self._in_file.add(piece.first)

    def _open(self) -> ScratchFile | None:
        with self._lock:
            if self._scratch is None and self._new_scratch is not None:
                self._scratch = self._new_scratch()
            return self._scratch if self._new_scratch is not None else None

    def _read(self, piece: Computed) -> Buffers | None:
        with self._lock:
            scratch = self._scratch if piece.first in self._in_file else None
        if scratch is None:
            return None
        buffer = self._pool.buffer(piece.count * self._width)
        scratch.read_into(buffer.data, piece.first * self._width)
        return dict.fromkeys(self._task.sources, buffer)
