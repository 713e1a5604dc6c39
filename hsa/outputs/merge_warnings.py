"""Warnings from the names, configs and records of the sources, whatever the method of the merge.

Warnings about the values of the sources and about the result of the merge come from the method
(`Method.source_findings` and similar).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hsa.errors import StrictError, shown
from hsa.findings import Findings
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.methods.tensors import Outcome
from hsa.option_names import option
from hsa.outputs.earlier_merges import EarlierMerges, merged_base_findings, repeated_merge_findings
from hsa.outputs.recording import target_digest
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.identity import is_generic_name, is_hub_id
from hsa.sources.source_set import Sources


def header_findings(sources: Sources, earlier: EarlierMerges) -> Findings:
    """Findings from headers, configs, names and the sources' own records, before any tensor is read."""
    return (
        Findings(tuple(_names_with_parent(sources)), tuple(_uninformative_names(sources)))
        + adapter_findings(sources)
        + merged_base_findings(earlier, sources)
    )


def adapter_findings(sources: Sources) -> Findings:
    """Findings from the configs of adapters; part of `header_findings`."""
    return Findings(warnings=tuple(_foreign_adapters(sources)))


def source_findings(
    outcomes: Sequence[Outcome], sources: Sources, earlier: EarlierMerges, settings: Settings
) -> Findings:
    """Findings of a finished merge about its sources: their values, and whether they were merged with each other
    before."""
    return method_named(settings.method).source_findings(outcomes) + repeated_merge_findings(
        earlier, sources, settings, lambda role: target_digest(role, outcomes)
    )


def raise_if_strict(findings: Findings, *, strict: bool) -> None:
    """Raise StrictError if there are warnings and `strict` makes them errors."""
    if strict and findings.warnings:
        count = len(findings.warnings)
        what = "a warning is an error" if count == 1 else f"{count} warnings are errors"
        raise StrictError(
            f"{what} with {option('strict', True)}, and nothing was written: {'; '.join(findings.warnings)}"
        )


def _foreign_adapters(sources: Sources) -> Iterator[str]:
    """Warnings about adapters whose configs say that they were trained on another base. Only Hub ids are compared, not
    directory names."""
    if sources.base is None:
        return
    base = sources.base_checkpoint.identity.id
    for source in sources:
        trained_on = source.trained_on
        if trained_on is None or not (is_hub_id(trained_on) and is_hub_id(base)):
            continue
        if trained_on.lower() != base.lower():
            yield (
                f"{source.role}'s adapter was trained on {shown(trained_on)} by its own config, and base is "
                f"{shown(base)}: give the base that it was trained on"
            )


def _uninformative_names(sources: Sources) -> Iterator[str]:
    """Warnings about names that are uninformative even with their parent's, or that two sources share."""
    for source in sources:
        if is_generic_name(source.identity.id):
            yield (
                f"the card calls {source.role} {shown(source.identity.id)}, which says nothing; give "
                f"{option(f'{source.role}_id')}, or a directory whose name or whose parent's name says what it is"
            )
    for one, two in sources.pairs:
        first, second = sources.of(one), sources.of(two)
        if first.identity == second.identity and first.path != second.path and not is_generic_name(first.identity.id):
            yield (
                f"the card calls both {one} and {two} {shown(first.identity.id)}; give {option(f'{one}_id')} and "
                f"{option(f'{two}_id')} to tell them apart"
            )


def _names_with_parent(sources: Sources) -> Iterator[str]:
    """Notes on names to which the parent directory's name was added."""
    for source in sources:
        if _has_parent_name(source):
            yield (
                f"{source.path.name} alone says little, so card and provenance call {source.role} "
                f"{shown(source.identity.id)}"
            )


def _has_parent_name(source: Checkpoint) -> bool:
    return source.identity.id.startswith(f"{source.path.name} in ")
