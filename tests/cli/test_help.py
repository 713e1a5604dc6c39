"""What the command line says of itself: help in groups, completion, and usage errors in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from helpers import merge_arguments, run_hsa

import hsa
from hsa.actions.keywords import MERGE
from hsa.cli import app
from hsa.cli.usage import COMMON, GROUPS
from hsa.errors import shown
from hsa.option_names import command_line

Triple = dict[str, Path]
PROGRAM: Any = app.program()
COMMANDS = tuple(PROGRAM.commands)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints."""
    assert app.run(arguments) == code
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a usage error."""
    assert app.run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"hsa: error: [^\n]+\n", printed.err)
    return printed.err.removeprefix("hsa: error: ").strip()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns_breaks_no_word_and_shows_flags_as_they_are(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, *([command] if command else []), "--help")
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"[│╭╰<]", text.replace("TREE/<group>/<name>", ""))
    found = PROGRAM.commands[command] if command else PROGRAM
    words = set(text.split())
    for parameter in found.params:
        assert set((parameter.help or "").split()) <= words
        assert {word.rstrip(",") for word in words} >= set(parameter.opts) or parameter.param_type_name == "argument"
    assert set((found.help or "").split()) <= words


def test_the_help_of_merge_has_a_group_for_each_question(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "merge", "--help")
    headings = [line.removesuffix(":") for line in text.splitlines() if re.fullmatch(r"\w[\w ]*:", line)]
    assert headings == [COMMON, *GROUPS]
    groups = dict(zip(headings, re.split(r"^\w[\w ]*:$", text, flags=re.MULTILINE)[1:], strict=True))
    for heading, option in (
        (COMMON, "--base SOURCE"),
        (COMMON, "--k NUMBER"),
        ("Sources", "--num-heads N"),
        ("Numerics", "--dtype DTYPE"),
        ("Output", "--json  "),
        ("Machine", "--threads N"),
    ):
        assert f"  {option}" in groups[heading]


def test_every_option_stands_in_a_group_of_help() -> None:
    options = [each for found in PROGRAM.commands.values() for each in found.params]
    used = {getattr(each, "rich_help_panel", None) or COMMON for each in options}
    assert used == {COMMON, *GROUPS}


def test_help_of_a_command_can_be_asked_for_in_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        text = said(capsys, command, "--help")
        assert said(capsys, command, "-h") == said(capsys, "help", command) == text
    assert said(capsys, "help") == said(capsys, "--help") == said(capsys, code=2)
    assert "Did you mean 'merge'" in refused(capsys, "help", "merg")


def test_the_version_can_be_asked_for_in_two_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "-V") == said(capsys, "--version") == f"{hsa.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("mrge", "No such command 'mrge'. Did you mean 'merge'"),
        ("merge --lamda=0.5", "No such option: --lamda"),
        ("merge --base=a", "Missing option '--output'. See: hsa merge --help"),
        ("merge --base=a --output=o", "Missing option '--primary'. See: hsa merge --help"),
        ("sweep --output=o --model=m", "method hsa needs --base, the model that the others were trained from; give it"),
        ("merge --base", "Option '--base' requires an argument. See: hsa merge --help"),
        ("merge --base=b --primary=p --secondary=s --output=o --k=much", "--k must be a number, got 'much'. See: "),
        ("apply primary", "Missing argument 'PATCH'. See: hsa apply --help"),
        ("verify one two", "unexpected extra argument"),
        ("inspect --diff one", "Option '--diff' requires 2 arguments"),
        ("merge --overwrite=yes", "--overwrite"),
        ("--show-completion tcsh", "there is no completion for the shell 'tcsh'; there is for bash, zsh"),
    ],
)
def test_a_usage_error_is_one_line(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *arguments.split())


def numeric_options() -> list[tuple[str, str, str]]:
    """Command, option, and what its value must be, by the annotations of the commands' functions."""
    kinds = {float: "a number", int: "a whole number"}
    return [
        (command, parameter.opts[0], kind)
        for command, found in PROGRAM.commands.items()
        for parameter in found.params
        for of, kind in kinds.items()
        if of in (hint := hints(found)[parameter.name], *get_args(hint)) and bool not in (hint, *get_args(hint))
    ]


def hints(command: Any) -> dict[str, Any]:
    """Types by the name of the parameter; of a context or a help option, nothing that counts."""
    return {"help": str, **get_type_hints(command.callback)}


