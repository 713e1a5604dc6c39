# ruff: noqa: N803, N806 -- constexprs of kernels are upper case
"""Headwise Selective Attention merge on a GPU: the parts of the formula, and the kernels that merge in two launches.

`fused` has the kernel that merges in one launch; `launch` calls them.

Formula (float32, evaluated in this order, every operation rounded by itself):

    tv1 = M1 - B,  tv2 = M2 - B,  proxy = |tv1| + |tv2|
    score[h] ** 2 = sum over head h of proxy ** 2
    selected[h]   = fewer than keep heads have a greater score
    out = B + scale * (c1 * tv1 + c2 * tv2)   in selected heads; no multiplication by a scale of 1
    out = B + scale * tv1                     in the others; M1 itself at scale 1

Source: Shankar, Wang, Eren, Alwan, "Compositional domain adaptation for automatic speech recognition with headwise
selective attention merging", Computer Speech & Language, 2026, 102012.

Arguments of every kernel, letters as in `primitives`:

    base, primary, secondary, out   int64 [G]     addresses of the projections' tensors, of dtypes B, M1, M2, OUT
    geometry                        int64 [G, 8]  see `primitives.FIELDS`
    items                           int32 [*, 4]  units of work: projection, head, slab, and the slab's slot
    slots                           int64 [S]     the sum of squares of every slab, see `encoded`
    scores                          float64 [G, P]  squared scores; selected: uint8 [G, P]; both 0 beyond H
    status                          int32 [G, P]  the faults found in a head: the bits below; 0 at the launch
    keep, c1, c2                    int32 [G], float32 [G], float32 [G]

`score_kernel` also takes arrivals, int32 [G], 0 at the launch and used by no other launch meanwhile.

Constexprs: P and ROWS; ALIGNED if every address of the launch is a multiple of 16 bytes and every geometry meets the
conditions in `primitives.tile`; ONE_RUN as there; SCALED if scale is not 1; IN_PLACE if out is primary in every
projection.
"""

from __future__ import annotations

import triton
import triton.language as tl
from hsa.kernels.primitives import (
    FIELDS,
    FIRST,
    HEADS,
    NOT_FINITE,
    SLABS,
    WIDTH,
    finite,
    greatest,
    load,
    magnitude,
    pointer,
    read,
    rounded,
    tile,
    write,
)

BASE_BIT = tl.constexpr(1)
PRIMARY_BIT = tl.constexpr(2)
SECONDARY_BIT = tl.constexpr(4)
SCORE_BIT = tl.constexpr(8)
RESULT_BIT = tl.constexpr(16)

THERE = tl.constexpr(-(1 << 63))
REST = tl.constexpr((1 << 63) - 1)

SMALL = tl.constexpr(2.0**-110)
"""Below this sum, squares that underflow float32 could make up more than 2**-26 of it."""

LARGE = tl.constexpr(1e37)
"""Above this sum, a square may have overflowed, or a source may not be finite."""

PART = tl.constexpr(16)
"""Tile rows that the careful sum takes at a time."""

GROUPS = tl.constexpr(2)
"""Parts of half a slab that are first added up in float32: they are in the same threads, so no exchange is needed."""

CHUNK = tl.constexpr(32)
"""Slabs of every head whose sums are read at a time."""


@triton.jit
def encoded(total):
    """A sum of squares (float64) as a nonzero int64: the sign bit, which no sum uses, says that the sum is present."""
    return total.to(tl.int64, bitcast=True) | THERE


