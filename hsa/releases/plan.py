"""Plan a release: check every merge of a recipe, and what the tree already holds, before the first byte is written.

An existing entry is judged by its record alone: its parameters, settings, card fields and sources must agree, as far as
headers show. A run then verifies it (see `hsa.releases.release`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hsa.actions.keywords import RELEASE, run_options
from hsa.actions.merge import dry_run
from hsa.actions.request import Request, open_sources
from hsa.errors import DestinationError, HsaError, MachineError, RequestError, listed, shown
from hsa.option_names import as_keys, spelled
from hsa.outputs import recording
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.report import PlanReport
from hsa.outputs.source_record import SourceRecord
from hsa.releases import index
from hsa.releases.index import EntryState
from hsa.releases.recipe import Recipe, RecipeEntry, keys, load
from hsa.sources.hub.client import Hub
from hsa.sources.hub.repository import cache_directories, find_id
from hsa.sources.roles import Role
from hsa.system import fsio
from hsa.system.destinations import check_replaceable, check_tree
from hsa.system.manifest import PROVENANCE
from hsa.system.types import PathLike

Action = Literal["build", "verify", "rebuild", "refuse"]

ROOM_FOR_METADATA = 1 << 20
"""Bytes to keep free for an entry's card and provenance, whose sizes are known only at the end."""

MAX_NAMED = 5
"""The most problems that one message names."""


@dataclass(frozen=True)
class PlannedEntry:
    """The planned action for an entry. `state` is its current state by its record; `why` says what differs or is wrong.

    `replaced` is the number of bytes that a rebuild frees. `remedy` says what to do if `overwrite` does not help.
    """

    entry: RecipeEntry
    request: Request
    action: Action
    state: EntryState
    why: str
    plan: PlanReport
    replaced: int = 0
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.entry.path,
            "action": self.action,
            "why": self.why,
            "bytes_to_write": self.plan.bytes_to_write if self.action in ("build", "rebuild") else 0,
            "bytes_to_fetch": self.plan.bytes_to_fetch if self.action in ("build", "rebuild") else 0,
            "plan": self.plan.as_dict(),
        }


@dataclass(frozen=True)
class ReleasePlan:
    """The plan of a release. For it, only headers and small files were read, and nothing was written.

    `short` names the disks with too little space, for which a release is refused. Sizes are in bytes.
    """

    recipe: Recipe
    tree: Path
    entries: tuple[PlannedEntry, ...]
    short: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def building(self) -> tuple[PlannedEntry, ...]:
        return tuple(planned for planned in self.entries if planned.action in ("build", "rebuild"))

    @property
    def bytes_to_write(self) -> int:
        return sum(planned.plan.bytes_to_write for planned in self.building)

    @property
    def bytes_to_fetch(self) -> int:
        return sum(planned.plan.bytes_to_fetch for planned in self.building)

    def as_dict(self) -> dict[str, Any]:
        """The plan as `hsa release --dry-run --json` prints it."""
        return {
            "dry_run": True,
            "tree": str(self.tree),
            "bytes_to_write": self.bytes_to_write,
            "bytes_to_fetch": self.bytes_to_fetch,
            "entries": [planned.as_dict() for planned in self.entries],
            "notes": list(self.notes),
            "warnings": list(self.short),
        }


@fsio.map_os_errors()
def plan_release(recipe: PathLike, output: PathLike, **keywords: Any) -> ReleasePlan:
    """Plan what `release` would do with the same arguments. Reads only headers and small files, and writes nothing.

    Raises RequestError for a bad recipe, or for merges that cannot be done, all of which it names. If the machine or
    the network is the cause for all of them, raises MachineError instead.
    """
    overwrite = run_options(RELEASE, keywords).overwrite
    options = {name: value for name, value in keywords.items() if name != "overwrite"}
    parsed_recipe = load(recipe)
    tree = check_tree(output, ())
    index.check_place(tree)
    requests = [entry.request(tree, **options) for entry in parsed_recipe.entries]
    entries: list[PlannedEntry] = []
    problems: list[tuple[RecipeEntry, HsaError]] = []
    for entry, request in zip(parsed_recipe.entries, requests, strict=True):
        try:
            entries.append(plan_entry(entry, request, tree, overwrite=overwrite))
        except HsaError as error:
            problems.append((entry, error))
    if problems:
        raise _planning_error(parsed_recipe, problems)
    _check_no_overlap(parsed_recipe, entries)
    return ReleasePlan(
        parsed_recipe,
        tree,
        tuple(entries),
        tuple(_disk_shortages(entries)),
        tuple(_outputs_not_in_recipe(parsed_recipe, tree)),
    )


