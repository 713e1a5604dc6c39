"""Compute output bytes from the sources' bytes: read, digest and merge targets and slices, in several threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hsa.backends.base import Backend, Merged, NotFinite, TaskBuffers, changed_ranges
from hsa.engine.buffer_pool import BufferPool
from hsa.engine.streamed import StreamedTensor
from hsa.errors import NonFiniteError
from hsa.methods.base import Method
from hsa.methods.copied import COPIED
from hsa.methods.distance_sums import added
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.methods.tensors import DistanceSums, Outcome, TensorTask
from hsa.option_names import option
from hsa.planning.equal_sources import all_equal, equal_pairs, may_be_copied
from hsa.planning.file_layout import Computed
from hsa.planning.tensor_digests import tensor_digest
from hsa.sources.source_set import Sources
from hsa.system.dtypes import Array, size
from hsa.system.threads import usable_cores

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Computation:
    """Computed bytes, and the ranges of them that may differ from the anchor's."""

    data: Array
    changed: Ranges


class Calculator:
    """The state shared by the threads of a run: sources, method and settings, finished outcomes by name, and memory.

    `recorded` holds decisions by canonical name; they are applied instead of those that follow from the sources.
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
        self._streamed: dict[str, StreamedTensor] = {}
        self._sums: dict[str, dict[int, DistanceSums]] = {}
        self._lock = threading.Lock()

    @property
    def group_bytes(self) -> int:
        return self.backend.group_bytes

    def thread(self) -> ComputeThread:
        return ComputeThread(self)

    def give_back(self, buffer: Array) -> None:
        self.pool.give_back(buffer)

    def cost(self, tasks: Sequence[TensorTask]) -> int:
        """Bytes of memory needed to compute these tensors together.

        If the method's own working memory is most of it, the budget is widened so that every core can compute one of
        the largest.
        """
        work = sum(self.method.work_bytes(task, self.settings) for task in tasks)
        cost = work + sum(map(self.backend.cost, tasks))
        if work:
            self.pool.widen(usable_cores() * cost)
        return cost

    def ordered(self, targets: Sequence[TensorTask]) -> tuple[Outcome, ...]:
        """The outcomes of these targets, all of which have been computed."""
        return tuple(self.outcomes[task.name] for task in targets)

    def record(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes[outcome.task.name] = outcome

    def reserve(self, contents: Sequence[Computed]) -> Callable[[], None]:
        """Wait for the memory to compute these contents, and return a function that releases it.

        A slice waits for the memory of its tensor, which is held until the tensor's last slice is computed.
        """
        if not contents[0].whole:
            self.streamed(contents[0].task)
            return lambda: None
        cost = self.cost([content.task for content in contents])
        self.pool.take(cost)
        return lambda: self.pool.release(cost)

    def streamed(self, task: TensorTask) -> StreamedTensor:
        """The tensor that a slice belongs to; its memory is reserved when it is first requested."""
        with self._lock:
            tensor = self._streamed.get(task.name)
            new = tensor is None
            if tensor is None:
                tensor = self._streamed[task.name] = StreamedTensor(task, self.method, self.settings, self.pool)
        if new:
            self.pool.take(tensor.cost)
            tensor.opened.set()
        tensor.opened.wait()
        return tensor

    def finish(self, tensor: StreamedTensor, decision: Any) -> None:
        """Record a tensor whose slices have all been computed, and free its memory."""
        task = tensor.task
        if tensor.facts is not None:
            changed = changed_ranges(task, frozenset({0}) if decision is COPIED else frozenset())
            self.record(
                Outcome(task, decision, changed, tensor.facts.digests(), tensor.facts.equal, self._sums_of(task))
            )
        with self._lock:
            del self._streamed[task.name]
        self.pool.release(tensor.free())

    def add_sums(self, piece: Computed, sums: DistanceSums | None) -> None:
        """Keep the sums of a slice until its tensor is finished."""
        if sums is not None:
            with self._lock:
                self._sums.setdefault(piece.task.name, {})[piece.first] = sums

    def _sums_of(self, task: TensorTask) -> DistanceSums | None:
        """The sums of a tensor whose slices have all been computed."""
        with self._lock:
            slices = self._sums.pop(task.name, {})
        return added(sums for _, sums in sorted(slices.items()))

    def abandon(self, tensor: StreamedTensor) -> None:
        """Free the memory of a tensor that cannot be computed.

        Another thread may be waiting for that memory, and has to wake up to see that the run failed.
        """
        self.pool.release(tensor.free())

    def read(self, piece: Computed, roles: Collection[str] | None = None) -> dict[str, Array]:
        """Read a slice of every source, or of those in `roles`, into uint8 buffers of the pool."""
        buffers = {}
        for role, ref in piece.task.sources.items():
            if roles is None or role in roles:
                width = size(ref.code)
                buffers[role] = self.pool.buffer(piece.count * width)
                self.sources.of(role).read_into(ref, buffers[role].data, piece.first * width)
        return buffers


def result_bytes(task: TensorTask) -> int:
    """Bytes of a task's whole result."""
    return math.prod(task.shape) * size(task.out_code)


