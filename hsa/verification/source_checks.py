"""Check that the sources given for a comparison are those that a record names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

from hsa.actions.request import Request, has_hub_ids, open_sources
from hsa.errors import listed, shown
from hsa.option_names import option
from hsa.outputs import recording
from hsa.outputs.provenance import changed_keys
from hsa.outputs.record import Record
from hsa.outputs.recording import PROGRAM
from hsa.outputs.source_record import SourceRecord
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.hub.client import Hub
from hsa.sources.identity import Identity
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system.fsio import Tally
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.problems import Problems

MAX_NAMED = 8
"""Differences of one kind that are named."""


def open_recorded(
    request: Request,
    record: Record,
    source_paths: SourcePaths,
    context: VerifyContext,
    stack: ExitStack,
    *,
    rows_only: bool = False,
    assets: Collection[Role] = (),
) -> Sources | None:
    """The sources of a request, if they have the files and names of a record; else None, and problems that say so.

    Of the anchor no more than its targets is fetched where `rows_only`; of the roles in `assets` the small files too.
    Raises SourceError where one cannot be opened.
    """
    hub = Hub(bars=context.progress is not None)
    open_them = partial(open_sources, request, rows_only=rows_only, assets=assets)
    if has_hub_ids(request):  # headers first: other sources need not be fetched whole
        with ExitStack() as trial:
            headers = open_them(Tally(), hub, trial, headers_only=True)
            if not _are_recorded(headers, record.sources, context.problems):
                return None
    sources = open_them(context.tally, hub, stack, headers_only=False)
    context.notes.extend(hub.notes)
    if not _are_recorded(sources, record.sources, context.problems):
        context.notes.append("nothing was recomputed, for the sources given are not the recorded ones")
        return None
    _check_names(sources, record, source_paths, context)
    return sources.with_identities({role: recorded.identity for role, recorded in record.sources.items()})


def _are_recorded(sources: Sources, recorded: Mapping[Role, SourceRecord], problems: Problems) -> bool:
    """Whether the sources have the recorded files, by size and header; names those that do not."""
    same = True
    for source in sources:
        for what in _source_differences(source, recorded[source.role]):
            problems.add(source.role, f"is not the recorded source: {what}")
            same = False
    return same


def _source_differences(source: Checkpoint, recorded: SourceRecord) -> Iterator[str]:
    own = recording.source_record(source, "")
    if own.kind != recorded.kind:
        yield f"its weights are {own.kind}, {shown(recorded.kind, 40)} was recorded"
        return
    for name in changed_keys(own.files, recorded.files)[:MAX_NAMED]:
        file, recorded_file = own.files.get(name), recorded.files.get(name)
        if file is None or recorded_file is None:
            what = "was not recorded" if recorded_file is None else "was recorded and is not there"
            yield f"{shown(name, 200)} {what}"
        elif file.nbytes != recorded_file.nbytes:
            yield f"{name} has {file.nbytes} bytes, {recorded_file.nbytes} were recorded"
        else:
            yield f"the header of {name} has BLAKE3 {file.header}, {recorded_file.header} was recorded"


def _check_names(sources: Sources, record: Record, source_paths: SourcePaths, context: VerifyContext) -> None:
    """Compare the recorded ids with those of the sources.

    Bytes do not say what a model is called. An id that is known, since the source came from the Hub or the user gave
    the id, must be the recorded one; the name of a directory proves nothing, and a note tells what was not checked.
    """
    unchecked = []
    for source in sources:
        role, own, recorded = source.role, source.identity, record.sources[source.role].identity
        if own != recorded:
            is_known = source_paths.ids.get(role) is not None or ("/" in own.id and "/" in recorded.id)
            if is_known and own.id != recorded.id:
                todo = f"give its id by {option(f'{role}_id')} if it was merged under another name"
                what = f"is recorded as {_name(recorded)}, the source given is {_name(own)}"
                context.problems.add(role, f"{what}; {todo}")
            else:
                unchecked.append(f"{role} is recorded as {_name(recorded)}, given is {_name(own)}")
    if unchecked:
        context.notes.append(
            f"bytes do not tell names, so these were not checked: {'; '.join(unchecked)}. To check them, give ids as "
            f"sources, or with {', '.join(dict.fromkeys(option(f'{role}_id') for role in sources.roles))}"
        )


def _name(identity: Identity) -> str:
    return shown(identity.id if identity.revision is None else f"{identity.id}@{identity.revision}", 200)


def other_roles(record: Record, source_paths: SourcePaths) -> str | None:
    """Why the sources given cannot be those of a record: it names others; None where it does not."""
    if set(record.sources) == set(source_paths.by_role):
        return None
    return f"was merged from {listed(record.sources)}, and was not compared with {listed(source_paths.by_role)}"


def check_targets(record: Record, digests: Mapping[Role, str], problems: Problems) -> bool:
    """Whether the sources, whose target tensors have these digests, have the recorded ones; names those without."""
    same = True
    for role, source in record.sources.items():
        digest, recorded = digests[role], source.targets
        if digest != recorded:
            problems.add(role, f"is not the recorded source: its targets have BLAKE3 {digest}, {recorded} was recorded")
            same = False
    return same


def other_versions(record: Record) -> str | None:
    """The versions that a record names and that are not those here; None where all are."""
    method = f"method {record.method.name}"
    own = {**PROGRAM, **recording.libraries(record.method.libraries), method: record.method.version}
    recorded = {**record.program, **record.libraries, method: record.version}
    unlike = [f"{shown(k)} {shown(recorded.get(k))} (here {shown(own.get(k))})" for k in changed_keys(recorded, own)]
    return ", ".join(unlike[:MAX_NAMED]) or None


def comparison_notes(record: Record) -> Iterator[str]:
    """Notes of a comparison with the sources: other versions, and what the method says of its decisions."""
    versions = other_versions(record)
    if versions is not None:
        yield f"its record says that it was written with {versions}; no digest proves that"
    yield from record.method.comparison_notes(record.targets)
