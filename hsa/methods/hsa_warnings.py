"""Warnings about HSA's settings, heads that were chosen by a narrow margin, and merges that change next to nothing.

Warnings that depend only on the sources are in `source_warnings`. For them, HSA sums every target by its heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from hsa.findings import Findings
from hsa.methods import source_warnings
from hsa.methods.distance_sums import ModelDistances
from hsa.methods.geometry import percent
from hsa.methods.hsa_extent import Extent, PlannedExtent
from hsa.methods.selection import TIE_RISK
from hsa.methods.settings import PerTensor
from hsa.methods.source_warnings import ATTENTION, NO_CHANGE, RolePair, first_and_each
from hsa.methods.tensors import BASE, Outcome, TensorRecord
from hsa.option_names import option

LEAST_PLAUSIBLE_PERCENTAGE = 10
"""A `k` above 1 and below this causes a warning: so few percent of a model's 6 to 20 heads are one head or two."""

MAX_NAMED = 3
"""The number of values that one message names."""


def percentage_findings(values: Iterable[PerTensor]) -> Findings:
    """Findings for values of `k` above 1: a note, or below `LEAST_PLAUSIBLE_PERCENTAGE` a warning.

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


def no_weight_findings(extent: PlannedExtent, attention_scale: float) -> Findings:
    """A warning if the settings alone give secondary no weight; `change_findings` judges a finished merge."""
    if attention_scale != 1.0 or (extent.weights is not None and extent.weights[1] > 0.0):
        return Findings()
    return Findings(warnings=(f"the merge changes nothing: {_why_nothing_changes(extent)}",))


def value_findings(outcomes: Sequence[Outcome]) -> Findings:
    """Findings about the values of the sources' target tensors, whatever the settings of the merge."""
    if not outcomes:
        return Findings()
    return source_warnings.value_findings(_equal_sources(outcomes), _distances(outcomes), ATTENTION, len(outcomes))


def change_findings(outcomes: Sequence[Outcome]) -> Findings:
    """A warning if a finished merge changes next to nothing, unless two sources are equal."""
    extent = Extent.of(outcomes)
    if extent.change is None or extent.change >= NO_CHANGE or _equal_sources(outcomes):
        return Findings()
    return Findings(
        warnings=(
            f"the merge changes next to nothing: the output differs from primary by {percent(extent.change)} % of its "
            f"task vector on the target tensors; {_why_nothing_changes(extent)}",
        )
    )


def selection_findings(outcomes: Sequence[Outcome]) -> Findings:
    """Narrow margins and ties between the heads that are merged and those that are not."""
    notes, warnings = [], []
    close = [o for o in outcomes if o.decision.margin is not None and o.decision.margin < TIE_RISK]
    if close:
        warnings.append(
            f"{len(close)} tensors have a margin below {TIE_RISK:g}, such as {close[0].task.stored.name}: another "
            f"backend or machine could select other heads there"
        )
    tied = [o for o in outcomes if len(o.decision.selected) > o.decision.keep]
    if tied:
        notes.append(
            f"{len(tied)} tensors have ties at the cut, such as {tied[0].task.stored.name}: all tied heads are merged"
        )
    return Findings(tuple(notes), tuple(warnings))


def _as_shares(values: Sequence[float]) -> str:
    each = [f"k = {value:g} is taken as a percentage, the share {value / 100:g}" for value in values[:MAX_NAMED]]
    return "; ".join(each) + (f"; and {len(values) - MAX_NAMED} more" if len(values) > MAX_NAMED else "")


def _models(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """The roles of the models, in their order."""
    return tuple(role for role in outcomes[0].task.sources if role != BASE)


def _equal_sources(outcomes: Sequence[Outcome]) -> list[RolePair]:
    """The pairs of sources with the same values in every target. Of several equal sources, the first is paired with
    each."""
    models = _models(outcomes)
    still = {
        (BASE, role): not any(outcome.decision.measured.differ[number] for outcome in outcomes)
        for number, role in enumerate(models)
    }
    pairs = combinations((BASE, *models), 2)
    return first_and_each(
        pair for pair in pairs if still.get(pair) or all(pair in outcome.equal for outcome in outcomes)
    )


def _distances(outcomes: Sequence[Outcome]) -> ModelDistances:
    """The distances of the models from base and from each other, over all targets."""
    models = _models(outcomes)
    geometries = [outcome.decision.measured.geometry for outcome in outcomes]
    pairs = {pair: [each.between(pair) for each in geometries] for pair in combinations(range(len(models)), 2)}
    return ModelDistances(
        models,
        _total(geometry.base for geometry in geometries),
        tuple(_total(geometry.squares[number] for geometry in geometries) for number in range(len(models))),
        {pair: _total(each.product for each in between) for pair, between in pairs.items()},
        {pair: _total(each.difference for each in between) for pair, between in pairs.items()},
    )


def _total(by_head: Iterable[Sequence[float]]) -> float:
    return math.fsum(value for values in by_head for value in values)


def _why_nothing_changes(extent: Extent | PlannedExtent) -> str:
    """Why a merge changes nothing, and what would merge more."""
    if extent.weights is None:
        return f"k selects no head; raise {option('k')}"
    if extent.weights[1] == 0.0:
        which = "secondary has" if extent.secondaries == 1 else "the secondaries have"
        why = f"{which} no weight where lambda is 1 or alpha is 0"
        return f"{why}; lower {option('lam')}, or raise {option('alpha')}"
    more = f"lower {option('lam')}, raise {option('alpha')} or raise {option('k')}"
    return f"{more}, or give a secondary that differs from primary"


def close_margin_notes(records: Iterable[TensorRecord]) -> Iterator[str]:
    """A note where margins are so small that another backend may select other heads."""
    close = [target.name for target in records if target.margin is not None and target.margin < TIE_RISK]
    if close:
        yield (
            f"{len(close)} tensors have a margin below {TIE_RISK:g}, such as {close[0]}: another backend could have "
            f"selected other heads there, and would give other bytes"
        )
