"""Warns of sources that can be merged but do not belong together, and of merges that change next to nothing.

Such a merge writes a sound checkpoint of no use, so it is told as a warning. The thresholds lie between what was
measured of sound and of mistaken sources. Real ones: three fine-tunes of whisper-tiny by two or three, in float16, with
float16 and bfloat16 copies of each (encoder-qkv, attention-qkv). `d` is |M1 - M2|, `t` the task vector of the fine-tune
that is nearer to the other.

| sources | tv / B | cosine | d / t |
|---|---|---|---|
| fine-tunes of one base, any two of three | 0.005 to 0.010 | 0.20 to 0.33 | 1.16 to 1.29 |
| made-up triples of the benchmarks, any shape | 0.05 | -0.01 to 0.03 | 1.4 |
| base and a fine-tune exchanged, any pair | 0.005 to 0.013 | 0.57 to 0.63 | 0.80 to 0.87 |
| a third fine-tune as base, any of three | 0.006 to 0.013 | 0.45 to 0.55 | 0.93 to 1.04 |
| random base of equal shapes | 1.4 to 2.2 | 1.00 | below 0.02 |
| random secondary, or primary | 1.1 to 1.4 of it | 0.01 | 1.0 |

Of more than two fine-tunes, each pair is looked at as here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from hsa.errors import listed
from hsa.findings import Findings
from hsa.methods.base import BASE
from hsa.methods.geometry import Pair, cosine, ratio
from hsa.methods.hsa_extent import Extent, PlannedExtent, percent
from hsa.methods.selection import TIE_RISK
from hsa.methods.settings import PerTensor
from hsa.methods.tensors import Outcome, TensorRecord
from hsa.option_names import option

RolePair = tuple[str, str]

LEAST_PLAUSIBLE_PERCENTAGE = 10
"""A `k` above 1 and below this is a warning: so few percent of a model's 6 to 20 heads are one head or two."""

MAX_NAMED = 3
"""Values that one message names."""

UNRELATED = 0.5
"""|tv| / |B| from which a fine-tune is none of this base. Two independent models are at least 1.0 apart."""

SHARED_COSINE = 0.39
"""Cosine of the task vectors from which they share more than two fine-tunes of one base do. It is used together with
`CLOSE_RATIO`, for a small fine-tune lies near to a large one whatever their angle."""

CLOSE_RATIO = 1.1
"""d / t below which two fine-tunes lie nearer to each other than two of one base do."""

NO_CHANGE = 1e-4
"""|output - primary| / |tv1| below which a merge changes next to nothing. HSA's defaults give 0.1."""


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


def no_weight_findings(extent: PlannedExtent, attention_scale: float) -> Findings:
    """A warning where the settings alone give secondary no weight; `change_findings` judges a finished merge."""
    if attention_scale != 1.0 or (extent.weights is not None and extent.weights[1] > 0.0):
        return Findings()
    return Findings(warnings=(f"the merge changes nothing: {_why_nothing_changes(extent)}",))


def value_findings(outcomes: Sequence[Outcome]) -> Findings:
    """What the values of the sources' target tensors tell, whatever the settings of the merge."""
    if not outcomes:
        return Findings()
    equal = _equal_sources(outcomes)
    unrelated = list(_unrelated_fine_tunes(outcomes))
    exchanged = [] if equal or unrelated else _exchanged_sources(outcomes)
    return Findings(warnings=(*(_equal_sources_warning(pair, len(outcomes)) for pair in equal), *unrelated, *exchanged))


def change_findings(outcomes: Sequence[Outcome]) -> Findings:
    """A warning where a finished merge changes next to nothing, and not because two sources are equal."""
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
    """The pairs of sources that hold the same values in every target; of several equal ones, the first and each."""
    models = _models(outcomes)
    still = {
        (BASE, role): not any(outcome.decision.measured.differ[number] for outcome in outcomes)
        for number, role in enumerate(models)
    }
    pairs: list[RolePair] = []
    for pair in combinations((BASE, *models), 2):
        known = any(pair[1] == other for _, other in pairs)
        if not known and (still.get(pair) or all(pair in outcome.equal for outcome in outcomes)):
            pairs.append(pair)
    return pairs


