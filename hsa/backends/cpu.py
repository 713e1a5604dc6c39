"""The exact numerics of SPEC section 2 in numpy: tile by tile, in scratch memory that stays in the cache.

numpy's float32 operations are IEEE operations one at a time: nothing is contracted to a fused multiply-add,
so the merged bytes are those of the formula as written. Squares are formed in float64, where the square of a
float32 is exact, summed down the rows of a tile, and the lanes that remain are added by `math.fsum`, which
is exact: a score depends on nothing but the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hsa.backends.base import NotFinite, TargetBuffers, buffers_cost, changed_ranges, merge_one_by_one
from hsa.methods.geometry import Geometry, Norms, Sums, tile_sums
from hsa.methods.selection import select
from hsa.planning.file_layout import Slice
from hsa.planning.outcome import MergedTarget
from hsa.planning.target import Target
from hsa.sources.roles import Role
from hsa.system.dtypes import STORAGE, Array, Float32, all_finite, narrow, widen

TILE = 1 << 17
"""Elements of a tile at most: a head of any Whisper size is one. Its scratch of 4 MiB exceeds a core's second-level
cache, but threads hand Python's lock over four times as seldom as with tiles that fit: on two cores a merge of large-v3
tensors takes two thirds of the time."""

RUN = 1 << 18
"""Elements of neighbouring heads that are blended at a time for patches: with two threads, operations on twice the
elements of one head took two thirds of the time for each, and on the elements of twelve again as long as on one."""

FOLD = 64
"""Lanes left for the exact sum, where the width is a multiple of it."""


@dataclass(frozen=True)
class Scored:
    """Squared scores of a tensor's heads, whether any element of each task vector is nonzero, and how the task vectors
    lie to each other."""

    squared: tuple[float, ...]
    primary_differs: bool
    secondary_differs: bool
    geometry: Geometry


@dataclass(frozen=True)
class Blend:
    """Heads to blend with a pair of coefficients, and where they go: their rows (columns) alone, uint8."""

    selected: tuple[int, ...]
    c1: float
    c2: float
    out: Array


class CpuBackend:
    """Exact numerics on the CPU."""

    name = "cpu"
    device = "cpu"
    group_bytes = 0

    def worker(self) -> CpuWorker:
        return CpuWorker()

    def empty(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)

    def cost(self, target: Target) -> int:
        return buffers_cost(target)


class _Scratch:
    """Buffers of one tile, reused; grown for a matrix whose row is wider than a tile."""

    def __init__(self) -> None:
        self._grow(TILE)

    def _grow(self, elements: int) -> None:
        self.elements = elements
        self.wide = [np.empty(elements, np.float32) for _ in range(3)]
        self.tv = [np.empty(elements, np.float32) for _ in range(2)]
        self.bits = np.empty(elements, np.uint32)
        self.square = np.empty(elements, np.float64)
        self.blend = [np.empty(0, np.float32) for _ in range(2)]

    def reserve_blends(self, elements: int) -> None:
        """Room for results beside the task vectors, which stay for the next pair of coefficients."""
        self.reserve(elements)
        if self.blend[0].size < self.elements:
            self.blend = [np.empty(self.elements, np.float32) for _ in range(2)]

    def reserve(self, elements: int) -> None:
        if elements > self.elements:
            self._grow(elements)


class CpuWorker:
    """One thread's scratch memory and the arithmetic on it."""

    def __init__(self) -> None:
        self._scratch = _Scratch()

    def merge_all(self, jobs: Sequence[TargetBuffers]) -> list[MergedTarget]:
        """Merge targets one after another."""
        return merge_one_by_one(jobs, self.merge)

    def merge(self, target: Target, base: Array, primary: Array, secondary: Array, out: Array) -> MergedTarget:
        """Score, select and merge one tensor. Buffers: uint8, the tensors' bytes; `out` may be `primary`."""
        scored = self.score(target, base, primary, secondary)
        selection = select(scored.squared, target.keep)
        self.apply(target, selection.selected, base, primary, secondary, out)
        return MergedTarget(
            selection,
            changed_ranges(target, selection.selected),
            scored.primary_differs,
            scored.secondary_differs,
            scored.geometry,
        )

    def score(self, target: Target, base: Array, primary: Array, secondary: Array) -> Scored:
        """The squared saliency scores of one tensor's heads, and its geometry. Buffers: uint8. Raises NotFinite."""
        b, m1, m2 = self._views(target, base, primary, secondary)
        differ = [False, False]
        tiles: list[list[Sums]] = [[] for _ in range(target.heads)]
        squared = tuple(self._score(target, head, b, m1, m2, differ, tiles[head]) for head in range(target.heads))
        for head, score in enumerate(squared):
            if not math.isfinite(score):
                raise NotFinite(_source_not_finite(target, head, b, m1, m2), head)
        return Scored(squared, differ[0], differ[1], Geometry.of(tiles))

    def apply(
        self, target: Target, selected: tuple[int, ...], base: Array, primary: Array, secondary: Array, out: Array
    ) -> None:
        """Write one tensor with these heads merged. Buffers: uint8; `out` may be `primary`. Raises NotFinite."""
        b, m1, m2 = self._views(target, base, primary, secondary)
        o = m1 if out is primary else out.view(STORAGE[target.out_code]).reshape(target.matrix)
        merged_heads = set(selected)
        for head in range(target.heads):
            if head in merged_heads:
                self._blend(target, head, b, m1, m2, o)
            elif target.scale != 1.0:
                self._scale_unselected(target, head, b, m1, o)
            elif o is not m1:
                self._cast(target, head, m1, o)

    def blend(self, target: Target, base: Array, primary: Array, secondary: Array, blends: Sequence[Blend]) -> None:
        """Write the merged rows of the selected heads, for many pairs of coefficients. Buffers: uint8.

        Raises NotFinite. The values are those of `apply`, bit for bit.
        """
        b, m1, m2 = self._views(target, base, primary, secondary)
        rows, columns = target.matrix
        axis, width = target.projection.head_axis, target.head_dim
        outs = []
        for blend in blends:
            span = len(blend.selected) * width
            shape = (span, columns) if axis == 0 else (rows, span)
            outs.append(blend.out.view(STORAGE[target.out_code]).reshape(shape))
        places = [{head: place for place, head in enumerate(blend.selected)} for blend in blends]
        most = max(1, RUN // (rows * columns // target.heads))
        self._scratch.reserve_blends(most * (rows * columns // target.heads))
        for first, count in _head_runs([place.keys() for place in places], target.heads, most):
            for block in target.blocks(first, TILE if count == 1 else RUN, count):
                wide, tv1, tv2 = self._task_vectors(target, b[block], m1[block], m2[block])
                for blend, out, place in zip(blends, outs, places, strict=True):
                    if first in place:
                        shift = (place[first] - first) * width
                        part = out[_shifted(block[0], shift * (axis == 0)), _shifted(block[1], shift * (axis == 1))]
                        coefficients = (target.scale, blend.c1, blend.c2)
                        if target.out_code == "F32":
                            self._formula(*coefficients, wide, tv1, tv2, self._scratch.blend, part)
                        else:
                            value = self._formula(*coefficients, wide, tv1, tv2, self._scratch.blend)
                            self._narrow(target.out_code, value, part)
                        if not all_finite(target.out_code, part):
                            raise NotFinite(None, first + _head_not_finite(target.out_code, part, count, axis))

    def norms(self, target: Target, primary: Array, secondary: Array) -> Norms:
        """Sums of squares in float64, where the square of a float32 neither overflows nor vanishes. Buffers: uint8."""
        _, m1, m2 = self._views(target, primary, primary, secondary, base_code=target.primary.code)
        parts: list[list[float]] = [[], []]
        difference = []
        for head in range(target.heads):
            sums_of_head: list[float] = []
            for block in target.blocks(head, TILE):
                one = self._widen(1, target.primary.code, m1[block])
                two = self._widen(2, target.secondary.code, m2[block])
                square = self._scratch.square[: one.size].reshape(one.shape)
                for first, second, sums in ((one, None, parts[0]), (two, None, parts[1]), (one, two, sums_of_head)):
                    np.copyto(square, first)
                    if second is not None:
                        np.subtract(square, second, out=square)
                    np.multiply(square, square, out=square)
                    sums.append(float(np.add.reduce(square, axis=None)))
            difference.append(math.fsum(sums_of_head))
        return Norms(math.fsum(parts[0]), math.fsum(parts[1]), tuple(difference))

    def _views(
        self, target: Target, base: Array, primary: Array, secondary: Array, base_code: str | None = None
    ) -> tuple[Array, Array, Array]:
        rows, columns = target.matrix
        self._scratch.reserve(max(rows if columns == 1 else 1, columns))
        return (
            base.view(STORAGE[base_code or target.base.code]).reshape(rows, columns),
            primary.view(STORAGE[target.primary.code]).reshape(rows, columns),
            secondary.view(STORAGE[target.secondary.code]).reshape(rows, columns),
        )

    def slice(self, piece: Slice, primary: Array, base: Array | None, out: Array) -> None:
        """Cast a slice, or move it along primary's task vector. Buffers: uint8."""
        m1 = primary.view(STORAGE[piece.primary.code])
        o = out.view(STORAGE[piece.code])
        b = None if base is None or piece.base is None else base.view(STORAGE[piece.base.code])
        for first in range(0, piece.count, TILE):
            part = slice(first, min(first + TILE, piece.count))
            wide = self._widen(0, piece.primary.code, m1[part])
            if b is None or piece.base is None:
                result = self._copy(wide)
            else:
                result = self._scaled(self._widen(1, piece.base.code, b[part]), wide, piece.scale)
            self._narrow(piece.code, result, o[part])
            if not all_finite(piece.code, o[part]):
                if not all_finite(piece.primary.code, m1[part]):
                    raise NotFinite("primary", None)
                damaged = b is not None and piece.base is not None and not all_finite(piece.base.code, b[part])
                raise NotFinite("base" if damaged else None, None)

    def _score(
        self, target: Target, head: int, b: Array, m1: Array, m2: Array, differ: list[bool], tiles: list[Sums]
    ) -> float:
        lanes: Array | None = None
        for block in target.blocks(head, TILE):
            wide, tv1, tv2 = self._task_vectors(target, b[block], m1[block], m2[block])
            tiles.append(tile_sums(wide, tv1, tv2))
            differ[0] = differ[0] or bool(tv1.any())
            differ[1] = differ[1] or bool(tv2.any())
            np.abs(tv1, out=tv1)
            np.abs(tv2, out=tv2)
            with np.errstate(over="ignore"):
                proxy = np.add(tv1, tv2, out=tv1)
            square = self._scratch.square[: proxy.size].reshape(proxy.shape)
            np.copyto(square, proxy)
            np.multiply(square, square, out=square)
            columns = np.add.reduce(square, axis=0)
            lanes = columns if lanes is None else np.add(lanes, columns, out=lanes)
        assert lanes is not None
        if lanes.size > FOLD and lanes.size % FOLD == 0:
            lanes = np.add.reduce(lanes.reshape(-1, FOLD), axis=0)
        values = lanes.tolist()
        return math.fsum(values) if all(map(math.isfinite, values)) else math.nan

    def _blend(self, target: Target, head: int, b: Array, m1: Array, m2: Array, o: Array) -> None:
        for block in target.blocks(head, TILE):
            wide, tv1, tv2 = self._task_vectors(target, b[block], m1[block], m2[block])
            value = self._formula(target.scale, target.c1, target.c2, wide, tv1, tv2, self._scratch.tv)
            self._store(target.out_code, value, o[block], head)

    def _formula(
        self,
        scale: float,
        c1: float,
        c2: float,
        base: Float32,
        tv1: Float32,
        tv2: Float32,
        into: list[Float32],
        out: Float32 | None = None,
    ) -> Float32:
        """`B + scale * (c1 * tv1 + c2 * tv2)` in `out`, or in the first of two scratch buffers, which may be the task
        vectors'."""
        first, second = (buffer[: base.size].reshape(base.shape) for buffer in into)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            np.multiply(tv1, np.float32(c1), out=first)
            np.multiply(tv2, np.float32(c2), out=second)
            np.add(first, second, out=first)
            if scale != 1.0:
                np.multiply(first, np.float32(scale), out=first)
            return np.add(base, first, out=first if out is None else out)

    def _scale_unselected(self, target: Target, head: int, b: Array, m1: Array, o: Array) -> None:
        for block in target.blocks(head, TILE):
            wide = self._widen(0, target.base.code, b[block])
            value = self._scaled(wide, self._widen(1, target.primary.code, m1[block]), target.scale)
            self._store(target.out_code, value, o[block], head)

    def _cast(self, target: Target, head: int, m1: Array, o: Array) -> None:
        for block in target.blocks(head, TILE):
            if target.out_code == target.primary.code:
                np.copyto(o[block], m1[block])
                if not all_finite(target.out_code, o[block]):
                    raise NotFinite(None, head)
                continue
            value = self._copy(self._widen(0, target.primary.code, m1[block]))
            self._store(target.out_code, value, o[block], head)

    def _task_vectors(self, target: Target, b: Array, m1: Array, m2: Array) -> tuple[Float32, Float32, Float32]:
        """Base widened, and both task vectors."""
        tv1 = self._scratch.tv[0][: b.size].reshape(b.shape)
        tv2 = self._scratch.tv[1][: b.size].reshape(b.shape)
        wide = self._widen(0, target.base.code, b)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            np.subtract(self._widen(1, target.primary.code, m1), wide, out=tv1)
            np.subtract(self._widen(2, target.secondary.code, m2), wide, out=tv2)
        return wide, tv1, tv2

    def _scaled(self, base: Float32, primary: Float32, scale: float) -> Float32:
        value = self._scratch.tv[0][: base.size].reshape(base.shape)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            np.subtract(primary, base, out=value)
            np.multiply(value, np.float32(scale), out=value)
            np.add(base, value, out=value)
        return value

    def _copy(self, values: Float32) -> Float32:
        copied = self._scratch.tv[0][: values.size].reshape(values.shape)
        np.copyto(copied, values)
        return copied

    def _widen(self, slot: int, code: str, raw: Array) -> Float32:
        out = self._scratch.wide[slot][: raw.size].reshape(raw.shape)
        return widen(code, raw, out)

    def _narrow(self, code: str, values: Float32, out: Array) -> None:
        narrow(code, values, out, self._scratch.bits[: values.size].reshape(values.shape))

    def _store(self, code: str, values: Float32, out: Array, head: int) -> None:
        self._narrow(code, values, out)
        if not all_finite(code, out):
            raise NotFinite(None, head)


def _head_runs(selections: Sequence[Collection[int]], heads: int, most: int) -> Iterator[tuple[int, int]]:
    """First head and number of heads of runs that the same of these selections hold, at most `most` long."""
    first = 0
    while first < heads:
        blended = [first in selection for selection in selections]
        stop = first + 1
        while stop < heads and stop - first < most and [stop in selection for selection in selections] == blended:
            stop += 1
        if any(blended):
            yield first, stop - first
        first = stop


def _shifted(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


def _head_not_finite(code: str, part: Array, count: int, axis: int) -> int:
    """Which of the heads side by side in a part holds NaN or Inf."""
    return next(n for n, head in enumerate(np.split(part, count, axis)) if not all_finite(code, head.copy()))


def _source_not_finite(target: Target, head: int, b: Array, m1: Array, m2: Array) -> Role | None:
    """Which source holds NaN or Inf in a head; None where the task vectors themselves overflow."""
    sources: tuple[tuple[Role, str, Array], ...] = (
        ("base", target.base.code, b),
        ("primary", target.primary.code, m1),
        ("secondary", target.secondary.code, m2),
    )
    for role, code, array in sources:
        if not all(all_finite(code, np.ascontiguousarray(array[block])) for block in target.blocks(head, TILE)):
            return role
    return None
