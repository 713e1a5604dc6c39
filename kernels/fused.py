# ruff: noqa: N803, N806 -- constexprs of kernels are upper case
"""The fused kernel: scores, selection and merge of any number of projections in one launch that reads each source once.

Arguments, letters and formula are as in `headwise`. In addition: members, int32 [n], the projections of the launch;
released, int64 [G], the decision on each of them; states, int32 [S], of the slabs; tickets, int32 [2]. released,
states, tickets and the slots are 0 at the launch, and no other launch uses them meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from hsa.kernels.headwise import (
    RESULT_BIT,
    apply_slab,
    begin_to_read,
    encoded,
    merged,
    slab_sum,
    squares,
    sum_of_slots,
    widened,
)
from hsa.kernels.primitives import (
    FIELDS,
    FIRST,
    HEADS,
    NOT_FINITE,
    SLABS,
    WIDTH,
    finite,
    packed,
    tile,
    unpacked,
    write,
)

MERGE = tl.constexpr(-(1 << 63))
"""The bit of a released projection that is to be merged; a head's own bit says that the head is selected."""

REFUSE = tl.constexpr(1 << 62)
"""The bit of a released projection that is not merged, because a score is not finite. So there are at most 62 heads."""

DONE = tl.constexpr(1)
LEFT = tl.constexpr(2)
"""States of a slab: done (written, or rightly not written), and left to the program that closes its projection."""

STATES = tl.constexpr(512)
"""Slabs whose states are read at a time."""


@triton.jit
def _decide(slots, geometry, scores, selected, released, keep, g, most, P: tl.constexpr):
    """Wait for a projection's slots, for at most `most` looks (0: no limit), write its rows of scores and of selected
    heads, and release it. This is idempotent: a second program writes the same values."""
    squared, ready = sum_of_slots(slots, geometry, g, P)
    looks = 1
    while (not ready) & ((looks < most) | (most == 0)):
        squared, ready = sum_of_slots(slots, geometry, g, P)
        looks += 1
    if ready:
        h = tl.arange(0, P)
        # Slots beyond the heads hold 0: no score is below that, so they outrank none.
        greater = tl.sum((squared[None, :] > squared[:, None]).to(tl.int32), axis=1)
        merge = finite(squared)
        chosen = (greater < tl.load(keep + g)) & (h < tl.load(geometry + g * FIELDS + HEADS)) & merge
        tl.store(scores + g * P + h, squared)
        tl.store(selected + g * P + h, chosen.to(tl.uint8))
        bits = tl.sum(tl.where(chosen, tl.full([P], 1, tl.int64) << h.to(tl.int64), 0), axis=0)
        tl.atomic_or(released + g, tl.where(merge, bits | MERGE, REFUSE), sem="relaxed")


