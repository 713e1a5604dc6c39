"""Coefficients that follow from inner products, against the geometry on the vectors themselves, to 60 digits.

Nothing here knows Gram matrices: directions are turned into one another by the sphere's logarithm and exponential, made
of projections. Vectors are of float32 numbers, and their matrix is summed by the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mpmath
import numpy as np
import pytest
from mpmath import mp, mpf

from hsa.architectures.base import Partition, TensorInfo
from hsa.methods.arcs import on_the_arc, on_the_line
from hsa.methods.gram import Gram, gram_of, row_products, totals
from hsa.methods.karcher import karcher_mean
from hsa.methods.registry import method_named
from hsa.methods.tensors import TensorTask

Vector = list[mpf]
DIGITS = 60
EPSILON = 2.0**-52
DIMENSIONS = 37

WIDE = [0.04, 0.5, 1.0, math.pi / 2, 2.0, 3.0, math.pi - 0.04]
"""Angles at which SLERP follows the arc."""

NARROW = [1e-6, 1e-4, 0.01]
"""Angles of nearly parallel vectors; their supplements are those of nearly opposite ones."""


@pytest.fixture(autouse=True)
def many_digits() -> Any:
    with mpmath.workdps(DIGITS):
        yield


# --- vectors ----------------------------------------------------------------------------------------------------------


def directions(count: int, seed: int = 0) -> np.ndarray:
    """Orthonormal float64 [count, dimensions]."""
    drawn = np.random.default_rng(seed).standard_normal((DIMENSIONS, count))
    return np.linalg.qr(drawn)[0].T


def pair(angle: float, lengths: tuple[float, float] = (1.7, 0.6)) -> list[np.ndarray]:
    """Two float32 vectors at that angle, up to rounding."""
    one, aside = directions(2)
    two = math.cos(angle) * one + math.sin(angle) * aside
    return [(length * each).astype(np.float32) for length, each in zip(lengths, (one, two), strict=True)]


def equally_long(angle: float) -> list[np.ndarray]:
    """Two float32 vectors at about that angle, whose lengths are the same to the last digit: they share some elements,
    and have the others with opposite signs."""
    drawn = np.random.default_rng(1).standard_normal(DIMENSIONS)
    shared, opposite = drawn[:20], drawn[20:]
    shared = shared / np.linalg.norm(shared) * math.cos(angle / 2)
    opposite = opposite / np.linalg.norm(opposite) * math.sin(angle / 2)
    return [np.concatenate([shared, sign * opposite]).astype(np.float32) for sign in (1, -1)]


def exactly(vector: np.ndarray) -> Vector:
    return [mpf(float(each)) for each in vector]


def gram(vectors: Sequence[np.ndarray]) -> Gram:
    """As the package measures it."""
    sums = totals(row_products([vector.reshape(1, -1) for vector in vectors])[:, 0])
    return gram_of(sums.tolist(), len(vectors))


def combined(coefficients: Sequence[Any], vectors: Sequence[Vector]) -> Vector:
    return [mp.fsum(mpf(a) * x for a, x in zip(coefficients, each, strict=True)) for each in zip(*vectors, strict=True)]


def dot(one: Vector, two: Vector) -> mpf:
    return mp.fsum(x * y for x, y in zip(one, two, strict=True))


def norm(vector: Vector) -> mpf:
    return mp.sqrt(dot(vector, vector))


def unit(vector: Vector) -> Vector:
    length = norm(vector)
    return [x / length for x in vector]


def apart(found: Vector, expected: Vector) -> float:
    return float(norm([x - y for x, y in zip(found, expected, strict=True)]) / norm(expected))


# --- the sphere -------------------------------------------------------------------------------------------------------


def angle_between(one: Vector, two: Vector) -> mpf:
    """By the chord and its opposite, which is exact for nearly parallel and nearly opposite vectors alike."""
    one, two = unit(one), unit(two)
    difference = norm([x - y for x, y in zip(one, two, strict=True)])
    return 2 * mp.atan2(difference, norm([x + y for x, y in zip(one, two, strict=True)]))


def logarithm(at: Vector, to: Vector) -> Vector:
    """The tangent at a point of the sphere that leads to another, as long as the way is; zero to the point itself."""
    along = dot(at, to)
    aside = [y - along * x for x, y in zip(at, to, strict=True)]
    length = norm(aside)
    return [mpf(0)] * len(at) if length == 0 else [mp.atan2(length, along) / length * x for x in aside]


def exponential(at: Vector, tangent: Vector) -> Vector:
    """The point where a tangent at a point leads."""
    length = norm(tangent)
    if length == 0:
        return at
    return [mp.cos(length) * x + mp.sin(length) / length * y for x, y in zip(at, tangent, strict=True)]


def way_along(one: Vector, two: Vector, t: float) -> Vector:
    """The point that lies the share t of the way from one direction to another."""
    return exponential(one, [mpf(t) * x for x in logarithm(one, two)])


# --- two vectors ------------------------------------------------------------------------------------------------------


def task(models: int, name: str = "layers.0.fc.weight") -> TensorTask:
    info = TensorInfo(name, "F32", (DIMENSIONS,))
    return TensorTask(
        name=name,
        place=None,
        layers=0,
        shape=(DIMENSIONS,),
        partition=Partition(),
        sources={f"model{number + 1}": info for number in range(models)},
        anchor="model1",
        out_code="F32",
        output_name=name,
        numbers=tuple(range(models)),
        models_given=models,
    )


def coefficients(method: str, vectors: Sequence[np.ndarray], **settings: Any) -> Sequence[float]:
    own: Any = method_named(method)
    return own.coefficients(task(len(vectors)), gram(vectors), own.Settings(**settings))


def two_vectors(method: str, vectors: Sequence[np.ndarray], t: float) -> Sequence[float]:
    return coefficients(method, vectors, **({"t": t} if method == "slerp" else {"weights": [1 - t, t]}))


def allowed(angle: float) -> float:
    """The rounding of a cosine in float64, and what becomes of it near opposite vectors, where the arc divides by the
    square of the sine."""
    return 32 * EPSILON / min(1.0, 1.0 + math.cos(angle))


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("method", "angle"),
    [
        *(("slerp", angle) for angle in WIDE),
        *(("nuslerp", angle) for angle in [*WIDE, *NARROW, *(math.pi - angle for angle in NARROW)]),
    ],
)
def test_equally_long_vectors_turn_into_one_another(method: str, angle: float, t: float) -> None:
    vectors = equally_long(angle)
    one, two = map(exactly, vectors)
    found = combined(two_vectors(method, vectors, t), [one, two])
    length, limit = norm(one), allowed(angle)
    assert length == norm(two)
    assert apart(found, [length * x for x in way_along(unit(one), unit(two), t)]) <= limit
    assert abs(float(angle_between(found, one) / angle_between(one, two)) - t) <= limit / min(angle, 1.0)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("method", "angle"),
    [
        *(("slerp", angle) for angle in WIDE),
        *(("nuslerp", angle) for angle in [*WIDE, *NARROW, *(math.pi - angle for angle in NARROW)]),
    ],
)
def test_the_shares_of_two_directions_are_those_of_their_lengths(method: str, angle: float, t: float) -> None:
    """The point between the directions is a sum of both; each vector is taken as often as its direction."""
    vectors = pair(angle)
    one, two = map(exactly, vectors)
    first, second = unit(one), unit(two)
    aside = unit(logarithm(first, second))
    point = way_along(first, second, t)
    share_two = dot(point, aside) / dot(second, aside)
    share_one = dot(point, first) - share_two * dot(second, first)
    found = combined(two_vectors(method, vectors, t), [one, two])
    assert apart(found, combined([share_one, share_two], [one, two])) <= allowed(angle)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-8, math.pi - 1e-9, math.pi])
def test_nuslerp_goes_straight_where_no_angle_is_left(angle: float) -> None:
    assert two_vectors("nuslerp", pair(angle, (1.0, 1.0)), 0.25) == on_the_line(0.25)


@pytest.mark.parametrize("angle", [0.03, math.pi - 0.03])
def test_slerp_goes_straight_near_the_ends(angle: float) -> None:
    assert two_vectors("slerp", pair(angle), 0.25) == on_the_line(0.25)


def test_the_line_and_the_arc_meet_where_vectors_are_parallel() -> None:
    """Where NuSLERP changes over, both are the same up to rounding."""
    cosine = 1.0 - 2.0**-46
    assert on_the_arc(cosine, 0.25) == pytest.approx(on_the_line(0.25), abs=2.0**-46)


# --- several vectors --------------------------------------------------------------------------------------------------

SETS = {
    "wide": [(1.0, 0.0, 0.0), (0.2, 0.8, 0.1), (0.1, -0.3, 2.0)],
    "nearly parallel": [(1.0, 0.0, 0.0), (2.0, 2e-5, 0.0), (0.5, 0.0, -1e-5)],
    "two": [(1.0, 0.0), (-0.3, 0.7)],
    "one nearly opposite": [(1.0, 0.1, 0.0), (1.0, -0.1, 0.02), (-1.0, 0.003, 0.0)],
    "four": [(1.0, 0.0, 0.0, 0.1), (0.0, 1.0, 0.3, 0.0), (0.0, 0.2, 1.0, 0.0), (-0.2, 0.1, 0.4, 1.0)],
}
"""Vectors by their parts along orthogonal directions."""


def several(name: str) -> list[np.ndarray]:
    parts = np.array(SETS[name])
    return list((parts @ directions(parts.shape[1])).astype(np.float32))


def barycentre(vectors: Sequence[Vector], weights: Sequence[float], eps: float) -> tuple[Vector, mpf]:
    """mergekit's multislerp, step by step, the tangent step too; and the length of the mean of the directions."""
    units = [[x / (norm(vector) + mpf(eps)) for x in vector] for vector in vectors]
    mean = combined(weights, units)
    start = unit(mean)
    tangents = [[x - dot(each, start) * y for x, y in zip(each, start, strict=True)] for each in units]
    end = exponential(start, combined(weights, tangents))
    size = mp.fsum(mpf(w) * norm(vector) for w, vector in zip(weights, vectors, strict=True))
    return [size * x for x in end], norm(mean)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", SETS)
