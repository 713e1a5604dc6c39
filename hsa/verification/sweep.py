"""The directory of a sweep: each point, and what the index says of them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hsa.errors import HsaError, MachineError, RequestError, SourceError, shown
from hsa.outputs import provenance, sweep_index
from hsa.outputs.distances import Distances
from hsa.outputs.patch_reader import SUFFIX, Patch, open_patch
from hsa.outputs.provenance import Record, changed_keys
from hsa.outputs.sweep_index import PRESETS, SweepEntry, entry_of, point_of
from hsa.sources.checkpoint import read_whole
from hsa.sources.roles import ROLES
from hsa.system.descriptors import reason
from hsa.verification.collection import Verify, compare_index, open_index, take_over
from hsa.verification.output import LABEL
from hsa.verification.report import Verified
from hsa.verification.source_checks import GivenSources, Work

OPEN_PATCHES = 64
"""Patches that are open at a time while they are compared with their sources."""


def verify_sweep(directory: Path, given: GivenSources | None, work: Work, verify: Verify) -> Verified:
    """Check each point of a sweep by `verify`, and both index files against the points."""
    names = _listed(directory, work)
    members, entries, records, patches = [], [], [], []
    listed = _distances(directory, work)
    for name in names:
        path = directory / name
        whole = path.is_dir()
        report = verify(path, given if whole else None)
        members.append(report)
        take_over(name, report, work)
        if report.record is not None:
            records.append((name, report.record))
            entry = _entry(path, report.record, listed, work)
            if entry is not None:
                entries.append(entry)
            if not whole:
                patches.append(path)
    _compare_sources(records, work)
    compared = all(report.sources_compared for report in members if report.kind == "output")
    if given is not None:
        compared = _recompute(patches, given, work) and compared and len(patches) + len(records) > 0
    _compare_index(directory, names, entries, records, work)
    return Verified(None, sum(report.files for report in members), given is not None and compared, tuple(members))


def _listed(directory: Path, work: Work) -> list[str]:
    """The names of the points; what else is there is a note."""
    names, aside = [], []
    try:
        found = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise MachineError(f"{directory} cannot be listed: {reason(error)}") from error
    for entry in found:
        if entry.name in (sweep_index.JSON, sweep_index.CSV):
            continue
        if not entry.name.startswith(PRESETS) or not (entry.is_dir() or entry.name.endswith(SUFFIX)):
            aside.append(entry.name)
        elif entry.is_symlink():
            work.problems.add(entry.name, "is a link; expected a patch or an output that the sweep wrote")
        else:
            names.append(entry.name)
    if aside:
        work.notes.append(f"{len(aside)} entries that are no points were not looked at, such as {shown(aside[0])}")
    return names


def _entry(path: Path, record: Record, listed: Mapping[str, Mapping[str, Distances]], work: Work) -> SweepEntry | None:
    """What the index must say of a point. The distances of a checkpoint need its sources, and are taken as listed."""
    try:
        point = point_of(record)
        if point.name != path.name.removesuffix(SUFFIX):
            work.problems.add(path.name, f"its parameters are those of the point {shown(point.name, 300)}")
        if path.is_dir():
            held = provenance.load(path)
            return SweepEntry.of(point, path.name, held.record, held.digest, listed.get(path.name, {}))
        with ExitStack() as stack:
            return entry_of(point, open_patch(path, work.tally, stack))
    except (RequestError, SourceError) as error:
        work.problems.add(path.name, f"is no point of a sweep: {error}")
        return None


def _compare_sources(records: Sequence[tuple[str, Record]], work: Work) -> None:
    """All points of a sweep have the same sources, and those of one preset the same target tensors."""
    first: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {}
    for name, record in records:
        for preset in ("", str(record.parameters.get("targets"))):
            about = {str(role): source.as_dict() for role, source in record.sources.items()}
            if not preset:
                for each in about.values():
                    del each["targets_blake3"]
            other, expected = first.setdefault(preset, (name, about))
            unlike = changed_keys(about, expected)
            if unlike:
                work.problems.add(name, f"{', '.join(unlike)} are recorded otherwise than in {other}")
                break


def _recompute(patches: Sequence[Path], given: GivenSources, work: Work) -> bool:
    from hsa.verification.recompute_patches import recompute_patches

    compared = True
    for first in range(0, len(patches), OPEN_PATCHES):
        with ExitStack() as stack:
            opened: list[Patch] = []
            for path in patches[first : first + OPEN_PATCHES]:
                with suppress(SourceError):  # which its own verification has named
                    opened.append(open_patch(path, work.tally, stack))
            compared = (not opened or recompute_patches(opened, given, work)) and compared
    return compared


def _distances(directory: Path, work: Work) -> dict[str, dict[str, Distances]]:
    """The distances that index.csv lists, by place; nothing of rows that are malformed."""
    found: dict[str, dict[str, Distances]] = {}
    with suppress(HsaError, UnicodeDecodeError, csv.Error, ValueError, KeyError, TypeError):
        text = read_whole(LABEL, directory, sweep_index.CSV, work.tally).decode("utf-8")
        for row in csv.DictReader(io.StringIO(text)):
            held = {}
            for stack in sweep_index.STACKS:
                one, two = row[f"{stack}_from_primary"], row[f"{stack}_from_secondary"]
                if one or two:
                    held[stack] = Distances(float(one) if one else None, float(two) if two else None)
            found[row["place"]] = held
    return found


def _compare_index(
    directory: Path,
    names: Sequence[str],
    entries: Sequence[SweepEntry],
    records: Sequence[tuple[str, Record]],
    work: Work,
) -> None:
    if not entries:
        work.problems.add(sweep_index.JSON, "nothing that the sweep wrote can be read beside it")
        return
    sources = records[0][1].sources
    made = sweep_index.render(entries, {role: sources[role] for role in ROLES})
    listed = set(_places(directory, work))
    absent, gone = [name for name in names if name not in listed], sorted(listed - set(names))
    for what, which in (("lists no", absent), ("lists what is not there,", gone)):
        if which and listed:
            more = f", nor {len(which) - 1} more" if which[1:] else ""
            work.problems.add(sweep_index.CSV, f"{what} {shown(which[0], 300)}{more}; run the sweep again")
    for name, data in made.items():
        with ExitStack() as stack:
            source = open_index(directory, name, work, stack)
            where = None if source is None else compare_index(source, data)
            if where is not None:
                work.problems.add(name, f"is not what the points give: {where}; run the sweep again, which writes it")


def _places(directory: Path, work: Work) -> Iterator[str]:
    """The places that index.csv lists; none where it cannot be read, which its comparison tells."""
    with suppress(HsaError, UnicodeDecodeError, csv.Error):
        text = read_whole(LABEL, directory, sweep_index.CSV, work.tally).decode("utf-8")
        for row in csv.DictReader(io.StringIO(text)):
            yield str(row.get("place"))
