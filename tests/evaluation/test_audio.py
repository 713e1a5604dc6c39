"""Audio that is read: every format, channels, rates and parts of files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from peak_memory import with_peak
from speech import noise, refusal, write_audio

from hsa.errors import AudioError, RequestError
from hsa.evaluation import audio
from hsa.evaluation.audio import check_audio, check_rate, duration, read_audio
from hsa.evaluation.utterance import Utterance


def whole(path: Path, start: float | None = None, end: float | None = None) -> Utterance:
    return Utterance("u1", path, "", start=start, end=end)


@pytest.mark.parametrize(
    ("ending", "subtype"),
    [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "FLOAT"), ("wav", "DOUBLE"), ("flac", "PCM_16"), ("aiff", "PCM_16")],
)
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_lossless_audio_is_its_samples_with_channels_averaged(
    ending: str, subtype: str, channels: int, tmp_path: Path
) -> None:
    samples = noise(0.5, channels=channels)
    path = write_audio(tmp_path / f"a.{ending}", samples, subtype=subtype)
    found = read_audio(whole(path), 16000)
    assert found.dtype == np.float32 and found.shape == (8000,)
    assert np.abs(found - samples.astype(np.float64).mean(axis=1)).max() < 1e-7
    assert duration(whole(path)) == 0.5


@pytest.mark.parametrize(("ending", "subtype"), [("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", "MPEG_LAYER_III")])
def test_lossy_audio_is_what_soundfile_decodes(ending: str, subtype: str, tmp_path: Path) -> None:
    path = write_audio(tmp_path / f"a.{ending}", noise(1.0), subtype=subtype)
    expected, rate = soundfile.read(path, dtype="float32")
    assert rate == 16000 and len(expected) >= 16000
    found = read_audio(whole(path), 16000)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-6  # the decoder of MP3 rounds as its memory is aligned


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 8])
def test_other_rates_are_resampled_as_soxr_does_it_in_one_go(rate: int, channels: int, tmp_path: Path) -> None:
    samples = noise(1.3, rate, channels)
    path = write_audio(tmp_path / "a.wav", samples, rate)
    found = read_audio(whole(path), 16000)
    expected = soxr.resample(samples.mean(axis=1, dtype=np.float32), rate, 16000, quality=soxr.HQ)
    assert found.shape == expected.shape == (round(len(samples) * 16000 / rate),)
    assert np.abs(found - expected).max() < 1e-5
    assert duration(whole(path)) == pytest.approx(1.3, abs=1 / rate)


def test_a_tone_of_8_khz_audio_keeps_its_pitch_and_its_height(tmp_path: Path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    found = read_audio(whole(write_audio(tmp_path / "a.wav", tone, 8000, subtype="FLOAT")), 16000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(found - expected)[1000:-1000].max() < 1e-3


@pytest.mark.parametrize("rate", [1000, 7999, 8000, 15999, 16001, 44100, 47999, 768_000])
@pytest.mark.parametrize("target", [8000, 16000, 24000])
def test_any_two_rates_and_any_length_fit_what_is_set_aside(rate: int, target: int, tmp_path: Path) -> None:
    for count in (1, 2, 3, 160, 1009, 10_007):
        path = write_audio(tmp_path / "a.wav", noise(1)[:count], rate)
        if round(count * target / rate):
            assert abs(len(read_audio(whole(path), target)) - count * target / rate) < 1


def test_one_sample_of_much_higher_rate_gives_none(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", noise(1)[:1], 96000)
    assert "1 samples at 96000 Hz give none at 16000 Hz" in refusal(AudioError, read_audio, whole(path), 16000)


def test_the_size_of_blocks_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        write_audio(tmp_path / f"{rate}.flac", noise(2.0, rate, channels), rate)
        for rate, channels in ((16000, 2), (44100, 3))
    ]
    expected = [read_audio(whole(path, 0.3), 16000) for path in paths]
    monkeypatch.setattr(audio, "BLOCK", 1000)
    for path, before in zip(paths, expected, strict=True):
        found = read_audio(whole(path, 0.3), 16000)
        assert found.shape == before.shape and np.abs(found - before).max() < 1e-6


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_a_segment_is_the_part_between_its_times(ending: str, tmp_path: Path) -> None:
    samples = noise(2.0)
    path = write_audio(tmp_path / f"a.{ending}", samples)
    for start, end in ((0.0, 0.5), (0.25, 1.75), (1.5, None), (None, 0.1), (1.0, 2.0), (0.00003, 1.99997)):
        first, last = round((start or 0) * 16000), 32000 if end is None else round(end * 16000)
        found = read_audio(whole(path, start, end), 16000)
        assert np.array_equal(found, samples[first:last, 0])
        assert duration(whole(path, start, end)) == (last - first) / 16000


def test_a_segment_may_end_half_a_second_after_its_file_and_no_later(tmp_path: Path) -> None:
    samples = noise(1.0)
    path = write_audio(tmp_path / "a.wav", samples)
    assert np.array_equal(read_audio(whole(path, 0.5, 1.5), 16000), samples[8000:, 0])
    assert "has 1.000 s, expected it to hold 0.5 to 1.6 s" in refusal(
        AudioError, read_audio, whole(path, 0.5, 1.6), 16000
    )
    assert "has 1.000 s" in refusal(AudioError, duration, whole(path, 1.0, 1.2))
    assert "has 1.000 s" in refusal(AudioError, read_audio, whole(path, 7.0), 16000)
    assert "no sample between" in refusal(AudioError, read_audio, whole(path, 0.5, 0.50001), 16000)
    assert "end is 0.25" in refusal(AudioError, read_audio, whole(path, 0.5, 0.25), 16000)


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (8000, 2)])
def test_an_hour_takes_little_more_memory_than_its_samples(rate: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "hour.flac"
    minute = np.zeros((60 * rate, channels), dtype=np.int16)
    minute[0] = 16384
    with soundfile.SoundFile(path, "w", rate, channels) as file:
        for _ in range(60):
            file.write(minute)
    samples = 3600 * 16000
    bound = 4 * samples + 8 * 4 * audio.BLOCK
    found, peak = with_peak(lambda: read_audio(whole(path), 16000), bound)
    assert len(found) == samples and found.itemsize == 4 and duration(whole(path)) == 3600
    assert peak < bound
    loud = np.flatnonzero(np.abs(found) > 0.2)
    assert loud[0] < 3 and np.unique(np.round(loud / (60 * 16000))).tolist() == list(range(60))


def test_rates_that_are_none_are_refused(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", noise(0.1))
    for rate in (0, -16000, 999, 768_001, 16000.0, True, "16000", None):
        assert "rate must be 1000 to 768000" in refusal(RequestError, check_rate, rate)
        assert "rate must be" in refusal(RequestError, read_audio, whole(path), rate)


def test_the_audio_of_a_set_is_looked_at_without_opening_it(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", noise(0.1))
    check_audio([whole(path), whole(path, 0.05)])
    missing = Utterance("u2", tmp_path / "b.wav", "")
    message = refusal(AudioError, check_audio, [whole(path), missing])
    assert f"{tmp_path}/b.wav (utterance 'u2'): the audio cannot be read: No such file or directory" in message
    os.mkfifo(tmp_path / "b.wav")
    assert "is a named pipe, expected an audio file" in refusal(AudioError, check_audio, [missing])
    assert "is a directory" in refusal(AudioError, check_audio, [Utterance("u3", tmp_path, "")])


@pytest.mark.parametrize("library", ["soundfile", "soxr"])
def test_a_library_that_is_not_installed_is_named(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_audio(tmp_path / "a.wav", noise(0.1), 8000)
    monkeypatch.setitem(__import__("sys").modules, library, None)
    message = refusal(RequestError, read_audio, whole(path), 16000)
    assert message == f"hsa eval needs {library}, which is not installed: pip install 'hsa-merge[eval]'"