def _equal_sources_warning(pair: RolePair, count: int) -> str:
    one, two = pair
    if one == BASE:
        return (
            f"base and {two} are equal on all {count} target tensors: is {option(two)} really a fine-tune, and of this "
            f"base?"
        )
    return f"{one} and {two} are equal on all {count} target tensors: is the same model given twice?"


def _unrelated_fine_tunes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Fine-tunes that were not trained from this base."""
    models = _models(outcomes)
    sizes = {role: _size(outcomes, number) for number, role in enumerate(models)}
    far = {role: size for role, size in sizes.items() if size is not None and size > UNRELATED}
    if sizes[models[0]] is None:
        yield "base's target tensors are all zero, so no fine-tune was trained from it; give the pretrained model"
    usual = "a fine-tune lies within a few hundredths of it"
    if len(far) == len(models):
        cosines = [_pair_of(outcomes, pair).cosine for pair in combinations(range(len(models)), 2)]
        known = [f"{each:.2f}" for each in sorted(each for each in cosines if each is not None)]
        angle = " to ".join(dict.fromkeys((known[0], known[-1]))) if known else "undefined"
        all_of_them = "both" if len(models) == 2 else "all"
        yield (
            f"{listed(models)} were hardly trained from this base: they lie "
            f"{listed([f'{size:.2g}' for size in far.values()])} times the norm of base's target tensors away from it, "
            f"and {usual} (the cosine of their task vectors is {angle}); give the model that {all_of_them} were "
            f"trained from"
        )
    else:
        for role, size in far.items():
            yield (
                f"{role} was hardly trained from this base: it lies {size:.2g} times the norm of base's target tensors "
                f"away from it, and {usual}; give a fine-tune of the same base as the other{'s' * (len(models) > 2)}"
            )


def _size(outcomes: Sequence[Outcome], model: int) -> float | None:
    """|tv| / |B| of a model over all targets."""
    geometries = [outcome.decision.measured.geometry for outcome in outcomes]
    base = math.fsum(value for geometry in geometries for value in geometry.base)
    return ratio(math.fsum(value for geometry in geometries for value in geometry.squares[model]), base)


class _PairSums(NamedTuple):
    """Two models over all targets: |tv1|^2, |tv2|^2, |tv1 - tv2|^2, and the cosine of their task vectors."""

    first: float
    second: float
    difference: float
    cosine: float | None


def _pair_of(outcomes: Sequence[Outcome], pair: Pair) -> _PairSums:
    geometries = [outcome.decision.measured.geometry.between(pair) for outcome in outcomes]
    first = math.fsum(value for geometry in geometries for value in geometry.primary)
    second = math.fsum(value for geometry in geometries for value in geometry.secondary)
    product = math.fsum(value for geometry in geometries for value in geometry.product)
    difference = math.fsum(value for geometry in geometries for value in geometry.difference)
    return _PairSums(first, second, difference, cosine(first, second, product))


def _exchanged_sources(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A fine-tune that is nearer to another than to base, or nearly so. A mistake about base brings all of them near to
    each other, so that the nearest pair alone is named."""
    models = _models(outcomes)
    near: list[tuple[float, str]] = []
    for first, second in combinations(range(len(models)), 2):
        sums = _pair_of(outcomes, (first, second))
        larger = max(sums.first, sums.second)
        if sums.cosine is None or sums.cosine < SHARED_COSINE or sums.difference >= CLOSE_RATIO**2 * larger:
            continue
        nearer, other = (second, first) if sums.second >= sums.first else (first, second)
        share = math.sqrt(sums.difference / larger)
        near.append((share, _exchanged_text(models[nearer], models[other], share, sums.cosine)))
    if near:
        yield min(near)[1]


def _exchanged_text(nearer: str, other: str, share: float, cosine: float) -> str:
    how = f"nearer to {other} than to base" if share < 1.0 else f"nearly as near to {other} as to base"
    return (
        f"{nearer} is {how}, at {percent(share)} % of the distance (the cosine of the task vectors is "
        f"{cosine:.2f}, that of two fine-tunes of one base was 0.2 to 0.33 where it was measured): are base and "
        f"{other} exchanged, is base itself a fine-tune, or is one fine-tune made from the other?"
    )


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
