"""Rows of results as figures in a text: found, checked, and shown; what every part of the report uses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rows import Row, markdown, read

NOT_YET = "not yet measured"
GB = 1e9
MIB = 2**20
LARGE = "large-v3"

KEYS = {
    "merge": ("run", "shape", "dtype", "program"),
    "sweep": ("run", "shape", "dtype", "case"),
    "kernels": ("run", "device", "shape", "dtype", "case"),
    "wer": ("run", "model", "variant"),
    "methods": ("run", "shape", "dtype", "method", "program"),
    "parity": ("run", "comparison", "method", "case", "between", "most"),
    "wer_methods": ("run", "model", "method", "set"),
    "search": ("run", "model", "set", "case", "way"),
}
"""Columns that rows are found by; any other may be missing or blank."""

Image = Callable[[str, str], str]
"""The link to a PNG, from its name and what it shows."""


def rows_of(name: str, folder: Path) -> list[Row]:
    found = read(name, folder)
    missing = [column for column in KEYS[name] if found and column not in found[0]]
    if missing:
        raise SystemExit(f"{folder / name}.csv: expected the columns {', '.join(missing)}, which are missing")
    return found


def number(row: Row | None, column: str) -> float | None:
    """The value of a column, or None where the row or the value is missing."""
    text = ((row or {}).get(column) or "").strip()
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise SystemExit(f"run {(row or {}).get('run')}: column {column} holds {text!r}, expected a number")
    return value


def divided(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def show(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def span(row: Row, low: str, high: str, form: str = ".2f") -> str:
    """`low to high`, or nothing where either is missing."""
    ends = number(row, low), number(row, high)
    return "" if None in ends else f"{show(ends[0], form)} to {show(ends[1], form)}"


def size(nbytes: float | None) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB / 10 else f"{nbytes / 1e6:.2f} MB"


def plain(value: object) -> str:
    """Text that stays within its cell and within its marker, whatever a row holds."""
    text = " ".join(str("" if value is None else value).split())
    return re.sub(r"([\\|`*])", r"\\\1", text).replace("<", "&lt;")


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    return markdown(head, [[plain(value) for value in line] for line in lines])


def measured_on(every: Sequence[Row], label: Callable[[Row], str]) -> str:
    """One sentence on the machine; where rows come from several, one for each, with the label of its rows."""
    found: dict[str, dict[str, None]] = {}
    for row in every:
        known = {column: plain(row.get(column)) for column in ("machine", "cpu", "gpu", "driver", "versions", "commit")}
        parts = [known["machine"], known["cpu"], known["gpu"]]
        parts += [f"{column} {known[column]}" for column in ("driver", "commit") if known[column]]
        parts.insert(-1, known["versions"])
        where = f"{', '.join(filter(None, parts))}, {plain(row['run'])[:10]}"
        found.setdefault(where, {})[plain(label(row))] = None
    if len(found) == 1:
        return f"Measured on {next(iter(found))}."
    return "\n".join(f"- {', '.join(labels)}: measured on {where}." for where, labels in found.items())


def of_shape(row: Row) -> str:
    return f"{row['shape']} {row['dtype']}"
