"""Grids of parameters: lists and ranges of numbers, and the points that they span."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal, localcontext
from itertools import product
from typing import Any

from hsa.errors import RequestError, shown
from hsa.methods.settings import Declared, Settings
from hsa.option_names import option
from hsa.outputs.grid_point import LONGEST_NAME, GridPoint, axes

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?")
DIGITS = 20
"""The most digits on either side of the decimal point; more would not fit into a file name."""

MOST_POINTS = 10_000
"""The most points of a grid; a larger number is assumed to be a mistyped step."""


def values(axis: Declared, text: str) -> tuple[Any, ...]:
    """The values of an axis from text: texts separated by commas, or numbers; see `numbers`.

    Example:
        >>> [values(axis, "0.1,0.3") for axis in axes(HsaSettings) if axis.name == "lam"]
        [(0.1, 0.3)]
    """
    return tuple(part.strip() for part in text.split(",")) if axis.about.choices else numbers(axis.name, text)


def numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers of `0.1,0.3` or `0:1:0.1` (start, stop, step, both ends included); `name` is an argument of a sweep.

    Ranges are computed in decimal arithmetic: `0:1:0.1` contains 0.3, not 0.30000000000000004. Raises RequestError,
    also if the steps do not end exactly at the stop, which would silently omit the last value.

    Example:
        >>> numbers("lam", "0:1:0.25")
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    name = option(name)
    values: list[Decimal] = []
    for part in text.split(","):
        ends = [_decimal(name, end, text) for end in part.split(":")]
        if len(ends) == 1:
            values += ends
            continue
        if len(ends) != 3 or ends[2] <= 0 or ends[1] < ends[0]:
            raise RequestError(
                f"{name} takes numbers such as 0.1,0.3 or start:stop:step with a step above 0, got {shown(text)}"
            )
        values += _steps(name, text, MOST_POINTS - len(values), *ends)
    return tuple(float(value) for value in values)


def _steps(name: str, text: str, limit: int, start: Decimal, stop: Decimal, step: Decimal) -> list[Decimal]:
    """The values from start to stop. Raises RequestError if there are more than `limit`, or if the steps do not end
    exactly at the stop."""
    with localcontext(Context(prec=4 * DIGITS)):  # exact for all numbers that `_decimal` accepts
        count = int((stop - start) / step) + 1
        if count > limit:
            raise RequestError(f"{name} {shown(text)} has over {MOST_POINTS} values; is the step right?")
        values = [start + step * number for number in range(count)]
        last, next_value = values[-1], values[-1] + step
        if last != stop:
            raise RequestError(
                f"{name} {shown(text)}: steps of {step:f} from {start:f} do not meet {stop:f}, but {last:f} and "
                f"{next_value:f}; give {start:f}:{last:f}:{step:f}, or another step"
            )
    return values


def _decimal(name: str, text: str, whole: str) -> Decimal:
    if not _NUMBER.fullmatch(text.strip()):
        raise RequestError(f"{name} takes numbers such as 0.1,0.3 or start:stop:step, got {shown(whole)}")
    value = Decimal(text.strip()) + 0  # turns -0 into 0
    if value and not -DIGITS < value.adjusted() < DIGITS:
        raise RequestError(
            f"{name} takes numbers of at most {DIGITS} digits before and after the point, got {shown(text, 40)}"
        )
    return value


def points(
    owner: type[Settings], values: Mapping[str, Sequence[Any]], others: Mapping[str, Any] | None = None
) -> tuple[GridPoint, ...]:
    """Every combination of the axes' values, without repeats, in the order of the given values.

    `values` are lists by axis name; an axis that is not given has its default. `others` are the settings that all
    points share. Raises RequestError for too many points or none, and for a missing setting.

    Example:
        >>> [point.settings.lam for point in points(HsaSettings, {"lam": [0.1, 0.5]})]
        [0.1, 0.5]
    """
    names = [axis.name for axis in axes(owner)]
    lists = [values.get(axis.name, (axis.default,)) for axis in axes(owner)]
    count = math.prod(map(len, lists))
    if not 1 <= count <= MOST_POINTS:
        raise RequestError(f"the grid has {count} points, expected 1 to {MOST_POINTS}")
    combinations = dict.fromkeys(product(*lists))
    grid = tuple(GridPoint(owner(**dict(zip(names, each, strict=True)), **(others or {}))) for each in combinations)
    for point in grid:
        point.settings.require()
        if len(point.name) > LONGEST_NAME:
            raise RequestError(
                f"the point {point.name:.80}... has a name of {len(point.name)} letters; give fewer digits"
            )
    return grid
