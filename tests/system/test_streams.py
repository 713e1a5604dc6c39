"""Standard streams that are closed, full, narrow or gone: what cannot be printed does not undo what was done."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import snapshot

import hsa
from hsa.cli import app, printing

Triple = dict[str, Path]

CLOSED = {"stderr": "2>&-", "stdout": ">&-", "stdin": "<&-", "all": "<&- >&- 2>&-"}
NARROW = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
"""Environments in which stdout has no Chinese letters."""


def shell(
    arguments: Sequence[str], redirections: str, program: str = "-m hsa", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line from a shell with redirections; what remains of stdout and stderr is captured."""
    line = f"exec {shlex.quote(sys.executable)} {program} {shlex.join(map(str, arguments))} {redirections}"
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **env},
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def workshop(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the triple, an output, a patch and a recipe, for reading alone."""
    folder = tmp_path_factory.mktemp("workshop")
    for role, path in shared_triple.items():
        shutil.copytree(path, folder / role)
    triple = {role: folder / role for role in shared_triple}
    hsa.merge(**triple, output=folder / "ready", sync=False)
    hsa.merge_patch(**triple, output=folder / "ready.safetensors", sync=False)
    lines = [f"    {role}: {folder / role}" for role in triple]
    (folder / "recipe.yaml").write_text("\n".join(["merges:", "  - name: a", "    group: g", *lines]), encoding="utf-8")
    return folder


def commands(folder: Path, new: Path) -> dict[str, list[str]]:
    """A command line for each command, writing below `new`."""
    sources = [f"--{role}={folder / role}" for role in ("base", "primary", "secondary")]
    ready, patch = str(folder / "ready"), str(folder / "ready.safetensors")
    return {
        "merge": ["merge", *sources, f"--output={new / 'merged'}"],
        "patch": ["merge", *sources, f"--output={new / 'p.safetensors'}", "--patch"],
        "dry run": ["merge", *sources, f"--output={new / 'planned'}", "--dry-run"],
        "sweep": ["sweep", *sources, f"--output={new / 'sweep'}", "--lambda=0.3,0.5"],
        "apply": ["apply", str(folder / "primary"), patch, f"--output={new / 'applied'}"],
        "verify": ["verify", ready],
        "inspect": ["inspect", ready],
        "page": ["inspect", ready, f"--html={new / 'page.html'}"],
        "diff": ["inspect", "--diff", ready, ready],
        "release": ["release", str(folder / "recipe.yaml"), f"--output={new / 'tree'}"],
        "version": ["--version"],
        "help": ["merge", "--help"],
    }


NAMES = tuple(commands(Path(), Path()))
WRITTEN = {
    "merge": "merged",
    "patch": "p.safetensors",
    "sweep": "sweep",
    "apply": "applied",
    "page": "page.html",
    "release": "tree",
}
"""What each command that writes leaves, and a message must say is whole."""


@pytest.mark.parametrize("name", NAMES)
def test_every_command_works_without_standard_streams(name: str, workshop: Path, tmp_path: Path) -> None:
    done = shell(commands(workshop, tmp_path)[name], CLOSED["all"])
    assert done.returncode == 0
    assert name not in WRITTEN or (tmp_path / WRITTEN[name]).exists()


@pytest.mark.parametrize("closed", ["stderr", "stdout", "stdin"])
def test_one_closed_stream_leaves_the_others_alone(closed: str, workshop: Path, tmp_path: Path) -> None:
    done = shell(commands(workshop, tmp_path)["merge"], CLOSED[closed])
    assert done.returncode == 0
    assert "error" not in done.stderr
    assert ("heads merged" in done.stdout) == (closed != "stdout")
    assert hsa.verify(tmp_path / "merged").ok


NOISY = """
import contextlib, os, sys
def noise(event, arguments):
    with contextlib.suppress(OSError):
        os.write(int(sys.argv[-1]), b"NOISE")
sys.addaudithook(noise)
from hsa.__main__ import main
number, sys.argv[-1:] = sys.argv[-1], []
sys.argv.append(number)
from hsa.cli.app import run
from hsa.system.console import exit_with
exit_with(lambda: run(sys.argv[1:-1]))
"""


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_data_file_gets_the_number_of_a_closed_stream(number: int, workshop: Path, tmp_path: Path) -> None:
    """Whatever prints to the bare descriptor, as libraries in C do, must not print into an output."""
    (tmp_path / "noisy.py").write_text(NOISY, encoding="utf-8")
    arguments = [*commands(workshop, tmp_path)["merge"], "--no-sync", str(number)]
    done = shell(arguments, CLOSED["all"], program=str(tmp_path / "noisy.py"))
    assert done.returncode == 0
    hsa.merge(**{role: workshop / role for role in ("base", "primary", "secondary")}, output=tmp_path / "own")
    assert snapshot(tmp_path / "merged") == snapshot(tmp_path / "own")
    assert "NOISE" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "merged").iterdir())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("version", "help")])
def test_a_full_stdout_is_one_error_that_says_what_is_finished(name: str, workshop: Path, tmp_path: Path) -> None:
    done = shell(commands(workshop, tmp_path)[name], ">/dev/full")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hsa: error: ")]
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert line.endswith("could not be printed, for stdout took no more: No space left on device")
    if name in WRITTEN:
        assert f"{tmp_path / WRITTEN[name]} is whole; only its summary" in line
        assert (tmp_path / WRITTEN[name]).exists()
    else:
        assert "the result could not" in line


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"], ["help", "merge"], []])
def test_help_that_stdout_does_not_take_is_one_error(arguments: list[str]) -> None:
    done = shell(arguments, ">/dev/full")
    assert done.returncode == (1 if arguments else 2)
    assert done.stderr == (
        "hsa: error: the result could not be printed, for stdout took no more: No space left on device\n"
    )


@pytest.mark.parametrize("name", ["merge", "verify", "inspect", "sweep", "release", "version", "help"])
def test_a_full_stderr_is_no_error(name: str, workshop: Path, tmp_path: Path) -> None:
    """Notes are printed there: the sources lack a feature extractor's file."""
    done = shell(commands(workshop, tmp_path)[name], "2>/dev/full")
    assert done.returncode == 0
    assert done.stdout != ""


def test_a_finding_of_verify_keeps_its_exit_code_where_nothing_can_be_printed(workshop: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(workshop / "ready", tmp_path / "damaged"))
    (damaged / "README.md").write_text("other", encoding="utf-8")
    for redirections in (">/dev/full", "2>/dev/full", CLOSED["all"], "2>&-"):
        assert shell(["verify", str(damaged)], redirections).returncode == 2


def gone(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run with a stdout whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            [sys.executable, "-m", "hsa", *arguments],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        os.close(write)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_that_stops_early_is_no_error(name: str, workshop: Path, tmp_path: Path) -> None:
    done = gone(commands(workshop, tmp_path)[name])
    assert done.returncode == 0
    assert "error" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("redirections", [">&-", ">/dev/full"])
def test_json_that_nobody_gets_is_an_error(redirections: str, workshop: Path, tmp_path: Path) -> None:
    done = shell([*commands(workshop, tmp_path)["merge"], "--json"], redirections)
    assert done.returncode == 1
    assert f"hsa: error: the output {tmp_path / 'merged'} is whole; only its summary could not be" in done.stderr
    assert hsa.verify(tmp_path / "merged").ok
    lost = gone(["verify", str(tmp_path / "merged"), "--json"])
    assert lost.returncode == 1
    assert lost.stderr == "hsa: error: the result could not be printed, for stdout took no more: Broken pipe\n"


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
def test_letters_that_stdout_lacks_are_escaped(narrow: dict[str, str], workshop: Path, tmp_path: Path) -> None:
    place = tmp_path / "gr\u00f6\u00dfe \u6a21\u578b"
    place.mkdir()
    everything = commands(workshop, place)
    for name in everything if narrow == NARROW["C locale"] else ("merge", "inspect", "sweep", "help"):
        arguments = everything[name]
        done = shell(arguments, "", **narrow)
        assert done.returncode == 0, (name, done.stderr)
        if name in WRITTEN:
            assert (place / WRITTEN[name]).exists()
            assert name in ("inspect", "help") or "\\u6a21" in done.stdout or "\\udce6" in done.stdout
    done = shell(["verify", str(place / "merged"), "--json"], "", **narrow)
    assert json.loads(done.stdout)["ok"]


def test_python_without_streams_runs_commands(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs without a console, such as those of pythonw, have None there."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    for name, arguments in commands(workshop, tmp_path).items():
        assert app.run(arguments) == 0, name
    assert app.run(["verify", str(workshop / "nothing")]) == 2
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert app.run(["verify", str(workshop / "ready")]) == 0
    monkeypatch.setattr(sys, "stdout", closed)
    assert app.run(["verify", str(workshop / "ready")]) == 1


def test_a_terminal_that_goes_away_ends_the_bar_and_not_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = os.openpty()
    with open(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with printing.progress(show=True) as step:
            assert step is not None
            step(1, 10)
            os.close(leader)
            with pytest.raises(OSError, match="Input/output error"):
                print("x" * 10_000, file=terminal, flush=True)
            for done in range(2, 11):
                step(done, 10)
        printing.problem("nobody reads this")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            terminal.close()


def test_the_reference_scripts_command_line_works_without_streams(workshop: Path, tmp_path: Path) -> None:
    roles = {"base": "--pretrained-model", "primary": "--model1", "secondary": "--model2"}
    arguments = [f"{option}={workshop / role}" for role, option in roles.items()]
    program = "-m hsa.integrations.reference_script"
    done = shell([*arguments, f"--out-path={tmp_path / 'a'}"], CLOSED["all"], program)
    assert done.returncode == 0
    done = shell([*arguments, f"--out-path={tmp_path / 'b'}"], ">/dev/full", program)
    assert done.returncode == 1
    assert f"the output {tmp_path / 'b'} is whole; only its summary" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