def test_multislerp_is_the_way_over_the_tangents(name: str, normalize: bool) -> None:
    vectors, given = several(name), [0.5, 0.3, 0.9, 0.7][: len(SETS[name])]
    found = coefficients("multislerp", vectors, weights=given, normalize_weights=normalize)
    weights = [each / math.fsum(given) for each in given] if normalize else given
    expected, length = barycentre(list(map(exactly, vectors)), weights, 1e-8)
    limit = 32 * EPSILON * float(sum(weights) / length) ** 2
    assert apart(combined(found, list(map(exactly, vectors))), expected) <= limit


def test_multislerp_of_nearly_opposite_vectors() -> None:
    vectors = pair(math.pi - 1e-3)
    expected, length = barycentre(list(map(exactly, vectors)), [0.5, 0.5], 1e-8)
    found = combined(coefficients("multislerp", vectors), list(map(exactly, vectors)))
    assert float(length) < 1e-3
    assert apart(found, expected) <= 32 * EPSILON / float(length) ** 2


def mean_of(units: Sequence[Vector], steps: int, tol: float) -> Vector:
    """The Karcher mean by logarithms and exponentials, at most so many steps."""
    mean = unit([mp.fsum(each) for each in zip(*units, strict=True)])
    for _ in range(steps):
        ways = [logarithm(mean, each) for each in units]
        ways = [way for way in ways if norm(way) >= tol]
        tangent = [mp.fsum(each) / len(units) for each in zip(*ways, strict=True)] if ways else []
        if not ways or norm(tangent) < tol:
            break
        mean = exponential(mean, tangent)
    return mean


