"""The sources that are given to a verification, assigned to the roles of the record that it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from hsa.actions.keywords import NamedArguments
from hsa.actions.recorded_sources import recorded_sources
from hsa.actions.request import check_ids
from hsa.errors import RequestError, SourceError
from hsa.option_names import option
from hsa.outputs.grid_point import name_starts
from hsa.outputs.patch_reader import open_patch
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.record import Record
from hsa.system.fsio import Tally
from hsa.system.manifest import PROVENANCE
from hsa.verification.context import SourcePaths
from hsa.verification.report import ReportKind

FindSources = Callable[[Path, ReportKind], SourcePaths | None]
"""A function that returns the sources to compare with what is at a path, or None if there are none."""


def check_given(given: NamedArguments) -> None:
    """Raise RequestError for sources and ids that would be invalid for any merge."""
    given.check_types()
    if given.ids and not given.sources:
        raise RequestError(f"ids are compared with those of the sources; give {option('sources')} too")
    for name, value in given.ids.items():
        if name == "model_ids":
            check_ids({f"model{number}": each for number, each in enumerate(value, 1)})
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                check_ids({name.removesuffix("_id"): each})


def find_sources(given: NamedArguments) -> FindSources:
    """Return a function that assigns the given sources to roles, by the record of what is at a path.

    If no record can be read, they keep the names under which they were given, and nothing is compared.
    """

    def find(path: Path, kind: ReportKind) -> SourcePaths | None:
        if not given.sources:
            return None
        record = next(_records(path, kind), None)
        return SourcePaths(given.sources, {}) if record is None else SourcePaths(*recorded_sources(record, given, path))

    return find


def _records(path: Path, kind: ReportKind) -> Iterator[Record]:
    """The record of an output or a patch, or the readable records of a sweep's points.

    A release has none, because each of its outputs has its own sources.
    """
    if kind == "sweep":
        for place in sorted(path.iterdir()):
            if place.name.startswith(name_starts()) and not place.is_symlink():
                yield from _record_at(place)
    elif kind != "release":
        yield from _record_at(path)


def _record_at(path: Path) -> Iterator[Record]:
    """The record at a path; nothing if it cannot be read, which the verification reports."""
    try:
        if path.is_dir():
            if (path / PROVENANCE).is_file():
                yield load_provenance(path).record
        elif path.is_file():
            with ExitStack() as stack:
                yield open_patch(path, Tally(), stack).record
    except SourceError:
        return
