"""Mistakes of meaning: sources that can be merged but hardly belong together, and merges that do next to nothing.

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
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from hsa.architectures.base import Preset
from hsa.errors import StrictError, shown
from hsa.findings import Findings
from hsa.option_names import option
from hsa.outputs.ancestry import Ancestries, of_base, of_fine_tunes
from hsa.outputs.extent import Extent, percent, planned
from hsa.outputs.provenance import target_digest
from hsa.planning.likeness import PAIRS, Pair
from hsa.planning.outcome import TargetOutcome
from hsa.planning.target import Target
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.identity import is_hub_id, says_nothing
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources

UNRELATED = 0.5
"""|tv| / |B| from which a fine-tune is none of this base. Two independent models are at least 1.0 apart."""

SHARED = 0.39
"""Cosine of the task vectors from which they share more than two fine-tunes of one base do. It is used together with
`CLOSE`, for a small fine-tune lies near to a large one whatever their angle."""

CLOSE = 1.1
"""d / t below which two fine-tunes lie nearer to each other than two of one base do."""

STILL = 1e-4
"""|output - primary| / |tv1| below which a merge changes next to nothing. HSA's defaults give 0.1."""


def of_plan(sources: Sources, found: Ancestries) -> Findings:
    """What headers, configs, names and the sources' own records tell, before any tensor is read."""
    return Findings(tuple(_located(sources)), tuple(_unnamed(sources))) + of_adapters(sources) + of_base(found)


def of_adapters(sources: Sources) -> Findings:
    """What the configs of adapters tell; part of `of_plan`."""
    return Findings(warnings=tuple(_adapters(sources)))


def of_settings(targets: Sequence[Target]) -> Findings:
    """A warning where the parameters alone give secondary no weight. A finished merge is judged by `of_change`."""
    found = planned(targets)
    if any(target.scale != 1.0 for target in targets) or (found is not None and found[1] > 0.0):
        return Findings()
    return Findings(warnings=(f"the merge changes nothing: {_reason(found)}",))


def of_values(outcomes: Sequence[TargetOutcome]) -> Findings:
    """What the values of the sources' target tensors tell, whatever the parameters of the merge."""
    extent = Extent.of(outcomes)
    equal = _equal(outcomes)
    strangers = list(_strangers(extent))
    exchanged = [] if equal or strangers else _exchanged(outcomes, extent)
    return Findings(warnings=(*(_twice(pair, len(outcomes)) for pair in equal), *strangers, *exchanged))


def of_sources(outcomes: Sequence[TargetOutcome], sources: Sources, found: Ancestries, preset: Preset) -> Findings:
    """What a finished merge tells of its sources: their values, and whether they were merged with each other before."""
    return of_values(outcomes) + of_fine_tunes(found, sources, preset, lambda role: target_digest(role, outcomes))


def of_change(outcomes: Sequence[TargetOutcome]) -> Findings:
    """A warning where a finished merge changes next to nothing, and not because two sources are equal."""
    extent = Extent.of(outcomes)
    if extent.change is None or extent.change >= STILL or _equal(outcomes):
        return Findings()
    return Findings(
        warnings=(
            f"the merge changes next to nothing: the output differs from primary by {percent(extent.change)} % of its "
            f"task vector on the target tensors; {_reason(extent.weights)}",
        )
    )


def refuse(found: Findings, *, strict: bool) -> None:
    """StrictError where there are warnings and `strict` makes them errors."""
    if strict and found.warnings:
        count = len(found.warnings)
        what = "a warning is an error" if count == 1 else f"{count} warnings are errors"
        raise StrictError(f"{what} with {option('strict', True)}, and nothing was written: {'; '.join(found.warnings)}")


def _equal(outcomes: Sequence[TargetOutcome]) -> list[Pair]:
    """The pairs of sources that hold the same values in every target; of three equal ones, base and each other."""
    still = {
        ("base", "primary"): not any(outcome.merged.primary_moved for outcome in outcomes),
        ("base", "secondary"): not any(outcome.merged.secondary_moved for outcome in outcomes),
    }
    found = [pair for pair in PAIRS if still.get(pair) or all(pair in outcome.equal for outcome in outcomes)]
    return found if len(found) < len(PAIRS) else found[:2]


def _twice(pair: Pair, count: int) -> str:
    one, two = pair
    if one == "base":
        return (
            f"base and {two} are equal on all {count} target tensors: is {option(two)} really a fine-tune, and of this "
            f"base?"
        )
    return f"{one} and {two} are equal on all {count} target tensors: is the same model given twice?"


