"""Warns where a source is itself an output of hsa, or was already merged from another source.

The record of a merge is `hsa_merge.json`. It names the sources of the earlier merge, with a digest over the target
tensors of each. A source whose record is missing or damaged counts as a model that hsa did not write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from hsa.errors import HsaError, listed
from hsa.findings import Findings
from hsa.methods.settings import Settings, declared
from hsa.outputs.provenance import load
from hsa.outputs.source_record import SourceRecord
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.identity import is_hub_id
from hsa.sources.roles import BASE, Role
from hsa.sources.source_set import Sources
from hsa.system.manifest import PROVENANCE


@dataclass(frozen=True)
class EarlierMerge:
    """How a source was merged, according to its own record: its sources, and the preset of target tensors where the
    method has presets."""

    preset: str | None
    sources: Mapping[Role, SourceRecord]


EarlierMerges = Mapping[Role, EarlierMerge]
"""The earlier merges, by role, of the sources that are outputs of hsa."""


def read_earlier_merges(sources: Iterable[Checkpoint]) -> dict[Role, EarlierMerge]:
    """Read the records in the folders of open sources. Each is read whole, within the bounds of `provenance`."""
    earlier: dict[Role, EarlierMerge] = {}
    for source in sources:
        with suppress(HsaError):
            record = load(source.path).record
            earlier[source.role] = EarlierMerge(record.parameters.get("targets"), record.sources)
    return earlier


def merged_base_findings(earlier: EarlierMerges, sources: Sources) -> Findings:
    """A warning if base is an output of hsa."""
    if BASE not in earlier:
        return Findings()
    return Findings(
        warnings=(
            f"base is an output of hsa, by the {PROVENANCE} in its folder: a merge is not the pretrained model; give "
            f"the model that {listed(sources.models)} were trained from",
        )
    )


def repeated_merge_findings(
    earlier: EarlierMerges, sources: Sources, settings: Settings, digest: Callable[[Role], str]
) -> Findings:
    """Warnings where a model was merged from another source of this merge.

    A common base is expected, and so is a merge with a further fine-tune. `digest` returns the digest over the target
    tensors of a source. It is called only where a record has one for the same preset.
    """
    return Findings(warnings=tuple(_merged_before(earlier, sources, settings, digest)))


def _merged_before(
    earlier: EarlierMerges, sources: Sources, settings: Settings, digest: Callable[[Role], str]
) -> Iterator[str]:
    preset: str | None = getattr(settings, "targets", None)
    for role in sources.models:
        earlier_merge = earlier.get(role)
        if earlier_merge is None:
            continue
        for other in sources.roles:
            if other == role:
                continue
            earlier_role = _earlier_role(earlier_merge, sources.of(other), preset, digest)
            if earlier_role is None or earlier_role == other == BASE:
                continue
            advice = (
                "give the pretrained model as base"
                if BASE in (earlier_role, other)
                else f"give the fine-tunes themselves{_to_merge_more(other, settings)}"
            )
            yield (
                f"{role} was merged from {other} already: the {PROVENANCE} in {role}'s folder names {other}'s model as "
                f"the {earlier_role} of that merge; {advice}"
            )


def _to_merge_more(role: Role, settings: Settings) -> str:
    """Advice on which settings to change instead: those that a search tries."""
    names = [each.key for each in declared(type(settings)) if each.about.search is not None]
    return f", and to merge more of {role} another {listed(names, 'or')}" if names else ""


def _earlier_role(
    earlier_merge: EarlierMerge, source: Checkpoint, preset: str | None, digest: Callable[[Role], str]
) -> Role | None:
    """The role that a source had in an earlier merge, or None if it had none.

    Digests are comparable only if both merges have the same target tensors. Otherwise only names on the Hub are
    compared.
    """
    for role, record in earlier_merge.sources.items():
        if earlier_merge.preset == preset:
            if record.targets == digest(source.role):
                return role
        elif is_hub_id(record.identity.id) and record.identity == source.identity:
            return role
    return None
