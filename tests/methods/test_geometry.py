"""The sums over a target's heads, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hsa.methods.geometry import Geometry, dot, tile_sums

Sums = tuple[float, float, float, float, float]


def expected(base: np.ndarray, tv1: np.ndarray, tv2: np.ndarray) -> Sums:
    b, one, two = (array.astype(np.longdouble) for array in (base, tv1, tv2))
    return tuple(float((x * y).sum()) for x, y in ((b, b), (one, one), (two, two), (one, two), (one - two, one - two)))


def random(seed: int, shape: tuple[int, int], scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("shape", [(64, 1280), (102, 1280), (1, 1), (64, 1), (1, 5000), (384, 64), (3, 7)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_those_of_float64(shape: tuple[int, int], dtype: type) -> None:
    arrays = [random(seed, shape, scale).astype(dtype) for seed, scale in enumerate((0.05, 1e-3, 2e-3))]
    found, right = tile_sums(*arrays), expected(*arrays)
    exact = 1e-13 if dtype is np.float64 else 3e-6
    for place in (0, 1, 2, 4):
        assert found[place] == pytest.approx(right[place], rel=exact)
    assert found[3] == pytest.approx(right[3], abs=exact * math.sqrt(right[1] * right[2]))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-17, 1e15, 1.9e19, 1e30, 1e38], ids="{:g}".format)
def test_sums_neither_overflow_nor_vanish(scale: float) -> None:
    """The squares of these lie outside float32, or among its subnormal numbers."""
    arrays = [np.clip(random(seed, (64, 96)), -1, 1) * np.float32(scale) for seed in range(3)]
    found, right = tile_sums(*arrays), expected(*arrays)
    assert all(math.isfinite(value) for value in found)
    assert found == pytest.approx(right, rel=1e-5)


def test_the_sums_of_a_large_and_a_small_task_vector_are_both_right() -> None:
    arrays = random(0, (64, 96)), random(1, (64, 96), 1e25), random(2, (64, 96), 1e-25)
    found, right = tile_sums(*arrays), expected(*arrays)
    assert found == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-5])
def test_the_distance_of_nearly_equal_task_vectors_has_correct_digits(apart: float) -> None:
    """The difference of the other sums would be rounding noise."""
    one = random(0, (64, 1280), 1e-3)
    two = one + random(1, (64, 1280), 1e-3 * apart)
    found, right = tile_sums(one, one, two), expected(one, one, two)
    assert found[4] == pytest.approx(right[4], rel=1e-3)


def test_equal_task_vectors_are_zero_apart() -> None:
    one = random(0, (64, 1280), 1e-3)
    assert tile_sums(one, one, one.copy())[4] == 0.0
    nothing = np.zeros((64, 1280), np.float32)
    assert tile_sums(one, nothing, nothing) == (dot(one, one), 0.0, 0.0, 0.0, 0.0)


def test_a_geometry_adds_the_tiles_of_each_head() -> None:
    found = Geometry.of([[(4.0, 1.0, 1.0, 0.5, 1.0), (0.0, 3.0, 0.0, 0.5, 2.0)], [(0.0, 0.0, 9.0, 0.0, 9.0)]])
    assert found == Geometry((4.0, 0.0), (4.0, 0.0), (1.0, 9.0), (1.0, 0.0), (3.0, 9.0))
    assert found.cosines == (0.5, None)
    assert found.relative_primary == (1.0, None)
    assert found.relative_secondary == (0.5, None)
