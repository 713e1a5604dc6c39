"""Transcripts equal those of transformers, whatever is decoded beside an utterance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from speech_sets import RATE, Norm, load_ctc, noise, write_ctc, write_moonshine

from hsa.errors import RequestError, SourceError
from hsa.evaluation.decoding import load_recognizer
from hsa.evaluation.options import DecodingOptions

Triple = dict[str, Path]
LENGTHS = (0.9, 0.31, 0.77, 0.31, 1.4, 0.05, 0.6)
CPU = DecodingOptions(device="cpu")


def transcripts(folder: Path, audio: Sequence[np.ndarray], batch: int) -> list[str]:
    recognizer = load_recognizer(folder, CPU)
    texts: list[str] = []
    for start in range(0, len(audio), batch):
        texts += recognizer.transcribe(recognizer.features(audio[start : start + batch]))
    return texts


# --- CTC ------------------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[("Wav2Vec2", "layer"), ("Wav2Vec2", "group"), ("Hubert", "layer"), ("WavLM", "layer")],
    ids="-".join,
)
def ctc(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, norm = request.param
    return write_ctc(tmp_path_factory.mktemp(f"{family}-{norm}"), norm, family=family)


@torch.no_grad()
def alone(folder: Path, samples: np.ndarray) -> str:
    """What transformers' own model and processor make of one utterance, unpadded."""
    model, processor = load_ctc(folder)
    inputs = processor(samples, sampling_rate=RATE, return_tensors="pt")
    return str(processor.batch_decode(model(**inputs).logits.argmax(-1))[0]).strip()


