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
"""The most differences of one kind that are named."""


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
    """Open the sources of a request if they have the recorded files; otherwise add problems and return None.

    With `rows_only`, only the targets of the anchor are fetched, and for the roles in `assets` also the small files.
    Raises SourceError if a source cannot be opened.
    """
    hub = Hub(bars=context.progress is not None)
    open_them = partial(open_sources, request, rows_only=rows_only, assets=assets)
    if has_hub_ids(request):  # headers first, so that wrong sources are not fetched whole
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
    """Whether the sources have the recorded files, by size and header; add a problem for each that does not."""
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

    Bytes do not contain a model's name. An id is known if the source came from the Hub or the user gave the id; it must
    then equal the recorded one. The name of a directory proves nothing, so a note lists what was not checked.
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
    """The reason why the given sources cannot be those of a record: their roles differ. None if the roles match."""
    if set(record.sources) == set(source_paths.by_role):
        return None
    return f"was merged from {listed(record.sources)}, and was not compared with {listed(source_paths.by_role)}"


def check_targets(record: Record, digests: Mapping[Role, str], problems: Problems) -> bool:
    """Whether these digests of the sources' target tensors are the recorded ones; add a problem for each that
    differs."""
    same = True
    for role, source in record.sources.items():
        digest, recorded = digests[role], source.targets
        if digest != recorded:
            problems.add(role, f"is not the recorded source: its targets have BLAKE3 {digest}, {recorded} was recorded")
            same = False
    return same


def other_versions(record: Record) -> str | None:
    """The recorded versions that differ from those of this installation; None if all agree."""
    method = f"method {record.method.name}"
    own = {**PROGRAM, **recording.libraries(record.method.libraries), method: record.method.version}
    recorded = {**record.program, **record.libraries, method: record.version}
    unlike = [f"{shown(k)} {shown(recorded.get(k))} (here {shown(own.get(k))})" for k in changed_keys(recorded, own)]
    return ", ".join(unlike[:MAX_NAMED]) or None


def comparison_notes(record: Record) -> Iterator[str]:
    """Notes on a comparison with the sources: other versions, and the method's own notes on its decisions."""
    versions = other_versions(record)
    if versions is not None:
        yield f"its record says that it was written with {versions}; no digest proves that"
    yield from record.method.comparison_notes(record.targets)
