"""Makes the record of a merge from its plan and outcomes: the identities of the sources, the merged tensors, and
digests."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from hsa._version import __version__
from hsa.methods.base import Method
from hsa.methods.settings import Settings
from hsa.methods.tensors import Outcome, TensorRecord, TensorTask
from hsa.outputs.record import Record
from hsa.outputs.source_record import SourceFileRecord, SourceRecord
from hsa.planning.plan import Plan
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system import lapack, manifest
from hsa.system.digests import digest_of
from hsa.system.manifest import BLANK_DIGEST

PROGRAM = {"name": "hsa-merge", "version": __version__}


def make_record(plan: Plan, sources: Sources, outcomes: Sequence[Outcome], parameters: Mapping[str, Any]) -> Record:
    """Make the record of a finished merge; `parameters` shaped the output besides the method's settings."""
    digests = {source.role: target_digest(source.role, outcomes) for source in sources}
    return new_record(plan.method, plan.settings, sources, parameters, map(TensorRecord.of, outcomes), digests)


def new_record(
    method: Method[Any, Any],
    settings: Settings,
    sources: Sources,
    parameters: Mapping[str, Any],
    targets: Iterable[TensorRecord],
    digests: Mapping[str, str] | None = None,
) -> Record:
    """Make a record of these targets; `digests` are over the target tensors of each source, blank while unknown."""
    return Record(
        dict(PROGRAM),
        libraries(method.libraries),
        method,
        method.version,
        sources.architecture,
        {**settings.as_dict(), **parameters},
        {
            source.role: source_record(source, BLANK_DIGEST if digests is None else digests[source.role])
            for source in sources
        },
        sources.anchor,
        sources.base,
        tuple(targets),
    )


def longest_records(method: Method[Any, Any], tasks: Iterable[TensorTask]) -> Iterator[TensorRecord]:
    """The longest possible records of targets that are not merged yet."""
    for task in tasks:
        yield TensorRecord(
            task.output_name,
            task.name,
            task.place,
            task.shape,
            task.out_code,
            task.partition,
            method.longest(task, manifest.LONGEST_NUMBER),
        )


def check_record_size(plan: Plan, sources: Sources, parameters: Mapping[str, Any], small_files: Iterable[str]) -> None:
    """Raise RequestError if the provenance of a planned merge could be too large to be read again.

    `small_files` are the names of the files that may lie beside the weights.
    """
    groups = sum(task.partition.groups for task in plan.targets)
    targets = longest_records(plan.method, plan.targets) if groups <= manifest.MAX_PROVENANCE_MARKS else ()
    expected = new_record(plan.method, plan.settings, sources, parameters, targets)
    expected.check_fits([*small_files, *(file.name for file in plan.files)], groups)


def source_record(source: Checkpoint, targets: str) -> SourceRecord:
    """The record of an open source, with the digest over its target tensors."""
    files = {s.name: SourceFileRecord(s.source.size, s.header.digest) for s in source.shards}
    return SourceRecord(source.identity, source.kind, files, targets)


def target_digest(role: Role, outcomes: Sequence[Outcome]) -> str:
    """BLAKE3 over the target tensors of one source: name, dtype, shape and digest of each, by name.

    It depends on these tensors alone, not on the shards of the source, the slices of a merge or other sources.
    """
    lines = []
    for outcome in outcomes:
        ref = outcome.task.sources.get(role)
        if ref is not None:
            lines.append((outcome.task.name, ref.code, ref.shape, outcome.digests[role]))
    return tensors_digest(lines)


def tensors_digest(tensors: Sequence[tuple[str, str, Sequence[int], str]]) -> str:
    """BLAKE3 over tensors given by name, dtype, shape and digest, sorted by name."""
    lines = [
        json.dumps([name, code, list(shape), digest], separators=(",", ":")) for name, code, shape, digest in tensors
    ]
    return digest_of("\n".join(sorted(lines)).encode("ascii"))


def libraries(extra: Iterable[str] = ()) -> dict[str, str]:
    """The versions of the libraries that determine the bytes of an output. `extra` are those that a method needs
    (`Method.libraries`)."""
    names = ["numpy", "blake3", "huggingface_hub", *extra]
    versions = {name: lapack.description() if name == "lapack" else version(name) for name in sorted(names)}
    return {"python": platform.python_version(), **versions}
