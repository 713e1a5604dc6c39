"""`hsa.verify`: whether what hsa wrote is what it was, is sound, and follows from its sources."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hsa.actions.request import check_ids
from hsa.arguments import check_functions, check_paths
from hsa.errors import HeaderError, HsaError, RequestError, SourceChanged, shown
from hsa.outputs.patch_reader import SUFFIX, is_patch
from hsa.outputs.release_index import is_release
from hsa.outputs.sweep_index import holds_points
from hsa.sources.checkpoint import CONFIG, PICKLES, SAFETENSORS
from hsa.sources.roles import Role
from hsa.sources.safetensors import read_header
from hsa.system.descriptors import open_file, reason
from hsa.system.fsio import MACHINE_ERRNOS, SourceFile, Tally, exists, map_os_errors
from hsa.system.manifest import PROVENANCE
from hsa.system.memory import PeakMemory
from hsa.system.threads import check_threads, default_threads
from hsa.system.types import PathLike
from hsa.verification.output import verify_output
from hsa.verification.patch import verify_patch
from hsa.verification.problems import Problem, Problems
from hsa.verification.release import verify_release
from hsa.verification.report import Kind, VerifyReport
from hsa.verification.source_checks import GivenSources, Progress, Work
from hsa.verification.sweep import verify_sweep

__all__ = ["Problem", "VerifyReport", "verify"]

ATTEMPTS = 3
"""How often a verification is begun where the output is replaced while it is read."""

PATIENCE = 1.0
"""Seconds to wait for an output that is just being replaced, on a filesystem that cannot swap two directories."""

EXPECTED = "give an output, a patch, or the directory of a sweep or of a release"


@map_os_errors()
def verify(
    output: PathLike,
    *,
    base: PathLike | None = None,
    primary: PathLike | None = None,
    secondary: PathLike | None = None,
    base_id: str | None = None,
    primary_id: str | None = None,
    secondary_id: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check what hsa wrote, and with its three sources compute the merge again and compare bytes.

    Without sources: every file against the digests of the provenance, headers, index, names and shapes against
    `config.json`, every target tensor finite, and the provenance's targets and heads against weights and parameters. Of
    a patch, the same of its rows and its document. With sources: every byte against what they give.

    Args:
        output: an output's directory, a patch file, or the directory of a sweep or of a release, each member of which
            is verified. Only what lies there is read; of the Hub's cache those files that its links lead to.
        base, primary, secondary: all three or none; as for `merge`. Not for a release, whose outputs have their own.
        base_id, primary_id, secondary_id: the ids that the record must have for them, where they are directories.
        threads: worker threads; by default the usable cores and one more.
        progress: called now and then with bytes done and bytes in all.

    Returns the report: a damaged output is no exception. Raises RequestError (nothing there, or nothing of hsa, some
    sources and not all), SourceError (a source cannot be opened), SourceChanged (the output is replaced again and
    again), MachineError (reading failed).

    Example:
        >>> report = hsa.verify("merged")
        >>> report.ok, report.problems
        (True, ())
    """
    sources = {"base": base, "primary": primary, "secondary": secondary}
    check_paths(output=output, **{name: path for name, path in sources.items() if path is not None})
    check_functions(progress=progress)
    check_threads(threads)
    place = _place(output)
    given = _given(
        {"base": base, "primary": primary, "secondary": secondary},
        {"base": base_id, "primary": primary_id, "secondary": secondary_id},
    )
    for attempt in range(ATTEMPTS):
        report = _whole(place, given, threads or default_threads(), progress)
        if report is not None:
            again = f"{place} was replaced while it was read; this is of what replaced it"
            return replace(report, notes=(again, *report.notes)) if attempt else report
    raise SourceChanged(
        f"output {place} was replaced {ATTEMPTS} times while it was read; verify it once no run writes to it"
    )


def _place(output: PathLike) -> Path:
    """Where the output is, links resolved. RequestError where nothing is."""
    given = os.fspath(output)
    if isinstance(given, str) and not given:
        raise RequestError(f"output is an empty path; {EXPECTED}")
    try:
        return Path(os.path.expanduser(given)).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise RequestError(f"output {shown(given, 1000)} cannot be found ({why}); {EXPECTED}") from error


