"""Warnings about sources that can be merged but do not belong together, and about merges that change next to nothing.

Such a merge writes a valid but useless checkpoint, so it causes a warning, whatever the method. The thresholds lie
between measurements of sound and of mistaken sources. The real sources were three fine-tunes of whisper-tiny, in merges
of two or three. `d` is |M1 - M2|, `t` the task vector of the fine-tune that is nearer to the other. The figures for
attention (encoder-qkv, attention-qkv), in float16, with float16 and bfloat16 copies of each:

| sources | tv / B | cosine | d / t |
|---|---|---|---|
| fine-tunes of one base, any two of three | 0.005 to 0.010 | 0.20 to 0.33 | 1.16 to 1.29 |
| made-up triples of the benchmarks, any shape | 0.05 | -0.01 to 0.03 | 1.4 |
| base and a fine-tune exchanged, any pair | 0.005 to 0.013 | 0.57 to 0.63 | 0.80 to 0.87 |
| a third fine-tune as base, any of three | 0.006 to 0.013 | 0.45 to 0.55 | 0.93 to 1.04 |
| random base of equal shapes | 1.4 to 2.2 | 1.00 | below 0.02 |
| random secondary, or primary | 1.1 to 1.4 of it | 0.01 | 1.0 |

The same models, with all tensors merged:

| sources | tv / B | cosine | d / t |
|---|---|---|---|
| fine-tunes of one base, any two of three | 0.0014 | 0.28 to 0.40 | 1.10 to 1.19 |
| base and a fine-tune exchanged, any pair | 0.0014 to 0.0017 | 0.55 to 0.61 | 0.83 to 0.91 |
| a third fine-tune as base, any of three | 0.0016 to 0.0017 | 0.43 to 0.55 | 0.92 to 1.05 |

So the gap between sound and mistaken sources is smaller than for attention. The thresholds miss one case of the last
row, and warn about none of the first. For more than two fine-tunes, each pair is measured as here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from hsa.errors import listed
from hsa.findings import Findings
from hsa.methods.distance_sums import MergeDistances, ModelDistances
from hsa.methods.geometry import percent
from hsa.methods.tensors import BASE, Outcome
from hsa.option_names import option

RolePair = tuple[str, str]

UNRELATED = 0.5
"""|tv| / |B| from which a fine-tune does not belong to this base. Two independent models are at least 1.0 apart."""


class TooClose(NamedTuple):
    """Limits for two fine-tunes that share more than two of one base do: the cosine of their task vectors is at least
    `cosine`, and d / t is below `ratio`. Both are needed, because a small fine-tune is near to a large one at any
    angle. `usual` is the range of cosines that was measured for fine-tunes of one base."""

    cosine: float
    ratio: float
    usual: str


ATTENTION = TooClose(0.39, 1.1, "0.2 to 0.33")
"""Limits for attention heads."""

WHOLE_MODELS = TooClose(0.47, 1.0, "0.28 to 0.4")
"""Limits for all tensors that a method merges."""

NO_CHANGE = 1e-4
"""|output - M1| / |tv1| below which a merge changes next to nothing. HSA's defaults give 0.1."""


def source_findings(outcomes: Sequence[Outcome]) -> Findings:
    """Findings about the values of the sources, whatever the method and the settings."""
    equal = equal_sources(outcomes)
    found = MergeDistances.of(outcomes) if outcomes else None
    distances = found.sources if found is not None and found.with_base else None
    return value_findings(equal, distances, WHOLE_MODELS, len(outcomes))


def change_findings(outcomes: Sequence[Outcome]) -> Findings:
    """A warning if the output of a finished merge is next to base or to one of the models, unless two sources are
    equal."""
    found = MergeDistances.of(outcomes) if outcomes else None
    if found is None or found.moved is None or equal_sources(outcomes):
        return Findings()
    models = found.sources.models
    squares = found.sources.squares
    whole = squares[0] if found.with_base else max(squares)
    distances = dict(zip(models, found.from_models, strict=True))
    if found.with_base:
        distances = {BASE: found.moved, **distances}
    nearest = min(distances, key=lambda role: distances[role])
    if not distances[nearest] < NO_CHANGE**2 * whole:
        return Findings()
    share = percent(math.sqrt(distances[nearest] / whole))
    what = f"{models[0]}'s task vector" if found.with_base else "the distance between the models"
    return Findings(
        warnings=(
            f"the merge changes next to nothing: the output differs from {nearest} by {share} % of {what}; the "
            f"settings give the other sources next to no weight",
        )
    )


