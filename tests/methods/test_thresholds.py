"""The k-th largest magnitude by counts of bit patterns, against a sort."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest

from hsa.methods import thresholds
from hsa.methods.thresholds import Counts, Place, locate, merged, value_of


def upper_counts(values: np.ndarray) -> Counts:
    return thresholds.upper_counts(np.abs(values), np.full(values.size, np.nan))


def lower_counts(values: np.ndarray, upper: int) -> Counts:
    return thresholds.lower_counts(np.abs(values), upper, np.full(values.size, np.nan))


def kth(blocks: Iterable[np.ndarray], rank: int) -> float:
    """The threshold as a method finds it: in two passes over blocks, in any order."""
    blocks = list(blocks)
    random.Random(rank).shuffle(blocks)
    place = locate(merged(map(upper_counts, blocks)), rank)
    inside = locate(merged(lower_counts(block, place.bin) for block in blocks), place.rank)
    return value_of(place.bin, inside.bin)


def samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(3001).astype(np.float32)
    return {
        "normal": normal,
        "small": normal * np.float32(1e-6),
        "half": normal.astype(np.float16).astype(np.float32),
        "one value": np.full(77, -0.125, np.float32),
        "zeros": np.zeros(50, np.float32),
        "signed zeros and a one": np.array([0.0, -0.0, 1.0, -0.0], np.float32),
        "one element": np.array([-3.5], np.float32),
        "ends": np.array([1e-45, -3.4028235e38, 1.1754944e-38, 0.0, 2.0**127, -1e-45], np.float32),
        "one bin": (np.arange(1000) * 2.0**-23 + 1.0).astype(np.float32) * np.float32(-1),
        "bits of every kind": rng.integers(0, 2**32, 999, dtype=np.uint32).view(np.float32),
    }


@pytest.mark.parametrize("name", samples())
def test_every_rank_is_that_of_a_sort(name: str) -> None:
    values = samples()[name]
    values = values[np.isfinite(values)]
    descending = np.sort(np.abs(values))[::-1]
    ranks = {1, 2, 3, len(values) // 3 + 1, len(values) // 2 + 1, len(values) - 1, len(values)}
    for rank in sorted(ranks & set(range(1, len(values) + 1))):
        for parts in (1, 2, 7):
            assert kth(np.array_split(values, parts), rank) == float(descending[rank - 1])


def test_matrices_and_infinities_are_counted() -> None:
    values = np.array([[np.inf, 1.0], [-np.inf, -2.0]], np.float32)
    assert [kth([values], rank) for rank in (1, 2, 3, 4)] == [np.inf, np.inf, 2.0, 1.0]


def test_counts_are_small_and_add_up() -> None:
    counts = upper_counts(np.array([1.0, -1.0, 1.0, 1.0078125], np.float32))
    assert (counts.bins.tolist(), counts.counts.tolist(), counts.total) == ([0x3F80, 0x3F81], [3, 1], 4)
    lower = lower_counts(np.array([1.0, -1.0, 1.0, 1.0078125, 0.5, 1.0 + 2.0**-22], np.float32), 0x3F80)
    assert (lower.bins.tolist(), lower.counts.tolist()) == ([0, 2], [3, 1])
    both = merged([counts, Counts(np.array([5, 0x3F80]), np.array([2, 1 << 40])), merged([])])
    assert both.bins.tolist() == [5, 0x3F80, 0x3F81]
    assert (both.counts.tolist(), both.total) == ([2, (1 << 40) + 3, 1], (1 << 40) + 6)


def test_nothing_counts_nothing() -> None:
    empty = np.zeros(0, np.float32)
    assert upper_counts(empty).total == lower_counts(empty, 3).total == merged([upper_counts(empty)]).total == 0
    assert lower_counts(np.ones(5, np.float32), 3).total == 0


def test_a_rank_lies_in_a_bin() -> None:
    counts = Counts(np.array([10, 12], np.uint16), np.array([5, 2], np.uint32))
    assert [locate(counts, rank) for rank in (1, 2, 3, 7)] == [
        Place(12, 1, 0),
        Place(12, 2, 0),
        Place(10, 1, 2),
        Place(10, 5, 2),
    ]
    assert [counts.at_least(bin) for bin in (0, 10, 11, 12, 13)] == [7, 7, 2, 2, 0]


def test_the_bits_of_a_magnitude_make_it_again() -> None:
    for value in (0.0, 1.0, 1e-45, 0.1, 3.4028235e38):
        bits = int(np.float32(value).view(np.uint32))
        assert value_of(bits >> 16, bits & 0xFFFF) == float(np.float32(value))
