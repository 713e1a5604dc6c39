"""Print what commands print: objects and text, sizes, notes and warnings, a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from hsa.errors import one_line
from hsa.findings import Findings
from hsa.option_names import command_line
from hsa.system.streams import LenientStream, print_stderr, print_stdout, stderr_is_terminal

if TYPE_CHECKING:
    from hsa.outputs.report import MergeReport
    from hsa.verification.verify import VerifyReport


def result(content: dict[str, Any] | str, quiet: bool, *, done: str = "") -> None:
    """An object as JSON, or text unless `quiet`, on stdout. `done` says what is finished even if that fails."""
    if isinstance(content, dict):
        print_stdout(json.dumps(content), done=done, needed=True)
    elif not quiet:
        print_stdout(content, done=done)


def findings(entries: Findings, *, quiet: bool = False) -> None:
    """Warnings, and notes unless `quiet`, on stderr."""
    for warning in entries.warnings:
        print_stderr(f"hsa: warning: {one_line(warning)}")
    for note in () if quiet else entries.notes:
        print_stderr(f"hsa: note: {one_line(note)}")


def problems(report: VerifyReport) -> None:
    """What a verification found, on stderr."""
    for entry in report.problems:
        print_stderr(one_line(f"hsa: problem: {entry.file}: {entry.what}"))


def problem(text: str) -> None:
    """An error that does not end the run, on stderr."""
    print_stderr(f"hsa: error: {one_line(text)}")


def size_text(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"


def finished(report: MergeReport) -> str:
    """What a merge has finished, whatever becomes of its summary."""
    return f"the output {report.output} is whole"


def merge_report(report: MergeReport) -> str:
    """A finished merge, in a few lines."""
    narrowest = report.narrowest
    lines = [
        f"{report.output}",
        f"  {report.extent.headline} ({report.route} route, backend {report.backend})",
        *([f"  {report.extent.details}"] if report.extent.details else []),
        *([f"  {report.hint}"] if report.hint else []),
        f"  {size_text(report.bytes_read)} read, {size_text(report.bytes_written)} written in {report.seconds:.2f} s, "
        f"peak memory {size_text(report.peak_memory_bytes)}",
    ]
    if report.bytes_fetched:
        lines.append(f"  {size_text(report.bytes_fetched)} fetched from the Hub")
    if narrowest is not None:
        lines.append(f"  narrowest margin {narrowest.margin:.2g} in {narrowest.name}")
    if report.unlinked:
        options = ", ".join(dict.fromkeys(command_line(f"{role}_id") for role in report.unlinked))
        lines.append(f"  the card links no model for {', '.join(report.unlinked)}: before you publish, give {options}")
    return "\n".join(map(one_line, lines))


@contextmanager
def progress(*, show: bool, label: str = "merging") -> Iterator[Any]:
    """A progress bar on stderr that begins with the first step, or None where stderr is not a terminal.

    Before the first step, sources may show bars of their own. A terminal that goes away ends the bar, not the work.
    """
    if not show or not stderr_is_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    bar = Progress(
        label,
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(file=cast(IO[str], LenientStream(sys.stderr))),
        transient=True,
    )
    task = bar.add_task(label, total=None)

    def step(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield step
    finally:
        bar.stop()