def plan_entry(entry: RecipeEntry, request: Request, tree: Path, *, overwrite: bool) -> PlannedEntry:
    """Plan one entry. Raises HsaError if its merge cannot be done."""
    check_tree(tree, _local_paths(request))
    with spelled(as_keys(keys())):
        dry_run_report = dry_run(request, occupied=True)  # an existing output does not stop the other checks
    destination = dry_run_report.output
    if not (destination / PROVENANCE).is_file():
        check_replaceable(destination, overwrite=True)
        return PlannedEntry(entry, request, "build", "missing", "", dry_run_report)
    replaced = sum(path.lstat().st_size for path in destination.iterdir())
    state, why = state_of(destination, request)
    if state == "complete":
        return PlannedEntry(entry, request, "verify", state, "", dry_run_report, replaced)
    if not overwrite:
        return PlannedEntry(entry, request, "refuse", state, why, dry_run_report, replaced)
    try:
        check_replaceable(destination, overwrite=True)
    except DestinationError as error:
        return PlannedEntry(entry, request, "refuse", state, why, dry_run_report, replaced, str(error))
    return PlannedEntry(entry, request, "rebuild", state, why, dry_run_report, replaced)


def _local_paths(request: Request) -> list[Path]:
    """The sources that are not hub ids, with their links resolved."""
    paths = [Path(path).expanduser() for path in request.sources.values() if find_id(path) is None]
    return [Path(os.path.realpath(path)) for path in paths]


def state_of(destination: Path, request: Request) -> tuple[EntryState, str]:
    """The state of an output by its own record, and its differences from the recipe."""
    try:
        provenance = load_provenance(destination)
    except HsaError as error:
        return "damaged", str(error)
    with ExitStack() as stack:
        sources = open_sources(request, fsio.Tally(), Hub(), stack, headers_only=True)
        records = {source.role: recording.source_record(source, "") for source in sources}
    expected = {**request.settings.as_dict(), **request.output_settings("")}
    differences = [
        *_other_method(request.settings.method, provenance.record.method.name),
        *_other_parameters(expected, provenance.record.parameters),
        *_other_sources(records, provenance.record.sources),
    ]
    if not differences:
        return "complete", ""
    more = f", and {len(differences) - MAX_NAMED} more" if len(differences) > MAX_NAMED else ""
    return "other", f"it was made otherwise than the recipe says: {'; '.join(differences[:MAX_NAMED])}{more}"


def _other_method(expected: str, recorded: str) -> Iterator[str]:
    if expected != recorded:
        yield f"method is {recorded}, the recipe says {expected}"


def _other_parameters(expected: Mapping[str, Any], recorded: Mapping[str, Any]) -> Iterator[str]:
    """The parameters that make the output differ. The backend is ignored, because all backends write the same bytes."""
    for key in sorted({*expected, *recorded} - {"backend", "card"}):
        if expected.get(key) != recorded.get(key):
            yield f"{key} is {shown(recorded.get(key), 60)}, the recipe says {shown(expected.get(key), 60)}"
    expected_fields, recorded_fields = expected["card"], recorded.get("card")
    recorded_fields = recorded_fields if isinstance(recorded_fields, dict) else {}
    for key in sorted({*expected_fields, *recorded_fields}):
        if expected_fields.get(key) != recorded_fields.get(key):
            recorded_text, expected_text = (shown(fields.get(key), 60) for fields in (recorded_fields, expected_fields))
            yield f"card field {key} is {recorded_text}, the recipe says {expected_text}"


def _other_sources(expected: Mapping[Role, SourceRecord], recorded: Mapping[Role, SourceRecord]) -> Iterator[str]:
    """The differences between the recorded sources and the recipe's, as far as headers show."""
    if set(expected) != set(recorded):
        yield f"it was merged from {listed(recorded)}, the recipe has {listed(expected)}"
        return
    for role, expected_source in expected.items():
        recorded_source = recorded[role]
        if expected_source.identity != recorded_source.identity:
            yield f"{role} is {_name(recorded_source)}, the recipe's is {_name(expected_source)}"
        elif (expected_source.kind, dict(expected_source.files)) != (recorded_source.kind, dict(recorded_source.files)):
            yield f"the weights files of {role} are not those that it was made from"


def _name(source: SourceRecord) -> str:
    identity = source.identity
    return f"{identity.id:.120}@{identity.revision:.60}" if identity.revision else f"{identity.id:.120}"


def _planning_error(recipe: Recipe, problems: Sequence[tuple[RecipeEntry, HsaError]]) -> HsaError:
    """One error for all merges that cannot be done."""
    texts = [f"{entry.path} (line {entry.line}): {error}" for entry, error in problems[:MAX_NAMED]]
    more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    machine = all(isinstance(error, MachineError) for _, error in problems)
    return (MachineError if machine else RequestError)(
        f"{recipe.where}: {len(problems)} of {len(recipe.entries)} merges cannot be done, nothing was written: "
        f"{'; '.join(texts)}{more}"
    )


def _check_no_overlap(recipe: Recipe, entries: Sequence[PlannedEntry]) -> None:
    """Raise RequestError if links in the tree lead two entries to the same place."""
    outputs: dict[Path, RecipeEntry] = {}
    for planned in entries:
        output = planned.plan.output
        for other, entry in outputs.items():
            if output == other or output.is_relative_to(other) or other.is_relative_to(output):
                raise RequestError(
                    f"{recipe.where}:{planned.entry.line}: {planned.entry.path} and {entry.path} lead to {output} and "
                    f"{other}; take the links out of the tree"
                )
        outputs[output] = planned.entry


def _disk_shortages(entries: Sequence[PlannedEntry]) -> Iterator[str]:
    """The disks without enough space for everything to write. A replaced output is removed only after the new one is
    complete."""
    used: dict[int, int] = {}
    peak: dict[int, int] = {}
    directories: dict[int, Path] = {}
    building = [planned for planned in entries if planned.action in ("build", "rebuild")]
    fetched = max((planned.plan.bytes_to_fetch for planned in building), default=0)
    caches = {_device(cache, directories) for cache in cache_directories()} if fetched else set()
    if len(caches) == 1:  # merges may share sources, so only the largest download of one merge is certain
        used = dict.fromkeys(caches, fetched)
        peak = dict(used)
    for planned in building:
        device = _device(planned.plan.output.parent, directories)
        size, before = planned.plan.bytes_to_write, used.get(device, 0)
        peak[device] = max(peak.get(device, 0), before + size + ROOM_FOR_METADATA)
        used[device] = before + (max(0, size - planned.replaced) if planned.replaced else size + ROOM_FOR_METADATA)
    for device, needed in peak.items():
        free = fsio.free_bytes(directories[device])
        if free < needed:
            yield f"{needed} bytes are needed for all merges and {free} are free in {directories[device]}"


def _device(path: Path, directories: dict[int, Path]) -> int:
    """The device of the nearest existing directory, which is added to `directories`."""
    directory = next(parent for parent in (path, *path.parents) if parent.exists())
    device = directory.stat().st_dev
    directories.setdefault(device, directory)
    return device


def _outputs_not_in_recipe(recipe: Recipe, tree: Path) -> Iterator[str]:
    """Outputs in the tree that the recipe does not name."""
    named = {entry.path for entry in recipe.entries}
    outputs = sorted(path.parent for path in tree.glob(f"*/*/{PROVENANCE}")) if tree.is_dir() else []
    others = [path.relative_to(tree).as_posix() for path in outputs]
    others = [path for path in others if path not in named and not path.split("/")[1].startswith(".")]
    if others:
        yield f"{len(others)} outputs in the tree are not of this recipe and left alone, such as {others[0]}"
