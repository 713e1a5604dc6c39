# ruff: noqa: N803, N806 -- constexprs of kernels are upper case
"""The kernels of Headwise Selective Attention merge; `launch` calls them.

Formula (float32, evaluated in this order, every operation rounded by itself):

    tv1 = M1 - B,  tv2 = M2 - B,  proxy = |tv1| + |tv2|
    score[h] ** 2 = sum over head h of proxy ** 2
    selected[h]   = fewer than keep heads have a greater score
    out = B + scale * (c1 * tv1 + c2 * tv2)   in selected heads; no multiplication by a scale of 1
    out = B + scale * tv1                     in the others; M1 itself at scale 1

Source: Shankar, Wang, Eren, Alwan, "Compositional domain adaptation for automatic speech recognition with headwise
selective attention merging", Computer Speech & Language, 2026, 102012.

What every kernel takes, letters as in `primitives`:

    base, primary, secondary, out   int64 [G]     addresses of the projections' tensors, of dtypes B, M1, M2, OUT
    geometry                        int64 [G, 8]  see `primitives.FIELDS`
    items, queue                    int32 [*, 4]  units of work: kind (SCORE or APPLY), projection, head, slab
    partials                        float64 [S]   the sum of squares of every slab
    scores                          float64 [G, P]  squared scores; selected: uint8 [G, P]; both 0 beyond H
    status                          int32 [G, P]  what was found wrong in a head: the bits below; 0 at the launch
    arrivals, released, ticket      int32 [G], [G], [1]  0 at the launch, of no other launch meanwhile
    keep, c1, c2                    int32 [G], float32 [G], float32 [G]

Constexprs: P and ROWS; ALIGNED when every address of the launch is a multiple of 16 bytes and every geometry is as
`primitives.tile` wants it; SCALED when scale is not 1; IN_PLACE when out is primary in every projection.
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
    finite,
    load,
    magnitude,
    pointer,
    read,
    tile,
    write,
)

SCORE = tl.constexpr(0)
APPLY = tl.constexpr(1)

BASE_BIT = tl.constexpr(1)
PRIMARY_BIT = tl.constexpr(2)
SECONDARY_BIT = tl.constexpr(4)
SCORE_BIT = tl.constexpr(8)
RESULT_BIT = tl.constexpr(16)

MERGE = tl.constexpr(1)
REFUSE = tl.constexpr(2)

SMALL = tl.constexpr(2.0**-110)
"""Below this sum, squares that float32 cannot hold could make more than 2**-26 of it."""

LARGE = tl.constexpr(1e37)
"""Above this sum, a square may have overflowed, or a source may not be finite."""

PART = tl.constexpr(16)
"""Tile rows that the careful sum takes at a time."""


@triton.jit
def _proxy(b, m1, m2, exists):
    return tl.where(exists, tl.abs(m1 - b) + tl.abs(m2 - b), 0.0)


@triton.jit
def _careful_sum(
    base, primary, secondary, geometry, status, g, head, slab,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The sum of a slab whose squares leave the range of float32, and the status bits if a source is not finite.

    A loop over small parts: the path is rare, and as one tile its float64 would cost the common path registers.
    """
    total = tl.zeros([], dtype=tl.float64)
    bits = tl.zeros([], dtype=tl.int32)
    for part in range(ROWS // PART):
        offsets, exists = tile(geometry, g, head, slab * (ROWS // PART) + part, PART, ALIGNED)
        b = read(base, g, offsets, exists, B, ALIGNED)
        m1 = read(primary, g, offsets, exists, M1, ALIGNED)
        m2 = read(secondary, g, offsets, exists, M2, ALIGNED)
        wide = _proxy(b, m1, m2, exists).to(tl.float64)
        total += tl.sum(tl.sum(wide * wide, axis=1), axis=0)
        bits |= tl.where(magnitude(b) >= NOT_FINITE, BASE_BIT, 0)
        bits |= tl.where(magnitude(m1) >= NOT_FINITE, PRIMARY_BIT, 0)
        bits |= tl.where(magnitude(m2) >= NOT_FINITE, SECONDARY_BIT, 0)
    bits |= tl.where(total < float("inf"), 0, SCORE_BIT)
    if bits != 0:
        tl.atomic_or(status + g * P + head, bits, sem="relaxed")
    return total


@triton.jit
def _score_slab(
    base, primary, secondary, geometry, partials, scores, status, arrivals, g, head, slab,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sum one slab into its slot. The program that comes last of its projection writes the projection's row of
    scores, from the slots in their order, and gets True."""
    entry = geometry + g * FIELDS
    heads = tl.load(entry + HEADS)
    slabs = tl.load(entry + SLABS)
    first = partials + tl.load(entry + FIRST)
    offsets, exists = tile(geometry, g, head, slab, ROWS, ALIGNED)
    b = read(base, g, offsets, exists, B, ALIGNED)
    m1 = read(primary, g, offsets, exists, M1, ALIGNED)
    m2 = read(secondary, g, offsets, exists, M2, ALIGNED)
    proxy = _proxy(b, m1, m2, exists)
    total = tl.sum(tl.sum(proxy * proxy, axis=1).to(tl.float64), axis=0)
    if ~((total >= SMALL) & (total <= LARGE)):
        total = _careful_sum(
            base, primary, secondary, geometry, status, g, head, slab, B, M1, M2, P, ROWS, ALIGNED
        )  # fmt: skip
    tl.store(first + head * slabs + slab, total)
    tl.debug_barrier()
    last = tl.atomic_add(arrivals + g, 1, sem="acq_rel") == heads * slabs - 1
    tl.debug_barrier()
    if last:
        h = tl.arange(0, P)
        squared = tl.zeros([P], dtype=tl.float64)
        for s in range(slabs):
            squared += tl.load(first + h * slabs + s, mask=h < heads, other=0.0, cache_modifier=".cg")
        tl.store(scores + g * P + h, squared)
        tl.debug_barrier()
    return last


@triton.jit
def _select_and_release(geometry, scores, selected, released, keep, g, P: tl.constexpr):
    """Write a projection's row of selected heads and let its merge begin, or refuse it if a score is not finite."""
    heads = tl.load(geometry + g * FIELDS + HEADS)
    h = tl.arange(0, P)
    squared = tl.load(scores + g * P + h, cache_modifier=".cg")
    # Slots beyond the heads hold 0: no score is below that, so they outrank none.
    greater = tl.sum((squared[None, :] > squared[:, None]).to(tl.int32), axis=1)
    merge = finite(squared)
    chosen = (greater < tl.load(keep + g)) & (h < heads) & merge
    tl.store(selected + g * P + h, chosen.to(tl.uint8))
    tl.debug_barrier()
    tl.atomic_xchg(released + g, tl.where(merge, MERGE, REFUSE), sem="release")


@triton.jit
def _apply_slab(
    base, primary, secondary, out, geometry, status, c1, c2, scale, g, head, slab, chosen,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OUT: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Write one slab of `out`. chosen: whether its head is selected."""
    offsets, exists = tile(geometry, g, head, slab, ROWS, ALIGNED)
    worst = 0
    if chosen:
        b = read(base, g, offsets, exists, B, ALIGNED)
        tv1 = read(primary, g, offsets, exists, M1, ALIGNED) - b
        tv2 = read(secondary, g, offsets, exists, M2, ALIGNED) - b
        displacement = tl.load(c1 + g) * tv1 + tl.load(c2 + g) * tv2
        if SCALED:
            displacement = scale * displacement
        worst = write(out, g, offsets, exists, b + displacement, OUT, ALIGNED)
    else:
        if SCALED:
            b = read(base, g, offsets, exists, B, ALIGNED)
            tv1 = read(primary, g, offsets, exists, M1, ALIGNED) - b
            worst = write(out, g, offsets, exists, b + scale * tv1, OUT, ALIGNED)
        elif not IN_PLACE:
            if OUT == M1:
                _copy(primary, out, g, offsets, exists, OUT, ALIGNED)
            else:
                m1 = read(primary, g, offsets, exists, M1, ALIGNED)
                worst = write(out, g, offsets, exists, m1, OUT, ALIGNED)
    if worst >= NOT_FINITE:
        tl.atomic_or(status + g * P + head, RESULT_BIT, sem="relaxed")


@triton.jit
def _copy(source, out, g, offsets, exists, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Copy bits, as integers: a copy through a floating type may change a NaN's payload."""
    if DTYPE.primitive_bitwidth == 16:
        BITS: tl.constexpr = tl.int16
    else:
        BITS: tl.constexpr = tl.int32
    bits = load(source, g, offsets, exists, BITS, ALIGNED)
    tl.store(pointer(out, g, BITS, ALIGNED) + offsets, bits, mask=exists)


@triton.jit(do_not_specialize=["work", "scale"])
def fused_kernel(
    base, primary, secondary, out, geometry, queue, work,
    partials, scores, selected, status, arrivals, released, ticket, keep, c1, c2, scale,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OUT: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Score, select and merge in one launch of any number of programs.

    A program draws `work` units of the queue, one at a time, until none is left. Score units never wait. An apply
    unit waits for its projection's release, which depends on units with lower tickets alone, and those are in the
    hands of running programs: the lowest unfinished unit never waits, so the launch ends whatever is resident.
    """
    drawn = tl.atomic_add(ticket, 1, sem="relaxed")
    while drawn < work:
        unit = queue + drawn.to(tl.int64) * 4
        kind = tl.load(unit)
        g = tl.load(unit + 1).to(tl.int64)
        head = tl.load(unit + 2).to(tl.int64)
        slab = tl.load(unit + 3)
        if kind == SCORE:
            last = _score_slab(
                base, primary, secondary, geometry, partials, scores, status, arrivals, g, head, slab,
                B, M1, M2, P, ROWS, ALIGNED,
            )  # fmt: skip
            if last:
                _select_and_release(geometry, scores, selected, released, keep, g, P)
        else:
            verdict = tl.atomic_add(released + g, 0, sem="acquire")
            while verdict == 0:
                verdict = tl.atomic_add(released + g, 0, sem="acquire")
            tl.debug_barrier()
            if verdict == MERGE:
                chosen = tl.load(selected + g * P + head, cache_modifier=".cg") != 0
                _apply_slab(
                    base, primary, secondary, out, geometry, status, c1, c2, scale, g, head, slab, chosen,
                    B, M1, M2, OUT, P, ROWS, ALIGNED, SCALED, IN_PLACE,
                )  # fmt: skip
        drawn = tl.atomic_add(ticket, 1, sem="relaxed")


@triton.jit
def score_kernel(
    base, primary, secondary, geometry, items, partials, scores, status, arrivals,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Squared scores of every head. A program owns one slab, the last of a projection also its row of scores."""
    unit = items + tl.program_id(0).to(tl.int64) * 4
    g = tl.load(unit + 1).to(tl.int64)
    head = tl.load(unit + 2).to(tl.int64)
    slab = tl.load(unit + 3)
    _score_slab(
        base, primary, secondary, geometry, partials, scores, status, arrivals, g, head, slab,
        B, M1, M2, P, ROWS, ALIGNED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["scale"])
def apply_kernel(
    base, primary, secondary, out, geometry, items, scores, selected, status, keep, c1, c2, scale,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OUT: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Select and merge by scores that are known. A program owns one slab, the first of a head also its selection.

    A projection with a score that is not finite is left as it is, and those heads' status says SCORE_BIT.
    """
    unit = items + tl.program_id(0).to(tl.int64) * 4
    g = tl.load(unit + 1).to(tl.int64)
    head = tl.load(unit + 2).to(tl.int64)
    slab = tl.load(unit + 3)
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
        _apply_slab(
            base, primary, secondary, out, geometry, status, c1, c2, scale, g, head, slab, chosen,
            B, M1, M2, OUT, P, ROWS, ALIGNED, SCALED, IN_PLACE,
        )  # fmt: skip
