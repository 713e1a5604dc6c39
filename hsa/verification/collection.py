"""What sweeps and releases share in verification: joining the reports of members, and comparing index files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from hsa.errors import SourceError
from hsa.system.fsio import SourceFile
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.output import LABEL
from hsa.verification.output_checks import STEP
from hsa.verification.report import VerifyReport

Verify = Callable[[Path, SourcePaths | None], VerifyReport]
"""The function that verifies a member."""


def add_member_report(name: str, report: VerifyReport, context: VerifyContext) -> None:
    """Add a member's problems and notes to the collection's, under the member's name."""
    context.memory.peak = max(context.memory.peak, report.peak_memory_bytes)
    context.tally.add_read(name, report.bytes_read)
    for problem in report.problems:
        file = problem.file if report.kind != "patch" or problem.file not in (name, "") else ""
        context.problems.add(f"{name}/{file}".rstrip("/"), problem.what)
    context.notes.extend(f"{name}: {note}" for note in report.notes)


def open_index(directory: Path, name: str, context: VerifyContext, stack: ExitStack) -> SourceFile | None:
    """Open an index file until the stack closes. If it cannot be read, add a problem and return None."""
    path = directory / name
    try:
        if path.is_symlink():
            raise SourceError("is a link; expected a file with data in it")
        source = SourceFile(path, LABEL, context.tally)
        stack.callback(source.close)
        return source
    except SourceError as error:
        missing = not os.path.lexists(path)
        what = "is missing; run the sweep or the release again, which writes it" if missing else str(error)
        context.problems.add(name, what)
        return None


def read_in_pieces(source: SourceFile) -> Iterator[bytes]:
    """The bytes of an index in pieces, since it may be of any size."""
    for start in range(0, source.size, STEP):
        yield source.read(min(STEP, source.size - start), start)


def compare_index(source: SourceFile, expected: bytes) -> str | None:
    """The first difference between an index and its expected bytes; None if there is none. The index is read in
    pieces, never as a whole."""
    start = 0
    for piece in read_in_pieces(source):
        expected_piece = expected[start : start + len(piece)]
        if piece != expected_piece:
            at = next(
                (n for n, (a, b) in enumerate(zip(piece, expected_piece, strict=False)) if a != b), len(expected_piece)
            )
            return f"{source.size} bytes, expected {len(expected)}; they differ first at byte {start + at}"
        start += len(piece)
    return None if start == len(expected) else f"{source.size} bytes, expected {len(expected)}"
