"""The commands of docs/tutorial.md and what they print there."""

from __future__ import annotations

import re
import subprocess
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
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [command for block in blocks for command in _commands_of(block, page.name)]


def python_blocks(page: Path = PAGE) -> list[str]:
    """The Python programs of the page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _commands_of(block: str, name: str) -> list[Command]:
    found: list[Command] = []
    lines = block.splitlines()
    while lines:
        line = lines.pop(0)
        assert line.startswith("$ "), f"{name}: {line!r} follows no command"
        words = [line.removeprefix("$ ")]
        while words[-1].endswith("\\"):
            words.append(lines.pop(0))
        output = []
        while lines and not lines[0].startswith("$ "):
            output.append(lines.pop(0))
        found.append(Command("\n".join(words), "\n".join(output)))
    return found


def renew(page: Path = PAGE) -> None:
    """Run every command, in the working directory and with the environment of this process, and put what it prints into
    the page. Run by `python tests/support/tutorial.py`, with MODELS and CLIPS set, when outputs have changed."""

    def block(match: re.Match[str]) -> str:
        lines = []
        for command in _commands_of(match[1], page.name):
            done = subprocess.run(["bash", "-euc", command.text], stdout=subprocess.PIPE, text=True, check=True)
            lines += [f"$ {command.text}", *(line.rstrip() for line in done.stdout.strip("\n").splitlines())]
        return "```console\n" + "\n".join(lines) + "\n```"

    page.write_text(_BLOCK.sub(block, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    renew()
