"""Verify the directory of a sweep: each point, and the index."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hsa.errors import HsaError, MachineError, RequestError, SourceError, shown
from hsa.outputs import sweep_index
from hsa.outputs.grid_point import name_starts
from hsa.outputs.patch_format import Distances
from hsa.outputs.patch_reader import SUFFIX, Patch, open_patch
from hsa.outputs.provenance import changed_keys
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.record import Record
from hsa.outputs.sweep_index import SweepEntry, entry_of, point_of
from hsa.sources.checkpoint import read_whole
from hsa.system.descriptors import reason
from hsa.verification.collection import Verify, add_member_report, compare_index, open_index
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.decisions import Answers
from hsa.verification.output import LABEL
from hsa.verification.report import VerifyResult

_FROM = "_from_"
"""The separator in names of distance columns of index.csv: `STACK_from_ROLE`."""

OPEN_PATCHES = 64
"""The number of patches that are open at a time while they are compared with their sources."""


def verify_sweep(
    directory: Path, source_paths: SourcePaths | None, context: VerifyContext, verify: Verify
) -> VerifyResult:
    """Check each point of a sweep with `verify`, and both index files against the points."""
    names = _point_names(directory, context)
    reports, entries, records, patches = [], [], [], []
    listed_distances = _listed_distances(directory, context)
    for name in names:
        path = directory / name
        is_checkpoint = path.is_dir()
        report = verify(path, source_paths if is_checkpoint else None)
        reports.append(report)
        add_member_report(name, report, context)
        if report.record is not None:
            records.append((name, report.record))
            entry = _entry(path, report.record, listed_distances, context)
            if entry is not None:
                entries.append(entry)
            if not is_checkpoint:
                patches.append(path)
    _compare_sources(records, context)
    answers: list[Answers | None] = [report.answers for report in reports if report.kind == "output"]
    if source_paths is not None:
        answers += _recompute(patches, source_paths, context)
    _compare_index(directory, names, entries, records, context)
    return VerifyResult(None, sum(report.files for report in reports), _together(answers), tuple(reports))


def _point_names(directory: Path, context: VerifyContext) -> list[str]:
    """The names of the points; other entries are noted, and links are problems."""
    names, ignored, starts = [], [], name_starts()
    try:
        files = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise MachineError(f"{directory} cannot be listed: {reason(error)}") from error
    for entry in files:
        if entry.name in (sweep_index.JSON, sweep_index.CSV):
            continue
        if not entry.name.startswith(starts) or not (entry.is_dir() or entry.name.endswith(SUFFIX)):
            ignored.append(entry.name)
        elif entry.is_symlink():
            context.problems.add(entry.name, "is a link; expected a patch or an output that the sweep wrote")
        else:
            names.append(entry.name)
    if ignored:
        context.notes.append(
            f"{len(ignored)} entries that are no points were not looked at, such as {shown(ignored[0])}"
        )
    return names


def _entry(
    path: Path, record: Record, listed_distances: Mapping[str, Distances], context: VerifyContext
) -> SweepEntry | None:
    """The expected index entry of a point. A checkpoint's distances could only be computed from its sources, so they
    are taken from the index."""
    try:
        point = point_of(record)
        if point.name != path.name.removesuffix(SUFFIX):
            context.problems.add(path.name, f"its parameters are those of the point {shown(point.name, 300)}")
        if path.is_dir():
            provenance = load_provenance(path)
            return SweepEntry.of(
                point, path.name, provenance.record, provenance.digest, listed_distances.get(path.name, {})
            )
        with ExitStack() as stack:
            return entry_of(point, open_patch(path, context.tally, stack))
    except (RequestError, SourceError) as error:
        context.problems.add(path.name, f"is no point of a sweep: {error}")
        return None


def _compare_sources(records: Sequence[tuple[str, Record]], context: VerifyContext) -> None:
    """Check that all points of a sweep have the same sources, and those of one preset the same target tensors."""
    first: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {}
    for name, record in records:
        for preset in ("", str(record.parameters.get("targets"))):
            sources = {str(role): source.as_dict() for role, source in record.sources.items()}
            if not preset:
                for recorded in sources.values():
                    del recorded["targets_blake3"]
            first_name, expected = first.setdefault(preset, (name, sources))
            unlike = changed_keys(sources, expected)
            if unlike:
                context.problems.add(name, f"{', '.join(unlike)} are recorded otherwise than in {first_name}")
                break


def _together(answers: Sequence[Answers | None]) -> Answers | None:
    """The combined answers for all points; None if one was not compared, or if there are no points."""
    given = [each for each in answers if each is not None]
    return Answers.all(given) if given and len(given) == len(answers) else None


def _recompute(patches: Sequence[Path], source_paths: SourcePaths, context: VerifyContext) -> Iterator[Answers | None]:
    from hsa.verification.recompute_patches import recompute_patches

    for first in range(0, len(patches), OPEN_PATCHES):
        with ExitStack() as stack:
            group: list[Patch] = []
            for path in patches[first : first + OPEN_PATCHES]:
                with suppress(SourceError):  # the patch's own verification has reported it already
                    group.append(open_patch(path, context.tally, stack))
            if group:
                yield recompute_patches(group, source_paths, context)


def _listed_distances(directory: Path, context: VerifyContext) -> dict[str, Distances]:
    """The distances that index.csv lists, by place. Reading stops at the first malformed row."""
    by_place: dict[str, Distances] = {}
    with suppress(HsaError, UnicodeDecodeError, csv.Error, ValueError, KeyError, TypeError):
        text = read_whole(LABEL, directory, sweep_index.CSV, context.tally).decode("utf-8")
        rows = csv.DictReader(io.StringIO(text))
        columns = [name.partition(_FROM) for name in rows.fieldnames or () if _FROM in name]
        for row in rows:
            by_stack: dict[str, dict[str, float | None]] = {}
            for stack, _, role in columns:
                value = row[f"{stack}{_FROM}{role}"]
                by_stack.setdefault(stack, {})[role] = float(value) if value else None
            by_place[row["place"]] = {
                stack: by_role for stack, by_role in by_stack.items() if any(v is not None for v in by_role.values())
            }
    return by_place


def _compare_index(
    directory: Path,
    names: Sequence[str],
    entries: Sequence[SweepEntry],
    records: Sequence[tuple[str, Record]],
    context: VerifyContext,
) -> None:
    if not entries:
        context.problems.add(sweep_index.JSON, "nothing that the sweep wrote can be read beside it")
        return
    files = sweep_index.render(entries, records[0][1].sources, records[0][1].architecture)
    listed = set(_listed_places(directory, context))
    unlisted, missing = [name for name in names if name not in listed], sorted(listed - set(names))
    for text, places in (("lists no", unlisted), ("lists what is not there,", missing)):
        if places and listed:
            more = f", nor {len(places) - 1} more" if places[1:] else ""
            context.problems.add(sweep_index.CSV, f"{text} {shown(places[0], 300)}{more}; run the sweep again")
    for name, data in files.items():
        with ExitStack() as stack:
            source = open_index(directory, name, context, stack)
            difference = None if source is None else compare_index(source, data)
            if difference is not None:
                context.problems.add(
                    name, f"is not what the points give: {difference}; run the sweep again, which writes it"
                )


def _listed_places(directory: Path, context: VerifyContext) -> Iterator[str]:
    """The places that index.csv lists; none if it cannot be read, which the comparison of the index reports."""
    with suppress(HsaError, UnicodeDecodeError, csv.Error):
        text = read_whole(LABEL, directory, sweep_index.CSV, context.tally).decode("utf-8")
        for row in csv.DictReader(io.StringIO(text)):
            yield str(row.get("place"))
