"""From the sources' bytes to computed bytes: reading, digesting and merging of targets and slices, thread by thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hsa.backends.base import Backend, Merged, NotFinite, TaskBuffers
from hsa.errors import NonFiniteError
from hsa.methods.base import Method
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.methods.tensors import Outcome, TensorTask
from hsa.option_names import option
from hsa.planning.equal_sources import equal_pairs
from hsa.planning.file_layout import Computed
from hsa.sources.source_set import Sources
from hsa.system.digests import digest_of, digest_of_slices
from hsa.system.dtypes import Array, size

BUDGET_BYTES = 80 << 20
"""Memory of all computations under way: four targets of large-v3 in float32, whatever the number of threads."""

SPARE_BYTES = 48 << 20
"""Memory of buffers kept for reuse."""

Ranges = tuple[tuple[int, int], ...]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Computation:
    """Computed bytes, and the ranges of them that may differ from the anchor's."""

    data: Array
    changed: Ranges


@dataclass(frozen=True)
class _SliceFacts:
    """What is kept of a slice of a listed tensor: digests by role, and the sources that hold equal values in it."""

    digests: Mapping[str, str]
    equal: frozenset[Pair]


class BufferPool:
    """Memory that threads share: buffers of given sizes, reused, and a budget of bytes for computations under way."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._lock = threading.Condition()
        self._in_use = 0
        self._spare: list[Array] = []

    def buffer(self, nbytes: int) -> Array:
        """An uninitialised buffer, reused where one of that size is spare."""
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

    @contextmanager
    def reserve(self, cost: int) -> Iterator[None]:
        """Wait until the computations under way leave room for one more; the largest runs alone."""
        with self._lock:
            while self._in_use and self._in_use + cost > BUDGET_BYTES:
                self._lock.wait()
            self._in_use += cost
        try:
            yield
        finally:
            with self._lock:
                self._in_use -= cost
                self._lock.notify_all()


class Calculator:
    """What the threads of a run share: sources, method and settings, finished outcomes by name, and memory.

    `recorded` are decisions that are applied instead of those that follow from the sources, by canonical name.
    """

    def __init__(
        self,
        sources: Sources,
        backend: Backend,
        settings: Settings,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self.sources, self.backend, self.settings, self.recorded = sources, backend, settings, recorded or {}
        self.method: Method[Any, Any] = method_named(settings.method)
        self.pool = BufferPool(backend)
        self.outcomes: dict[str, Outcome] = {}
        self._slices: dict[str, dict[int, _SliceFacts]] = {}
        self._lock = threading.Lock()

    @property
    def group_bytes(self) -> int:
        return self.backend.group_bytes

    def thread(self) -> ComputeThread:
        return ComputeThread(self)

    def give_back(self, buffer: Array) -> None:
        self.pool.give_back(buffer)

    def ordered(self, targets: Sequence[TensorTask]) -> tuple[Outcome, ...]:
        """The outcomes of these targets, which all were computed."""
        return tuple(self.outcomes.get(task.name) or self._joined(task) for task in targets)

    def record(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes[outcome.task.name] = outcome

    def record_slice(self, piece: Computed, facts: _SliceFacts) -> None:
        with self._lock:
            self._slices.setdefault(piece.task.name, {})[piece.first] = facts

    def _joined(self, task: TensorTask) -> Outcome:
        """The outcome of a tensor that was computed in slices: its digests are those of the slices' digests."""
        slices = [facts for _, facts in sorted(self._slices[task.name].items())]
        digests = {role: digest_of_slices(facts.digests[role] for facts in slices) for role in task.sources}
        equal = frozenset.intersection(*(facts.equal for facts in slices))
        decision = self.method.decide(task, None, self.settings, None)
        return Outcome(task, decision, ((0, result_bytes(task)),), digests, equal)


def result_bytes(task: TensorTask) -> int:
    """Bytes of a task's whole result."""
    rows, columns = task.matrix
    return rows * columns * size(task.out_code)


