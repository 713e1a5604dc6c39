"""Sets that are hostile or broken, from their files to the scores: each is one line, or right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech_sets import RATE, noise, write_ctc, write_set

import hsa
from hsa.errors import AudioError, DataError, HsaError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ctc(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A folder with three clips and set.tsv."""
    write_set(tmp_path / "speech", (0.5, 0.4, 0.6))
    return tmp_path / "speech"


def evaluate(model: Path, data: Path, **more: object) -> hsa.Evaluation:
    return hsa.evaluate(model, data, device="cpu", **more)  # type: ignore[arg-type]


def refusal(kind: type[HsaError], model: Path, data: Path) -> str:
    """The line with which a set is refused, before anything is decoded."""
    with pytest.raises(kind) as caught:
        evaluate(model, data, progress=lambda step: pytest.fail("something was decoded"))
    assert type(caught.value) is kind and str(caught.value).isprintable()
    return str(caught.value)


def test_audio_that_is_missing(model: Path, speech: Path) -> None:
    (speech / "clip_001.wav").unlink()
    assert "clip_001.wav: the audio cannot be read: No such file" in refusal(AudioError, model, speech / "set.tsv")


@pytest.mark.parametrize("command", ["touch ran |", "|touch ran", "cat clip_000.wav|", "sox clip_000.wav -t wav - |"])
def test_a_command_in_wav_scp_is_refused_and_not_run(
    command: str, model: Path, speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(speech)
    (speech / "wav.scp").write_text(f"a clip_000.wav\nb {command}\n")
    (speech / "text").write_text("a ab cad\nb bee\n")
    message = refusal(DataError, model, speech)
    assert "wav.scp: line 2 is a command" in message and "commands are never run" in message
    assert not (speech / "ran").exists()


def test_paths_that_lead_out_are_allowed_and_said(model: Path, speech: Path, tmp_path: Path) -> None:
    inner = tmp_path / "manifests"
    inner.mkdir()
    (inner / "set.tsv").write_text(f"file\ttext\n../speech/clip_000.wav\tab cad\n{speech}/clip_001.wav\tbee\n")
    found = evaluate(model, inner / "set.tsv")
    inside = evaluate(model, speech / "set.tsv", limit=2)
    assert [each.hypothesis for each in found.models[0].utterances] == [
        each.hypothesis for each in inside.models[0].utterances
    ]
    assert any("2 of 2 utterances have their audio outside of" in note for note in found.notes)
    assert not any("outside" in note for note in inside.notes)


def test_text_in_another_encoding(model: Path, speech: Path) -> None:
    (speech / "set.tsv").write_bytes("file\ttext\nclip_000.wav\tgrößer\n".encode("latin-1"))
    assert "set.tsv: line 2 is not UTF-8" in refusal(DataError, model, speech / "set.tsv")
    (speech / "set.tsv").write_bytes("file\ttext\nclip_000.wav\tgrößer\n".encode("utf-16"))
    assert "save the file as UTF-8" in refusal(DataError, model, speech / "set.tsv")
    (speech / "set.tsv").write_bytes("\ufefffile\ttext\r\nclip_000.wav\tgrößer\r\n".encode())
    assert evaluate(model, speech / "set.tsv").models[0].utterances[0].reference == "größer"


def test_audio_of_no_samples(model: Path, speech: Path) -> None:
    soundfile.write(speech / "clip_001.wav", np.zeros(0, dtype=np.float32), RATE)
    assert "clip_001.wav has no samples" in refusal(AudioError, model, speech / "set.tsv")


def test_nan_in_the_audio(model: Path, speech: Path) -> None:
    samples = noise(0.4, 1)
    samples[1000] = np.nan
    soundfile.write(speech / "clip_001.wav", samples, RATE, subtype="FLOAT")
    assert "clip_001.wav: NaN or infinity in the audio" in refusal(AudioError, model, speech / "set.tsv")


@pytest.mark.parametrize("channels", [2, 8])
def test_channels_are_averaged(channels: int, model: Path, speech: Path) -> None:
    before = evaluate(model, speech / "set.tsv").models[0].utterances
    for path in speech.glob("*.wav"):
        samples, rate = soundfile.read(path, dtype="int16")
        soundfile.write(path, np.repeat(samples[:, None], channels, axis=1), rate)
    assert evaluate(model, speech / "set.tsv").models[0].utterances == before


def test_8_khz_is_heard_as_the_same_speech_at_16(model: Path, speech: Path) -> None:
    """What 16 kHz audio without the upper half of its band is transcribed as."""
    import soxr

    for path in speech.glob("*.wav"):
        samples, _ = soundfile.read(path, dtype="float32")
        narrow = soxr.resample(samples, RATE, RATE // 2)
        soundfile.write(path, narrow, RATE // 2, subtype="FLOAT")
    heard = evaluate(model, speech / "set.tsv").models[0].utterances
    for path in speech.glob("*.wav"):
        narrow, _ = soundfile.read(path, dtype="float32")
        soundfile.write(path, soxr.resample(narrow, RATE // 2, RATE, quality=soxr.HQ), RATE, subtype="FLOAT")
    assert evaluate(model, speech / "set.tsv").models[0].utterances == heard


def test_an_hour_in_one_utterance(tmp_path: Path) -> None:
    """Decoded window by window: the first minute is transcribed as that of a shorter recording, and every other as
    long. The model's frames are long, or this would take minutes."""
    model = write_ctc(tmp_path / "model", strides=(8, 8, 10))
    minute = noise(60, 1)
    with soundfile.SoundFile(tmp_path / "hour.flac", "w", RATE, 1, subtype="PCM_16") as file:
        for _ in range(60):
            file.write(minute)
    soundfile.write(tmp_path / "two.flac", np.tile(minute, 2), RATE, subtype="PCM_16")
    (tmp_path / "set.tsv").write_text("file\ttext\nhour.flac\tab cad\ntwo.flac\tab cad\n")
    hour, two = (each.hypothesis for each in evaluate(model, tmp_path / "set.tsv", batch=1).models[0].utterances)
    half = len(two) // 2
    assert half > 20 and hour[:half] == two[:half]
    assert len(hour) == pytest.approx(60 * half, rel=0.1)
