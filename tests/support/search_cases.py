"""Small Whisper fine-tunes with made-up numbers, and noise whose references one of their merges writes, for tests of
searches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import hsa
from hsa.evaluation.audio import read_audio
from hsa.evaluation.decoding import load_recognizer
from hsa.evaluation.normalizers import plain
from hsa.evaluation.options import DecodingOptions
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

RATE = 16_000
HIDDEN = {"method": "task_arithmetic", "lam": 0.7, "weights": [0.4, 0.9, 0.2]}
"""The merge whose transcripts are the references."""

NORMALIZER = "plain"


def write_models(folder: Path, dtype: str = "float16") -> dict[str, Any]:
    """Base and three fine-tunes that are far from it, as sources of a search."""
    paths = write_triple(folder, SHAPES["test"], dtype=dtype, delta=0.05, more=("tertiary",))
    for path in paths.values():
        _write_words(Path(path))
    return {"base": str(paths["base"]), "models": [str(paths[name]) for name in ("primary", "secondary", "tertiary")]}


def _write_words(folder: Path) -> None:
    """Let each token be eight words, the bits of its number: models that write different tokens get some words right.

    The tokens of the made-up tokenizer are bytes, most of which are no letters.
    """
    path = folder / "vocab.json"
    numbers = json.loads(path.read_text(encoding="utf-8"))
    words = {
        "".join(f"Ġ{letter}{number >> bit & 1}" for bit, letter in enumerate("abcdefgh")): number
        for number in range(256)
    }
    special = {token: number for token, number in numbers.items() if number not in words.values()}
    path.write_text(json.dumps({**words, **special}), encoding="utf-8")


def write_clips(folder: Path, count: int, seed: int) -> list[Path]:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        tone = np.sin(np.arange(RATE) * generator.uniform(0.02, 0.9)) * generator.uniform(0.1, 0.6)
        paths.append(folder / f"clip_{number:03}.wav")
        soundfile.write(paths[-1], (tone + 0.05 * generator.standard_normal(RATE)).astype(np.float32), RATE)
    return paths


def write_table(clips: Sequence[Path], texts: Sequence[str]) -> Path:
    lines = ["file\ttext", *(f"{clip.name}\t{text}" for clip, text in zip(clips, texts, strict=True))]
    table = clips[0].parent / f"{clips[0].parent.name}.tsv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def references(folder: Path, sources: Mapping[str, Any], clips: Sequence[Path]) -> list[str]:
    """What the hidden merge writes of clips."""
    output = folder / "hidden"
    if not output.exists():
        hsa.merge(**sources, **HIDDEN, output=output, sync=False)
    recognizer = load_recognizer(output, DecodingOptions())
    set_of_clips = hsa.data(write_table(clips, ["x"] * len(clips)))
    texts = recognizer.transcribe(recognizer.features([read_audio(each, RATE) for each in set_of_clips.utterances]))
    return [plain(text).strip() for text in texts]


def write_speech(folder: Path, sources: Mapping[str, Any], count: int = 10, seed: int = 1) -> Path:
    """A set of clips with the references of the hidden merge. Returns the table."""
    clips = write_clips(folder, count, seed)
    return write_table(clips, references(folder.parent, sources, clips))
