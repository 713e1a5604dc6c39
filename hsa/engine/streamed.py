"""Tensors that several threads compute in slices: the decision for each tensor, and the shared work of measuring it.

A thread that needs a tensor's decision helps to measure it: it draws slices of the current pass until none is left,
then waits for the other threads. So all threads work on a large tensor, and none can wait for a slice that nobody has
drawn. The result of a pass does not depend on which thread measured which slice, because methods add up with
`hsa.methods.sums`.

Slices are kept from the first pass on, so that the sources are read once. All slices are kept of a tensor that takes up
to KEPT_BYTES in all sources together. Of any other tensor, the leading slices that are equal in all sources are kept,
one copy for all of them, up to KEPT_BYTES. All other slices are read again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from hsa.backends.base import NotFinite, Worker
from hsa.engine.buffer_pool import BufferPool
from hsa.engine.kept_slices import Buffers, KeptSlices
from hsa.engine.source_facts import SourceFacts
from hsa.methods.base import Method, NotFiniteSums
from hsa.methods.copied import COPIED
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.planning.equal_sources import may_be_copied
from hsa.planning.file_layout import Computed, pieces_of

KEPT_BYTES = 128 << 20
"""Bytes of a tensor that are kept in memory between passes: over all sources, or of one source where all are equal."""

Read = Callable[[Computed], Buffers]
"""Reads a slice of every source."""


class StreamedTensor:
    """A tensor whose slices are computed by several threads."""

    def __init__(self, task: TensorTask, method: Method[Any, Any], settings: Settings, pool: BufferPool) -> None:
        self.task, self._method, self._settings, self._pool = task, method, settings, pool
        self.pieces = pieces_of(task)
        self.facts = SourceFacts(task) if task.listed else None
        self._kept = KeptSlices(task, pool, KEPT_BYTES)
        self._may_be_copied = may_be_copied(task, method, settings)
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._measuring: set[int] = set()
        self._begin(0)
        self._decision: Any = None
        self._decided = not task.passes and not self._may_be_copied
        if self._decided and task.merged:
            self._decision = method.decide(task, None, settings, None)
        self._left = len(self.pieces)
        self._held = self.cost
        self.opened = threading.Event()

    @property
    def keeps(self) -> bool:
        """Whether slices of all sources are kept between passes."""
        return self.task.passes > 0 and self._bytes <= KEPT_BYTES

    @property
    def cost(self) -> int:
        """The most bytes of memory that the tensor takes until its last slice is computed."""
        if self.keeps:
            return self._bytes
        return min(self.task.sources[self.task.anchor].nbytes, KEPT_BYTES) if self._may_be_copied else 0

    @property
    def _bytes(self) -> int:
        return sum(ref.nbytes for ref in self.task.sources.values())

    def decision(self, worker: Worker, read: Read) -> Any:
        """Return the decision for the tensor, and help to measure the tensor until it is known.

        Raises NotFinite, SourceChanged, MachineError.
        """
        while (number := self._draw()) is not None:
            try:
                self._measure(number, worker, read)
            except BaseException as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()
                raise
        return self._decision

    def take(self, piece: Computed) -> Buffers | None:
        """Remove a kept slice and return it, or None; waits while another thread measures it."""
        with self._changed:
            while piece.first in self._measuring:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
        return self._kept.take(piece)

    def finish(self) -> bool:
        """Count a computed slice, and return whether it was the last."""
        with self._changed:
            self._left -= 1
            return self._left == 0

    def free(self) -> int:
        """Return the bytes of memory to release for the tensor: all that it holds on the first call, 0 after that."""
        with self._changed:
            held, self._held = self._held, 0
            return held

    def _begin(self, number: int) -> None:
        """Begin a pass; the caller holds the lock, or is the constructor."""
        self._number, self._next = number, 0
        self._results: list[list[Any]] = [[] for _ in self.pieces]

    def _draw(self) -> int | None:
        """The number of the next slice to measure, or None once the tensor is decided.

        Waits while other threads measure the last slices.
        """
        with self._changed:
            while not self._decided:
                if self._failure is not None:
                    raise self._failure
                if self._next < len(self.pieces):
                    self._next += 1
                    self._measuring.add(self.pieces[self._next - 1].first)
                    return self._next - 1
                self._changed.wait()
            return None

    def _measure(self, number: int, worker: Worker, read: Read) -> None:
        piece, first_pass = self.pieces[number], self._number == 0
        kept = self._kept.look_at(piece)
        buffers = read(piece) if kept is None else kept
        if first_pass and self.facts is not None:
            self.facts.add(piece, buffers)
        result: list[Any] = []
        if self.task.passes:
            result = worker.measure_slice(piece, buffers, self._number, self._decision)
        if kept is None:
            self._keep(piece, buffers)
        with self._changed:
            self._results[number] = result
            self._measuring.remove(piece.first)
            differs = self._may_be_copied and not self._all_equal
            if (differs and not self.task.passes) or (self._next == len(self.pieces) and not self._measuring):
                self._end_pass()
            surplus = self._surplus() if differs else 0
            self._changed.notify_all()
        if surplus:
            self._pool.release(surplus)

    @property
    def _all_equal(self) -> bool:
        """Whether all sources are equal in all slices seen so far."""
        return self.facts is not None and self.facts.all_equal

    def _keep(self, piece: Computed, buffers: Buffers) -> None:
        """Keep a slice that was read and measured, if it is needed again and there is room."""
        if self._number == 0 and self._may_be_copied and self._all_equal:
            self._kept.keep_once(piece, buffers)
        elif self.keeps or not self.task.passes:
            self._kept.keep(piece, buffers)
        else:
            self._pool.give_back_all(buffers.values())

    def _surplus(self) -> int:
        """Give up the memory held for equal slices that will not come; return its bytes. The caller holds the lock."""
        if self.keeps or not self._held:
            return 0
        surplus, self._held = self._held - self._kept.shared_bytes, self._kept.shared_bytes
        return surplus

    def _end_pass(self) -> None:
        """Decide after a finished pass, or at the first slice that differs; the caller holds the lock."""
        if self._decided:
            return
        if self._number == 0 and self._may_be_copied and self._all_equal:
            self._decision, self._decided = COPIED, True
            return
        measured = None
        if self.task.passes:
            try:
                measured = self._method.gather(self.task, [[each for part in self._results for each in part]])
            except NotFiniteSums:
                raise NotFinite(None, None) from None
        self._decision = self._method.decide(self.task, measured, self._settings, self._decision)
        self._decided = self._number + 1 >= self.task.passes
        if not self._decided:
            self._begin(self._number + 1)
