"""From a merge to CTranslate2 and faster-whisper, by the commands of docs/deployment.md.

Nothing is downloaded: faster-whisper is given directories, and the Hub is switched off for the converter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import RATE, read_clips, word_edits

import hsa
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

NEEDED = "is not installed; `make test-integrations` installs the extra `deploy`"
ctranslate2 = pytest.importorskip("ctranslate2", reason=f"ctranslate2 {NEEDED}")
faster_whisper = pytest.importorskip("faster_whisper", reason=f"faster-whisper {NEEDED}")

Triple = dict[str, Path]
WINDOW = 30 * RATE
MAX_NEW_TOKENS = 224
COPIED = ("tokenizer.json", "preprocessor_config.json")
GREEDY: Mapping[str, Any] = {
    "language": "en",
    "beam_size": 1,
    "temperature": 0.0,
    "without_timestamps": True,
    "condition_on_previous_text": False,
    "vad_filter": False,
    "compression_ratio_threshold": None,
    "log_prob_threshold": None,
    "no_speech_threshold": None,
    "max_new_tokens": MAX_NEW_TOKENS,
}
"""Options of faster-whisper's `transcribe` that make it decode as `generate(num_beams=1, do_sample=False)` does."""


def convert(model: Path, output: Path, *more: str) -> Path:
    """Run the converter as the documentation does."""
    command = [str(Path(sys.executable).with_name("ct2-transformers-converter")), "--model", str(model)]
    done = subprocess.run(
        [*command, "--output_dir", str(output), *more],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def load(directory: Path, compute_type: str) -> Any:
    return faster_whisper.WhisperModel(
        str(directory), device="cpu", compute_type=compute_type, cpu_threads=1, local_files_only=True
    )


def transcribe(model: Any, samples: np.ndarray) -> str:
    """What faster-whisper hears in a clip, padded to the window that transformers pads it to."""
    padded = np.pad(samples, (0, WINDOW - len(samples)))
    segments, _ = model.transcribe(padded, **GREEDY)
    return "".join(segment.text for segment in segments).strip()


@dataclass(frozen=True)
class Heard:
    """What transformers hears: log-mel features [clips, mels, frames], token ids without special ones, and texts."""

    features: torch.Tensor
    tokens: list[list[int]]
    texts: list[str]


@pytest.fixture(scope="session")
def speech(clips: Path) -> list[tuple[str, np.ndarray]]:
    """Every clip that transcripts.tsv names: file and float32 samples at 16 kHz."""
    found = [(name, samples) for name, _, samples in read_clips(clips)]
    assert all(len(samples) <= WINDOW for _, samples in found)
    return found


@pytest.fixture(scope="session")
def merged(real: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "merged"
    hsa.merge(**real, output=output, k=0.6, lam=0.1)
    return output


@pytest.fixture(scope="session")
def heard(merged: Path, speech: Sequence[tuple[str, np.ndarray]]) -> Heard:
    return hear(merged, speech)


def hear(checkpoint: Path, speech: Sequence[tuple[str, np.ndarray]]) -> Heard:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    processor = WhisperProcessor.from_pretrained(checkpoint, local_files_only=True)
    model.eval().generation_config.max_length = None
    samples = [each for _, each in speech]
    features = processor.feature_extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features
    tokens = []
    for part in features.split(30):
        tokens += model.generate(part, num_beams=1, do_sample=False, max_new_tokens=MAX_NEW_TOKENS).tolist()
    special = set(processor.tokenizer.all_special_ids)
    texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Heard(features, [[t for t in row if t not in special] for row in tokens], [text.strip() for text in texts])


def disagreements(
    speech: Sequence[tuple[str, np.ndarray]], expected: Sequence[str], found: Sequence[str]
) -> list[tuple[str, str, str]]:
    rows = zip(speech, expected, found, strict=True)
    return [(name, theirs, ours) for (name, _), theirs, ours in rows if theirs != ours]


def copy_options(names: Sequence[str] = COPIED) -> list[str]:
    return ["--copy_files", *names]


@pytest.fixture(scope="session")
def converted(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(
        merged, tmp_path_factory.mktemp("converted") / "float32", "--quantization", "float32", *copy_options()
    )


def test_every_transcript_is_that_of_transformers(
    converted: Path, speech: Sequence[tuple[str, np.ndarray]], heard: Heard
) -> None:
    model = load(converted, "float32")
    assert disagreements(speech, heard.texts, [transcribe(model, samples) for _, samples in speech]) == []
    assert sum(map(bool, heard.texts)) > 0.9 * len(speech)


def test_the_same_features_give_the_same_tokens(converted: Path, heard: Heard) -> None:
    """CTranslate2 alone, without faster-whisper's own features and options."""
    model = ctranslate2.models.Whisper(str(converted), device="cpu", compute_type="float32", intra_threads=1)
    prompt = vocabulary_ids(converted, "<|startoftranscript|>", "<|notimestamps|>")
    found = []
    for row in heard.features.numpy():
        view = ctranslate2.StorageView.from_array(np.ascontiguousarray(row[None]))
        (result,) = model.generate(view, [prompt], beam_size=1, max_length=len(prompt) + MAX_NEW_TOKENS)
        found.append(result.sequences_ids[0])
    assert found == heard.tokens


def vocabulary_ids(converted: Path, *tokens: str) -> list[int]:
    vocabulary = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))
    return [vocabulary.index(token) for token in tokens]


def test_the_converted_weights_are_the_merged_ones(converted: Path, real: Triple, tmp_path: Path) -> None:
    """The converter takes the merge, not primary: other heads give another file of the same size."""
    other = convert(real["primary"], tmp_path / "primary", "--quantization", "float32", *copy_options())
    ours, theirs = (directory / "model.bin" for directory in (converted, other))
    assert ours.stat().st_size == theirs.stat().st_size
    assert ours.read_bytes() != theirs.read_bytes()


def test_int8_hears_nearly_the_same(
    merged: Path, converted: Path, tmp_path: Path, speech: Sequence[tuple[str, np.ndarray]], heard: Heard
) -> None:
    small = convert(merged, tmp_path / "int8", "--quantization", "int8", *copy_options())
    assert (small / "model.bin").stat().st_size < 0.3 * (converted / "model.bin").stat().st_size
    model = load(small, "int8")
    found = [transcribe(model, samples) for _, samples in speech]
    wrong = sum(word_edits(one.split(), other.split()) for one, other in zip(heard.texts, found, strict=True))
    assert wrong < 0.1 * sum(len(text.split()) for text in heard.texts), disagreements(speech, heard.texts, found)


def test_files_that_the_merge_lacks_are_made_from_those_it_has(
    real: Triple, converted: Path, tmp_path: Path, speech: Sequence[tuple[str, np.ndarray]], heard: Heard
) -> None:
    """A fine-tune with vocab.json, merges.txt and processor_config.json alone, as they are often saved."""
    from transformers import WhisperFeatureExtractor, WhisperTokenizerFast

    sources = {role: bare(path, tmp_path / "sources" / role) for role, path in real.items()}
    hsa.merge(**sources, output=tmp_path / "merged", k=0.6, lam=0.1)
    assert not any((tmp_path / "merged" / name).exists() for name in COPIED)
    output = convert(tmp_path / "merged", tmp_path / "converted", "--quantization", "float32")
    WhisperTokenizerFast.from_pretrained(tmp_path / "merged", local_files_only=True).save_pretrained(output)
    extractor = WhisperFeatureExtractor.from_pretrained(tmp_path / "merged", local_files_only=True)
    extractor.save_pretrained(output)
    assert (output / "model.bin").read_bytes() == (converted / "model.bin").read_bytes()
    model = load(output, "float32")
    assert model.feat_kwargs["feature_size"] == 80
    few = speech[:10]
    assert disagreements(few, heard.texts[:10], [transcribe(model, samples) for _, samples in few]) == []


def bare(source: Path, target: Path) -> Path:
    """A copy of a checkpoint without tokenizer.json, whose feature extractor stands in processor_config.json."""
    shutil.copytree(source, target)
    (target / "tokenizer.json").unlink()
    extractor = json.loads((target / "preprocessor_config.json").read_text(encoding="utf-8"))
    (target / "preprocessor_config.json").unlink()
    processor = {"feature_extractor": extractor, "processor_class": "WhisperProcessor"}
    (target / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return target


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_outputs_in_every_dtype_and_in_shards_are_converted(dtype: str, tmp_path: Path) -> None:
    """The float32 conversion holds the checkpoint's own values: it is that of the checkpoint widened to float32."""
    triple = write_triple(tmp_path / "triple", SHAPES["test"], dtype="float32")
    hsa.merge(**triple, output=tmp_path / "merged", dtype=dtype, max_shard_size="100KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    found = convert(tmp_path / "merged", tmp_path / "converted", "--quantization", "float32")
    hsa.merge(
        base=tmp_path / "merged",
        primary=tmp_path / "merged",
        secondary=tmp_path / "merged",
        output=tmp_path / "widened",
        dtype="float32",
        k=0,
    )
    widened = convert(tmp_path / "widened", tmp_path / "expected", "--quantization", "float32")
    assert (found / "model.bin").read_bytes() == (widened / "model.bin").read_bytes()
