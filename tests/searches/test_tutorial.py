"""The tutorial's commands run as written. `$MODELS` and `$CLIPS` are the reader's own: here the real fine-tunes, and
the first clips of each of their sets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tutorial import commands

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


def _same_form(shown: str, printed: str, command: str) -> None:
    """The labels at the beginning of lines that the page shows are printed too; what a merge's record says depends on
    which merge is the best."""
    if command.startswith("hsa verify"):
        assert shown.splitlines()[0].endswith("search/best: sound")
        assert printed.splitlines()[0].endswith("search/best: sound")
        return
    found = {line.split()[0] for line in printed.splitlines() if line.split()}
    labels = {line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line.split()}
    labels = {label for label in labels if label.isalpha()}
    assert labels <= found, f"{command}: {sorted(labels - found)} are not printed"