@triton.jit
def _careful_sum(
    base, primary, secondary, geometry, status, g, head, slab,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    """The sum of a slab whose squares leave the range of float32; sets the status bits if a source is not finite.

    It is a loop over small parts: the path is rare, and as one tile its float64 values would cost the common path
    registers.
    """
    total = tl.zeros([], dtype=tl.float64)
    bits = tl.zeros([], dtype=tl.int32)
    for part in range(ROWS // PART):
        start, offsets, exists = tile(geometry, g, head, slab * (ROWS // PART) + part, PART, ALIGNED, ONE_RUN)
        b = tl.where(exists, read(base, g, start, offsets, exists, B, ALIGNED, ONE_RUN), 0.0)
        m1 = tl.where(exists, read(primary, g, start, offsets, exists, M1, ALIGNED, ONE_RUN), 0.0)
        m2 = tl.where(exists, read(secondary, g, start, offsets, exists, M2, ALIGNED, ONE_RUN), 0.0)
        wide = (tl.abs(m1 - b) + tl.abs(m2 - b)).to(tl.float64)
        total += tl.sum(tl.sum(wide * wide, axis=1), axis=0)
        bits |= tl.where(magnitude(b) >= NOT_FINITE, BASE_BIT, 0)
        bits |= tl.where(magnitude(m1) >= NOT_FINITE, PRIMARY_BIT, 0)
        bits |= tl.where(magnitude(m2) >= NOT_FINITE, SECONDARY_BIT, 0)
    bits |= tl.where(total < float("inf"), 0, SCORE_BIT)
    if bits != 0:
        tl.atomic_or(status + g * P + head, bits, sem="relaxed")
    return total


@triton.jit
def squares(tv1, tv2, exists, B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr):
    """Sums of the proxy's squares in half a slab, in float32, each of at most 16 elements that are in one thread."""
    ROWS: tl.constexpr = tv1.shape[0]
    # The elements of one 16-byte load.
    WIDE: tl.constexpr = B.primitive_bitwidth + M1.primitive_bitwidth + M2.primitive_bitwidth > 48
    SPAN: tl.constexpr = 4 if WIDE else 8
    proxy = tl.where(exists, tl.abs(tv1) + tl.abs(tv2), 0.0)
    parts = tl.reshape(proxy * proxy, [GROUPS, ROWS // GROUPS, WIDTH // SPAN, SPAN])
    return tl.sum(tl.sum(parts, axis=3), axis=0)


@triton.jit
def slab_sum(
    low, high, base, primary, secondary, geometry, status, g, head, slab,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    """The sum of squares (float64) of a slab, from those of its halves, which are added up in float64."""
    sums = low.to(tl.float64) + high.to(tl.float64)
    total = tl.sum(tl.reshape(sums, [sums.numel], can_reorder=True), axis=0)
    if ~((total >= SMALL) & (total <= LARGE)):
        total = _careful_sum(
            base, primary, secondary, geometry, status, g, head, slab, B, M1, M2, P, ROWS, ALIGNED, ONE_RUN
        )  # fmt: skip
    return total


@triton.jit
def begin_to_read(
    base, primary, secondary, geometry, g, head, slab,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    """Begin to read a slab of ROWS tile rows from all three sources, in their own dtypes."""
    start, offsets, exists = tile(geometry, g, head, slab, ROWS, ALIGNED, ONE_RUN)
    b = load(base, g, start, offsets, exists, B, ALIGNED, ONE_RUN)
    m1 = load(primary, g, start, offsets, exists, M1, ALIGNED, ONE_RUN)
    m2 = load(secondary, g, start, offsets, exists, M2, ALIGNED, ONE_RUN)
    return b, m1, m2, exists


@triton.jit
def widened(b, m1, m2):
    """Base and both task vectors, float32."""
    b = b.to(tl.float32)
    return b, m1.to(tl.float32) - b, m2.to(tl.float32) - b


@triton.jit
def sum_of_slots(slots, geometry, g, P: tl.constexpr):
    """Squared scores (float64 [P]) of a projection, summed in a fixed order, and whether every slot was present."""
    entry = geometry + g * FIELDS
    heads = tl.load(entry + HEADS).to(tl.int32)
    slabs = tl.load(entry + SLABS).to(tl.int32)
    first = slots + tl.load(entry + FIRST)
    h = tl.arange(0, P)
    s = tl.arange(0, CHUNK)
    squared = tl.zeros([P], dtype=tl.float64)
    lacking = tl.zeros([], dtype=tl.int32)
    for c in range(0, slabs, CHUNK):
        exists = (h[:, None] < heads) & (c + s[None, :] < slabs)
        # Volatile: bypasses the L1 cache, and loads again in every iteration of a loop.
        bits = tl.load(first + h[:, None] * slabs + c + s[None, :], mask=exists, other=THERE, volatile=True)
        lacking |= greatest((bits >= 0).to(tl.int32))
        squared += tl.sum((bits & REST).to(tl.float64, bitcast=True), axis=1)
    return squared, lacking == 0


@triton.jit
def apply_slab(
    base, primary, secondary, out, geometry, status, c1, c2, scale, g, head, slab, chosen,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Read one slab of the sources and write the same slab of `out`. chosen: whether its head is selected."""
    start, offsets, exists = tile(geometry, g, head, slab, ROWS, ALIGNED, ONE_RUN)
    worst = 0
    if chosen:
        b = read(base, g, start, offsets, exists, B, ALIGNED, ONE_RUN)
        tv1 = read(primary, g, start, offsets, exists, M1, ALIGNED, ONE_RUN) - b
        tv2 = read(secondary, g, start, offsets, exists, M2, ALIGNED, ONE_RUN) - b
        value = merged(b, tv1, tv2, tl.load(c1 + g), tl.load(c2 + g), scale, OUT, SCALED)
        worst = write(out, g, start, offsets, exists, value, OUT, ALIGNED)
    else:
        if SCALED:
            b = read(base, g, start, offsets, exists, B, ALIGNED, ONE_RUN)
            tv1 = read(primary, g, start, offsets, exists, M1, ALIGNED, ONE_RUN) - b
            worst = write(out, g, start, offsets, exists, rounded(b + scale * tv1, OUT), OUT, ALIGNED)
        elif not IN_PLACE:
            if OUT == M1:
                _copy(primary, out, g, start, offsets, exists, OUT, ALIGNED, ONE_RUN)
            else:
                m1 = read(primary, g, start, offsets, exists, M1, ALIGNED, ONE_RUN)
                worst = write(out, g, start, offsets, exists, rounded(m1, OUT), OUT, ALIGNED)
    if worst >= NOT_FINITE:
        tl.atomic_or(status + g * P + head, RESULT_BIT, sem="relaxed")


@triton.jit
def merged(b, tv1, tv2, w1, w2, scale, OUT: tl.constexpr, SCALED: tl.constexpr):
    """The formula of a selected head, rounded to OUT."""
    displacement = w1 * tv1 + w2 * tv2
    if SCALED:
        displacement = scale * displacement
    return rounded(b + displacement, OUT)


@triton.jit
def _copy(
    source, out, g, start, offsets, exists,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    """Copy bits, as integers: a copy through a floating type may change a NaN's payload."""
    if DTYPE.primitive_bitwidth == 16:
        BITS: tl.constexpr = tl.int16
    else:
        BITS: tl.constexpr = tl.int32
    bits = load(source, g, start, offsets, exists, BITS, ALIGNED, ONE_RUN)
    tl.store(pointer(out, g, BITS, ALIGNED) + start + offsets, bits, mask=exists)


@triton.jit
def score_kernel(
    base, primary, secondary, geometry, items, slots, scores, status, arrivals,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    """Squared scores of every head. Each program owns one slab; a projection's last one also writes its row of
    scores."""
    unit = items + tl.program_id(0).to(tl.int64) * 4
    g = tl.load(unit).to(tl.int64)
    head = tl.load(unit + 1).to(tl.int64)
    slab = tl.load(unit + 2)
    slot = tl.load(unit + 3)
    HALF: tl.constexpr = ROWS // 2
    b0, m10, m20, exists0 = begin_to_read(
        base, primary, secondary, geometry, g, head, slab * 2, B, M1, M2, HALF, ALIGNED, ONE_RUN
    )  # fmt: skip
    b1, m11, m21, exists1 = begin_to_read(
        base, primary, secondary, geometry, g, head, slab * 2 + 1, B, M1, M2, HALF, ALIGNED, ONE_RUN
    )  # fmt: skip
    b0, tv10, tv20 = widened(b0, m10, m20)
    low = squares(tv10, tv20, exists0, B, M1, M2)
    b1, tv11, tv21 = widened(b1, m11, m21)
    high = squares(tv11, tv21, exists1, B, M1, M2)
    total = slab_sum(
        low, high, base, primary, secondary, geometry, status, g, head, slab, B, M1, M2, P, ROWS, ALIGNED, ONE_RUN
    )  # fmt: skip
    tl.store(slots + slot, encoded(total))
    tl.debug_barrier()
    entry = geometry + g * FIELDS
    others = tl.load(entry + HEADS) * tl.load(entry + SLABS) - 1
    last = tl.atomic_add(arrivals + g, 1, sem="acq_rel") == others
    tl.debug_barrier()
    if last:
        squared, _ = sum_of_slots(slots, geometry, g, P)
        tl.store(scores + g * P + tl.arange(0, P), squared)


@triton.jit(do_not_specialize=["scale"])
def apply_kernel(
    base, primary, secondary, out, geometry, items, scores, selected, status, keep, c1, c2, scale,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Select and merge by known scores. Each program owns one slab; that of a head's first slab also stores its
    selection.

    A projection with a score that is not finite is left unchanged, and SCORE_BIT is set in the status of those heads.
    """
    unit = items + tl.program_id(0).to(tl.int64) * 4
    g = tl.load(unit).to(tl.int64)
    head = tl.load(unit + 1).to(tl.int64)
    slab = tl.load(unit + 2)
    h = tl.arange(0, P)
    heads = tl.load(geometry + g * FIELDS + HEADS)
    squared = tl.load(scores + g * P + h, mask=h < heads, other=0.0)
    own = tl.load(scores + g * P + head)
    merge = finite(squared)
    greater = tl.sum((squared > own).to(tl.int32), axis=0)
    chosen = (greater < tl.load(keep + g)) & merge
    if slab == 0:
        tl.store(selected + g * P + head, chosen.to(tl.uint8))
        if ~(own < float("inf")):
            tl.atomic_or(status + g * P + head, SCORE_BIT, sem="relaxed")
    if merge:
        apply_slab(
            base, primary, secondary, out, geometry, status, c1, c2, scale, g, head, slab, chosen,
            B, M1, M2, OUT, P, ROWS, ALIGNED, ONE_RUN, SCALED, IN_PLACE,
        )  # fmt: skip
