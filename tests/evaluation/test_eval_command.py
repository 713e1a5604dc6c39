"""The command `hsa eval` in processes of its own: what it prints, resuming after SIGKILL, and a missing extra."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import run_hsa
from speech_sets import LETTERS, write_ctc, write_set

COUNT = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ctc(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("speech"), [0.3 + 0.02 * number for number in range(COUNT)])


def test_what_is_printed(model: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("eval", model, f"--data=mine={table}", "--limit=5", "--device=cpu", f"--output={out}")
    done = run_hsa(*arguments)
    assert done.returncode == 0, done.stderr
    assert "mine: 5 utterances" in done.stdout and "5 utterances decoded in" in done.stdout
    assert f"written: {out}/scores.csv, scores.json, report.html" in done.stdout.replace("\n", " ")
    again = run_hsa(*arguments, "--json")
    printed = json.loads(again.stdout)
    assert printed.pop("run")["decoded"] == 0
    assert printed == json.loads((out / "scores.json").read_text())
    assert run_hsa(*arguments, "--quiet").stdout == ""


def test_errors_are_one_line(model: Path, table: Path) -> None:
    for arguments, message in (
        (("eval", model), "Missing option '--data'"),
        (("eval", f"--data={table}"), "Missing argument 'MODEL...'"),
        (("eval", model, f"--data={table}", "--beams=2"), "decoded greedily; leave --beams out"),
        (("eval", model, "--data=nowhere.tsv"), "nowhere.tsv cannot be read as a set of utterances"),
        (("eval", table.parent, f"--data={table}"), "config.json"),
    ):
        done = run_hsa(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


def test_a_text_that_cannot_be_scored_is_one_line_and_stays(model: Path, table: Path, tmp_path: Path) -> None:
    """One letter of the second model is more brackets than a normaliser of Whisper's takes."""
    bad = write_ctc(tmp_path / "bad", letters=(*LETTERS[:-1], "<" * 1001))
    arguments = (
        "eval",
        model,
        bad,
        f"--data=mine={table}",
        "--limit=3",
        "--device=cpu",
        f"--output={tmp_path / 'out'}",
    )
    done = run_hsa(*arguments, "--normalizer=basic")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "bad cannot be scored: what it wrote for utterance 'clip_00" in done.stderr
    assert "of set 'mine': the text '" in done.stderr
    assert "choose another --normalizer, or leave the model out; transcripts stay" in done.stderr
    again = run_hsa(*arguments, "--normalizer=plain", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["run"]["decoded"] == 0


@pytest.mark.parametrize("library", ["jiwer", "soundfile", "soxr"])
def test_a_missing_library_is_one_line(library: str, model: Path, table: Path) -> None:
    code = f"import sys; sys.modules[{library!r}] = None\nfrom hsa.cli.app import run\nsys.exit(run(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "eval", str(model), f"--data={table}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"hsa: error: hsa eval needs {library}, which is not installed: pip install 'hsa-merge[eval]'\n"
    )


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom hsa.cli.app import run\nrun(['eval', '--help'])\nprint(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--baseline MODEL" in done.stdout
    for library in ("'torch'", "'transformers'", "'numpy'", "'jiwer'"):
        assert library not in done.stderr


def start(model: Path, table: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "hsa", "eval", model, f"--data={table}", f"--output={out}", "--batch=1", "--device=cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def lines_kept(out: Path) -> int:
    """Transcripts in the file of an unfinished run, whose first line is its head."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in out.glob("hypotheses/*.partial"))


def wait_for(process: subprocess.Popen[bytes], out: Path, count: int) -> None:
    end = time.monotonic() + 120
    while lines_kept(out) < count:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(model: Path, table: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(model, table, whole)
    assert process.wait(120) == 0, process.stderr
    for count in (1, 12, 25):
        process = start(model, table, killed)
        wait_for(process, killed, count)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert not (killed / "scores.json").exists()
    kept = lines_kept(killed)
    done = run_hsa("eval", model, f"--data={table}", f"--output={killed}", "--batch=1", "--device=cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert 25 <= kept < COUNT and json.loads(done.stdout)["run"]["decoded"] in (COUNT - kept, COUNT - kept + 1)
    files = [
        {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (whole, killed)
    ]
    assert files[0] == files[1]


def test_a_run_that_is_told_to_end_says_what_stays(model: Path, table: Path, tmp_path: Path) -> None:
    process = start(model, table, tmp_path / "out")
    wait_for(process, tmp_path / "out", 3)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"transcripts of finished batches stay; run it again to go on" in stderr
