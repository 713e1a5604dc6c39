"""One pass over every tensor that a merge of whole models computes: find the merge's decision, then sum up the tensor.

Threads draw slices in order, as in a merge. If a method measures a tensor before it decides, the engine's own
`StreamedTensor` does this too, so that thresholds and coefficients equal those of the merge bit for bit. Memory holds
the slices in progress and the tensors that the engine keeps between its passes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hsa.backends.base import NotFinite
from hsa.backends.cpu import CpuBackend
from hsa.engine.compute import Calculator, not_finite_error
from hsa.engine.schedule import Schedule
from hsa.engine.source_facts import SourceFacts
from hsa.inspection.vector_sums import BlockSums, TensorSums, VectorSums, block_sums, drops, gather, is_finite
from hsa.methods.base import BASE, Method
from hsa.methods.copied import COPIED
from hsa.methods.gram import pairs_of
from hsa.methods.settings import Settings
from hsa.methods.tensors import DistanceSums, Outcome, TensorTask
from hsa.planning.equal_sources import may_be_copied
from hsa.planning.file_layout import Computed, is_whole, pieces_of
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import Array

STREAMED = ("flat", "rows", "columns")
"""The layouts whose decisions follow from sums over slices."""


@dataclass(frozen=True)
class InspectedTensor:
    """A tensor to measure: the merge's task, and base's tensor. `decides` is false if its decision is left open."""

    task: TensorTask
    base: TensorRef | None
    decides: bool

    @classmethod
    def of(cls, method: Method[Any, Any], task: TensorTask, base: TensorRef | None) -> InspectedTensor:
        """The tensor of a task. Its decision is left open if it takes more than sums over slices, such as a
        decomposition."""
        decides = method.elementwise and task.layout in STREAMED
        return cls(task if decides else replace(task, layout="flat", passes=0), base, decides)

    @property
    def whole(self) -> bool:
        """Whether the tensor is read as a whole."""
        return is_whole(self.task)

    @property
    def shown(self) -> TensorTask:
        """The task with base among its sources, even if the method does not use it."""
        if self.base is None or BASE in self.task.sources:
            return self.task
        return replace(self.task, sources={BASE: self.base, **self.task.sources})

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in all sources."""
        return sum(ref.nbytes for ref in self.shown.sources.values())


@dataclass(frozen=True)
class TensorFindings:
    """The findings about a tensor: its outcome, whose decision is None if it was left open, and its sums."""

    outcome: Outcome
    sums: TensorSums


@dataclass
class _Progress:
    """The state of a tensor while threads measure it. `parts` holds the sums of each slice by its first element."""

    target: InspectedTensor
    left: int
    facts: SourceFacts
    parts: dict[int, list[BlockSums]] = field(default_factory=dict)


