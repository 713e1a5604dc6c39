"""Angles between vectors by their Gram matrix, and the coefficients of points on the arc between two of them.

Decisions are made with Python's `math` alone, on numbers in float64, so that they repeat.
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
    """A cosine that rounding took out of [-1, 1], taken back."""
    return max(-1.0, min(1.0, cosine))


def combined_norm(factors: Sequence[float], gram: Sequence[Sequence[float]]) -> float:
    """The norm of the sum of vectors times factors; 0 where rounding leaves less.

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
    """The coefficients of spherical interpolation between two vectors at an angle of that cosine, which is not 1 or -1:
    `sin((1 - t) o) / sin(o)` and `sin(t o) / sin(o)`.

    Example:
        >>> [round(each, 4) for each in on_the_arc(0.0, 0.5)]
        [0.7071, 0.7071]
    """
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine
