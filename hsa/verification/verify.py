"""`hsa.verify`: check that what hsa wrote is unchanged and sound, and that it follows from its sources."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hsa.actions.keywords import VERIFY, split_named
from hsa.actions.run_options import RunOptions
from hsa.actions.signatures import declared_keywords
from hsa.arguments import check_functions, check_paths
from hsa.errors import HeaderError, HsaError, RequestError, SourceChanged, shown
from hsa.outputs.patch_reader import SUFFIX, is_patch
from hsa.outputs.release_index import is_release
from hsa.outputs.sweep_index import holds_points
from hsa.sources.checkpoint import CONFIG, PICKLES, SAFETENSORS
from hsa.sources.safetensors import read_header
from hsa.system.descriptors import open_file, reason
from hsa.system.fsio import MACHINE_ERRNOS, SourceFile, Tally, exists, map_os_errors
from hsa.system.manifest import PROVENANCE
from hsa.system.memory import PeakMemory
from hsa.system.threads import default_threads
from hsa.system.types import PathLike
from hsa.verification.context import Progress, SourcePaths, VerifyContext
from hsa.verification.given_sources import FindSources, check_given, find_sources
from hsa.verification.output import verify_output
from hsa.verification.patch import verify_patch
from hsa.verification.problems import Problem, Problems
from hsa.verification.release import verify_release
from hsa.verification.report import ReportKind, VerifyReport
from hsa.verification.sweep import verify_sweep

__all__ = ["Problem", "VerifyReport", "verify"]

ATTEMPTS = 3
"""How often a verification is started if the output is replaced while it is read."""

PATIENCE = 1.0
"""Seconds to wait for an output that is just being replaced, on a filesystem that cannot swap two directories."""

EXPECTED = "give an output, a patch, or the directory of a sweep or of a release"


@map_os_errors()
@declared_keywords(VERIFY)
def verify(output: PathLike, *, progress: Progress | None = None, **keywords: Any) -> VerifyReport:
    """Verify what hsa wrote. With its sources, recompute the merge and compare every byte.

    Without sources, four things are checked: every file against the digests of the provenance; headers, index, names
    and shapes against `config.json`; that every target tensor is finite; and the targets and heads of the provenance
    against weights and parameters. For a patch, its rows and its document are checked the same way. With sources, every
    byte is also compared with the recomputed merge.

    Give all sources or none, by role as for `hsa.merge`, or as `models` in their order. The record names the method and
    the sources of the merge. A release takes no sources, because each of its outputs has its own. Ids are compared with
    the recorded ids of sources that are directories.

    Args:
        output: an output's directory, a patch file, or the directory of a sweep or a release, whose members are all
            verified. Only files in it are read. In the Hub's cache, its links are followed.
        {sources}
        {options}
        progress: called now and then with the bytes done and the total bytes.

    Returns the report, also for a damaged output. Raises RequestError (nothing is there, or hsa did not write it, or
    the sources are incomplete or not those that the record names), SourceError (a source cannot be opened),
    SourceChanged (the output is replaced again and again), MachineError (reading failed).

    Example:
        >>> report = hsa.verify("merged")
        >>> report.ok, report.problems
        (True, ())
    """
    given = split_named(VERIFY, keywords)
    check_paths(output=output)
    check_functions(progress=progress)
    threads = RunOptions(**given.options).threads or default_threads()
    path = _resolve(output)
    check_given(given)
    return _verify_until_whole(path, find_sources(given), threads, progress)


def _verify_until_whole(path: Path, sources: FindSources, threads: int, progress: Progress | None) -> VerifyReport:
    """Verify what is at a path, and start again if it is replaced meanwhile."""
    for attempt in range(ATTEMPTS):
        report = _verify_unless_replaced(path, sources, threads, progress)
        if report is not None:
            note = f"{path} was replaced while it was read; this is of what replaced it"
            return replace(report, notes=(note, *report.notes)) if attempt else report
    raise SourceChanged(
        f"output {path} was replaced {ATTEMPTS} times while it was read; verify it once no run writes to it"
    )


def _resolve(output: PathLike) -> Path:
    """The output's path with links resolved. Raises RequestError if nothing is there."""
    text = os.fspath(output)
    if isinstance(text, str) and not text:
        raise RequestError(f"output is an empty path; {EXPECTED}")
    try:
        return Path(os.path.expanduser(text)).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise RequestError(f"output {shown(text, 1000)} cannot be found ({why}); {EXPECTED}") from error