class ComputeThread:
    """One thread's place at a calculator: its worker."""

    def __init__(self, calculator: Calculator) -> None:
        self._shared = calculator
        self._worker = calculator.backend.worker(calculator.method, calculator.settings)

    def compute(self, contents: Sequence[Computed]) -> list[Computation]:
        """Compute whole tensors as a group, or one slice. Raises NonFiniteError, SourceChanged, MachineError."""
        first = contents[0]
        if not first.whole:
            return [self._slice(first)]
        tasks = [content.task for content in contents]
        with self._shared.pool.reserve(sum(map(self._shared.backend.cost, tasks))):
            return self._merge(tasks)

    def _merge(self, tasks: Sequence[TensorTask]) -> list[Computation]:
        shared = self._shared
        jobs, digests, equal = [], [], []
        for task in tasks:
            job = self._job(task)
            task_digests: dict[str, str] = {}
            for role, buffer in job.sources.items():
                shared.sources.of(role).read_into(task.sources[role], buffer.data)
                task_digests[role] = digest_of(buffer.data)
            jobs.append(job)
            digests.append(task_digests)
            equal.append(equal_pairs(task, job.sources))
        try:
            merged: list[Merged] = self._worker.merge_all(jobs)
        except NotFinite as error:
            raise not_finite_error(error, tasks[error.job], shared.sources, shared.method) from None
        for task, result, task_digests, pairs in zip(tasks, merged, digests, equal, strict=True):
            shared.record(Outcome(task, result.decision, result.changed, task_digests, pairs))
        for job in jobs:
            for buffer in job.sources.values():
                if buffer is not job.out:
                    shared.give_back(buffer)
        return [Computation(job.out, result.changed) for job, result in zip(jobs, merged, strict=True)]

    def _job(self, task: TensorTask) -> TaskBuffers:
        """Buffers for a target: the result replaces the anchor's bytes where it has their element type."""
        buffer = self._shared.pool.buffer
        sources = {role: buffer(ref.nbytes) for role, ref in task.sources.items()}
        out = sources[task.anchor]
        if task.load_codes is not None or task.out_code != task.stored.code:
            out = buffer(result_bytes(task))
        return TaskBuffers(task, sources, out, self._shared.recorded.get(task.name))

    def _slice(self, piece: Computed) -> Computation:
        shared, task = self._shared, piece.task
        sources = {}
        for role, ref in task.sources.items():
            width = size(ref.code)
            sources[role] = shared.pool.buffer(piece.count * width)
            shared.sources.of(role).read_into(ref, sources[role].data, piece.first * width)
        if task.listed:
            digests = {role: digest_of(buffer.data) for role, buffer in sources.items()}
            shared.record_slice(piece, _SliceFacts(digests, equal_pairs(task, sources)))
        out = shared.pool.buffer(piece.nbytes)
        try:
            self._worker.slice(piece, sources, out, shared.recorded.get(task.name))
        except NotFinite as error:
            raise not_finite_error(error, task, shared.sources, shared.method) from None
        for buffer in sources.values():
            shared.give_back(buffer)
        return Computation(out, ((0, piece.nbytes),))


def not_finite_error(error: NotFinite, task: TensorTask, sources: Sources, method: Method[Any, Any]) -> NonFiniteError:
    """The error that names file, tensor and head."""
    head = "" if error.group is None or not task.passes else f", head {error.group}"
    scripted = not method.elementwise
    if error.role is not None:
        ref, source = task.sources[error.role], sources.of(error.role)
        read = f", as the script's loader reads it (or give {option('load_dtype', 'float32')})" if scripted else ""
        return NonFiniteError(
            f"{source.file_of(ref)}: tensor {ref.name}{head} holds NaN or Inf{read}; a merge with it would be "
            f"damaged, use a sound checkpoint"
        )
    wider = option("load_dtype", "float32") if scripted else f"{option('dtype', 'float32')} or bfloat16"
    belong = f"do the {'three' if len(sources.roles) == 3 else 'sources'} belong together?"
    remedy = f"compute in a wider type ({wider})" if task.out_code == "F16" else belong
    file = sources.of(task.anchor).file_of(task.sources[task.anchor])
    return NonFiniteError(f"{file}: tensor {task.stored.name}{head}: the result overflows {task.out_code}; {remedy}")