class ModelPass:
    """The pass over tensors of open sources. It reads base even if the method does not use it."""

    def __init__(self, sources: Sources, method: Method[Any, Any], settings: Settings) -> None:
        self._sources, self._method, self._settings = sources, method, settings
        self._calculator = Calculator(sources, CpuBackend(), settings)
        self._lock = threading.Lock()
        self._under_way: dict[str, _Progress] = {}
        self._findings: dict[str, TensorFindings] = {}
        self._done = 0

    def run(
        self, targets: Sequence[InspectedTensor], threads: int, progress: Callable[[int], None]
    ) -> list[TensorFindings]:
        """The findings of each target, in the order of the targets. `progress` is called with the bytes done so far.

        Raises NonFiniteError, SourceChanged, MachineError, and RequestError if a method cannot decide.
        """
        slices = []
        for target in targets:
            pieces = pieces_of(target.task)
            self._under_way[target.task.name] = _Progress(target, len(pieces), SourceFacts(target.task))
            slices += [(target, piece) for piece in pieces]
        schedule: Schedule[tuple[InspectedTensor, Computed]] = Schedule()
        schedule.run(iter(slices), threads, self._thread, lambda: progress(self._done))
        progress(self._done)
        return [self._findings[target.task.name] for target in targets]

    def _thread(self) -> Callable[[tuple[InspectedTensor, Computed]], None]:
        worker = self._calculator.backend.worker(self._method, self._settings)
        return lambda drawn: self._measure(*drawn, worker)

    def _measure(self, target: InspectedTensor, piece: Computed, worker: Any) -> None:
        task, own = piece.task, self._under_way[target.task.name]
        try:
            if task.passes:
                self._measure_streamed(target, piece, worker)
            else:
                with self._calculator.pool.reserve(target.nbytes if target.whole else 0):
                    buffers = self._calculator.read(piece)
                    own.facts.add(piece, buffers)
                    decision = self._method.decide(task, None, self._settings, None) if target.decides else None
                    self._sum_up(target, piece, worker, decision, buffers)
            with self._lock:
                own.left -= 1
                self._done += target.nbytes * piece.count // max(1, math.prod(task.shape))
                last = own.left == 0
            if last:
                self._finish(own)
        except NotFinite as error:
            raise not_finite_error(error, target.shown, self._sources, self._method) from None

    def _measure_streamed(self, target: InspectedTensor, piece: Computed, worker: Any) -> None:
        shared = self._calculator
        tensor = shared.streamed(piece.task)
        try:
            decision = tensor.decision(worker, shared.read)
            buffers = tensor.take(piece) or shared.read(piece)
            self._sum_up(target, piece, worker, decision, buffers)
        except BaseException:
            shared.abandon(tensor)
            raise
        if tensor.finish():
            shared.finish(tensor, decision)

    def _sum_up(
        self, target: InspectedTensor, piece: Computed, worker: Any, decision: Any, buffers: Mapping[str, Array]
    ) -> None:
        """Sum up a slice and return its buffers to the pool."""
        shown = replace(piece, task=target.shown)
        added = shown.task.sources.keys() - piece.task.sources.keys()
        every = {**self._calculator.read(shown, added), **buffers}
        sums_of = block_sums(self._method, decision, masks=drops(decision))
        parts = worker.each_part(shown, every, sums_of, check=bool(added) or not piece.task.passes)
        self._calculator.pool.give_back_all(every.values())
        with self._lock:
            self._under_way[piece.task.name].parts[piece.first] = parts

    def _finish(self, own: _Progress) -> None:
        """Combine the sums of a tensor once all its slices are measured."""
        target, task = own.target, own.target.task
        outcome = self._calculator.outcomes[task.name] if task.passes else self._outcome(own)
        decision = outcome.decision
        blocks = [block for _, parts in sorted(own.parts.items()) for block in parts]
        base = BASE in target.shown.sources
        sums = gather(blocks, task.numbers, len(self._sources.models), base=base, masks=drops(decision))
        if not is_finite(sums):
            raise NotFinite(None, None)
        outcome = replace(outcome, sums=_distance_sums(task, sums.vectors))
        with self._lock:
            self._findings[task.name] = TensorFindings(outcome, sums)
            del self._under_way[task.name]

    def _outcome(self, own: _Progress) -> Outcome:
        """The outcome of a merge for a tensor that it does not measure."""
        target, task, facts = own.target, own.target.task, own.facts
        decision = None
        if may_be_copied(task, self._method, self._settings) and facts.all_equal:
            decision = COPIED
        elif target.decides:
            decision = self._method.decide(task, None, self._settings, None)
        return Outcome(task, decision, (), facts.digests(), facts.equal)


def _distance_sums(task: TensorTask, vectors: VectorSums) -> DistanceSums | None:
    """The sums over all elements, in the form in which a merge takes them over a sample; None for a tensor that is
    merged without base."""
    if BASE not in task.sources or vectors.base is None:
        return None
    numbers = task.numbers
    products = tuple(vectors.product(numbers[one], numbers[two]) for one, two in pairs_of(len(numbers)))
    return DistanceSums(math.prod(task.shape), vectors.base, products, output=False)
