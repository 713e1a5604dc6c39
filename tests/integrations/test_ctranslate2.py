"""From a merge to CTranslate2 and faster-whisper, by the commands of docs/deployment.md.

Nothing is downloaded: faster-whisper is given directories, and the Hub is switched off for the converter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hsa

NEEDED = "is not installed; `make test-integrations` installs the extra `deploy`"
ctranslate2 = pytest.importorskip("ctranslate2", reason=f"ctranslate2 {NEEDED}")
faster_whisper = pytest.importorskip("faster_whisper", reason=f"faster-whisper {NEEDED}")

Triple = dict[str, Path]
RATE = 16_000
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
        str(directory), device="cpu", compute_type=compute_type, cpu_threads=2, local_files_only=True
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
    import soundfile

    lines = (clips / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    names = [name for name in (line.partition("\t")[0] for line in lines) if name.endswith(".flac")]
    assert names
    found = []
    for name in names:
        samples, rate = soundfile.read(clips / name, dtype="float32")
        assert rate == RATE and samples.ndim == 1 and len(samples) <= WINDOW, name
        found.append((name, samples))
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
