"""Audio that is none, or not what it says: each is refused in one line, quickly, or read as far as it is sound."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech import noise, refusal, write_audio

from hsa.errors import AudioError
from hsa.evaluation.audio import duration, read_audio
from hsa.evaluation.utterance import Utterance


def refused(path: Path) -> str:
    """The message of a refusal, which names the file and the utterance."""
    message = refusal(AudioError, read_audio, Utterance("u1", path, ""), 16000)
    assert message.startswith(str(path))
    return message


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_no_samples(ending: str, tmp_path: Path) -> None:
    path = write_audio(tmp_path / f"a.{ending}", noise(0.0))  # a .flac of 0 bytes
    expected = {"wav": "has no samples; take it out of the manifest", "flac": "cannot be decoded"}
    assert expected[ending] in refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("channels", [1, 8])
def test_samples_that_are_no_numbers(value: float, rate: int, channels: int, tmp_path: Path) -> None:
    samples = noise(0.5, rate, channels)
    samples[1234, -1] = value
    path = write_audio(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    assert "NaN or infinity in the audio" in refused(path)


def test_samples_so_large_that_their_mean_overflows(tmp_path: Path) -> None:
    samples = np.full((100, 8), np.finfo(np.float32).max, dtype=np.float32)
    path = write_audio(tmp_path / "a.wav", samples, subtype="FLOAT")
    assert "NaN or infinity in the audio" in refused(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"R", b"RIFF", b"not audio at all\n", b"\x89PNG\r\n\x1a\n" + bytes(1000), bytes(4096), b"\xff" * 4096],
    ids=["empty", "one byte", "a magic alone", "text", "a picture", "zeros", "ones"],
)
@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "raw"])
def test_what_is_no_audio(content: bytes, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    assert "cannot be decoded" in (message := refused(path)) or "has no samples" in message


@pytest.mark.parametrize("share", [0.99, 0.5, 0.1])
@pytest.mark.parametrize("rate", [16000, 8000])
def test_a_flac_that_is_cut_off(share: float, rate: int, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.flac", noise(3.0, rate), rate)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = refused(path)
    assert "the file is cut off" in message or "cannot be decoded" in message


def test_a_flac_with_bytes_changed(tmp_path: Path) -> None:
    samples = noise(3.0)
    path = write_audio(tmp_path / "a.flac", samples)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    path.write_bytes(data)
    message = refused(path)
    assert "the file is cut off" in message or "cannot be decoded" in message


def test_a_flac_that_does_not_say_how_long_it_is(tmp_path: Path) -> None:
    """As programs write it that cannot seek back in their output."""
    path = write_audio(tmp_path / "a.flac", noise(1.0))
    data = bytearray(path.read_bytes())
    assert data[:4] == b"fLaC" and data[4] & 0x7F == 0  # STREAMINFO begins at byte 8, its 36 bits of length at 21.5
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert "does not say how long it is" in refused(path)


def test_a_wav_that_is_cut_off_is_as_long_as_what_is_left(tmp_path: Path) -> None:
    """libsndfile reads it so, as it does files of programs that cannot seek back to write their length."""
    samples = noise(1.0)
    path = write_audio(tmp_path / "a.wav", samples)
    path.write_bytes(path.read_bytes()[: 44 + 2 * 5000])
    assert np.array_equal(read_audio(Utterance("u1", path, ""), 16000), samples[:5000, 0])
    assert duration(Utterance("u1", path, "")) == 5000 / 16000


@pytest.mark.parametrize("rate", [0, 1, 999, 768_001, 2**31 - 1, 2**32 - 1])
def test_a_forged_rate(rate: int, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", noise(1.0))
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", rate)
    path.write_bytes(data)
    message = refused(path)
    assert "samples per second, expected 1000 to 768000" in message or "cannot be decoded" in message


@pytest.mark.parametrize("channels", [0, 1025, 65535])
def test_a_forged_number_of_channels(channels: int, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", noise(1.0))
    data = bytearray(path.read_bytes())
    data[22:24] = struct.pack("<H", channels)
    path.write_bytes(data)
    assert "cannot be decoded" in refused(path)


def test_more_than_six_hours(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    silence = np.zeros(3600 * 1000, dtype=np.int16)
    with soundfile.SoundFile(path, "w", 1000, 1) as file:
        for _ in range(7):
            file.write(silence)
    assert "an utterance of more than 21600 s; give parts of it, with start and end" in refused(path)
    assert len(read_audio(Utterance("u1", path, "", start=25199.0), 16000)) == 16000


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert "is a named pipe, expected an audio file that is a regular file" in refused(tmp_path / "pipe.wav")
    assert "is a directory" in refused(tmp_path)
    os.symlink("/dev/zero", tmp_path / "zero.wav")
    assert "is a device" in refused(tmp_path / "zero.wav")
    os.symlink("none.wav", tmp_path / "lost.wav")
    assert "No such file or directory" in refused(tmp_path / "lost.wav")
    os.symlink("loop.wav", tmp_path / "loop.wav")
    assert "cannot be opened" in refused(tmp_path / "loop.wav")
    message = refusal(AudioError, read_audio, Utterance("u1", Path("/a\0b"), ""), 16000)
    assert "a\\x00b" in message or "null" in message


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    sound = write_audio(tmp_path / "a.wav", noise(0.1))
    broken = tmp_path / "b.wav"
    broken.write_bytes(b"not audio")
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        read_audio(Utterance("u1", sound, ""), 16000)
        refused(broken)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_changed_bytes_give_finite_samples_or_one_line(ending: str, tmp_path: Path) -> None:
    sound = write_audio(tmp_path / f"a.{ending}", noise(0.2, 8000, 2), 8000).read_bytes()
    path = tmp_path / f"b.{ending}"
    drawn = random.Random(ending)
    outcomes = {True: 0, False: 0}
    for _ in range(100):
        data = bytearray(sound)
        for _ in range(drawn.choice((1, 4, 40))):
            data[drawn.randrange(min(len(data), drawn.choice((64, 1 << 20))))] = drawn.randrange(256)
        path.write_bytes(data[: drawn.choice((len(data), drawn.randrange(len(data))))])
        try:
            found = read_audio(Utterance("u1", path, ""), 16000)
        except AudioError as error:
            assert str(error).isprintable()
            outcomes[False] += 1
        else:
            assert found.ndim == 1 and len(found) and found.dtype == np.float32 and np.isfinite(found).all()
            outcomes[True] += 1
    assert outcomes[False] and (outcomes[True] or ending == "ogg")  # whose pages have checksums
