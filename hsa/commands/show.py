"""What commands print: objects and text, sizes, notes and warnings, a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hsa.errors import one_line
from hsa.findings import Findings

if TYPE_CHECKING:
    from hsa.report import MergeReport


def result(content: dict[str, Any] | str, quiet: bool) -> None:
    if isinstance(content, dict):
        print(json.dumps(content))
    elif not quiet:
        print(content)


def findings(found: Findings, *, quiet: bool = False) -> None:
    """Warnings, and notes unless `quiet`, on stderr."""
    for warning in found.warnings:
        print(f"hsa: warning: {one_line(warning)}", file=sys.stderr)
    for note in () if quiet else found.notes:
        print(f"hsa: note: {one_line(note)}", file=sys.stderr)


def problem(text: str) -> None:
    """An error that does not end the run, on stderr."""
    print(f"hsa: error: {one_line(text)}", file=sys.stderr)


def size_text(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"


def merge_report(report: MergeReport) -> str:
    """A finished merge, in a few lines."""
    narrowest = report.narrowest
    lines = [
        f"{report.output}",
        f"  {report.selected_heads} of {report.total_heads} heads merged in {len(report.tensors)} tensors "
        f"({report.route} route, backend {report.backend})",
        f"  {size_text(report.bytes_read)} read, {size_text(report.bytes_written)} written in {report.seconds:.2f} s, "
        f"peak memory {size_text(report.peak_memory_bytes)}",
    ]
    if report.bytes_fetched:
        lines.append(f"  {size_text(report.bytes_fetched)} fetched from the Hub")
    if narrowest is not None:
        lines.append(f"  narrowest margin {narrowest.margin:.2g} in {narrowest.name}")
    if report.unlinked:
        options = ", ".join(f"--{role}-id" for role in report.unlinked)
        lines.append(f"  the card links no model for {', '.join(report.unlinked)}: before you publish, give {options}")
    return "\n".join(map(one_line, lines))


@contextmanager
def progress(*, show: bool, label: str = "merging") -> Iterator[Any]:
    """A progress bar on stderr that begins with the first step, or None: before, sources may show bars of their own."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    bar = Progress(
        label,
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
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
