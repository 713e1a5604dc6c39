"""Sums over a sample of a tensor's elements, taken while a merge has them in memory.

The tensor is divided into runs of 1,024 elements. Of every `STRIDE` runs, the first `RUNS` belong to the sample, by
their position in the tensor. A tensor shorter than one run is sampled whole; otherwise an incomplete last run is left
out. The sample does not depend on slices, blocks or threads. The runs of a sample are adjacent, so that most blocks of
a large tensor hold none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hsa.methods.gram import pairs_of
from hsa.methods.tensors import BASE, UNIT, DistanceSums, TensorTask
from hsa.system.dtypes import STORAGE, Array, Float32, widen

STRIDE, RUNS = 512, 8
"""Of every `STRIDE` runs, the first `RUNS` are in the sample."""


class StoredBlock(Protocol):
    """Elements of every source as stored, in the order of the tensor; `first` is the flat index of the first
    element."""

    @property
    def first(self) -> int: ...

    def raw(self, role: str) -> Array: ...


@dataclass(frozen=True)
class _WholeTensor:
    """All elements of a tensor, from its bytes by role."""

    task: TensorTask
    buffers: Mapping[str, Array]
    first: int = 0

    def raw(self, role: str) -> Array:
        return self.buffers[role].view(STORAGE[self.task.sources[role].code])


class Sampler:
    """Adds up one tensor, or a slice of it, block by block: `take` the sources of a block, then `add` its result."""

    def __init__(self, task: TensorTask, *, output: bool) -> None:
        self._task, self._output = task, output
        self._models = [role for role in task.sources if role != BASE]
        self._origin = BASE if BASE in task.sources else task.anchor
        self._pairs = pairs_of(len(self._models) + output)
        self._elements, self._square, self._products = 0, 0.0, [0.0] * len(self._pairs)
        self._base: Array = np.empty(0)
        self._vectors: Array = np.empty((0, 0))
        self._first = 0

    def take(self, block: StoredBlock) -> None:
        """Take the sample of a block from each source."""
        self._first = block.first
        self._base = self._sample(self._origin, block)
        if not self._base.size:
            return
        self._vectors = np.empty((len(self._models) + self._output, self._base.size))
        for vector, role in zip(self._vectors, self._models, strict=False):
            np.subtract(self._base if role == self._origin else self._sample(role, block), self._base, out=vector)

    def add(self, result: Float32 | None = None) -> None:
        """Add the block to the sums, with its result, float32 of its shape, where the output is summed too."""
        if not self._base.size:
            return
        if result is not None:
            np.subtract(sampled(result, self._first).reshape(-1), self._base, out=self._vectors[-1])
        self._elements += self._base.size
        self._square += _dot(self._base, self._base)
        for number, (one, two) in enumerate(self._pairs):
            self._products[number] += _dot(self._vectors[one], self._vectors[two])

    def copied(self, block: StoredBlock) -> None:
        """Add a block that is equal in all sources and in the output; the anchor alone is read."""
        anchor = self._sample(self._task.anchor, block)
        self._elements += anchor.size
        self._square += _dot(anchor, anchor)

    @property
    def sums(self) -> DistanceSums | None:
        """The sums so far; None where no element is in the sample."""
        if not self._elements:
            return None
        return DistanceSums(self._elements, self._square, tuple(self._products), output=self._output)

    def _sample(self, role: str, block: StoredBlock) -> Array:
        """The sample of a source's elements, float64 [n]."""
        code, part = self._task.sources[role].code, np.ascontiguousarray(sampled(block.raw(role), block.first))
        if not part.size:
            return np.empty(0)
        wide: Array = widen(code, part, np.empty(part.shape, np.float32)).astype(np.float64).reshape(-1)
        return wide


def sampler_of(task: TensorTask) -> Sampler | None:
    """The sampler of a tensor that a merge computes. None for attention heads, which their methods measure themselves,
    and for tensors that no record lists."""
    return Sampler(task, output=True) if task.merged and task.listed and task.layout != "heads" else None


def source_sums(task: TensorTask, raw: Mapping[str, Array]) -> DistanceSums | None:
    """The sums of a tensor that is in memory, without an output; None as for `sampler_of`. `raw` holds the tensors'
    bytes, uint8, by role."""
    if sampler_of(task) is None:
        return None
    sampler = Sampler(task, output=False)
    sampler.take(_WholeTensor(task, raw))
    sampler.add()
    return sampler.sums


def sampled(elements: Array, first: int) -> Array:
    """The elements of a block that are in the sample [runs, length]; `first` is the flat index of the first element.

    Example:
        >>> sampled(np.arange(513 * 1024), 0)[:, 0].tolist()
        [0, 1024, 2048, 3072, 4096, 5120, 6144, 7168, 524288]
    """
    flat = elements.reshape(-1)
    if flat.size < UNIT:
        return flat[None, : 0 if first else flat.size]
    runs = flat[: flat.size // UNIT * UNIT].reshape(-1, UNIT)
    chosen: Array = runs[(first // UNIT + np.arange(len(runs))) % STRIDE < RUNS]
    return chosen


def _dot(one: Array, two: Array) -> float:
    return float(np.einsum("e,e->", one, two))
