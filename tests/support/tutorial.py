"""The commands of docs/tutorial.md and what they print there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of the page, and the output that the page shows after it."""

    text: str
    output: str


def commands(page: Path = PAGE) -> list[Command]:
    """The commands in their order. A line that ends in a backslash goes on in the next one.

    Example:
        >>> commands()[0].text.split()[0]
        'hsa'
    """
    found: list[Command] = []
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = block.splitlines()
        while lines:
            line = lines.pop(0)
            assert line.startswith("$ "), f"{page.name}: {line!r} follows no command"
            words = [line.removeprefix("$ ")]
            while words[-1].endswith("\\"):
                words.append(lines.pop(0))
            output = []
            while lines and not lines[0].startswith("$ "):
                output.append(lines.pop(0))
            found.append(Command("\n".join(words), "\n".join(output)))
    return found


def without_times(text: str) -> list[str]:
    """The lines of an output without what differs from run to run: durations, memory, and spaces at the ends."""
    text = re.sub(r"\b[0-9]+(?:\.[0-9]+)? (?:s|ms|MiB|GiB|KiB)\b", "N", text)
    return [line.rstrip() for line in text.strip().splitlines()]
