"""Which reader opens what, the names of sets, and manifests that are no files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from speech import refusal

import hsa
from hsa.errors import DataError, RequestError
from hsa.evaluation import collector
from hsa.evaluation.data import parse_set

TABLE = "file\ttext\na.wav\tone\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "noisy.tsv"
    path.write_text(TABLE)
    return path


def test_a_set_is_named_by_its_table_or_by_the_caller(table: Path) -> None:
    assert hsa.data(table).name == "noisy"
    assert hsa.data(str(table), name="far field").name == "far field"
    assert hsa.data(table).utterances == hsa.data(str(table), name="x").utterances


def test_the_command_line_names_a_set(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(table.parent)
    (table.parent / "a=b").mkdir()
    (table.parent / "a=b" / "transcripts.tsv").write_text(TABLE)
    assert parse_set("noisy.tsv").name == "noisy"
    assert parse_set("far=noisy.tsv").name == "far"
    assert parse_set(f"far={table}").path == table
    assert parse_set("x=a=b").path == table.parent / "a=b"
    assert parse_set("./a=b").name == "a=b"
    assert "a cannot be read" not in refusal(DataError, parse_set, "a=b")


@pytest.mark.parametrize("argument", ["=noisy.tsv", "far=", "="])
def test_half_of_a_named_set_is_refused(argument: str) -> None:
    assert "a set is given as NAME=PATH or PATH" in refusal(RequestError, parse_set, argument)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\nb", "x" * 101, "\x1b[2J", 3])
def test_a_name_that_is_none_is_refused(name: str, table: Path) -> None:
    assert "the name of a set is" in refusal(RequestError, hsa.data, table, name=name)


@pytest.mark.parametrize("path", [None, 3, b"noisy.tsv", ["noisy.tsv"]])
def test_what_is_no_path_is_refused(path: object) -> None:
    assert "must be a path or a text" in refusal(RequestError, hsa.data, path)


def test_a_directory_with_two_manifests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transcripts.tsv").write_text(TABLE)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,one\n")
    assert "has metadata.csv and transcripts.tsv; name the one to read" in refusal(DataError, hsa.data, tmp_path)
    assert len(hsa.data(tmp_path / "metadata.csv").utterances) == 1


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    assert "has none of wav.scp and text (Kaldi)" in refusal(DataError, hsa.data, tmp_path)


def test_a_manifest_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal(DataError, hsa.data, tmp_path / "none.tsv")
    assert "null" in refusal(DataError, hsa.data, f"{tmp_path}/a\0b.tsv")
    os.symlink("loop.tsv", tmp_path / "loop.tsv")
    assert "loop.tsv cannot be read" in refusal(DataError, hsa.data, tmp_path / "loop.tsv")
    os.symlink("none", tmp_path / "wav.scp")
    (tmp_path / "text").write_text("u1 one\n")
    assert "wav.scp: a manifest cannot be opened" in refusal(DataError, hsa.data, tmp_path)


def test_a_pipe_or_a_device_is_no_manifest_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tsv")
    assert "is a named pipe" in refusal(DataError, hsa.data, tmp_path / "pipe.tsv")
    os.symlink("/dev/zero", tmp_path / "zero.tsv")
    assert "is a device" in refusal(DataError, hsa.data, tmp_path / "zero.tsv")
    os.mkfifo(tmp_path / "wav.scp")
    (tmp_path / "text").write_text("u1 one\n")
    assert "wav.scp is a named pipe" in refusal(DataError, hsa.data, tmp_path)


def test_audio_outside_of_the_folder_is_allowed_and_said(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    inside = ["a.wav", "x/../b.wav", f"{folder}/c.wav", "..d.wav"]
    outside = ["../e.wav", "x/../../f.wav", "/g.wav", f"{folder}-other/h.wav"]
    lines = "".join(f"{name}\tone\n" for name in [*inside, *outside])
    (folder / "t.tsv").write_text(f"file\ttext\n{lines}")
    data = hsa.data(folder / "t.tsv")
    assert data.notes == (f"4 of 8 utterances have their audio outside of {folder}, first '../e.wav' at line 6",)
    assert [str(each.audio) for each in data.utterances] == [
        name if name.startswith("/") else f"{folder}/{name}" for name in [*inside, *outside]
    ]
    assert [os.path.normpath(each.audio) for each in data.utterances[-4:]] == [
        f"{tmp_path}/e.wav",
        f"{tmp_path}/f.wav",
        "/g.wav",
        f"{folder}-other/h.wav",
    ]


def test_names_in_a_manifest_cannot_forge_lines_of_a_message(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("file\ttext\tid\na\tb\t\x1b[2J\rall is well\nc\td\t\x1b[2J\rall is well\n")
    assert "\\x1b[2J\\rall is well" in refusal(DataError, hsa.data, path)


def test_the_number_of_utterances_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "MAX_UTTERANCES", 2)
    path = tmp_path / "t.tsv"
    path.write_text(TABLE + "b.wav\ttwo\n")
    assert len(hsa.data(path).utterances) == 2
    path.write_text(TABLE + "b.wav\ttwo\nc.wav\tthree\n")
    assert "line 4: a set holds at most 2 utterances" in refusal(DataError, hsa.data, path)


MEASURED = """
import sys
import hsa
def most():  # getrusage would give that of the process which started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
hsa.data
before = most()
data = hsa.data(sys.argv[1])
print(len(data.utterances), (most() - before) / 1024)
"""


def rows(kind: str, count: int) -> dict[str, str]:
    """Files of a set of so many utterances."""
    if kind == "kaldi":
        return {
            "wav.scp": "".join(f"utt{place:07} clips/{place:07}.flac\n" for place in range(count)),
            "text": "".join(f"utt{place:07} the words of number {place}\n" for place in range(count)),
            "utt2spk": "".join(f"utt{place:07} speaker{place % 1000}\n" for place in range(count)),
        }
    if kind == "jsonl":
        line = '{{"file": "clips/{0:07}.flac", "text": "the words of number {0}"}}\n'
        return {"t.jsonl": "".join(line.format(place) for place in range(count))}
    comma = "\t" if kind == "tsv" else ","
    lines = (f"clips/{place:07}.flac{comma}the words of number {place}\n" for place in range(count))
    return {f"t.{kind}": f"file{comma}text\n{''.join(lines)}"}


@pytest.mark.parametrize(
    ("kind", "count"), [("tsv", 1_000_000), ("csv", 100_000), ("jsonl", 100_000), ("kaldi", 100_000)]
)
def test_large_sets_take_a_bounded_amount_of_memory(kind: str, count: int, tmp_path: Path) -> None:
    for name, content in rows(kind, count).items():
        (tmp_path / name).write_text(content)
    path = tmp_path if kind == "kaldi" else tmp_path / f"t.{kind}"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True, timeout=300
    )
    number, mebibytes = done.stdout.split()
    assert int(number) == count
    assert 50 < float(mebibytes) * 2**20 / count < (1600 if kind == "kaldi" else 1000), "bytes an utterance"
