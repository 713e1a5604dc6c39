"""How much a merge merges: the weight of secondary, the number of heads, and how far the output moves.

If there are several secondaries, `secondary` means their weighted mean here. Merged heads are those of a merge with one
fine-tune whose task vector is this mean, so all figures stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.methods.geometry import cosine, percent, ratio
from hsa.methods.hsa_formula import settings_of, shares_of
from hsa.methods.selection import DecidedHeads, HeadCounts, count_heads
from hsa.methods.settings import Settings
from hsa.methods.tensors import Outcome, TensorRecord, TensorTask
from hsa.option_names import option

WeightRange = tuple[float, float]
"""The least and the greatest weight of secondary, 1 - lambda_i, among tensors with merged heads."""

Cut = tuple[str, float]
"""A tensor, and the margin between its merged heads and the others."""


@dataclass(frozen=True)
class Extent:
    """Sizes over all target tensors of a merge, in the formula's exact values before they are rounded.

    `weights` are the least and the greatest weight of secondary in merged heads, None if no head is merged. `narrowest`
    is the cut with the smallest margin, None if no tensor has one. `primary` and `secondary` are |tv1| / |B| and
    |tv2| / |B|, `cosine` is that of the task vectors, and `change` is |output - primary| / |tv1|. Each of these is None
    if its divisor is zero, or if the sources were not read. `secondaries` is the number of secondaries; if there are
    several, tv2 is their weighted mean.

    Example:
        >>> extent = Extent(20, 80, 120, (0.034, 0.129), None, 0.0102, 0.0102, 0.22, 0.098)
        >>> extent.headline
        '80 of 120 heads merged in 20 tensors'
        >>> extent.text
        'secondary weighs 3 to 13 % in 80 of 120 heads; the output differs from primary by 9.8 % of its task vector \
(on the target tensors)'
    """

    tensors: int
    merged_heads: int
    total_heads: int
    weights: WeightRange | None
    narrowest: Cut | None = None
    primary: float | None = None
    secondary: float | None = None
    cosine: float | None = None
    change: float | None = None
    secondaries: int = 1

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Extent:
        """The extent of a finished merge."""
        geometries = [outcome.decision.geometry for outcome in outcomes]
        base = math.fsum(value for geometry in geometries for value in geometry.base)
        primary = math.fsum(value for geometry in geometries for value in geometry.primary)
        secondary = math.fsum(value for geometry in geometries for value in geometry.secondary)
        product = math.fsum(value for geometry in geometries for value in geometry.product)
        counts = [(outcome.decision.coefficient, len(outcome.decision.selected)) for outcome in outcomes]
        return cls(
            len(outcomes),
            *count_heads(
                DecidedHeads(outcome.task.partition.groups, outcome.decision.selected) for outcome in outcomes
            ),
            weight_range(counts),
            _narrowest((outcome.task.output_name, outcome.decision.margin) for outcome in outcomes),
            ratio(primary, base),
            ratio(secondary, base),
            cosine(primary, secondary, product),
            ratio(math.fsum(map(_moved, outcomes)), primary),
            secondaries_of(outcome.decision for outcome in outcomes),
        )

    @classmethod
    def of_records(cls, records: Sequence[TensorRecord]) -> Extent:
        """The extent of a merge as far as records show it: they contain no norms."""
        return cls(
            len(records),
            *count_heads(records),
            weight_range((record.coefficient, len(record.selected)) for record in records),
            _narrowest((record.name, record.margin) for record in records),
            secondaries=secondaries_of(record.decision for record in records),
        )

    @property
    def counted(self) -> str:
        """How many heads."""
        return f"{HeadCounts(self.merged_heads, self.total_heads)} heads merged"

    @property
    def headline(self) -> str:
        """How many heads in how many tensors."""
        return f"{self.counted} in {self.tensors} tensors"

    @property
    def details(self) -> str:
        """The result in words, the same as `text`."""
        return self.text

    @property
    def text(self) -> str:
        """One line for people."""
        what = weight_text(self.weights, self.merged_heads, self.total_heads, self.secondaries)
        if self.change is None:
            return what
        return (
            f"{what}; the output differs from primary by {percent(self.change)} % of its task vector (on the target "
            f"tensors)"
        )

    def counts(self) -> dict[str, Any]:
        """The counts for every report and index."""
        return {"selected_heads": self.merged_heads, "total_heads": self.total_heads}

    def margins(self) -> dict[str, Any]:
        """The margin of the closest choice of heads, and its tensor."""
        name, margin = self.narrowest or (None, None)
        return {"min_margin": margin, "min_margin_tensor": name}

    def as_dict(self) -> dict[str, Any]:
        """The further values that `--json` prints."""
        return {
            "secondary_weight": weight_dict(self.weights),
            "change": self.change,
            "task_vectors": {"primary": self.primary, "secondary": self.secondary, "cosine": self.cosine},
        }


@dataclass(frozen=True)
class PlannedExtent:
    """How much a merge will merge if no heads tie at the cut.

    Example:
        >>> PlannedExtent(20, 80, 120, (0.034, 0.129)).headline
        '20 tensors, 80 of 120 heads to merge'
    """

    tensors: int
    heads_to_merge: int
    total_heads: int
    weights: WeightRange | None
    secondaries: int = 1

    @classmethod
    def of(cls, tasks: Sequence[TensorTask], settings: Settings) -> PlannedExtent:
        """The extent that these settings give to these targets."""
        planned = [settings_of(task, settings) for task in tasks]
        return cls(
            len(tasks),
            sum(keep for keep, _ in planned),
            sum(task.partition.groups for task in tasks),
            weight_range((coefficient, keep) for keep, coefficient in planned),
            max((len(shares_of(task, settings)) for task in tasks), default=1),
        )

    @property
    def counted(self) -> str:
        """How many heads."""
        return f"{HeadCounts(self.heads_to_merge, self.total_heads)} heads to merge"

    @property
    def headline(self) -> str:
        """How many heads in how many tensors."""
        return f"{self.tensors} tensors, {self.counted}"

    @property
    def details(self) -> str:
        """The result in words, the same as `text`."""
        return self.text

    @property
    def text(self) -> str:
        """One line for people."""
        return weight_text(self.weights, self.heads_to_merge, self.total_heads, self.secondaries)

    def counts(self) -> dict[str, Any]:
        """The counts for every report."""
        return {"heads_to_merge": self.heads_to_merge, "total_heads": self.total_heads}

    def margins(self) -> dict[str, Any]:
        """Return nothing: no head is chosen yet."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        """The further values that `--json` prints."""
        return {"secondary_weight": weight_dict(self.weights)}


def weight_range(counts: Iterable[tuple[float, int]]) -> WeightRange | None:
    """The range of secondary's weight, from each tensor's lambda_i and number of merged heads."""
    values = [1.0 - coefficient for coefficient, heads in counts if heads]
    return (min(values), max(values)) if values else None


def weight_text(weights: WeightRange | None, heads: int, total: int, secondaries: int = 1) -> str:
    """The text about secondary's weight: `secondary weighs 3 to 13 % in 80 of 120 heads`."""
    if weights is None:
        return f"none of {total} heads is merged"
    return f"{_weighing(secondaries)} {_range(weights)} % in {heads} of {total} heads"


