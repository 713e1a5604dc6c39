"""How much a merge merges: what secondary weighs, in how many heads, and how far the output moves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.methods.geometry import cosine, ratio
from hsa.methods.hsa import HsaSettings, settings_of
from hsa.methods.selection import DecidedHeads, count_heads
from hsa.methods.tensors import Outcome, TensorTask
from hsa.option_names import option

WeightRange = tuple[float, float]
"""The least and the greatest weight of secondary, 1 - lambda_i, among tensors with merged heads."""


@dataclass(frozen=True)
class Extent:
    """Sizes over all target tensors of a merge, in the formula's exact values before they are rounded.

    `weights` are the least and the greatest weight of secondary in merged heads, None where no head is merged.
    `primary` and `secondary` are |tv1| / |B| and |tv2| / |B|, `cosine` is that of the task vectors, and `change` is
    |output - primary| / |tv1|; None where a divisor is zero, or where the sources were not read.

    Example:
        >>> Extent(80, 120, (0.034, 0.129), 0.0102, 0.0102, 0.22, 0.098).text
        'secondary weighs 3 to 13 % in 80 of 120 heads; the output differs from primary by 9.8 % of its task vector \
(on the target tensors)'
    """

    merged_heads: int
    total_heads: int
    weights: WeightRange | None
    primary: float | None = None
    secondary: float | None = None
    cosine: float | None = None
    change: float | None = None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Extent:
        """The extent of a finished merge."""
        geometries = [outcome.decision.measured.geometry for outcome in outcomes]
        base = math.fsum(value for geometry in geometries for value in geometry.base)
        primary = math.fsum(value for geometry in geometries for value in geometry.primary)
        secondary = math.fsum(value for geometry in geometries for value in geometry.secondary)
        product = math.fsum(value for geometry in geometries for value in geometry.product)
        counts = [(outcome.decision.coefficient, len(outcome.decision.selected)) for outcome in outcomes]
        return cls(
            *count_heads(
                DecidedHeads(outcome.task.partition.groups, outcome.decision.selected) for outcome in outcomes
            ),
            weight_range(counts),
            ratio(primary, base),
            ratio(secondary, base),
            cosine(primary, secondary, product),
            ratio(math.fsum(map(_moved, outcomes)), primary),
        )

    @property
    def text(self) -> str:
        """One line for people."""
        what = weight_text(self.weights, self.merged_heads, self.total_heads)
        if self.change is None:
            return what
        return (
            f"{what}; the output differs from primary by {percent(self.change)} % of its task vector (on the target "
            f"tensors)"
        )

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "secondary_weight": weight_dict(self.weights),
            "change": self.change,
            "task_vectors": {"primary": self.primary, "secondary": self.secondary, "cosine": self.cosine},
        }


def weight_range(counts: Iterable[tuple[float, int]]) -> WeightRange | None:
    """The range of secondary's weight, from each tensor's lambda_i and number of merged heads."""
    values = [1.0 - coefficient for coefficient, heads in counts if heads]
    return (min(values), max(values)) if values else None


def planned_weight_range(targets: Sequence[TensorTask], settings: HsaSettings) -> WeightRange | None:
    """The range of secondary's weight that a plan gives."""
    planned = (settings_of(task, settings) for task in targets)
    return weight_range((coefficient, keep) for keep, coefficient in planned)


def weight_text(weights: WeightRange | None, heads: int, total: int) -> str:
    """`secondary weighs 3 to 13 % in 80 of 120 heads`."""
    if weights is None:
        return f"none of {total} heads is merged"
    return f"secondary weighs {_range(weights)} % in {heads} of {total} heads"


def weight_dict(weights: WeightRange | None) -> dict[str, float] | None:
    """The range for JSON."""
    return None if weights is None else {"least": weights[0], "greatest": weights[1]}


def merge_more_hint(config: HsaSettings, weights: WeightRange | None) -> str | None:
    """With HSA's defaults, which let secondary weigh little: what would merge more. None with other parameters.

    With base 0.5 and alpha 0.2, lambda_i is 0.5 ** (0.2 * x), where x grows to 1 with the layer; so other values of
    lambda and alpha are powers of it.
    """
    defaults = HsaSettings()
    if weights is None or (config.k, config.lam, config.alpha) != (defaults.k, defaults.lam, defaults.alpha):
        return None
    assert isinstance(defaults.lam, float) and isinstance(defaults.alpha, float)
    lower = math.log(0.1) / math.log(defaults.lam)
    alpha, lam = (_range(_powers(weights, exponent)) for exponent in (1.0 / defaults.alpha, lower))
    return (
        f"these are HSA's careful defaults; {option('alpha', 1)} (secondary weighs {alpha} %), {option('lam', 0.1)} "
        f"({lam} %) or a larger {option('k')} merges more"
    )


def percent(share: float) -> str:
    """A share in percent, to two significant digits, never in exponents.

    Example:
        >>> [percent(share) for share in (0.0000123, 0.0344, 0.129, 1.25)]
        ['0.0012', '3.4', '13', '125']
    """
    if share >= 0.1:
        return f"{100.0 * share:.0f}"
    value = float(f"{100.0 * share:.1e}")
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}" if value else "0"


def _range(weights: WeightRange) -> str:
    """A range in percent, in whole ones from 1 % on."""
    least, greatest = (percent(weight) if weight < 0.01 else f"{100 * weight:.0f}" for weight in weights)
    return least if least == greatest else f"{least} to {greatest}"


def _powers(weights: WeightRange, exponent: float) -> WeightRange:
    """The weights where every lambda_i is raised to a power."""
    least, greatest = (1.0 - (1.0 - weight) ** exponent for weight in weights)
    return least, greatest


def _moved(outcome: Outcome) -> float:
    """|output - primary|^2 over one target."""
    decision = outcome.decision
    geometry, selected = decision.measured.geometry, decision.selection.merged
    c1, c2, scale = decision.coefficient, 1.0 - decision.coefficient, decision.scale
    parts = []
    for head, tv1 in enumerate(geometry.primary):
        if head not in selected:
            parts.append((scale - 1.0) ** 2 * tv1)
        elif scale == 1.0:
            parts.append(c2**2 * geometry.difference[head])
        else:
            x, y = scale * c1 - 1.0, scale * c2
            parts.append(x * x * tv1 + 2.0 * x * y * geometry.product[head] + y * y * geometry.secondary[head])
    return max(0.0, math.fsum(parts))
