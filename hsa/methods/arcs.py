"""Angles between vectors from their Gram matrix, and the coefficients of points on the arc between two of them.

Decisions use only Python's `math`, on float64 numbers, so that they are reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hsa.methods.gram import Gram


def norm_product(gram: Gram, one: int, two: int) -> float:
    """The product of two vectors' norms; exact where both are equally long.

    Example:
        >>> norm_product(((4.0, 0.0), (0.0, 9.0)), 0, 1)
        6.0
    """
    return math.sqrt(gram[one][one] * gram[two][two])


def clamped(cosine: float) -> float:
    """A cosine, clamped to [-1, 1] because rounding may take it out of that range."""
    return max(-1.0, min(1.0, cosine))


def combined_norm(factors: Sequence[float], gram: Sequence[Sequence[float]]) -> float:
    """The norm of the sum of vectors times factors; 0 where rounding makes its square negative.

    Example:
        >>> combined_norm([1.0, -1.0], ((4.0, 2.0), (2.0, 4.0)))
        2.0
    """
    square = 0.0
    for factor, row in zip(factors, gram, strict=True):
        for other, product in zip(factors, row, strict=True):
            square += factor * other * product
    return math.sqrt(max(0.0, square))


def on_the_line(t: float) -> tuple[float, float]:
    """The coefficients of linear interpolation."""
    return 1.0 - t, t


def on_the_arc(cosine: float, t: float) -> tuple[float, float]:
    """The coefficients of spherical interpolation between two vectors: `sin((1 - t) o) / sin(o)` and
    `sin(t o) / sin(o)`. `cosine` is that of the angle `o` between them, and is neither 1 nor -1.

    Example:
        >>> [round(each, 4) for each in on_the_arc(0.0, 0.5)]
        [0.7071, 0.7071]
    """
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine
