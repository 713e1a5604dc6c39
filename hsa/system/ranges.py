"""Byte ranges, each a start and a stop: which of them are here, which are missing, which to fetch in one go."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

Range = tuple[int, int]


def union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same bytes as disjoint ranges in order, none empty and none touching the next."""
    found: list[Range] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def covers(held: Sequence[Range], start: int, stop: int) -> bool:
    """Whether every byte from `start` to `stop` lies in `held`, which is a union."""
    if start >= stop:
        return True
    place = bisect_right(held, start, key=lambda r: r[0]) - 1
    return place >= 0 and stop <= held[place][1]


def subtract(wanted: Iterable[Range], held: Sequence[Range]) -> tuple[Range, ...]:
    """The bytes of `wanted` that are not in `held`, which is a union."""
    missing: list[Range] = []
    for start, stop in union(wanted):
        for first, last in held:
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
    """Fewer ranges that hold these and some bytes between: gaps of at most `gap` bytes are bridged, the smallest first,
    as long as all that are bridged have at most `budget` bytes together."""
    apart = union(ranges)
    gaps = sorted((after[0] - before[1], number) for number, (before, after) in enumerate(pairwise(apart)))
    bridges: list[Range] = []
    for size, number in gaps:
        if size > gap or size > budget:
            break
        budget -= size
        bridges.append((apart[number][1], apart[number + 1][0]))
    return union((*apart, *bridges))


def total(ranges: Iterable[Range]) -> int:
    """Bytes in disjoint ranges."""
    return sum(stop - start for start, stop in ranges)