def test_numeric_options_are_those_of_merge_sweep_inspect_and_verify() -> None:
    found = {(command, name) for command, name, _ in numeric_options()}
    assert {("merge", "--k"), ("merge", "--lambda"), ("inspect", "--alpha"), ("sweep", "--jobs")} <= found
    assert {("merge", "--num-heads"), ("verify", "--threads"), ("merge", "--non-attention-scale")} <= found


SHARES = {command_line(each.name) for each in MERGE.declared_settings() if each.about.axis and each.about.high == 1.0}
"""Options that take a share, from 0 to 1."""


@pytest.mark.parametrize(("command", "name", "kind"), numeric_options())
def test_a_value_that_is_not_a_number_is_named_in_our_own_words(
    command: str, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The validator's words stood there, which depend on typer's version and lack the value."""
    for value in ["much", "1.5.2", "0.6%", "1,5", "", "x" * 5000]:
        line = refused(capsys, command, *required(command), f"{name}={value}")
        remedy = {"--k": "; write 60 for 60 %", **dict.fromkeys(SHARES, "; write 0.6 for 60 %")}.get(name, "")
        expected = f"{name} must be {kind}, got {shown(value)}{remedy if value.endswith('%') else ''}"
        assert line == f"{expected.removesuffix('.')}. See: hsa {command} --help"
    if kind == "a whole number":
        line = refused(capsys, command, *required(command), f"{name}=1.5")
        assert line == f"{name} must be a whole number, got '1.5'. See: hsa {command} --help"
        line = refused(capsys, command, *required(command), f"{name}={'9' * 5000}")
        assert line.startswith(f"{name} must be a smaller number, got '999") and len(line) < 200


def required(command: str) -> list[str]:
    """What a command needs beside the option in question."""
    sources = ["--base=x", "--primary=x", "--secondary=x"] if command in ("merge", "sweep") else []
    return sources + [
        word
        for parameter in PROGRAM.commands[command].params
        if parameter.required
        for word in ([f"{parameter.opts[0]}=x"] if parameter.param_type_name == "option" else ["x"])
    ]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_numbers_that_are_not_finite_are_refused_by_their_range(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "merge", *required("merge"), f"--k={value}")
    assert line.startswith("--k must be ")
    assert "a number, got '" not in line


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("merge --base=a --base=b", "--base"),
        ("merge --k=0.6 --base=a --k=0.6", "--k"),
        ("sweep --lambda=0.1 --lambda=0.2", "--lambda"),
        ("inspect --diff a b --diff c d", "--diff"),
        ("verify out --threads=1 --threads=2", "--threads"),
    ],
)
def test_a_single_option_that_is_given_twice_is_refused(
    arguments: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one used to win without a word."""
    assert f"{name} is given 2 times and takes one value" in refused(capsys, *arguments.split())


def test_options_of_several_values_and_flags_can_be_repeated(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = ["--card=license=mit", "--card=language=de"]
    arguments = merge_arguments(shared_triple, tmp_path / "out", *cards, "--no-sync", "--no-sync")
    assert app.run(arguments) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card and "de" in card


def completed(words: str) -> set[str]:
    """What the bash script asks for, and is answered."""
    asked = {"_HSA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return set(run_hsa(env=asked).stdout.split())


def test_the_shell_completes_commands_and_options() -> None:
    assert completed("hsa in") == {"inspect"}
    assert {"--no-hash", "--no-normalize", "--no-sync"} <= completed("hsa merge --no-")
    assert {"--k", "--lambda", "--threads"} <= completed("hsa merge --")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_and_installed_for_a_shell(shell: str, tmp_path: Path) -> None:
    script = run_hsa("--show-completion", shell)
    assert script.returncode == 0
    assert "_HSA_COMPLETE" in script.stdout
    done = run_hsa("--install-completion", shell, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    place = Path(done.stdout.partition(" completes hsa in ")[0])
    assert place.is_relative_to(tmp_path)
    assert script.stdout.strip() in place.read_text(encoding="utf-8")


def test_the_shell_is_found_out_where_none_is_named() -> None:
    line = f"{sys.executable} -m hsa --show-completion; true"  # two commands, so that bash stays the parent
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={**os.environ}, check=False)
    assert "complete -o default -F _hsa_completion hsa" in done.stdout
