"""Sums in one order: against an oracle that adds one number after another, and against exactly rounded sums."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hsa.methods.sums import block_sums, total


def added(block: list[float]) -> float:
    """Lane after lane from its first number on, and then halves of lanes."""
    values = [sum(block[lane::64]) for lane in range(64)]
    while len(values) > 1:
        half = len(values) // 2
        values = [values[n] + values[n + half] for n in range(half)]
    return values[0]


@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 1025, 5 * 1024 - 1])
def test_lanes_are_added_in_order_and_by_halves_and_then_blocks_in_order(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count) * 10.0 ** np.arange(count).astype(float).clip(0, 12)
    expected = []
    for first in range(0, count, 1024):
        part = values[first : first + 1024].tolist()
        expected.append(added(part + [0.0] * (1024 - len(part))))
    parts = block_sums(values.copy())
    assert parts.tolist() == expected
    in_order = 0.0
    for each in expected:
        in_order += each
    assert total([parts]) == in_order
    assert total([parts]) == pytest.approx(math.fsum(values.tolist()), rel=1e-12, abs=1e-3)


@pytest.mark.parametrize("cut", [1024, 2048, 4096])
def test_slices_of_whole_blocks_give_the_same_sum(cut: int) -> None:
    values = np.random.default_rng(7).standard_normal(10_000)
    parts = [block_sums(values[first : first + cut].copy()) for first in range(0, values.size, cut)]
    assert total(parts) == total([block_sums(values.copy())])
    assert total([]) == 0.0