@triton.jit
def _settle(
    words0, words1, i,
    base, primary, secondary, out, geometry, items, status, released, states, c1, c2, scale, patience,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Write the merged slab of unit `i` (none if negative), held in two halves, once its projection is released.

    After `patience` looks it is left to the program that closes the projection, which reads its sources again.
    """
    if i >= 0:
        unit = items + i.to(tl.int64) * 4
        g = tl.load(unit).to(tl.int64)
        head = tl.load(unit + 1).to(tl.int64)
        slab = tl.load(unit + 2)
        slot = tl.load(unit + 3)
        # An atomic, because its result is the same in all threads.
        release = tl.atomic_add(released + g, 0, sem="relaxed")
        looks = 1
        while (release == 0) & (looks < patience):
            release = tl.atomic_add(released + g, 0, sem="relaxed")
            looks += 1
        if release < 0:
            if (release >> head) & 1 != 0:
                HALF: tl.constexpr = ROWS // 2
                start, offsets, exists = tile(geometry, g, head, slab * 2, HALF, ALIGNED, ONE_RUN)
                worst = write(out, g, start, offsets, exists, unpacked(words0, OUT), OUT, ALIGNED)
                start, offsets, exists = tile(geometry, g, head, slab * 2 + 1, HALF, ALIGNED, ONE_RUN)
                worst = tl.maximum(worst, write(out, g, start, offsets, exists, unpacked(words1, OUT), OUT, ALIGNED))
                if worst >= NOT_FINITE:
                    tl.atomic_or(status + g * P + head, RESULT_BIT, sem="relaxed")
            elif SCALED or not IN_PLACE:
                apply_slab(
                    base, primary, secondary, out, geometry, status, c1, c2, scale, g, head, slab, False,
                    B, M1, M2, OUT, P, ROWS, ALIGNED, ONE_RUN, SCALED, IN_PLACE,
                )  # fmt: skip
        tl.atomic_or(states + slot, tl.where(release == 0, LEFT, DONE), sem="relaxed")


@triton.jit
def _close(
    base, primary, secondary, out, geometry, slots, scores, selected, status, released, states, keep, c1, c2, scale, g,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Release a projection if no program has, and merge its slabs that were left. By now all of its units are drawn."""
    release = tl.atomic_add(released + g, 0, sem="relaxed")
    if release == 0:
        _decide(slots, geometry, scores, selected, released, keep, g, 0, P)
        release = tl.atomic_add(released + g, 0, sem="relaxed")
    entry = geometry + g * FIELDS
    slabs = tl.load(entry + SLABS).to(tl.int32)
    count = tl.load(entry + HEADS).to(tl.int32) * slabs
    own = states + tl.load(entry + FIRST)
    lanes = tl.arange(0, STATES)
    for c in range(0, count, STATES):
        found = tl.load(own + c + lanes, mask=c + lanes < count, other=DONE, volatile=True)
        while tl.min(found, axis=0) == 0:
            found = tl.load(own + c + lanes, mask=c + lanes < count, other=DONE, volatile=True)
        if (tl.max(found, axis=0) == LEFT) & (release < 0):
            for s in range(c, min(count, c + STATES)):
                if tl.max(tl.where(c + lanes == s, found, 0), axis=0) == LEFT:
                    head = (s // slabs).to(tl.int64)
                    apply_slab(
                        base, primary, secondary, out, geometry, status, c1, c2, scale, g, head, s % slabs,
                        (release >> head) & 1 != 0,
                        B, M1, M2, OUT, P, ROWS, ALIGNED, ONE_RUN, SCALED, IN_PLACE,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["work", "projections", "deciders", "patience", "scale"])
def fused_kernel(
    base, primary, secondary, out, geometry, items, work, members, projections,
    slots, scores, selected, status, released, states, tickets, keep, c1, c2, scale, deciders, patience,
    B: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    ALIGNED: tl.constexpr, ONE_RUN: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
    HELD: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Score, select and merge in one launch of any number of programs.

    Every source is read once. Slabs of unselected heads that are copied or scaled, and slabs that were left, are read a
    second time.

    A program draws units one at a time. It scores a unit, and holds the merged slab, in case the head is selected,
    until it has scored HELD more. By then the projection is usually decided, and the slab is written from registers.
    The first `deciders` programs to begin add up scores and select before they draw units.

    Waiting is bounded: by `patience` looks for a decision, and by its square for sums. After that, a slab is left.
    Programs that find no more units to draw close the projections, one at a time, and read again what was left. They
    alone wait without a bound, for units that are all held by running programs, none of which waits without a bound for
    them. So the launch cannot deadlock, whichever programs are resident, even if programs run one after the other.

    Programs communicate only through single words, each written and read by itself, so that no order between two words
    matters. ALONE says that programs run one after the other. Then the program that scores a projection's last unit
    decides it, which would cost registers where other programs can decide.
    """
    role = tl.atomic_add(tickets + 1, 1, sem="relaxed")
    if role < deciders:
        for i in range(role, projections, deciders):
            g = tl.load(members + i).to(tl.int64)
            _decide(slots, geometry, scores, selected, released, keep, g, patience * patience, P)
    drawn = tl.atomic_add(tickets, 1, sem="relaxed")
    HALF: tl.constexpr = ROWS // 2
    first0 = packed(tl.zeros([HALF, WIDTH], dtype=OUT), OUT)
    first1 = packed(tl.zeros([HALF, WIDTH], dtype=OUT), OUT)
    second0 = packed(tl.zeros([HALF, WIDTH], dtype=OUT), OUT)
    second1 = packed(tl.zeros([HALF, WIDTH], dtype=OUT), OUT)
    first_unit = tl.full([], -1, tl.int32)
    second_unit = tl.full([], -1, tl.int32)
    while drawn < work:
        i = drawn
        unit = items + i.to(tl.int64) * 4
        g = tl.load(unit).to(tl.int64)
        head = tl.load(unit + 1).to(tl.int64)
        slab = tl.load(unit + 2)
        slot = tl.load(unit + 3)
        b0, m10, m20, exists0 = begin_to_read(
            base, primary, secondary, geometry, g, head, slab * 2, B, M1, M2, HALF, ALIGNED, ONE_RUN
        )  # fmt: skip
        b1, m11, m21, exists1 = begin_to_read(
            base, primary, secondary, geometry, g, head, slab * 2 + 1, B, M1, M2, HALF, ALIGNED, ONE_RUN
        )  # fmt: skip
        w1 = tl.load(c1 + g)
        w2 = tl.load(c2 + g)
        # All threads wait for the result, so they do it while the loads of the sources are in flight.
        drawn = tl.atomic_add(tickets, 1, sem="relaxed")
        # One half after the other: widened at once, they would not fit into the registers.
        b0, tv10, tv20 = widened(b0, m10, m20)
        low = squares(tv10, tv20, exists0, B, M1, M2)
        words0 = packed(merged(b0, tv10, tv20, w1, w2, scale, OUT, SCALED), OUT)
        b1, tv11, tv21 = widened(b1, m11, m21)
        high = squares(tv11, tv21, exists1, B, M1, M2)
        words1 = packed(merged(b1, tv11, tv21, w1, w2, scale, OUT, SCALED), OUT)
        total = slab_sum(
            low, high, base, primary, secondary, geometry, status, g, head, slab, B, M1, M2, P, ROWS, ALIGNED, ONE_RUN
        )  # fmt: skip
        # The slot was 0, so this stores the value; unlike an exchange, it has no result to wait for.
        tl.atomic_or(slots + slot, encoded(total), sem="relaxed")
        if ALONE:
            entry = geometry + g * FIELDS
            if (slab + 1 == tl.load(entry + SLABS)) & (head + 1 == tl.load(entry + HEADS)):
                _decide(slots, geometry, scores, selected, released, keep, g, 1, P)
        if HELD == 2:
            _settle(
                second0, second1, second_unit, base, primary, secondary, out, geometry, items, status, released, states,
                c1, c2, scale, patience, B, M1, M2, OUT, P, ROWS, ALIGNED, ONE_RUN, SCALED, IN_PLACE,
            )  # fmt: skip
            second0 = first0
            second1 = first1
            second_unit = first_unit
        else:
            _settle(
                first0, first1, first_unit, base, primary, secondary, out, geometry, items, status, released, states,
                c1, c2, scale, patience, B, M1, M2, OUT, P, ROWS, ALIGNED, ONE_RUN, SCALED, IN_PLACE,
            )  # fmt: skip
        first0 = words0
        first1 = words1
        first_unit = i
    if HELD == 2:
        _settle(
            second0, second1, second_unit, base, primary, secondary, out, geometry, items, status, released, states,
            c1, c2, scale, patience, B, M1, M2, OUT, P, ROWS, ALIGNED, ONE_RUN, SCALED, IN_PLACE,
        )  # fmt: skip
    _settle(
        first0, first1, first_unit, base, primary, secondary, out, geometry, items, status, released, states,
        c1, c2, scale, patience, B, M1, M2, OUT, P, ROWS, ALIGNED, ONE_RUN, SCALED, IN_PLACE,
    )  # fmt: skip
    while drawn < work + projections:
        g = tl.load(members + (drawn - work)).to(tl.int64)
        _close(
            base, primary, secondary, out, geometry, slots, scores, selected, status, released, states, keep,
            c1, c2, scale, g, B, M1, M2, OUT, P, ROWS, ALIGNED, ONE_RUN, SCALED, IN_PLACE,
        )  # fmt: skip
        drawn = tl.atomic_add(tickets, 1, sem="relaxed")
