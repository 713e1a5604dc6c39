"""Tensors that are computed in slices, which threads share: what was decided of each, and how they measure together.

A thread that needs the decision of a tensor takes part in measuring it: it draws slices of the pass under way until
none is left, and waits for the others. So all threads work on a large tensor, and none can wait for a slice that nobody
has drawn. What the passes give does not depend on who measured what, for methods take their sums by `hsa.methods.sums`.

Where a tensor fits into memory its slices are kept from the first pass on, so that sources are read once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hsa.backends.base import NotFinite, Worker
from hsa.methods.base import Method, NotFiniteSums
from hsa.methods.copied import COPIED
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.planning.equal_sources import all_equal, may_be_copied
from hsa.planning.file_layout import Computed, pieces_of
from hsa.system.digests import digest_of_slices
from hsa.system.dtypes import Array

KEPT_BYTES = 128 << 20
"""Bytes of a tensor in all sources up to which its slices are kept between the passes."""

KEPT_SLICES = 8
"""Slices of other tensors that are kept where sources are compared: one or two tell most of them apart."""

Pair = tuple[str, str]
Buffers = Mapping[str, Array]


@dataclass(frozen=True)
class SliceFacts:
    """What is kept of a slice of a listed tensor: digests by role, and the sources that hold equal values in it."""

    digests: Mapping[str, str]
    equal: frozenset[Pair]


Read = Callable[[Computed], Buffers]
"""Reads a slice of every source."""

Facts = Callable[[Computed, Buffers], SliceFacts]
"""Digests a slice, and compares the sources in it."""

GiveBack = Callable[[Array], None]


class StreamedTensor:
    """One tensor of which threads compute slices."""

    def __init__(self, task: TensorTask, method: Method[Any, Any], settings: Settings) -> None:
        self.task, self._method, self._settings = task, method, settings
        self.pieces = pieces_of(task)
        self._changed = threading.Condition()
        self._facts: dict[int, SliceFacts] = {}
        self._kept: dict[int, Buffers] = {}
        self._failure: BaseException | None = None
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
        """Whether slices are kept between the passes."""
        total: int = sum(ref.nbytes for ref in self.task.sources.values())
        return self.task.passes > 0 and total <= KEPT_BYTES

    @property
    def cost(self) -> int:
        """Bytes of memory that the tensor takes until its last slice is computed."""
        total: int = sum(ref.nbytes for ref in self.task.sources.values())
        return total if self.keeps else 0

    @property
    def _may_be_copied(self) -> bool:
        """Whether the tensor is copied where it is equal in all sources, which have to be compared for that."""
        return may_be_copied(self.task, self._method, self._settings)

    def decision(self, worker: Worker, read: Read, facts: Facts, give_back: GiveBack) -> Any:
        """What is decided of the tensor; takes part in measuring it until that is known.

        Raises NotFinite, SourceChanged, MachineError.
        """
        while (number := self._draw()) is not None:
            try:
                self._measure(number, worker, read, facts, give_back)
            except BaseException as error:
                with self._changed:
                    self._failure = self._failure or error
                    self._changed.notify_all()
                raise
        return self._decision

    def take(self, piece: Computed) -> Buffers | None:
        """The slice where it was kept; it is the caller's now."""
        with self._changed:
            return self._kept.pop(piece.first, None)

    def add_facts(self, piece: Computed, facts: SliceFacts) -> None:
        with self._changed:
            self._facts.setdefault(piece.first, facts)

    def has_facts(self, piece: Computed) -> bool:
        with self._changed:
            return piece.first in self._facts

    def finish(self) -> bool:
        """Count a slice that was computed; whether it was the last."""
        with self._changed:
            self._left -= 1
            return self._left == 0

    def free(self) -> int:
        """The bytes of memory to give back for the tensor: its cost the first time, then nothing."""
        with self._changed:
            held, self._held = self._held, 0
            return held

    def digests(self) -> dict[str, str]:
        """By role, the digest over the digests of all slices."""
        slices = [facts for _, facts in sorted(self._facts.items())]
        return {role: digest_of_slices(facts.digests[role] for facts in slices) for role in self.task.sources}

    @property
    def equal(self) -> frozenset[Pair]:
        """The pairs of sources that hold equal values in all slices."""
        return frozenset.intersection(*(facts.equal for facts in self._facts.values()))

    def _begin(self, number: int) -> None:
        """Begin a pass; the caller holds the lock, or is the first."""
        self._number, self._next, self._measuring = number, 0, 0
        self._results: list[list[Any]] = [[] for _ in self.pieces]

    def _draw(self) -> int | None:
        """The next slice to measure; None where all is decided. Waits while others measure the last ones."""
        with self._changed:
            while not self._decided:
                if self._failure is not None:
                    raise self._failure
                if self._next < len(self.pieces):
                    self._next += 1
                    self._measuring += 1
                    return self._next - 1
                self._changed.wait()
            return None

    def _measure(self, number: int, worker: Worker, read: Read, facts: Facts, give_back: GiveBack) -> None:
        piece, first_pass = self.pieces[number], self._number == 0
        with self._changed:
            kept = self._kept.get(piece.first)
        buffers = read(piece) if kept is None else kept
        if first_pass and self.task.listed and not self.has_facts(piece):
            self.add_facts(piece, facts(piece, buffers))
        result: list[Any] = []
        if self.task.passes:
            result = worker.measure_slice(piece, buffers, self._number, self._decision)
        with self._changed:
            keep = self.keeps or (not self.task.passes and len(self._kept) < KEPT_SLICES)
            if keep:
                self._kept[piece.first] = buffers
            self._results[number] = result
            self._measuring -= 1
            differs = first_pass and not self.task.passes and not self._all_equal()
            if differs or (self._next == len(self.pieces) and not self._measuring):
                self._end_pass(last=differs)
            self._changed.notify_all()
        if not keep:
            for buffer in buffers.values():
                give_back(buffer)

    def _all_equal(self) -> bool:
        """Whether all sources are equal in all slices that were looked at."""
        return all_equal(self.task, self.equal)

    def _end_pass(self, *, last: bool) -> None:
        """Decide by a finished pass; the caller holds the lock."""
        if self._decided:
            return
        if self._number == 0 and not last and self._may_be_copied and self._all_equal():
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