def _strangers(extent: Extent) -> Iterator[str]:
    """Fine-tunes that were not trained from this base."""
    sizes: dict[Role, float | None] = {"primary": extent.primary, "secondary": extent.secondary}
    far = {role: size for role, size in sizes.items() if size is not None and size > UNRELATED}
    if extent.primary is None:
        yield "base's target tensors are all zero, so no fine-tune was trained from it; give the pretrained model"
    usual = "a fine-tune lies within a few hundredths of it"
    if len(far) == 2:
        cosine = "undefined" if extent.cosine is None else f"{extent.cosine:.2f}"
        yield (
            f"primary and secondary were hardly trained from this base: they lie {far['primary']:.2g} and "
            f"{far['secondary']:.2g} times the norm of base's target tensors away from it, and {usual} (the cosine of "
            f"their task vectors is {cosine}); give the model that both were trained from"
        )
    else:
        for role, size in far.items():
            yield (
                f"{role} was hardly trained from this base: it lies {size:.2g} times the norm of base's target tensors "
                f"away from it, and {usual}; give a fine-tune of the same base as the other"
            )


def _exchanged(outcomes: Sequence[TargetOutcome], extent: Extent) -> Iterator[str]:
    """A fine-tune that is nearer to the other than to base, or nearly so."""
    found = [outcome.merged.geometry for outcome in outcomes]
    apart = math.fsum(value for geometry in found for value in geometry.apart)
    one = math.fsum(value for geometry in found for value in geometry.primary)
    two = math.fsum(value for geometry in found for value in geometry.secondary)
    nearer, other = ("secondary", "primary") if two >= one else ("primary", "secondary")
    if extent.cosine is None or extent.cosine < SHARED or apart >= CLOSE**2 * max(one, two):
        return
    share = math.sqrt(apart / max(one, two))
    how = f"nearer to {other} than to base" if share < 1.0 else f"nearly as near to {other} as to base"
    yield (
        f"{nearer} is {how}, at {percent(share)} % of the distance (the cosine of the task vectors is "
        f"{extent.cosine:.2f}, that of two fine-tunes of one base was 0.2 to 0.33 where it was measured): are base and "
        f"{other} exchanged, is base itself a fine-tune, or is one fine-tune made from the other?"
    )


def _reason(found: tuple[float, float] | None) -> str:
    """Why a merge changes nothing, and what would merge more."""
    if found is None:
        return f"k selects no head; raise {option('k')}"
    if found[1] == 0.0:
        why = "secondary has no weight where lambda is 1 or alpha is 0"
        return f"{why}; lower {option('lam')}, or raise {option('alpha')}"
    more = f"lower {option('lam')}, raise {option('alpha')} or raise {option('k')}"
    return f"{more}, or give a secondary that differs from primary"


def _adapters(sources: Sources) -> Iterator[str]:
    """Adapters that say they were trained on another base; directory names say nothing."""
    base = sources.base.identity.id
    for source in sources:
        trained_on = source.trained_on
        if trained_on is None or not (is_hub_id(trained_on) and is_hub_id(base)):
            continue
        if trained_on.lower() != base.lower():
            yield (
                f"{source.role}'s adapter was trained on {shown(trained_on)} by its own config, and base is "
                f"{shown(base)}: give the base that it was trained on"
            )


def _unnamed(sources: Sources) -> Iterator[str]:
    """Names that say nothing even with their parent's, or that two sources share."""
    for source in sources:
        if says_nothing(source.identity.id):
            yield (
                f"the card calls {source.role} {shown(source.identity.id)}, which says nothing; give "
                f"{option(f'{source.role}_id')}, or a directory whose name or whose parent's name says what it is"
            )
    for one, two in PAIRS:
        first, second = sources.of(one), sources.of(two)
        if first.identity == second.identity and first.path != second.path and not says_nothing(first.identity.id):
            yield (
                f"the card calls both {one} and {two} {shown(first.identity.id)}; give {option(f'{one}_id')} and "
                f"{option(f'{two}_id')} to tell them apart"
            )


def _located(sources: Sources) -> Iterator[str]:
    """Names to which the parent's was added."""
    for source in sources:
        if _has_place(source):
            yield (
                f"{source.path.name} alone says little, so card and provenance call {source.role} "
                f"{shown(source.identity.id)}"
            )


def _has_place(source: Checkpoint) -> bool:
    return source.identity.id.startswith(f"{source.path.name} in ")