def value_findings(
    equal: Sequence[RolePair], distances: ModelDistances | None, too_close: TooClose, tensors: int
) -> Findings:
    """Findings about the values of the sources. The pairs `equal` hold the same values in all target tensors, whose
    number is `tensors`. `distances` is None if there is no base or they were not measured."""
    unrelated = [] if distances is None else list(_unrelated_fine_tunes(distances))
    exchanged = [] if equal or unrelated or distances is None else _exchanged_sources(distances, too_close)
    return Findings(warnings=(*(_equal_sources_warning(pair, tensors) for pair in equal), *unrelated, *exchanged))


def equal_sources(outcomes: Sequence[Outcome]) -> list[RolePair]:
    """The pairs of sources with the same values in every target. Of several equal sources, the first is paired with
    each."""
    if not outcomes:
        return []
    found = frozenset.intersection(*(outcome.equal for outcome in outcomes))
    return first_and_each(pair for pair in sorted(found, key=lambda pair: (pair[0] != BASE, pair)))


def first_and_each(equal: Iterator[RolePair]) -> list[RolePair]:
    """The pairs that do not follow from the pairs before them.

    Example:
        >>> first_and_each(iter([("base", "model1"), ("base", "model2"), ("model1", "model2")]))
        [('base', 'model1'), ('base', 'model2')]
    """
    pairs: list[RolePair] = []
    for pair in equal:
        if not any(pair[1] == other for _, other in pairs):
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


def _unrelated_fine_tunes(distances: ModelDistances) -> Iterator[str]:
    """Fine-tunes that were not trained from this base."""
    models = distances.models
    sizes = {role: distances.size(number) for number, role in enumerate(models)}
    far = {role: size for role, size in sizes.items() if size is not None and size > UNRELATED}
    if sizes[models[0]] is None:
        yield "base's target tensors are all zero, so no fine-tune was trained from it; give the pretrained model"
    usual = "a fine-tune lies within a few hundredths of it"
    if len(far) == len(models) > 1:
        cosines = [distances.cosine(pair) for pair in combinations(range(len(models)), 2)]
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
            remedy = f"a fine-tune of the same base as the other{'s' * (len(models) > 2)}"
            yield (
                f"{role} was hardly trained from this base: it lies {size:.2g} times the norm of base's target tensors "
                f"away from it, and {usual}; give {remedy if len(models) > 1 else 'the model that it was trained from'}"
            )


def _exchanged_sources(distances: ModelDistances, too_close: TooClose) -> Iterator[str]:
    """A warning if a fine-tune is nearer to another than to base, or nearly so. A wrong base brings all fine-tunes near
    to each other, so only the nearest pair is named."""
    models, squares = distances.models, distances.squares
    near: list[tuple[float, str]] = []
    for first, second in combinations(range(len(models)), 2):
        cosine, difference = distances.cosine((first, second)), distances.differences[first, second]
        larger = max(squares[first], squares[second])
        if cosine is None or cosine < too_close.cosine or difference >= too_close.ratio**2 * larger:
            continue
        nearer, other = (second, first) if squares[second] >= squares[first] else (first, second)
        share = math.sqrt(difference / larger)
        near.append((share, _exchanged_text(models[nearer], models[other], share, cosine, too_close.usual)))
    if near:
        yield min(near)[1]


def _exchanged_text(nearer: str, other: str, share: float, cosine: float, usual: str) -> str:
    how = f"nearer to {other} than to base" if share < 1.0 else f"nearly as near to {other} as to base"
    return (
        f"{nearer} is {how}, at {percent(share)} % of the distance (the cosine of the task vectors is "
        f"{cosine:.2f}, that of two fine-tunes of one base was {usual} where it was measured): are base and "
        f"{other} exchanged, is base itself a fine-tune, or is one fine-tune made from the other?"
    )
