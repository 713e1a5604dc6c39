"""Weights that are divided by their sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hsa.errors import RequestError
from hsa.option_names import option

SMALLEST_SUM = 1e-8
"""Weights are not divided by their sum if it is closer to 0 than this. mergekit has this number for task arithmetic."""


def divisor(weights: Sequence[float]) -> float:
    """The sum of weights to divide by; 1 where it is too near to 0.

    Example:
        >>> divisor((0.5, 1.5)), divisor((1.0, -1.0))
        (2.0, 1.0)
    """
    whole = math.fsum(weights)
    return whole if abs(whole) >= SMALLEST_SUM else 1.0


def shares(weights: Sequence[float], tensor: str, switch: str) -> tuple[float, ...]:
    """The weights over their sum. If they sum to 0, raises RequestError, which names the tensor and the setting that
    switches the division off.

    Example:
        >>> shares((3.0, 1.0), "encoder.conv1.weight", "normalize")
        (0.75, 0.25)
    """
    whole = math.fsum(weights)
    if abs(whole) < SMALLEST_SUM:
        raise RequestError(
            f"{option('weights')} sum to 0 for tensor {tensor}, and a mean divides by their sum; give other weights, "
            f"or {option(switch, False)}"
        )
    return tuple(weight / whole for weight in weights)
