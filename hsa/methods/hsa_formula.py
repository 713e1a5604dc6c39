"""HSA's arithmetic on its settings: how many heads a share keeps, and the coefficient of a layer."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hsa.errors import RequestError
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.option_names import option

if TYPE_CHECKING:
    from hsa.system.dtypes import Array

FOLD = 64
"""The number of column sums that are left for the exact sum, if the width is a multiple of it."""

SOLE = (1.0,)
"""The shares of the secondaries if there is only one."""

CANCELLING = 1e-9
"""Weights cancel if their sum is at most this share of their magnitudes' sum: what is left is a rounding error."""

_PAIR = struct.Struct("2f")


def keep_count(k: float, heads: int) -> int:
    """The number of `heads` that are merged: max(1, k * heads rounded half to even); none at k = 0."""
    share = k / 100.0 if k > 1.0 else k
    if share <= 0.0:
        return 0
    if share >= 1.0:
        return heads
    return max(1, round(share * heads))


def layer_coefficient(lam: float, alpha: float, layer: int, layers: int) -> float:
    """lambda_i = lambda ** (alpha * ((i + 1) / L)) in float64, with 0 ** 0 = 1."""
    return math.pow(lam, alpha * ((layer + 1) / layers))


def settings_of(task: TensorTask, settings: Settings) -> tuple[int, float]:
    """The number of heads to merge in a target, and lambda_i."""
    assert task.place is not None
    k, lam, alpha = (settings.of(name, task.name) for name in ("k", "lam", "alpha"))
    return keep_count(k, task.partition.groups), layer_coefficient(lam, alpha, task.place.layer, task.layers)


def all_settings_of(tasks: Sequence[TensorTask], settings: Any) -> list[tuple[int, tuple[float, float]]]:
    """For each target: the number of heads to merge, and lambda_i and 1 - lambda_i as float32. These are computed once
    for the targets of a layer with the same number of heads, unless a setting is given per tensor."""
    alone = any(settings.per_tensor())
    known: dict[tuple[Any, ...], tuple[int, tuple[float, float]]] = {}
    planned = []
    for task in tasks:
        assert task.place is not None
        key = (task.name if alone else "", task.place.layer, task.layers, task.partition.groups)
        if key not in known:
            keep, coefficient = settings_of(task, settings)
            known[key] = keep, rounded_pair(coefficient)
        planned.append(known[key])
    return planned


def shares_of(task: TensorTask, settings: Settings) -> tuple[float, ...]:
    """Each secondary's share of the blend in a target: its weight over the sum of their weights, in float64."""
    return SOLE if len(task.numbers) <= 2 else normalized(settings.each("weights", task))


def normalized(weights: Sequence[float], where: str = "") -> tuple[float, ...]:
    """The weights over their sum. Raises RequestError if they sum to 0.

    Example:
        >>> normalized([3.0, 1.0])
        (0.75, 0.25)
    """
    whole = math.fsum(weights)
    if abs(whole) <= CANCELLING * math.fsum(map(abs, weights)):
        raise RequestError(
            f"{option('weights')} {', '.join(f'{weight:g}' for weight in weights)} of the secondaries sum to 0{where}, "
            f"and a mean divides by their sum; give others"
        )
    return tuple(weight / whole for weight in weights)


def coefficients_of(coefficient: float, shares: tuple[float, ...]) -> tuple[float, ...]:
    """The coefficients of the task vectors, each rounded to float32: lambda_i, and 1 - lambda_i times every share."""
    if len(shares) == 1:
        return rounded_pair(coefficient)
    others = ((1.0 - coefficient) * share for share in shares)
    return struct.unpack(f"{len(shares) + 1}f", struct.pack(f"{len(shares) + 1}f", coefficient, *others))


def rounded_pair(coefficient: float) -> tuple[float, float]:
    """lambda_i and 1 - lambda_i, each rounded to float32."""
    one, two = _PAIR.unpack(_PAIR.pack(coefficient, 1.0 - coefficient))
    return one, two


def squared_score(blocks: Sequence[Array]) -> float:
    """The squared score of a head, from the sums of squares down the columns of its blocks: float64 [columns] each.

    The sums of the blocks are added in order, and the numbers that are left are added exactly, so a score depends only
    on the inputs. NaN if a sum is not finite. The arrays are overwritten.
    """
    import numpy as np

    columns = blocks[0]
    for each in blocks[1:]:
        columns = np.add(columns, each, out=columns)
    if columns.size > FOLD and columns.size % FOLD == 0:
        columns = np.add.reduce(columns.reshape(-1, FOLD), axis=0)
    values = columns.tolist()
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
