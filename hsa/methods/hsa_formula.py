"""HSA's arithmetic on its settings: how many heads a share keeps, and the coefficient of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from hsa.findings import Findings
from hsa.methods.settings import PerTensor

LEAST_PLAUSIBLE_PERCENTAGE = 10
"""A `k` above 1 and below this is a warning: so few percent of a model's 6 to 20 heads are one head or two."""

MAX_NAMED = 3
"""Values that one message names."""


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