@pytest.mark.parametrize("max_iter", [0, 1, 10, 200])
@pytest.mark.parametrize("tol", [1e-5, 1e-12])
@pytest.mark.parametrize("name", SETS)
def test_karcher_is_the_mean_by_steps_along_the_sphere(name: str, tol: float, max_iter: int) -> None:
    vectors = several(name)
    wide = list(map(exactly, vectors))
    found = combined(karcher_mean(gram(vectors), max_iter, tol), wide)
    size = mp.fsum(map(norm, wide)) / len(wide)
    expected = [size * x for x in mean_of(list(map(unit, wide)), max_iter, tol)]
    assert apart(found, expected) <= (1e-9 if name == "one nearly opposite" else 1e-12)


@pytest.mark.parametrize("name", ["wide", "nearly parallel", "two", "four"])
def test_at_the_karcher_mean_the_ways_to_all_models_cancel(name: str) -> None:
    """Which is what makes it the point with the least sum of squared distances along the sphere."""
    vectors = several(name)
    wide = list(map(exactly, vectors))
    found = unit(combined(karcher_mean(gram(vectors), 500, 1e-13), wide))
    ways = [logarithm(found, unit(each)) for each in wide]
    assert float(norm([mp.fsum(each) for each in zip(*ways, strict=True)])) <= 1e-12

    def spread(point: Vector) -> mpf:
        return mp.fsum(angle_between(point, each) ** 2 for each in wide)

    for aside in directions(DIMENSIONS, seed=1)[:9]:
        moved = unit([x + mpf("1e-4") * y for x, y in zip(found, exactly(aside), strict=True)])
        assert spread(moved) > spread(found)


def test_karcher_leaves_a_step_to_the_opposite_out() -> None:
    """Between two opposite directions there is no mean: the first stays, whatever rounding says."""
    one, two = pair(math.pi, (1.0, 1.0))
    found = karcher_mean(gram([one, -one]), 10, 1e-5)
    assert found == pytest.approx([1.0, 0.0])
    nearly = karcher_mean(gram([one, two]), 10, 1e-5)
    assert all(math.isfinite(each) for each in nearly)
    assert float(norm(combined(nearly, [exactly(one), exactly(two)]))) == pytest.approx(1.0, abs=1e-6)