def _given(paths: Mapping[Role, PathLike | None], ids: Mapping[Role, str | None]) -> GivenSources | None:
    """The sources to compare with; None where none is given, RequestError where not all are."""
    found = {role: path for role, path in paths.items() if path is not None}
    if found and len(found) < len(paths):
        lacking = ", ".join(role for role in paths if role not in found)
        raise RequestError(f"to compare with the sources all three are needed; {lacking} is not given")
    if not found and any(ids.values()):
        raise RequestError("ids are compared with those of the sources; give base, primary and secondary too")
    check_ids(ids)
    return GivenSources(found, ids) if found else None


def _whole(place: Path, given: GivenSources | None, threads: int, progress: Progress | None) -> VerifyReport | None:
    """The report of what is at a place now; None where something else is there afterwards."""
    failed: HsaError | None = None
    with _held(place) as before:
        try:
            report = _verify(place, given, threads, progress)
        except HsaError as error:
            failed = error
        if _is_replaced(place, before):
            return None
    if failed is not None:
        raise failed
    return report


@contextmanager
def _held(place: Path) -> Iterator[tuple[int, int]]:
    """Device and inode of what is at a place, which stay its own as long as it is held open."""
    try:
        fd = open_file(place, getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno in MACHINE_ERRNOS:
            raise
        raise RequestError(f"output {place} cannot be opened ({reason(error)}); {EXPECTED}") from error
    try:
        status = os.fstat(fd)
        yield status.st_dev, status.st_ino
    finally:
        os.close(fd)


def _is_replaced(place: Path, before: tuple[int, int]) -> bool:
    """Whether something else is at the place now. SourceChanged where nothing is, and nothing comes."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            status = place.stat()
            return (status.st_dev, status.st_ino) != before
        except OSError as error:
            if time.monotonic() > last:
                raise SourceChanged(f"output {place} was removed while it was read: {reason(error)}") from error
            time.sleep(0.02)


def _verify(place: Path, given: GivenSources | None, threads: int, progress: Progress | None) -> VerifyReport:
    started, kind = time.perf_counter(), _kind(place)
    work = Work(threads, Tally(), PeakMemory(), Problems(), [], progress)

    def member(path: Path, sources: GivenSources | None) -> VerifyReport:
        paths, ids = (sources.paths, sources.ids) if sources else ({}, {})
        named = {f"{role}_id": value for role, value in ids.items()}
        return verify(path, **paths, **named, threads=threads, progress=progress)  # type: ignore[arg-type]

    if kind == "output":
        found = verify_output(place, given, work)
    elif kind == "patch":
        found = verify_patch(place, given, work)
    else:
        found = (verify_sweep if kind == "sweep" else verify_release)(place, given, work, member)
    work.memory.sample()
    return VerifyReport(
        output=place,
        kind=kind,
        record=found.record,
        files=found.files,
        bytes_read=work.tally.read,
        peak_memory_bytes=work.memory.peak,
        seconds=time.perf_counter() - started,
        problems=work.problems.listed(),
        notes=tuple(work.notes),
        sources_compared=found.sources_compared,
        members=found.members,
    )


def _kind(place: Path) -> Kind:
    """What is at a place. RequestError where it is nothing that hsa wrote."""
    if not place.is_dir():
        if place.is_file() and (is_patch(place) or _is_cut(place)):
            return "patch"
        if place.suffix == SUFFIX and place.is_file():
            raise RequestError(f"{place} holds weights and is no patch; give the directory that it is in")
        raise RequestError(f"output {place} is neither a directory nor a patch; {EXPECTED}")
    if exists(place / PROVENANCE):
        return "output"
    if holds_points(place):
        return "sweep"
    if is_release(place):
        return "release"
    known = (CONFIG, *(name for form in (SAFETENSORS, PICKLES) for name in (form.weights, form.index)))
    if any(exists(place / name) for name in known):
        return "output"
    raise RequestError(f"{place} holds no {PROVENANCE}, no patches and no weights, so hsa did not write it; {EXPECTED}")


def _is_cut(place: Path) -> bool:
    """Whether a file with a patch's name has no header that can be read, as after a broken copy."""
    if place.suffix != SUFFIX:
        return False
    try:
        source = SourceFile(place, "patch", Tally())
    except HsaError:
        return True
    try:
        read_header(source)
    except HeaderError:
        return True
    finally:
        source.close()
    return False
