"""The tutorial's commands run as written. `$MODELS` and `$CLIPS` are the reader's own: here the real fine-tunes, and
the first clips of each of their sets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tutorial import commands, python_blocks

CLIPS = 2
"""Of each set. The page shows what all of them give."""


def first_clips(clips: Path, output: Path) -> None:
    """Folders as those of the real case, with the first clips of each."""
    for folder in sorted(path for path in clips.parent.iterdir() if (path / "transcripts.tsv").is_file()):
        lines = (folder / "transcripts.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        taken = lines[: CLIPS + (not lines[0].split("\t")[0].endswith(".flac"))]
        (output / folder.name).mkdir(parents=True)
        (output / folder.name / "transcripts.tsv").write_text("".join(taken), encoding="utf-8")
        for line in taken:
            if (folder / line.split("\t")[0]).is_file():
                shutil.copyfile(folder / line.split("\t")[0], output / folder.name / line.split("\t")[0])


@pytest.mark.long
def test_the_commands_run_as_written(real: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    first_clips(clips, tmp_path / "clips")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "hsa").write_text(f'#!/bin/sh\nexec {sys.executable} -m hsa "$@"\n', encoding="utf-8")
    (programs / "hsa").chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "MODELS": str(real["base"].parent),
        "CLIPS": str(tmp_path / "clips"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    for command in commands():
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.text],
            cwd=work, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command.text}\n{done.stderr}"
        assert done.stdout.strip() or not command.output, command.text
        _same_form(command.output, done.stdout, command.text)
    document = json.loads((work / "search" / "search.json").read_text(encoding="utf-8"))
    best = {trial["name"]: trial for trial in document["trials"]}[document["best"]]
    merges = [trial["values"][0] for trial in document["trials"] if trial["method"] and trial["state"] == "complete"]
    assert best["values"][0] == min(merges)
    assert (work / "search" / "best" / "model.safetensors").is_file()
    recording = min((tmp_path / "clips" / "clips_noisy_dev").glob("*.flac"))
    shutil.copyfile(recording, work / "recording.flac")
    (program,) = python_blocks()
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(text)"], cwd=work, env={**environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert len(done.stdout.split()) > 3, done.stdout


def _same_form(shown: str, printed: str, command: str) -> None:
    """The words of each line that the page shows are printed too. Numbers depend on the clips, as does the best merge,
    and with it what its record says and the words of a difference that is shown."""
    if command.startswith("hsa verify"):
        assert shown.splitlines()[0].endswith("search/best: sound")
        assert printed.splitlines()[0].endswith("search/best: sound")
        return
    expected, found = (set(map(_words, text.splitlines())) - {()} for text in (shown, printed))
    assert len(expected) >= 4, command
    assert expected <= found, f"{command}: {sorted(expected - found)} are not printed"


def _words(line: str) -> tuple[str, ...]:
    """The words of a line, without numbers, paths, and the verdict after a semicolon. Of the best merge the command and
    the name depend on the clips."""
    label = line.split()[0] if line.split() else ""
    if label == line:  # the path of an output, which the page has without the directory
        return ()
    if re.match(r"\s+\w+: trial ", line):
        return ()
    if label in ("best", "command"):
        return (label,)
    words = re.split(r"[\s,:()\[\]]+", line.partition(";")[0])
    return tuple(word for word in words if word.isalpha() and word not in ("minutes", "seconds"))