def _verify_unless_replaced(
    path: Path, sources: FindSources, threads: int, progress: Progress | None
) -> VerifyReport | None:
    """The report on what is at a path; None if it was replaced meanwhile."""
    failure: HsaError | None = None
    with _kept_open(path) as inode:
        try:
            report = _verify(path, sources, threads, progress)
        except HsaError as error:
            failure = error
        if _is_replaced(path, inode):
            return None
    if failure is not None:
        raise failure
    return report


@contextmanager
def _kept_open(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the device and inode of what is at a path, and keep it open, so that no other file can get the same
    inode."""
    try:
        fd = open_file(path, getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno in MACHINE_ERRNOS:
            raise
        raise RequestError(f"output {path} cannot be opened ({reason(error)}); {EXPECTED}") from error
    try:
        status = os.fstat(fd)
        yield status.st_dev, status.st_ino
    finally:
        os.close(fd)


def _is_replaced(path: Path, inode: tuple[int, int]) -> bool:
    """Whether something else is at the path now. Raises SourceChanged if nothing is there for `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            status = path.stat()
            return (status.st_dev, status.st_ino) != inode
        except OSError as error:
            if time.monotonic() > deadline:
                raise SourceChanged(f"output {path} was removed while it was read: {reason(error)}") from error
            time.sleep(0.02)


def _verify(path: Path, sources: FindSources, threads: int, progress: Progress | None) -> VerifyReport:
    started, kind = time.perf_counter(), _kind(path)
    source_paths = sources(path, kind)
    context = VerifyContext(threads, Tally(), PeakMemory(), Problems(), [], progress)

    def verify_member(member: Path, member_sources: SourcePaths | None) -> VerifyReport:
        return _verify_until_whole(_resolve(member), lambda path, kind: member_sources, threads, progress)

    if kind == "output":
        result = verify_output(path, source_paths, context)
    elif kind == "patch":
        result = verify_patch(path, source_paths, context)
    else:
        result = (verify_sweep if kind == "sweep" else verify_release)(path, source_paths, context, verify_member)
    context.memory.sample()
    return VerifyReport(
        output=path,
        kind=kind,
        record=result.record,
        files=result.files,
        bytes_read=context.tally.read,
        peak_memory_bytes=context.memory.peak,
        seconds=time.perf_counter() - started,
        problems=context.problems.all(),
        notes=tuple(context.notes),
        answers=result.answers,
        members=result.members,
    )


def _kind(path: Path) -> ReportKind:
    """The kind of what is at a path. Raises RequestError if hsa did not write it."""
    if not path.is_dir():
        if path.is_file() and (is_patch(path) or _is_truncated(path)):
            return "patch"
        if path.suffix == SUFFIX and path.is_file():
            raise RequestError(f"{path} holds weights and is no patch; give the directory that it is in")
        raise RequestError(f"output {path} is neither a directory nor a patch; {EXPECTED}")
    if exists(path / PROVENANCE):
        return "output"
    if holds_points(path):
        return "sweep"
    if is_release(path):
        return "release"
    weights_files = (CONFIG, *(name for form in (SAFETENSORS, PICKLES) for name in (form.weights, form.index)))
    if any(exists(path / name) for name in weights_files):
        return "output"
    raise RequestError(f"{path} holds no {PROVENANCE}, no patches and no weights, so hsa did not write it; {EXPECTED}")


def _is_truncated(path: Path) -> bool:
    """Whether a file with a patch's suffix has no readable header, as after an interrupted copy."""
    if path.suffix != SUFFIX:
        return False
    try:
        source = SourceFile(path, "patch", Tally())
    except HsaError:
        return True
    try:
        read_header(source)
    except HeaderError:
        return True
    finally:
        source.close()
    return False
