"""From the sources' bytes to computed bytes: reading, digesting and merging of targets and slices, thread by thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hsa.backends.base import Backend, NotFinite, TargetBuffers
from hsa.errors import NonFiniteError
from hsa.methods.hsa import Numerics
from hsa.option_names import option
from hsa.planning.equal_sources import equal_pairs
from hsa.planning.file_layout import Computed, Merge, Slice
from hsa.planning.outcome import TargetOutcome
from hsa.planning.target import Target
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.digests import digest_of
from hsa.system.dtypes import Array, size

BUDGET_BYTES = 80 << 20
"""Memory of all computations under way: four targets of large-v3 in float32, whatever the number of threads."""

SPARE_BYTES = 48 << 20
"""Memory of buffers kept for reuse."""

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Computation:
    """Computed bytes, and the ranges of them that may differ from primary's."""

    data: Array
    changed: Ranges


class Calculator:
    """What the threads of a run share: the sources, finished outcomes by target name, and spare buffers."""

    def __init__(self, sources: Sources, backend: Backend, numerics: Numerics) -> None:
        self.sources, self.backend, self.numerics = sources, backend, numerics
        self.outcomes: dict[str, TargetOutcome] = {}
        self._lock = threading.Condition()
        self._in_use = 0
        self._spare: list[Array] = []

    @property
    def group_bytes(self) -> int:
        return self.backend.group_bytes

    def thread(self) -> ComputeThread:
        return ComputeThread(self)

    def ordered(self, targets: Sequence[Target]) -> tuple[TargetOutcome, ...]:
        """The outcomes of these targets, which all were computed."""
        return tuple(self.outcomes[target.projection.name] for target in targets)

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

    def record(self, outcome: TargetOutcome) -> None:
        with self._lock:
            self.outcomes[outcome.target.projection.name] = outcome


class ComputeThread:
    """One thread's place at a calculator: its worker."""

    def __init__(self, calculator: Calculator) -> None:
        self._shared = calculator
        self._worker = calculator.backend.worker()

    def compute(self, contents: Sequence[Computed]) -> list[Computation]:
        """Compute targets as a group, or one slice. Raises NonFiniteError, SourceChanged, MachineError."""
        first = contents[0]
        if isinstance(first, Slice):
            return [self._slice(first)]
        return self._merge([content.target for content in contents if isinstance(content, Merge)])

    def _merge(self, targets: Sequence[Target]) -> list[Computation]:
        with self._shared.reserve(sum(map(self._shared.backend.cost, targets))):
            return self._merge_now(targets)

    def _merge_now(self, targets: Sequence[Target]) -> list[Computation]:
        jobs, digests, equal = [], [], []
        for target in targets:
            job = self._job(target)
            target_digests: dict[Role, str] = {}
            for role in self._shared.sources.roles:
                buffer = job.source(role)
                self._shared.sources.of(role).read_into(target.ref(role), buffer.data)
                target_digests[role] = digest_of(buffer.data)
            jobs.append(job)
            digests.append(target_digests)
            equal.append(equal_pairs(target, {role: job.source(role) for role in self._shared.sources.roles}))
        try:
            merged = self._worker.merge_all(jobs)
        except NotFinite as error:
            target = targets[error.job]
            refs = {role: target.ref(role) for role in self._shared.sources.roles}
            raise not_finite_error(error, refs, target.out_code, self._shared.sources, self._shared.numerics) from None
        for target, result, target_digests, pairs in zip(targets, merged, digests, equal, strict=True):
            self._shared.record(TargetOutcome(target, result, target_digests, pairs))
        for job in jobs:
            for role in self._shared.sources.roles:
                if job.source(role) is not job.out:
                    self._shared.give_back(job.source(role))
        return [Computation(job.out, result.changed) for job, result in zip(jobs, merged, strict=True)]

    def _job(self, target: Target) -> TargetBuffers:
        """Buffers for a target: the result replaces primary's bytes where it has their element type."""
        buffer = self._shared.buffer
        primary = out = buffer(target.primary.nbytes)
        if target.load_codes is not None or target.out_code != target.primary.code:
            rows, columns = target.matrix
            out = buffer(rows * columns * size(target.out_code))
        return TargetBuffers(target, buffer(target.base.nbytes), primary, buffer(target.secondary.nbytes), out)

    def _slice(self, piece: Slice) -> Computation:
        start = piece.first * size(piece.primary.code)
        primary = self._shared.buffer(piece.count * size(piece.primary.code))
        self._shared.sources.of(piece.role).read_into(piece.primary, primary.data, start)
        base = None
        if piece.base is not None:
            base = self._shared.buffer(piece.count * size(piece.base.code))
            self._shared.sources.base_checkpoint.read_into(piece.base, base.data, piece.first * size(piece.base.code))
        out = self._shared.buffer(piece.nbytes)
        try:
            self._worker.slice(piece, primary, base, out)
        except NotFinite as error:
            refs: dict[Role, TensorRef] = {"primary": piece.primary, piece.role: piece.primary}
            if piece.base is not None:
                refs["base"] = piece.base
            raise not_finite_error(error, refs, piece.code, self._shared.sources, self._shared.numerics) from None
        for buffer in (primary, base):
            if buffer is not None:
                self._shared.give_back(buffer)
        return Computation(out, ((0, piece.nbytes),))


def not_finite_error(
    error: NotFinite, refs: Mapping[Role, TensorRef], code: str, sources: Sources, numerics: Numerics
) -> NonFiniteError:
    """The error that names file, tensor and head. `refs` are the tensor in the sources, `code` its output type."""
    head = "" if error.head is None else f", head {error.head}"
    scripted = numerics == "reference"
    if error.role is not None:
        ref, source = refs[error.role], sources.of(error.role)
        read = f", as the script's loader reads it (or give {option('load_dtype', 'float32')})" if scripted else ""
        return NonFiniteError(
            f"{source.file_of(ref)}: tensor {ref.name}{head} holds NaN or Inf{read}; a merge with it would be "
            f"damaged, use a sound checkpoint"
        )
    ref = refs["primary"]
    wider = option("load_dtype", "float32") if scripted else f"{option('dtype', 'float32')} or bfloat16"
    remedy = f"compute in a wider type ({wider})" if code == "F16" else "do the three belong together?"
    file = sources.anchor_checkpoint.file_of(ref)
    return NonFiniteError(f"{file}: tensor {ref.name}{head}: the result overflows {code}; {remedy}")
