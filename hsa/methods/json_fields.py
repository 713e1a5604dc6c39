"""Read the values of JSON documents: each function returns a value of its type, and raises for any other value."""

from __future__ import annotations

import sys
from typing import Any

from hsa.errors import shown

MAX_COUNT = 1 << 63
"""Whole numbers must be below this."""


def mapping(value: Any) -> dict[str, Any]:
    """An object; TypeError for anything else."""
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {shown(value)}")
    return value


def text(value: Any) -> str:
    """A text; TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {shown(value)}")
    return value


def count(value: Any) -> int:
    """A whole number of at least 0; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_COUNT:
        raise ValueError(f"expected a whole number of at least 0, found {shown(value)}")
    return value


def number(value: Any) -> float:
    """A finite number; ValueError for anything else.

    Example:
        >>> number(2)
        2.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"expected a finite number, found {shown(value)}")
    return float(value)


def between(value: Any, low: float, high: float) -> float:
    """A finite number from `low` to `high`, both included; ValueError for anything else."""
    if not low <= number(value) <= high:
        raise ValueError(f"expected a number from {low:g} to {high:g}, found {shown(value)}")
    return float(value)
