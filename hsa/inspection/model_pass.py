"""One pass over every tensor that a merge of whole models computes: decided as the merge decides it, then summed up.

Threads draw slices in order, as in a merge. Where a method measures a tensor before it decides, the engine's own
`StreamedTensor` does, so that thresholds and coefficients are the merge's bit for bit. In memory are the slices under
way and the tensors that the engine keeps between its passes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hsa.backends.base import NotFinite
from hsa.backends.cpu import CpuBackend
from hsa.engine.compute import Calculator, not_finite_error, slice_facts
from hsa.engine.schedule import Schedule
from hsa.engine.streamed import SliceFacts
from hsa.inspection.vector_sums import BlockSums, TensorSums, VectorSums, block_sums, drops, gather, is_finite
from hsa.methods.base import BASE, Method
from hsa.methods.copied import COPIED
from hsa.methods.gram import pairs_of
from hsa.methods.settings import Settings
from hsa.methods.tensors import DistanceSums, Outcome, TensorTask
from hsa.planning.equal_sources import all_equal, may_be_copied
from hsa.planning.file_layout import Computed, is_whole, pieces_of
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.digests import digest_of_slices
from hsa.system.dtypes import Array

STREAMED = ("flat", "rows", "columns")
"""Layouts whose decisions follow from sums over slices."""


@dataclass(frozen=True)
class InspectedTensor:
    """A tensor to measure: the merge's task, and base's tensor. `decides`: its decision is found, not left open.
    `whole`: the merge holds it whole, and so digests its bytes at once."""

    task: TensorTask
    base: TensorRef | None
    decides: bool
    whole: bool

    @classmethod
    def of(cls, method: Method[Any, Any], task: TensorTask, base: TensorRef | None) -> InspectedTensor:
        """A decision that takes more than sums over slices, such as a decomposition, is left open."""
        decides = method.elementwise and task.layout in STREAMED
        return cls(task if decides else replace(task, layout="flat", passes=0), base, decides, is_whole(task))

    @property
    def pieces(self) -> tuple[Computed, ...]:
        """The slices in which it is read."""
        return (Computed(self.task, 0, math.prod(self.task.shape)),) if self.whole else pieces_of(self.task)

    @property
    def shown(self) -> TensorTask:
        """The task with base among its sources, also where the method does not use it."""
        if self.base is None or BASE in self.task.sources:
            return self.task
        return replace(self.task, sources={BASE: self.base, **self.task.sources})

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in all sources."""
        return sum(ref.nbytes for ref in self.shown.sources.values())


@dataclass(frozen=True)
class TensorFindings:
    """What was found of a tensor: its outcome, whose decision is None where it was left open, and its sums."""

    outcome: Outcome
    sums: TensorSums


@dataclass
class _Progress:
    """A tensor while threads measure it: by the first element of a slice, what was found there."""

    target: InspectedTensor
    left: int
    facts: dict[int, SliceFacts] = field(default_factory=dict)
    parts: dict[int, list[BlockSums]] = field(default_factory=dict)


class ModelPass:
    """The pass over some tensors of open sources: of those that are merged, and of base where the method uses none."""

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
        """The findings of each target, in their order. `progress` is called with bytes done so far.

        Raises NonFiniteError, SourceChanged, MachineError, and RequestError where a method can decide nothing.
        """
        slices = []
        for target in targets:
            self._under_way[target.task.name] = _Progress(target, len(target.pieces))
            slices += [(target, piece) for piece in target.pieces]
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
                self._measure_streamed(target, piece, worker, own)
            else:
                with self._calculator.pool.reserve(target.nbytes if target.whole else 0):
                    buffers = self._calculator.read(piece)
                    own.facts[piece.first] = slice_facts(piece, buffers)
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

    def _measure_streamed(self, target: InspectedTensor, piece: Computed, worker: Any, own: _Progress) -> None:
        shared = self._calculator
        tensor = shared.streamed(piece.task)

        def facts(part: Computed, buffers: Mapping[str, Array]) -> SliceFacts:
            own.facts[part.first] = slice_facts(part, buffers)
            return own.facts[part.first]

        try:
            decision = tensor.decision(worker, shared.read, facts, shared.give_back)
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
        """Sum up a slice; its buffers are given back."""
        shown = replace(piece, task=target.shown)
        added = shown.task.sources.keys() - piece.task.sources.keys()
        every = {**self._calculator.read(shown, added), **buffers}
        sums_of = block_sums(self._method, decision, masks=drops(decision))
        parts = worker.each_part(shown, every, sums_of, check=bool(added) or not piece.task.passes)
        for buffer in every.values():
            self._calculator.give_back(buffer)
        with self._lock:
            self._under_way[piece.task.name].parts[piece.first] = parts

    def _finish(self, own: _Progress) -> None:
        """Gather what was found of a tensor, all of whose slices were measured."""
        target, task = own.target, own.target.task
        ordered = [facts for _, facts in sorted(own.facts.items())]
        equal = frozenset.intersection(*(facts.equal for facts in ordered)) if ordered else frozenset()
        decision = self._decision(target, equal)
        blocks = [block for _, parts in sorted(own.parts.items()) for block in parts]
        base = BASE in target.shown.sources
        sums = gather(blocks, task.numbers, len(self._sources.models), base=base, masks=drops(decision))
        if not is_finite(sums):
            raise NotFinite(None, None)
        outcome = Outcome(task, decision, (), _digests(target, ordered), equal, _distance_sums(task, sums.vectors))
        with self._lock:
            self._findings[task.name] = TensorFindings(outcome, sums)
            del self._under_way[task.name]

    def _decision(self, target: InspectedTensor, equal: frozenset[tuple[str, str]]) -> Any:
        task = target.task
        if may_be_copied(task, self._method, self._settings) and all_equal(task, equal):
            return COPIED
        if task.passes:
            return self._calculator.outcomes[task.name].decision
        return self._method.decide(task, None, self._settings, None) if target.decides else None


def _distance_sums(task: TensorTask, vectors: VectorSums) -> DistanceSums | None:
    """The sums over all elements, as a merge takes them of a sample; None of a tensor that is merged without base."""
    if BASE not in task.sources or vectors.base is None:
        return None
    numbers = task.numbers
    products = tuple(vectors.product(numbers[one], numbers[two]) for one, two in pairs_of(len(numbers)))
    return DistanceSums(math.prod(task.shape), vectors.base, products, output=False)


def _digests(target: InspectedTensor, facts: Sequence[SliceFacts]) -> dict[str, str]:
    """By role, the digest of the tensor as a merge records it."""
    if target.whole:
        return dict(facts[0].digests)
    return {role: digest_of_slices(each.digests[role] for each in facts) for role in target.task.sources}
