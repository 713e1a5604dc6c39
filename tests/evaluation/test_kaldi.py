"""Kaldi data directories."""

from __future__ import annotations

from pathlib import Path

import pytest
from speech import refusal

import hsa
from hsa.errors import DataError
from hsa.evaluation import kaldi
from hsa.evaluation.utterance import Utterance


def directory(folder: Path, **files: str | bytes) -> Path:
    """Write the files of a Kaldi directory; `wav_scp` is wav.scp."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def test_recordings_are_utterances_where_there_are_no_segments(tmp_path: Path) -> None:
    folder = directory(
        tmp_path / "test",
        wav_scp="u2 wav/two words.wav\nu1\t/far/one.wav\n",
        text="u1 Good morning, all.\nu2  größer \n",
        utt2spk="u1 anna\nu2 ben\n",
    )
    data = hsa.data(folder)
    assert data.utterances == (
        Utterance("u1", Path("/far/one.wav"), "Good morning, all.", "anna"),
        Utterance("u2", folder / "wav" / "two words.wav", "größer", "ben"),
    )
    assert data.name == "test"
    assert data.notes == (f"1 of 2 utterances have their audio outside of {folder}, first '/far/one.wav' at line 2",)


def test_segments_are_parts_of_recordings(tmp_path: Path) -> None:
    folder = directory(
        tmp_path,
        wav_scp="r1 a.wav\nr2 b.wav\nr3 c.wav\n",
        segments="u1 r1 0 1.5\nu2 r1 1.5 -1\nu3 r2 0.25 0.5\nu4 r3 0 1\n",
        text="u1 one\nu2 two\nu3\n",
    )
    data = hsa.data(folder)
    assert data.utterances == (
        Utterance("u1", folder / "a.wav", "one", start=0.0, end=1.5),
        Utterance("u2", folder / "a.wav", "two", start=1.5),
        Utterance("u3", folder / "b.wav", "", start=0.25, end=0.5),
    )
    assert data.notes == (
        "1 of 3 recordings in wav.scp have no text and are left out",
        "1 of 4 segments have no text and are left out",
    )


def test_utterances_whose_audio_lies_outside_are_counted(tmp_path: Path) -> None:
    """Not recordings: some have no text and some have several segments."""
    lines = "".join(f"u{place} /far/{place}.wav\n" for place in range(5))
    whole = hsa.data(directory(tmp_path / "whole", wav_scp=lines, text="u1 one\nu3 two\n"))
    outside = "utterances have their audio outside of"
    assert whole.notes[-1] == f"2 of 2 {outside} {tmp_path / 'whole'}, first '/far/1.wav' at line 2"
    segments = "".join(f"u{place} {'near' if place == 2 else 'far'} {place} {place + 1}\n" for place in range(5))
    text = "".join(f"u{place} x\n" for place in range(5))
    folder = directory(tmp_path / "parts", wav_scp="near a.wav\nfar ../b.wav\n", segments=segments, text=text)
    assert hsa.data(folder).notes == (f"4 of 5 {outside} {folder}, first '../b.wav' at line 2",)
    assert hsa.data(folder, limit=2).notes == (f"2 of 2 {outside} {folder}, first '../b.wav' at line 2",)


@pytest.mark.parametrize(
    "command",
    [
        "touch {mark}; cat a.wav |",
        "touch {mark}|",
        "| touch {mark}",
        "|touch {mark} |",
        "sox a.wav -t wav - | touch {mark} | \t",
        "$(touch {mark}) |",
    ],
)
@pytest.mark.parametrize("is_used", [True, False])
def test_a_command_is_refused_and_never_run(command: str, is_used: bool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    folder = directory(
        tmp_path / "test",
        wav_scp=f"u1 a.wav\nu2 {command.format(mark=mark)}\n",
        text="u1 one\nu2 two\n" if is_used else "u1 one\n",
    )
    message = refusal(DataError, hsa.data, folder)
    assert "wav.scp: line 2 is a command" in message and "commands are never run" in message
    assert not mark.exists()


def test_what_a_shell_would_run_is_else_the_name_of_a_file(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    names = [f"`touch {mark}`.wav", f"$(touch {mark})", f"a.wav; touch {mark}", f"a | touch {mark}"]
    lines = "".join(f"u{place} {name}\n" for place, name in enumerate(names))
    folder = directory(tmp_path / "test", wav_scp=lines, text="".join(f"u{place} x\n" for place in range(len(names))))
    assert [str(each.audio) for each in hsa.data(folder).utterances] == [f"{folder}/{name}" for name in names]
    assert not mark.exists()


SOUND = {"wav_scp": "r1 a.wav\n", "text": "u1 one\n", "segments": "u1 r1 0 1\n", "utt2spk": "u1 anna\n"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"wav_scp": "r1 a.wav\nr1 b.wav\n"}, "wav.scp: line 2: 'r1' occurs a second time"),
        ({"wav_scp": "r1\n"}, "wav.scp: line 1 has one field, 'r1', expected a name and a file"),
        ({"wav_scp": ""}, "segments: line 1: 'r1' is not in wav.scp"),
        ({"text": "u1 one\nu1 two\n"}, "text: line 2: id 'u1' occurs a second time"),
        ({"text": ""}, "holds no utterance"),
        ({"text": "u2 one\n"}, "text: line 1: 'u2' is not in segments"),
        ({"text": "u1 größer\n".encode("latin-1")}, "text: line 1 is not UTF-8"),
        ({"text": "u1 one\n".encode("utf-16")}, "text: line 1 begins with the mark of UTF-16"),
        ({"segments": "u1 r1 0\n"}, "segments: line 1 has 3 fields, expected utterance, recording, start and end"),
        ({"segments": "u1 r1 0 1 x\n"}, "segments: line 1 has 5 fields"),
        ({"segments": "u1 r1 0 1\nu1 r1 1 2\n"}, "segments: line 2: 'u1' occurs a second time"),
        ({"segments": "u1 r1 0 soon\n"}, "segments: line 1: end is 'soon'"),
        ({"segments": "u1 r1 -1 1\n"}, "start is -1.0"),
        ({"segments": "u1 r1 2 1\n"}, "end is 1.0, expected more than the start, 2.0"),
        ({"utt2spk": "u2 anna\n"}, "text: line 1: 'u1' has no speaker in utt2spk"),
        ({"utt2spk": "u1 anna ben\n"}, "utt2spk: line 1 has more than two fields"),
        ({"utt2spk": "u1 anna\nu1 ben\n"}, "utt2spk: line 2: 'u1' occurs a second time"),
    ],
)
def test_a_bad_directory_is_refused_in_one_line(change: dict[str, str | bytes], expected: str, tmp_path: Path) -> None:
    assert len(hsa.data(directory(tmp_path / "sound", **SOUND)).utterances) == 1
    assert expected in refusal(DataError, hsa.data, directory(tmp_path / "bad", **{**SOUND, **change}))


@pytest.mark.parametrize("lacking", ["text", "wav.scp"])
def test_a_directory_that_lacks_a_file_is_refused(lacking: str, tmp_path: Path) -> None:
    folder = directory(tmp_path, **SOUND)
    (folder / lacking).unlink()
    message = refusal(DataError, hsa.data, folder)
    assert ("has no file text" if lacking == "text" else "has none of wav.scp and text") in message


def test_the_number_of_lines_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kaldi, "MAX_UTTERANCES", 3)
    folder = directory(tmp_path, wav_scp="a a\nb b\nc c\n", text="a x\n")
    assert len(hsa.data(folder).utterances) == 1
    directory(tmp_path, wav_scp="a a\nb b\nc c\nd d\n")
    assert "wav.scp has more than 3 lines" in refusal(DataError, hsa.data, folder)
