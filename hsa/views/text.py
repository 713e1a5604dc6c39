"""Text for stdout: a console as wide as the terminal, tables that break no words, and formatted numbers.

Nothing in it is interpreted as markup.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

from hsa.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 80
"""The width in columns if the output is not a terminal."""

UNLIMITED = 100_000
"""The width limit of a wide table in columns, larger than any table."""


class TextBuffer(io.StringIO):
    """A text buffer that looks to rich like a given stream: a terminal or not, with its encoding."""

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"


def console_on(out: IO[str], *, wide: bool) -> Console:
    """A console that writes to `out`; with `wide`, lines have no width limit."""
    from rich.console import Console

    width = None if out.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(
        file=out, width=UNLIMITED if wide else width, markup=False, highlight=False, emoji=False, soft_wrap=False
    )


def new_table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """A table without rows. Columns on the `right` hold numbers; these and the `whole` ones are never wrapped."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        unbroken = name in (*right, *whole)
        table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=unbroken)
    return table


def add_row(table: Table, *values: Any) -> None:
    """Add a row; None is an empty cell."""
    from rich.text import Text

    table.add_row(*(Text(one_line("" if value is None else str(value))) for value in values))


def print_line(console: Console, text: str) -> None:
    """Print a line of text, wrapped between words at the console's width."""
    lead = "\n" if text.startswith("\n") else ""
    console.print(lead + one_line(text.removeprefix("\n")), markup=False)


def parameter_text(value: Any) -> str:
    """The value of a parameter as text; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        numbers = [v for v in value.values() if isinstance(v, int | float)]
        if len(numbers) == len(value) and numbers:
            return f"per tensor, {min(numbers):g} to {max(numbers):g}"
        return ", ".join(f"{key}={each}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_sources(console: Console, sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line for each source: its role, its identity, and the digest of its targets if a record contains it."""
    for role, source in sources.items():
        revision = f"@{source['revision']}" if source.get("revision") else ""
        print_line(console, f"{role:<10}{source['id']}{revision}" + _digest(source))


def print_files(console: Console, files: Mapping[str, str | None] | None) -> None:
    """Print a line about the files of an output, if there is an output."""
    if files is not None:
        hashed = sum(digest is not None for digest in files.values())
        print_line(console, f"files: {len(files)} recorded, {hashed} with a digest: {', '.join(files)}")


def _digest(source: Any) -> str:
    return f"  (targets {source['targets_blake3'][:16]}...)" if "targets_blake3" in source else ""


def number(value: float | None, form: str) -> str:
    """A number in a Python format; a dash for None."""
    return "-" if value is None else format(value, form)


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent; a dash for None."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"