def secondaries_of(decisions: Iterable[Any]) -> int:
    """How many secondaries a merge with these decisions has."""
    return max((len(decision.shares) for decision in decisions), default=1)


def weight_dict(weights: WeightRange | None) -> dict[str, float] | None:
    """The range for JSON."""
    return None if weights is None else {"least": weights[0], "greatest": weights[1]}


def merge_more_hint(settings: Any, weights: WeightRange | None, secondaries: int = 1) -> str | None:
    """A hint at settings that would merge more, for HSA's defaults, which let secondary weigh little. None for other
    settings.

    With the defaults lambda 0.5 and alpha 0.2, lambda_i is 0.5 ** (0.2 * x), where x grows to 1 with the layer. Other
    values of lambda and alpha give powers of this lambda_i.
    """
    defaults = type(settings)()
    if weights is None or (settings.k, settings.lam, settings.alpha) != (defaults.k, defaults.lam, defaults.alpha):
        return None
    lower = math.log(0.1) / math.log(defaults.lam)
    alpha, lam = (_range(_powers(weights, exponent)) for exponent in (1.0 / defaults.alpha, lower))
    return (
        f"these are HSA's careful defaults; {option('alpha', 1)} ({_weighing(secondaries)} {alpha} %), "
        f"{option('lam', 0.1)} ({lam} %) or a larger {option('k')} merges more"
    )


def change_range(extents: Mapping[str, Extent]) -> str | None:
    """One line with the least and the greatest change of primary among the named merges; None if no change is known."""
    changes = {name: extent.change for name, extent in extents.items() if extent.change is not None}
    if not changes:
        return None
    least, most = (choose(changes, key=lambda name: changes[name]) for choose in (min, max))
    return (
        f"the output differs from primary by {percent(changes[least])} % ({least}) to {percent(changes[most])} % "
        f"({most}) of its task vector (on the target tensors)"
    )


def _narrowest(margins: Iterable[tuple[str, float | None]]) -> Cut | None:
    """The first tensor with the smallest margin."""
    cuts = [(name, margin) for name, margin in margins if margin is not None]
    return min(cuts, key=lambda cut: cut[1], default=None)


def _weighing(secondaries: int) -> str:
    return "secondary weighs" if secondaries == 1 else f"the {secondaries} secondaries together weigh"


def _range(weights: WeightRange) -> str:
    """A range in percent, rounded to whole percents from 1 % on."""
    least, greatest = (percent(weight) if weight < 0.01 else f"{100 * weight:.0f}" for weight in weights)
    return least if least == greatest else f"{least} to {greatest}"


def _powers(weights: WeightRange, exponent: float) -> WeightRange:
    """The range of weights after every lambda_i is raised to a power."""
    least, greatest = (1.0 - (1.0 - weight) ** exponent for weight in weights)
    return least, greatest


def _moved(outcome: Outcome) -> float:
    """|output - primary|^2 over one target."""
    decision = outcome.decision
    geometry, selected = decision.geometry, decision.selection.merged
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
