"""Pages of the documentation, run: their code blocks, in order, in a directory of their own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from helpers import run_hsa

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """The language and the text of each code block; commands have no language."""
    for match in _BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")):
        yield match[1], match[2]


def run_page(
    page: str, files: Sequence[Path], triple: Mapping[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a page as a reader does who has what `hsa demo` builds: here it is the triple.

    A block that is the text of one of the files is saved under its name; the page must show each of them. Every other
    block must succeed, and commands must warn of nothing.
    """
    (folder / "demo").mkdir()
    for role, path in triple.items():
        (folder / "demo" / role).symlink_to(path)
    monkeypatch.chdir(folder)
    shown = {path.read_text(encoding="utf-8"): path.name for path in files}
    for language, text in blocks(page):
        if text in shown:
            Path(shown.pop(text)).write_text(text, encoding="utf-8")
        elif language == "python":
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{text}\n{done.stderr}"
        else:
            for line in text.splitlines():
                _run(line, monkeypatch)
    assert not shown, f"{page} does not show {', '.join(shown.values())} as it is"


def _run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line)
    if program == "export":
        name, _, value = arguments[0].partition("=")
        monkeypatch.setenv(name, value)
        return
    assert program == "hsa", line
    if arguments[0] != "demo":  # tests/testing/test_demo.py runs it
        done = run_hsa(*arguments)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert all(said.startswith("hsa: note: ") for said in done.stderr.splitlines()), f"{line}\n{done.stderr}"
