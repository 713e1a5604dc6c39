"""One pass over the targets for many settings: each target is read and measured once, and computed for every setting.

A consumer takes the computed rows: `patch_writer` writes them into patch files, and a verification compares them with
those of finished patches. Memory holds the targets in progress, within the budget of a merge, and a fixed amount of
rows for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from hsa.backends.base import NotFinite
from hsa.backends.cpu import CpuBackend, CpuWorker, TouchedGroups
from hsa.engine.buffer_pool import BufferPool
from hsa.engine.compute import not_finite_error
from hsa.engine.schedule import Schedule
from hsa.methods.base import Method
from hsa.methods.tensors import Outcome, TensorTask
from hsa.planning.equal_sources import equal_pairs
from hsa.planning.tasks import Targets
from hsa.planning.tensor_digests import tensor_digest
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.dtypes import Array, size
from hsa.system.huge_pages import allocate

ROWS_BYTES = 12 << 20
"""Memory of a thread for computed rows."""


@dataclass(frozen=True)
class Candidate:
    """A candidate by number: its targets under its settings.

    `recorded` holds decisions by canonical name; they are applied instead of those that follow from the sources.
    """

    number: int
    targets: Targets
    recorded: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TargetDecision:
    """The decision on a target for one candidate: the outcome, the decision that is applied, and the touched groups."""

    candidate: int
    outcome: Outcome
    applied: Any
    groups: tuple[int, ...]

    @property
    def rows_bytes(self) -> int:
        """Bytes of the touched groups' rows."""
        rows, columns = self.outcome.task.matrix
        task = self.outcome.task
        return rows * columns // task.partition.groups * len(self.groups) * size(task.out_code)


class RowsConsumer(Protocol):
    """Takes the touched groups of every target, from several threads."""

    def decided(self, decisions: Sequence[TargetDecision], norms: Any) -> None:
        """Take the decisions on a target for all its candidates; targets come in order. `norms` are the method's
        distance sums."""

    def store(self, decision: TargetDecision, rows: Array) -> None:
        """Take the rows (columns) of the touched groups of a decision, one group after another: uint8."""


@dataclass(frozen=True)
class _Job:
    """A target, and the candidates that include it."""

    number: int
    candidates: tuple[tuple[Candidate, TensorTask], ...]

    @property
    def task(self) -> TensorTask:
        return self.candidates[0][1]


