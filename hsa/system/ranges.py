"""Arithmetic on byte ranges, each a start and a stop: union, difference, and merging ranges across small gaps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

Range = tuple[int, int]


def union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return the same bytes as disjoint ranges in order. No range is empty or touches the next."""
    disjoint: list[Range] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if disjoint and start <= disjoint[-1][1]:
            disjoint[-1] = (disjoint[-1][0], max(stop, disjoint[-1][1]))
        else:
            disjoint.append((start, stop))
    return tuple(disjoint)


def covers(ranges: Sequence[Range], start: int, stop: int) -> bool:
    """Whether `ranges`, which is a union, contains every byte from `start` to `stop`."""
    if start >= stop:
        return True
    index = bisect_right(ranges, start, key=lambda r: r[0]) - 1
    return index >= 0 and stop <= ranges[index][1]


def subtract(ranges: Iterable[Range], removed: Sequence[Range]) -> tuple[Range, ...]:
    """The bytes of `ranges` that are not in `removed`, which is a union."""
    missing: list[Range] = []
    for start, stop in union(ranges):
        for first, last in removed:
            if last <= start:
                continue
            if first >= stop:
                break
            if start < first:
                missing.append((start, first))
            start = max(start, last)
        if start < stop:
            missing.append((start, stop))
    return tuple(missing)


def coalesce(ranges: Iterable[Range], gap: int, budget: int) -> tuple[Range, ...]:
    """Merge ranges by bridging gaps of at most `gap` bytes, the smallest first, and at most `budget` bytes of gaps in
    all."""
    disjoint = union(ranges)
    gaps = sorted((after[0] - before[1], number) for number, (before, after) in enumerate(pairwise(disjoint)))
    bridges: list[Range] = []
    for size, number in gaps:
        if size > gap or size > budget:
            break
        budget -= size
        bridges.append((disjoint[number][1], disjoint[number + 1][0]))
    return union((*disjoint, *bridges))


def total(ranges: Iterable[Range]) -> int:
    """Return the number of bytes in disjoint ranges."""
    return sum(stop - start for start, stop in ranges)
