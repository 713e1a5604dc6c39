"""The search that people write by hand: write a checkpoint for each candidate, load it, decode all clips, score, keep
the best. What `hsa search` is compared with.

    python bench/search_loop.py CANDIDATES.json SCRATCH --processor DIR --clips DIR [--limit N] [--batch 16]

CANDIDATES holds a list of {"name": ..., "folder": ...}, a checkpoint as it is, or {"name": ..., "merge": {...}}, the
keywords of `hsa.merge`. Merges are written without digests and without waiting for the disk, as such loops do. Prints
scores, texts and seconds as JSON; the best checkpoint that was written stays in SCRATCH.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

import hsa


def transcribe(folder: Path, processor: Any, files: Sequence[Path], batch: int) -> tuple[list[str], float]:
    """The text of each file by the checkpoint in a folder, and the seconds that its loading took."""
    started = time.perf_counter()
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    loading = time.perf_counter() - started
    texts: list[str] = []
    for first in range(0, len(files), batch):
        audio = [soundfile.read(file, dtype="float32")[0] for file in files[first : first + batch]]
        features = processor(audio, sampling_rate=16000, return_tensors="pt").input_features
        with torch.inference_mode():
            tokens = model.generate(features, max_new_tokens=224)
        texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts, loading


def score(processor: Any, references: Sequence[str], texts: Sequence[str]) -> float:
    """The word error rate after Whisper's own normalisation."""
    normalize = EnglishTextNormalizer(processor.tokenizer.english_spelling_normalizer)
    return float(jiwer.wer([normalize(text) for text in references], [normalize(text) for text in texts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--processor", type=Path, required=True, help="a checkpoint with tokenizer and features")
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="only the first clips (default: all)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.scratch.mkdir(parents=True, exist_ok=True)
    lines = (options.clips / "transcripts.tsv").read_text(encoding="utf-8").splitlines()[: options.limit or None]
    names, references = zip(*(line.split("\t") for line in lines), strict=True)
    processor = WhisperProcessor.from_pretrained(options.processor)
    best: dict[str, Any] = {"wer": float("inf")}
    found, writing, loading, decoding = [], 0.0, 0.0, 0.0
    for number, candidate in enumerate(json.loads(options.candidates.read_text(encoding="utf-8"))):
        started = time.perf_counter()
        folder = Path(candidate.get("folder") or options.scratch / str(number))
        if "merge" in candidate:
            hsa.merge(**candidate["merge"], output=folder, digest=False, sync=False)
        written = time.perf_counter()
        texts, seconds = transcribe(folder, processor, [options.clips / name for name in names], options.batch)
        decoding += time.perf_counter() - written - seconds
        writing, loading = writing + written - started, loading + seconds
        wer = score(processor, references, texts)
        found.append({"name": candidate["name"], "wer": wer, "texts": dict(zip(names, texts, strict=True))})
        worse = {"wer": wer, "folder": folder, "merge": "merge" in candidate}
        if wer < best["wer"]:
            best, worse = worse, best
        if worse.get("merge"):
            shutil.rmtree(worse["folder"])
    print(json.dumps({"found": found, "writing": writing, "loading": loading, "decoding": decoding}))


if __name__ == "__main__":
    main()