class TargetPass:
    """A pass over the targets of candidates that share a method and the sources."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        sources: Sources,
        consumer: RowsConsumer,
        order: Callable[[TensorTask], Any],
    ) -> None:
        """`order` is the sort key of the targets."""
        self._sources, self._consumer = sources, consumer
        self._backend = CpuBackend()
        self._pool = BufferPool(self._backend)
        self._schedule: Schedule[_Job] = Schedule()
        self._placed = 0
        self.done = 0
        groups: dict[tuple[str, int], list[tuple[Candidate, TensorTask]]] = {}
        for candidate in candidates:
            for task in candidate.targets.tasks:
                groups.setdefault((task.name, task.partition.groups), []).append((candidate, task))
        ordered = sorted(groups.values(), key=lambda group: order(group[0][1]))
        self._jobs = [_Job(number, tuple(group)) for number, group in enumerate(ordered)]
        self._candidates = candidates

    @property
    def source_bytes(self) -> int:
        """The total bytes that are read from the sources."""
        return sum(_cost(job) for job in self._jobs)

    def run(self, threads: int, watch: Callable[[], None]) -> None:
        """Compute every target for every candidate; `watch` is called now and then from this thread.

        Raises NonFiniteError, SourceChanged, MachineError, and what the consumer raises.
        """

        def reserve(job: _Job) -> Callable[[], None]:
            stack = ExitStack()
            stack.enter_context(self._pool.reserve(_cost(job)))
            return stack.close

        self._schedule.run(iter(self._jobs), threads, self._thread, watch, reserve)

    def _thread(self) -> Callable[[_Job], None]:
        first = self._candidates[0].targets
        worker, memory = self._backend.worker(first.method, first.settings), _RowMemory()
        return lambda job: self._merge(job, worker, memory)

    def _merge(self, job: _Job, worker: CpuWorker, memory: _RowMemory) -> None:
        self._schedule.check()
        task = job.task
        data: dict[str, Array] = {}
        digests: dict[str, str] = {}
        for role, ref in task.sources.items():
            data[role] = self._pool.buffer(ref.nbytes)
            self._sources.of(role).read_into(ref, data[role].data)
            digests[role] = tensor_digest(task, role, data[role])
        equal = equal_pairs(task, data)
        method = worker.method
        try:
            measured = worker.measure(task, data)
            norms = method.distance_sums(task, worker.each_block(task, data, method.measure_distances))
            decisions = [
                self._decide(candidate, own, worker, measured, data, digests, equal)
                for candidate, own in job.candidates
            ]
            self._hand_over(job, decisions, norms)
            for group in _groups(decisions):
                outs = memory.split([each.rows_bytes for each in group])
                wanted = [TouchedGroups(each.applied, each.groups, out) for each, out in zip(group, outs, strict=True)]
                worker.touched(task, data, wanted)
                for each, out in zip(group, outs, strict=True):
                    self._schedule.check()
                    self._consumer.store(each, out)
        except NotFinite as error:
            raise not_finite_error(error, task, self._sources, method) from None
        for array in data.values():
            self._pool.give_back(array)
        with self._schedule.changed:
            self.done += _cost(job)

    def _decide(
        self,
        candidate: Candidate,
        task: TensorTask,
        worker: CpuWorker,
        measured: Any,
        data: Mapping[str, Array],
        digests: Mapping[str, str],
        equal: frozenset[tuple[str, str]],
    ) -> TargetDecision:
        method: Method[Any, Any] = candidate.targets.method
        decision = worker.with_settings(candidate.targets.settings).decide(task, measured, data)
        applied = decision if candidate.recorded is None else candidate.recorded.get(task.name, decision)
        untouched = method.untouched(task.partition.groups, applied)
        groups = tuple(group for group in range(task.partition.groups) if group not in untouched)
        return TargetDecision(candidate.number, Outcome(task, decision, (), digests, equal), applied, groups)

    def _hand_over(self, job: _Job, decisions: Sequence[TargetDecision], norms: Any) -> None:
        """Pass the decisions to the consumer, after those of all earlier targets."""
        with self._schedule.changed:
            self._schedule.wait(lambda: self._placed == job.number)
            self._consumer.decided(decisions, norms)
            self._placed += 1
            self._schedule.changed.notify_all()


def _cost(job: _Job) -> int:
    nbytes: int = sum(ref.nbytes for ref in job.task.sources.values())
    return nbytes


class _RowMemory:
    """A thread's memory for rows, in whole pages, so that they can be written with direct I/O."""

    def __init__(self) -> None:
        self._memory = allocate(ROWS_BYTES)

    def split(self, sizes: Sequence[int]) -> list[Array]:
        """Return disjoint, page-aligned arrays of these sizes. The arrays of the previous call are no longer valid."""
        import numpy as np

        starts = [0, *accumulate(_pages(size) for size in sizes)]
        if starts[-1] > len(self._memory):
            self._memory = allocate(starts[-1])
        whole = np.frombuffer(self._memory, np.uint8)
        return [whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _pages(nbytes: int) -> int:
    """Round a number of bytes up to whole pages."""
    return -(-nbytes // fsio.ALIGNMENT) * fsio.ALIGNMENT


def _groups(decisions: Sequence[TargetDecision]) -> Iterator[list[TargetDecision]]:
    """Group decisions so that the rows of each group fit into a thread's memory; a group has at least one decision."""
    group: list[TargetDecision] = []
    filled = 0
    for each in decisions:
        needed = _pages(each.rows_bytes)
        if group and filled + needed > ROWS_BYTES:
            yield group
            group, filled = [], 0
        group.append(each)
        filled += needed
    if group:
        yield group
