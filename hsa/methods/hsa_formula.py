"""HSA's arithmetic on its settings: how many heads a share keeps, and the coefficient of a layer."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hsa.findings import Findings
from hsa.methods.settings import PerTensor

if TYPE_CHECKING:
    from hsa.system.dtypes import Array

LEAST_PLAUSIBLE_PERCENTAGE = 10
"""A `k` above 1 and below this is a warning: so few percent of a model's 6 to 20 heads are one head or two."""

MAX_NAMED = 3
"""Values that one message names."""

FOLD = 64
"""Columns of squares left for the exact sum, where the width is a multiple of it."""

_PAIR = struct.Struct("2f")


def keep_count(k: float, heads: int) -> int:
    """How many heads are merged of `heads`: max(1, round half to even of k * heads); none at k = 0."""
    share = k / 100.0 if k > 1.0 else k
    if share <= 0.0:
        return 0
    if share >= 1.0:
        return heads
    return max(1, round(share * heads))


def layer_coefficient(lam: float, alpha: float, layer: int, layers: int) -> float:
    """lambda_i = lambda ** (alpha * ((i + 1) / L)) in float64, with 0 ** 0 = 1."""
    return math.pow(lam, alpha * ((layer + 1) / layers))


def rounded_pair(coefficient: float) -> tuple[float, float]:
    """lambda_i and 1 - lambda_i, each rounded to float32."""
    one, two = _PAIR.unpack(_PAIR.pack(coefficient, 1.0 - coefficient))
    return one, two


def squared_score(blocks: Sequence[Array]) -> float:
    """The squared score of a head, from the sums of squares down the columns of its blocks: float64 [columns] each.

    The sums are added in the order of the blocks, and what is left is added exactly, so that a score depends on nothing
    but the inputs. NaN where a sum is not finite. The arrays are overwritten.
    """
    import numpy as np

    columns = blocks[0]
    for each in blocks[1:]:
        columns = np.add(columns, each, out=columns)
    if columns.size > FOLD and columns.size % FOLD == 0:
        columns = np.add.reduce(columns.reshape(-1, FOLD), axis=0)
    values = columns.tolist()
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def percentage_findings(values: Iterable[PerTensor]) -> Findings:
    """What is said of values of `k` above 1: a note, and below `LEAST_PLAUSIBLE_PERCENTAGE` a warning.

    Example:
        >>> percentage_findings([0.6, 60]).notes
        ('k = 60 is taken as a percentage, the share 0.6',)
    """
    numbers = {number for value in values for number in (value.values() if isinstance(value, Mapping) else (value,))}
    above = sorted(float(number) for number in numbers if number > 1)
    doubtful = [number for number in above if number < LEAST_PLAUSIBLE_PERCENTAGE]
    usual = [number for number in above if number >= LEAST_PLAUSIBLE_PERCENTAGE]
    hint = "; a share of heads lies between 0 and 1, such as 0.6"
    return Findings((_as_shares(usual),) if usual else (), (_as_shares(doubtful) + hint,) if doubtful else ())


def _as_shares(values: Sequence[float]) -> str:
    each = [f"k = {value:g} is taken as a percentage, the share {value / 100:g}" for value in values[:MAX_NAMED]]
    return "; ".join(each) + (f"; and {len(values) - MAX_NAMED} more" if len(values) > MAX_NAMED else "")