def test_a_ctc_model_writes_what_transformers_writes(ctc: Path) -> None:
    audio = [noise(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [alone(ctc, samples) for samples in audio if len(samples) >= RATE // 10]
    found = transcripts(ctc, audio, 1)
    del found[LENGTHS.index(0.05)]
    assert found == expected
    assert len(set(found)) > 3 and all(len(text) > 3 for text in found), "texts too alike to tell anything"


def test_a_ctc_model_writes_the_same_in_a_batch(ctc: Path) -> None:
    audio = [noise(length, seed) for seed, length in enumerate(LENGTHS)]
    assert transcripts(ctc, audio, 16) == transcripts(ctc, audio, 3) == transcripts(ctc, audio, 1)


@torch.no_grad()
def test_padding_would_change_a_ctc_model_without_a_mask(tmp_path: Path) -> None:
    """What the recogniser avoids."""
    folder = write_ctc(tmp_path / "model", "group")
    model, processor = load_ctc(folder)
    audio = [noise(0.5, 1), noise(1.5, 2)]
    padded = processor(audio, sampling_rate=RATE, return_tensors="pt", padding=True)
    assert "attention_mask" not in padded
    text = processor.batch_decode(model(**padded).logits.argmax(-1))[0].strip()
    assert text != alone(folder, audio[0]) == transcripts(folder, audio, 2)[0]


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_long_audio_reaches_a_ctc_model_in_the_windows_of_transformers_pipeline(norm: Norm, tmp_path: Path) -> None:
    from transformers import AutomaticSpeechRecognitionPipeline

    ctc = write_ctc(tmp_path / "model", norm, strides=(8, 8, 5))
    model, processor = load_ctc(ctc)
    pipeline = AutomaticSpeechRecognitionPipeline(
        model=model,
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        chunk_length_s=30,
        stride_length_s=5,
    )
    for seconds in (30.5, 50.0, 67.3):
        samples = noise(seconds, 7)
        (found,) = transcripts(ctc, [samples], 1)
        expected = pipeline({"raw": samples.copy(), "sampling_rate": RATE})["text"].strip()
        assert len(found) > 50
        assert found == expected, seconds


# --- other sequence-to-sequence models --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_moonshine_writes_what_transformers_writes_in_any_batch(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoTokenizer, MoonshineForConditionalGeneration

    folder = write_moonshine(tmp_path / "model")
    model = MoonshineForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    audio = [noise(length, seed) for seed, length in enumerate((0.9, 0.31, 0.9, 0.77))]
    expected = []
    for samples in audio:
        inputs = extractor(samples, sampling_rate=RATE, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=448, max_length=None)
        expected += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert len(set(expected)) == len(expected)
    for size in (1, 3, 4):
        assert transcripts(folder, audio, size) == expected, size


# --- Whisper ----------------------------------------------------------------------------------------------------------


def test_a_whisper_writes_what_transformers_writes_in_any_batch(shared_triple: Triple) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = shared_triple["primary"]
    audio = [noise(length, seed) for seed, length in enumerate((0.3, 0.9, 0.5, 1.0, 0.71))]
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
    expected = []
    for samples in audio:
        features = processor(samples, sampling_rate=RATE, return_tensors="pt").input_features
        how = {"language": "de", "task": "transcribe", "do_sample": False, "num_beams": 1, "max_new_tokens": 16}
        tokens = model.generate(features, **how)
        expected.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    options = DecodingOptions(device="cpu", language="german")
    recognizer = load_recognizer(folder, options)
    for size in (1, 2, 5):
        found = [
            text
            for start in range(0, len(audio), size)
            for text in recognizer.transcribe(recognizer.features(audio[start : start + size]))
        ]
        assert found == expected, size


def test_an_utterance_is_cut_after_the_tokens_asked_for(shared_triple: Triple) -> None:
    audio = [noise(0.6, 3)]
    texts = []
    for count in (None, 3, 1):
        options = DecodingOptions(device="cpu", language="de", max_tokens=count)
        recognizer = load_recognizer(shared_triple["primary"], options)
        texts += recognizer.transcribe(recognizer.features(audio))
    whole, three, one = texts
    assert whole.startswith(three) and three.startswith(one) and len(one) < len(three) < len(whole)


def test_features_are_equal_for_models_of_one_family_alone(shared_triple: Triple, ctc: Path) -> None:
    keys = [load_recognizer(folder, CPU).features_key for folder in (*shared_triple.values(), ctc)]
    assert len(set(keys[:3])) == 1 and keys[3] != keys[0]


def test_a_loaded_model_is_taken_as_it_is(shared_triple: Triple) -> None:
    first = load_recognizer(shared_triple["primary"], CPU)
    second = load_recognizer(first.model, CPU, files=shared_triple["primary"])
    assert second.model is first.model
    audio = [noise(0.6, 3)]
    assert second.transcribe(second.features(audio)) == first.transcribe(first.features(audio))
    with pytest.raises(RequestError, match="needs the directory of its tokenizer"):
        load_recognizer(first.model, CPU)


def test_the_size_of_features_is_that_of_their_tensors(shared_triple: Triple) -> None:
    recognizer = load_recognizer(shared_triple["base"], CPU)
    features = recognizer.features([noise(0.5, 1), noise(0.9, 2)])
    assert recognizer.size_of(features) == 2 * 80 * 100 * 4


# --- what cannot be asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 5}, "which is decoded greedily; leave beams out"),
        ({"max_tokens": 5}, "which writes as long as it hears; leave max_tokens out"),
        ({"task": "translate"}, "cannot translate; task='translate' needs a multilingual Whisper"),
    ],
)
def test_a_ctc_model_refuses_what_it_cannot_do(ctc: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_recognizer(ctc, DecodingOptions(device="cpu", **options))  # type: ignore[arg-type]


def test_a_whisper_refuses_a_language_that_it_does_not_know(shared_triple: Triple) -> None:
    with pytest.raises(RequestError, match="does not know language='pl'; give a code such as de"):
        load_recognizer(shared_triple["base"], DecodingOptions(device="cpu", language="pl"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beams", 0),
        ("batch", 1.5),
        ("batch", True),
        ("max_tokens", 0),
        ("task", "sing"),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("language", " "),
    ],
)
def test_options_are_checked(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"{name} must be .*, got"):
        DecodingOptions(**{name: value})  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_named() -> None:
    from hsa.errors import BackendUnavailable
    from hsa.evaluation.decoding import chosen_device

    with pytest.raises(BackendUnavailable, match="torch has no device cuda:99: it sees"):
        chosen_device("cuda:99")
    assert chosen_device("cpu") == "cpu"


def test_a_feature_extractor_of_another_size_is_refused(triple: Triple) -> None:
    import json

    path = triple["base"] / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "feature_size": 128}))
    with pytest.raises(SourceError, match="gives 128 mel bands and its model takes 80"):
        load_recognizer(triple["base"], CPU)


def test_lengths_of_the_tests_need_padding() -> None:
    assert len(set(LENGTHS)) > 3 and any(a > b for a, b in itertools.pairwise(LENGTHS))
