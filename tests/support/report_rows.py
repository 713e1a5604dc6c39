"""What the tests of the report share: a row's first columns, and the cells of a table that was made of rows."""

from __future__ import annotations

import re

Row = dict[str, object]


def about(run: str = "2026-11-20T10:00:00Z", **changes: object) -> Row:
    return {
        "run": run, "machine": "2 cores, 24 GiB, Linux 6.18", "cpu": "Some CPU", "gpu": "", "driver": "",
        "versions": "python 3.11.7, numpy 2.4.6", "commit": "abc1234", "command": "bench.py", **changes,
    }  # fmt: skip


def no_image(png: str, what: str) -> str:
    raise AssertionError(f"{png} is no picture of this block")


def cells(text: str, first: str) -> list[str]:
    """The cells of the one table row whose first cell begins so."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    assert len(found) == 1, (first, found)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found[0])[1:-1]]
