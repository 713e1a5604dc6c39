"""What the directories of a sweep and of a release have in common: members, and files that list them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from hsa.errors import SourceError
from hsa.system.fsio import SourceFile
from hsa.verification.output import LABEL
from hsa.verification.output_checks import STEP
from hsa.verification.report import VerifyReport
from hsa.verification.source_checks import GivenSources, Work

Verify = Callable[[Path, GivenSources | None], VerifyReport]
"""How a member is verified."""


def take_over(name: str, report: VerifyReport, work: Work) -> None:
    """Tell a member's problems and notes as the collection's, under the member's name."""
    work.memory.peak = max(work.memory.peak, report.peak_memory_bytes)
    work.tally.add_read(name, report.bytes_read)
    for problem in report.problems:
        inside = problem.file if report.kind != "patch" or problem.file not in (name, "") else ""
        work.problems.add(f"{name}/{inside}".rstrip("/"), problem.what)
    work.notes.extend(f"{name}: {note}" for note in report.notes)


def open_index(directory: Path, name: str, work: Work, stack: ExitStack) -> SourceFile | None:
    """A file of an index, open until the stack ends; None where it cannot be read, which is told."""
    path = directory / name
    try:
        if path.is_symlink():
            raise SourceError("is a link; expected a file with data in it")
        source = SourceFile(path, LABEL, work.tally)
        stack.callback(source.close)
        return source
    except SourceError as error:
        missing = not os.path.lexists(path)
        what = "is missing; run the sweep or the release again, which writes it" if missing else str(error)
        work.problems.add(name, what)
        return None


def pieces(source: SourceFile) -> Iterator[bytes]:
    """The bytes of an index, which may be of any size, in pieces."""
    for start in range(0, source.size, STEP):
        yield source.read(min(STEP, source.size - start), start)


def compare_index(source: SourceFile, expected: bytes) -> str | None:
    """Where an index differs from what it should be; None where it does not. It is never in memory whole."""
    start = 0
    for piece in pieces(source):
        other = expected[start : start + len(piece)]
        if piece != other:
            at = next((n for n, (a, b) in enumerate(zip(piece, other, strict=False)) if a != b), len(other))
            return f"{source.size} bytes, expected {len(expected)}; they differ first at byte {start + at}"
        start += len(piece)
    return None if start == len(expected) else f"{source.size} bytes, expected {len(expected)}"
