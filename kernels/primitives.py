# ruff: noqa: N803 -- constexprs of kernels are upper case
"""JIT helpers that several kernels use: addresses of a tile, reads, writes, rounding, ranking.

Shape letters: G projections of a plan, H heads of a projection, P the padded length of a row of heads (the greatest H
of the plan, rounded up to a power of two; `padded_heads` on the host), S slabs. A tile row is WIDTH contiguous
elements. A slab is ROWS tile rows of one head, and is one unit of work.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDTH = tl.constexpr(64)
"""Elements of a tile row."""

FIELDS = tl.constexpr(8)
"""Numbers per projection in the geometry table, in this order: heads, tile rows of a head, width of a run, pitch
between runs, step between heads, slabs of a head, first slab of the projection, tile rows of a run."""

HEADS = tl.constexpr(0)
TILE_ROWS = tl.constexpr(1)
RUN_WIDTH = tl.constexpr(2)
PITCH = tl.constexpr(3)
STEP = tl.constexpr(4)
SLABS = tl.constexpr(5)
FIRST = tl.constexpr(6)
CHUNKS = tl.constexpr(7)

NOT_FINITE = tl.constexpr(0x7F800000)
"""Bits of float32 infinity: the magnitude bits of Inf and of every NaN are at least this."""


@triton.jit
def tile(geometry, g, head, slab, ROWS: tl.constexpr, ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr):
    """The position of one slab of a head, and which of its elements exist.

    Returns an element to start from (int64), offsets from it ([ROWS, WIDTH]) in elements, and whether each one exists
    (bool).

    A head is a number of runs of `width` contiguous elements, `pitch` apart; heads begin `step` apart. Heads of
    consecutive output rows are one run each; heads of columns have a run for every row.

    ALIGNED promises that WIDTH divides the width, and that 16 divides the pitch and the step. Then only whole tile rows
    can be missing.

    ONE_RUN promises that too, and that every head is one run: a slab is one piece of memory, whose offsets are known at
    compile time. With ALIGNED alone, missing rows get the offsets of the head's first row, so that they can be read
    without a mask. This is for AMD, where every masked load compiles to a branch that is waited for before the next
    load begins.
    """
    entry = geometry + g * FIELDS
    step = tl.load(entry + STEP)
    # 32 bits: the host refuses heads with more tile rows, and a 64-bit division takes several times as long.
    row = slab * ROWS + tl.arange(0, ROWS)
    exists = row < tl.load(entry + TILE_ROWS)
    lane = tl.arange(0, WIDTH)
    if ONE_RUN:
        start = head * tl.multiple_of(step, 16) + slab.to(tl.int64) * (ROWS * WIDTH)
        offsets = tl.arange(0, ROWS)[:, None] * WIDTH + lane[None, :]
        exists = exists[:, None]
    else:
        pitch = tl.load(entry + PITCH)
        if ALIGNED:
            pitch = tl.multiple_of(pitch, 16)
            step = tl.multiple_of(step, 16)
        row = tl.where(exists, row, 0)
        chunks = tl.load(entry + CHUNKS).to(tl.int32)
        run = row // chunks
        column = (row - run * chunks).to(tl.int64) * WIDTH
        start = tl.zeros([], dtype=tl.int64)
        offsets = (head * step + run.to(tl.int64) * pitch + column)[:, None] + lane[None, :]
        exists = exists[:, None]
        if not ALIGNED:
            exists = exists & (column[:, None] + lane[None, :] < tl.load(entry + RUN_WIDTH))
    return start, offsets, exists


@triton.jit
def pointer(table, g, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a projection's tensor, as a pointer to DTYPE. table: int64 [G]."""
    found = tl.load(table + g).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # The compiler does not know the alignment of a loaded address, and loads through it would be one element wide.
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def load(
    table, g, start, offsets, exists,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    """Load elements of a projection's tensor as they are stored; elements that do not exist have arbitrary values."""
    places = pointer(table, g, DTYPE, ALIGNED) + start + offsets
    if ALIGNED and not ONE_RUN:
        return tl.load(places)
    else:  # noqa: RET505 - the compiler reads on after a return
        return tl.load(places, mask=exists)


@triton.jit
def read(
    table, g, start, offsets, exists,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    """Load elements of a projection's tensor, widened to float32; elements that do not exist have arbitrary values."""
    return load(table, g, start, offsets, exists, DTYPE, ALIGNED, ONE_RUN).to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round float32 once, to nearest even, to DTYPE.

    bfloat16 is rounded in integers: the interpreter truncates, and targets without the instruction differ in NaN.
    """
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A carry from a NaN's payload could make it a finite number.
        nearest = tl.where(x == x, nearest, 0x7FC0)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def magnitude(x):
    """The magnitude bits (int32) of a tensor's greatest float32; at least NOT_FINITE if any element is NaN or Inf."""
    return greatest(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def greatest(x):
    """The maximum of a tile, over all elements as they lie: a maximum by rows moves many times as many elements."""
    return tl.max(tl.reshape(x, [x.numel], can_reorder=True), axis=0)


@triton.jit
def write(table, g, start, offsets, exists, value, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Store values of DTYPE, and return the magnitude bits of what was stored, widened to float32."""
    tl.store(pointer(table, g, DTYPE, ALIGNED) + start + offsets, value, mask=exists)
    return magnitude(tl.where(exists, value.to(tl.float32), 0.0))


@triton.jit
def packed(value, DTYPE: tl.constexpr):
    """Pack a tile of DTYPE into 32-bit words, so that two 16-bit values take one register instead of two."""
    if DTYPE.primitive_bitwidth == 32:
        return value
    else:  # noqa: RET505 - the compiler reads on after a return
        low, high = tl.split(tl.reshape(value.to(tl.uint16, bitcast=True), [value.shape[0], value.shape[1] // 2, 2]))
        return low.to(tl.uint32) | (high.to(tl.uint32) << 16)


@triton.jit
def unpacked(words, DTYPE: tl.constexpr):
    """Undo `packed`."""
    if DTYPE.primitive_bitwidth == 32:
        return words
    else:  # noqa: RET505 - the compiler reads on after a return
        pairs = tl.join((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))
        return tl.reshape(pairs, [words.shape[0], words.shape[1] * 2]).to(DTYPE, bitcast=True)


@triton.jit
def finite(squared):
    """Whether no score is NaN or Inf (bool). squared: float64 [P]."""
    return tl.max((~(squared < float("inf"))).to(tl.int32), axis=0) == 0
