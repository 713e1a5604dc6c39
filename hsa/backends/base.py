"""Where the arithmetic of a merge runs.

A backend makes one worker per thread for a method with its settings; a worker owns its scratch memory and merges one
tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from hsa.methods.base import Method
from hsa.methods.settings import Settings
from hsa.methods.tensors import DistanceSums, TensorTask
from hsa.planning.file_layout import Computed
from hsa.system.dtypes import Array, size


class NotFinite(Exception):
    """NaN or Inf in the tensor of the source `role`, or in the result if that is None; `job` is the index in the
    group."""

    def __init__(self, role: str | None, group: int | None, job: int = 0) -> None:
        super().__init__(role, group, job)
        self.role, self.group, self.job = role, group, job


@dataclass(frozen=True)
class TaskBuffers:
    """A target to merge: the bytes of its tensor in each source, and of its result, one-dimensional uint8.

    `out` is the anchor's own array if the result overwrites it. If `recorded` is given, that decision is applied, while
    the one that follows from the sources is reported. `copied` marks a tensor that is equal in all sources.
    """

    task: TensorTask
    sources: Mapping[str, Array]
    out: Array
    recorded: Any = None
    copied: bool = False

    @property
    def in_place(self) -> bool:
        return self.out is self.sources[self.task.anchor]


@dataclass(frozen=True)
class Merged:
    """A merged target: the decision that follows from the sources, the byte ranges that may differ from the anchor's,
    and sums over a sample of its elements, if they were taken."""

    decision: Any
    changed: tuple[tuple[int, int], ...]
    sums: DistanceSums | None = None


class Worker(Protocol):
    """One thread's share of a backend."""

    def merge_all(self, jobs: Sequence[TaskBuffers]) -> list[Merged]:
        """Measure, decide and apply a group of targets into their outputs. Raises NotFinite."""

    def slice(
        self, piece: Computed, sources: Mapping[str, Array], out: Array, decision: Any, recorded: Any
    ) -> DistanceSums | None:
        """Compute a slice of a tensor into `out`; all arrays are uint8.

        A `recorded` decision is applied instead of the one that follows from the sources, unless it is None. Returns
        the sums over the slice's part of the sample, or None if it has none. Raises NotFinite.
        """

    def measure_slice(self, piece: Computed, sources: Mapping[str, Array], number: int, so_far: Any) -> list[Any]:
        """Measure the blocks of a slice in one pass. Raises NotFinite."""


class Backend(Protocol):
    """A place to compute: its name and device, the bytes of targets that a worker takes at a time, and its workers."""

    name: str
    device: str
    group_bytes: int

    def worker(self, method: Method[Any, Any], settings: Settings) -> Worker: ...

    def empty(self, nbytes: int) -> Array:
        """Host memory for a tensor's bytes, uninitialised uint8."""

    def cost(self, task: TensorTask) -> int:
        """Bytes of host memory that a target takes while it is merged."""


def buffers_cost(task: TensorTask) -> int:
    """Bytes of a target's tensors and of a result of the anchor's size."""
    nbytes: int = sum(source.nbytes for source in task.sources.values())
    anchor: int = task.sources[task.anchor].nbytes
    return nbytes + anchor


def merge_one_by_one(jobs: Sequence[TaskBuffers], merge: Callable[[TaskBuffers], Merged]) -> list[Merged]:
    """`merge_all` for a worker that merges one target at a time."""
    merged = []
    for number, job in enumerate(jobs):
        try:
            merged.append(merge(job))
        except NotFinite as error:
            raise NotFinite(error.role, error.group, number) from None
    return merged


def changed_ranges(task: TensorTask, untouched: frozenset[int]) -> tuple[tuple[int, int], ...]:
    """Byte ranges of the output tensor that may differ from the anchor's bytes, sorted and disjoint."""
    whole, groups = math.prod(task.shape) * size(task.out_code), task.partition.groups
    if task.out_code != task.stored.code or not untouched:
        return ((0, whole),)
    touched = [group for group in range(groups) if group not in untouched]
    if not touched:
        return ()
    if task.partition.axis == 1:
        return ((0, whole),)
    step = whole // groups
    return tuple((first * step, (last + 1) * step) for first, last in runs(touched))


def runs(groups: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and last number of each run of consecutive numbers in a sorted sequence.

    Example:
        >>> list(runs((0, 1, 2, 5)))
        [(0, 2), (5, 5)]
    """
    if groups:
        starts = [groups[0]] + [after for before, after in pairwise(groups) if after != before + 1]
        stops = [before for before, after in pairwise(groups) if after != before + 1] + [groups[-1]]
        yield from zip(starts, stops, strict=True)
