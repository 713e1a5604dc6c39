"""Where the arithmetic of a merge runs.

A backend makes one worker per thread; a worker owns its scratch memory and merges one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from hsa.planning.file_layout import Slice
from hsa.planning.outcome import MergedTarget
from hsa.planning.target import Target
from hsa.sources.roles import Role
from hsa.system.dtypes import Array, size


class NotFinite(Exception):
    """NaN or Inf: in a source's tensor where `role` is given, else in the result; `job` is the place in the group."""

    def __init__(self, role: Role | None, head: int | None, job: int = 0) -> None:
        super().__init__(role, head, job)
        self.role, self.head, self.job = role, head, job


@dataclass(frozen=True)
class TargetBuffers:
    """A target to merge: the bytes of its three tensors and of its result, one-dimensional uint8.

    `out` is `primary` itself where the result replaces it.
    """

    target: Target
    base: Array
    primary: Array
    secondary: Array
    out: Array

    @property
    def in_place(self) -> bool:
        return self.out is self.primary

    def source(self, role: Role) -> Array:
        return {"base": self.base, "primary": self.primary, "secondary": self.secondary}[role]


class Worker(Protocol):
    """One thread's share of a backend."""

    def merge_all(self, jobs: Sequence[TargetBuffers]) -> list[MergedTarget]:
        """Score, select and merge a group of targets into their outputs. Raises NotFinite."""

    def slice(self, piece: Slice, primary: Array, base: Array | None, out: Array) -> None:
        """Compute a slice of a tensor that is no target into `out`; all uint8. Raises NotFinite."""


class Backend(Protocol):
    """A place to compute: its name and device, how many bytes of targets a worker takes at a time, and workers."""

    name: str
    device: str
    group_bytes: int

    def worker(self) -> Worker: ...

    def empty(self, nbytes: int) -> Array:
        """Host memory for a tensor's bytes, uninitialised uint8."""

    def cost(self, target: Target) -> int:
        """Bytes of host memory that merging a target takes while it lasts."""


def buffers_cost(target: Target) -> int:
    """Bytes of the three tensors and of a result of their size."""
    return target.base.nbytes + 2 * target.primary.nbytes + target.secondary.nbytes


def merge_one_by_one(
    jobs: Sequence[TargetBuffers], merge: Callable[[Target, Array, Array, Array, Array], MergedTarget]
) -> list[MergedTarget]:
    """`merge_all` for a worker that merges one target at a time."""
    merged = []
    for number, job in enumerate(jobs):
        try:
            merged.append(merge(job.target, job.base, job.primary, job.secondary, job.out))
        except NotFinite as error:
            raise NotFinite(error.role, error.head, number) from None
    return merged


def changed_ranges(target: Target, selected: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Byte ranges of the output tensor that may differ from primary's bytes, in order and apart."""
    rows, columns = target.matrix
    whole = rows * columns * size(target.out_code)
    if target.scale != 1.0 or target.out_code != target.primary.code:
        return ((0, whole),)
    if not selected:
        return ()
    if target.projection.head_axis == 1:
        return ((0, whole),)
    step = whole // target.heads
    starts = [selected[0]] + [after for before, after in pairwise(selected) if after != before + 1]
    stops = [before + 1 for before, after in pairwise(selected) if after != before + 1] + [selected[-1] + 1]
    return tuple((start * step, stop * step) for start, stop in zip(starts, stops, strict=True))
