"""Distances of tensors from what was computed again, however their bytes are cut."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hsa.architectures.base import Partition, TensorInfo
from hsa.methods.tensors import TensorTask
from hsa.planning.file_layout import Computed, Segment
from hsa.system.dtypes import STORAGE, size
from hsa.verification.distances import TensorDistances


def segment(code: str, elements: int) -> Segment:
    info = TensorInfo("w", code, (elements,))
    task = TensorTask("w", None, 0, (elements,), Partition(), {"model1": info}, "model1", code, "w")
    return Segment(8, Computed(task, 0, elements))


def stored(code: str, values: Any) -> Any:
    """Values in an element type: bytes, and what they are exactly."""
    if code == "BF16":
        bits = (np.float32(values).view(np.uint32) >> 16).astype(np.uint16)
        return bits.view(np.uint8), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    raw = values.astype(STORAGE[code])
    return raw.view(np.uint8), raw.astype(np.float64)


@pytest.mark.parametrize("code", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("seed", range(6))
def test_parts_of_any_length_in_any_order(code: str, seed: int) -> None:
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    elements = draw.choice([1, 2, 7, 100])
    expected, wide = stored(code, rng.standard_normal(elements))
    found, other = stored(code, wide + 0.01 * rng.standard_normal(elements))
    total = elements * size(code)
    cuts = sorted({0, total, *(draw.randrange(total) for _ in range(draw.choice([0, 1, 5, 40])))})
    parts = list(pairwise(cuts))
    draw.shuffle(parts)
    distances, one = TensorDistances(), segment(code, elements)
    for low, high in parts:
        distances.add(one, low, found[low:high], expected[low:high])
    wanted = math.sqrt(float(((other - wide) ** 2).sum()) / float((wide**2).sum()))
    assert distances.distance(one) == pytest.approx(wanted, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("found", "expected", "distance"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, -0.0], [0.0, 0.0], 0.0),
        ([1e-30, 0.0], [0.0, 0.0], math.inf),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([math.inf, 2.0], [1.0, 2.0], math.inf),
        ([3e38, 0.0], [-3e38, 0.0], 2.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
    ],
)
def test_ends_of_the_range(found: list[float], expected: list[float], distance: float) -> None:
    distances, one = TensorDistances(), segment("F32", 2)
    distances.add(one, 0, np.float32(found).view(np.uint8), np.float32(expected).view(np.uint8))
    assert distances.distance(one) == pytest.approx(distance)


def test_tensors_are_told_apart() -> None:
    distances, one, two = TensorDistances(), segment("F32", 1), segment("F32", 1)
    ones, twos = np.float32([1.0]).view(np.uint8), np.float32([2.0]).view(np.uint8)
    distances.add(one, 0, ones, ones)
    distances.add(two, 0, twos, ones)
    assert (distances.distance(one), distances.distance(two)) == (0.0, 1.0)