class ComputeThread:
    """One thread's access to a calculator, with a worker of its own."""

    def __init__(self, calculator: Calculator) -> None:
        self._shared = calculator
        self._worker = calculator.backend.worker(calculator.method, calculator.settings)

    def compute(self, contents: Sequence[Computed]) -> list[Computation]:
        """Compute whole tensors as a group, or one slice; `reserve` was called for them.

        Raises NonFiniteError, SourceChanged, MachineError.
        """
        first = contents[0]
        if not first.whole:
            return [self._slice(first)]
        return self._merge([content.task for content in contents])

    def _merge(self, tasks: Sequence[TensorTask]) -> list[Computation]:
        shared = self._shared
        jobs, digests, equal = [], [], []
        for task in tasks:
            job = self._job(task)
            task_digests: dict[str, str] = {}
            for role, buffer in job.sources.items():
                shared.sources.of(role).read_into(task.sources[role], buffer.data)
                task_digests[role] = tensor_digest(task, role, buffer)
            pairs = equal_pairs(task, job.sources)
            copied = may_be_copied(task, shared.method, shared.settings) and all_equal(task, pairs)
            jobs.append(replace(job, copied=True) if copied else job)
            digests.append(task_digests)
            equal.append(pairs)
        try:
            merged: list[Merged] = self._worker.merge_all(jobs)
        except NotFinite as error:
            raise not_finite_error(error, tasks[error.job], shared.sources, shared.method) from None
        for task, result, task_digests, pairs in zip(tasks, merged, digests, equal, strict=True):
            shared.record(Outcome(task, result.decision, result.changed, task_digests, pairs, result.sums))
        for job in jobs:
            shared.pool.give_back_all(buffer for buffer in job.sources.values() if buffer is not job.out)
        return [Computation(job.out, result.changed) for job, result in zip(jobs, merged, strict=True)]

    def _job(self, task: TensorTask) -> TaskBuffers:
        """Allocate the buffers of a target; the result overwrites the anchor's bytes if it has their element type."""
        buffer = self._shared.pool.buffer
        sources = {role: buffer(ref.nbytes) for role, ref in task.sources.items()}
        out = sources[task.anchor]
        if task.load_codes is not None or task.out_code != task.stored.code:
            out = buffer(result_bytes(task))
        return TaskBuffers(task, sources, out, self._shared.recorded.get(task.name))

    def _slice(self, piece: Computed) -> Computation:
        tensor = self._shared.streamed(piece.task)
        try:
            return self._slice_of(tensor, piece)
        except BaseException:
            self._shared.abandon(tensor)
            raise

    def _slice_of(self, tensor: StreamedTensor, piece: Computed) -> Computation:
        shared, task = self._shared, piece.task
        out = shared.pool.buffer(piece.nbytes)
        try:
            decision = tensor.decision(self._worker, shared.read)
            recorded = shared.recorded.get(task.name)
            copied = decision is COPIED and recorded in (None, COPIED)
            sources = tensor.take(piece) or shared.read(piece, (task.anchor,) if copied else None)
            if tensor.facts is not None and not copied:
                tensor.facts.add(piece, sources)
            shared.add_sums(piece, self._worker.slice(piece, sources, out, decision, recorded))
        except NotFinite as error:
            raise not_finite_error(error, task, shared.sources, shared.method) from None
        shared.pool.give_back_all(sources.values())
        if tensor.finish():
            shared.finish(tensor, decision)
        return Computation(out, ((0, piece.nbytes),))


def not_finite_error(error: NotFinite, task: TensorTask, sources: Sources, method: Method[Any, Any]) -> NonFiniteError:
    """The error that names file, tensor and head."""
    head = "" if error.group is None or task.layout != "heads" else f", head {error.group}"
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
