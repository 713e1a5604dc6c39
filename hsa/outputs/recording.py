"""Makes the record of a merge from its plan and outcomes: who the sources were, what was merged, and digests."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from hsa._version import __version__
from hsa.architectures.base import TensorPlace
from hsa.methods.tensors import Outcome, TensorTask
from hsa.outputs.provenance import Record, SourceFileRecord, SourceRecord, TargetRecord
from hsa.planning.plan import Plan
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system import manifest
from hsa.system.digests import digest_of
from hsa.system.manifest import BLANK_DIGEST

PROGRAM = {"name": "hsa-merge", "version": __version__}


def make_record(plan: Plan, sources: Sources, outcomes: Sequence[Outcome], settings: Mapping[str, Any]) -> Record:
    """The record of a finished merge; `settings` is what besides its own parameters shaped the output."""
    return Record(
        dict(PROGRAM),
        libraries(plan.method.libraries),
        {**plan.settings.as_dict(), **settings},
        {source.role: source_record(source, target_digest(source.role, outcomes)) for source in sources},
        tuple(map(_record_of, outcomes)),
        sources.architecture,
    )


def check_record_size(plan: Plan, sources: Sources, settings: Mapping[str, Any], small_files: Iterable[str]) -> None:
    """RequestError where the provenance of a planned merge could be too large to be read again.

    `small_files` are the names of the files that may lie beside the weights.
    """
    longest = manifest.LONGEST_NUMBER
    heads = sum(task.partition.groups for task in plan.targets)
    targets = tuple(
        TargetRecord(
            task.output_name,
            _place(task),
            task.shape,
            task.out_code,
            task.partition.groups,
            task.partition.groups,
            longest,
            tuple(range(task.partition.groups)),
            (longest,) * task.partition.groups,
            longest,
        )
        for task in (plan.targets if heads <= manifest.MAX_PROVENANCE_MARKS else ())
    )
    records = {
        source.role: SourceRecord(
            source.identity,
            source.kind,
            {shard.name: SourceFileRecord(shard.source.size, BLANK_DIGEST) for shard in source.shards},
            BLANK_DIGEST,
        )
        for source in sources
    }
    expected = Record(
        dict(PROGRAM),
        libraries(plan.method.libraries),
        {**plan.settings.as_dict(), **settings},
        records,
        targets,
        sources.architecture,
    )
    expected.check_fits([*small_files, *(file.name for file in plan.files)], heads)


def source_record(source: Checkpoint, targets: str) -> SourceRecord:
    """The record of an open source, with the digest over its target tensors."""
    files = {s.name: SourceFileRecord(s.source.size, digest_of(s.header.raw)) for s in source.shards}
    return SourceRecord(source.identity, source.kind, files, targets)


def target_digest(role: Role, outcomes: Sequence[Outcome]) -> str:
    """BLAKE3 over the target tensors of one source: name, element type, shape and digest of each, by name.

    Independent of how the source is split into shards.
    """
    lines = []
    for outcome in outcomes:
        ref = outcome.task.sources[role]
        lines.append((outcome.task.name, ref.code, ref.shape, outcome.digests[role]))
    return tensors_digest(lines)


def tensors_digest(tensors: Sequence[tuple[str, str, Sequence[int], str]]) -> str:
    """BLAKE3 over tensors given by name, element type, shape and the digest of their bytes, in the order of names."""
    lines = [
        json.dumps([name, code, list(shape), digest], separators=(",", ":")) for name, code, shape, digest in tensors
    ]
    return digest_of("\n".join(sorted(lines)).encode("ascii"))


def libraries(extra: Iterable[str] = ()) -> dict[str, str]:
    """Versions of what the bytes of an output depend on; `extra` is what a method needs (`Method.libraries`)."""
    names = ["numpy", "blake3", "huggingface_hub", *extra]
    return {"python": platform.python_version(), **{name: version(name) for name in sorted(names)}}


def _record_of(outcome: Outcome) -> TargetRecord:
    task, decision = outcome.task, outcome.decision
    return TargetRecord.from_selection(
        task.output_name,
        _place(task),
        task.shape,
        task.out_code,
        decision.keep,
        decision.coefficient,
        decision.selection,
    )


def _place(task: TensorTask) -> TensorPlace:
    assert task.place is not None
    return task.place
