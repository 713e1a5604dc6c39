"""Word error rate of every merge method at its defaults, on three fine-tunes of one Whisper and two kinds of speech.

    python bench/bench_wer_methods.py [--triple DIR] [--sets NAME=DIR [NAME=DIR ...]] [--limit N]

The triple holds `base`, `primary`, `secondary` and `tertiary` (default: HSA_REAL_TRIPLE); each set is a folder of FLAC
files with `transcripts.tsv`, see bench_wer (default: HSA_REAL_CLIPS, else `clips` in the triple). Without them it
measures nothing, and says so. A method gets base where it needs one, and as many of the three fine-tunes as it
takes, in this order. Settings that have no default are those of SETTINGS. What is written is rounded once, to float32.
No figures without a correctness gate: what `Merger.apply_` leaves in the model must be, bit for bit, the checkpoint
that `hsa.merge` writes. Appends rows to bench/results/wer_methods.csv. Rates are in % of all words, by Whisper's own
normaliser; intervals are 95 % bootstraps over clips.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rows
import torch
from bench_wer import (
    PACKAGES,
    bits,
    count_errors,
    gate_scoring,
    load_model,
    make_normaliser,
    model_name,
    parameters_of,
    rate_and_interval,
    read_clips,
    transcribe,
    why_not,
)
from cases import CAVEATS

import hsa
from hsa.methods.registry import methods

FINE_TUNES = ("primary", "secondary", "tertiary")
SETTINGS: Mapping[str, dict[str, Any]] = {
    "slerp": {"t": 0.5},
    "nearswap": {"t": 0.001},
}
"""Values of settings that have no default."""

LEFT_OUT = {"hsa_script": "its checkpoints are those of hsa up to rounding, by another program's operations"}


@dataclass(frozen=True)
class Variant:
    """A model by its role, or a merge by a method."""

    name: str
    method: str = ""
    sources: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return SETTINGS.get(self.method, {})

    @property
    def models(self) -> int:
        return len(self.sources.get("models", ())) or 1


def variants(folder: Path) -> Iterator[Variant]:
    """The sources, and a merge by every method."""
    yield from map(Variant, FINE_TUNES)
    for name, method in methods().items():
        if name in LEFT_OUT:
            print(f"{name} is left out: {LEFT_OUT[name]}", file=sys.stderr)
            continue
        contract = method.contract
        models = [folder / role for role in FINE_TUNES[: contract.most]]
        base = {"base": folder / "base"} if contract.base == "required" else {}
        yield Variant(name, name, {**base, "models": models})
    yield Variant("base")  # last: what it makes of unknown speech is long, and takes long


def become(model: Any, variant: Variant, folder: Path, scratch: Path) -> None:
    """Write a variant into the model, which holds primary outside of what is merged; a merge passes its gate."""
    if not variant.method:
        copy_into(model, folder / variant.name)
        return
    copy_into(model, folder / FINE_TUNES[0])
    hsa.Merger(method=variant.method, **variant.sources).apply_(model, **variant.settings)
    out = scratch / variant.name
    hsa.merge(method=variant.method, **variant.sources, **variant.settings, output=out, dtype="float32", sync=False)
    found, expected = parameters_of(model), parameters_of(load_model(out))
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [name for name in found if name in expected and not torch.equal(bits(found[name]), bits(expected[name]))]
    if wrong:
        raise SystemExit(f"correctness gate: {wrong[0]} after apply_ by {variant.name} is not what hsa.merge writes")


def copy_into(model: Any, folder: Path) -> None:
    values = parameters_of(load_model(folder))
    with torch.no_grad():
        for name, tensor in parameters_of(model).items():
            tensor.copy_(values[name])


def measure(folder: Path, sets: Mapping[str, Path], limit: int, batch: int) -> Iterator[dict[str, Any]]:
    from transformers import WhisperProcessor

    processor = WhisperProcessor.from_pretrained(folder / "base", local_files_only=True)
    extractor, normalise = processor.feature_extractor, make_normaliser(folder / "base")
    heard = {}
    for name, clips in sets.items():
        samples, references = read_clips(clips, limit, extractor.sampling_rate, extractor.chunk_length)
        gate_scoring(references, normalise)
        features = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
        heard[name] = features, references
    model = load_model(folder / FINE_TUNES[0])
    with tempfile.TemporaryDirectory(prefix="hsa-bench-") as scratch:
        for variant in variants(folder):
            become(model, variant, folder, Path(scratch))
            for name, (features, references) in heard.items():
                started = time.perf_counter()
                said = transcribe(model, processor.tokenizer, features, batch)
                errors, words = count_errors(references, said, normalise)
                rate = rate_and_interval(errors, words)
                print(f"{variant.name} on {name}: {rate[0]:.2f} %", file=sys.stderr, flush=True)
                yield {
                    "method": variant.name,
                    "settings": " ".join(f"{key} {value}" for key, value in variant.settings.items()),
                    "models": variant.models,
                    "set": name,
                    "clips": len(words),
                    "words": int(words.sum()),
                    "errors": int(errors.sum()),
                    **dict(zip(("wer", "wer_low", "wer_high"), rate, strict=True)),
                    "seconds": round(time.perf_counter() - started, 1),
                }


def table(measured: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method, and a column for each set."""
    names = list(dict.fromkeys(row["set"] for row in measured))
    cells = {
        (row["method"], row["set"]): f"{row['wer']:.2f} ({row['wer_low']:.2f} to {row['wer_high']:.2f})"
        for row in measured
    }
    lines = {row["method"]: (row["method"], row["settings"], row["models"]) for row in measured}
    return rows.markdown(
        ("method", "settings", "models", *(f"WER % on {name}" for name in names)),
        ((*line, *(cells[method, name] for name in names)) for method, line in lines.items()),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triple", type=Path, default=os.environ.get("HSA_REAL_TRIPLE") or None)
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument("--limit", type=int, default=0, help="only the first clips of each set (default: all)")
    parser.add_argument("--batch", type=int, default=20, help="clips transcribed at once")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of wer_methods.csv")
    options = parser.parse_args(arguments)
    sets = {name: Path(folder) for name, _, folder in (each.partition("=") for each in options.sets)}
    clips = os.environ.get("HSA_REAL_CLIPS") or (options.triple and options.triple / "clips")
    if not sets and clips:
        sets = {Path(clips).name: Path(clips)}
    reasons = [why_not(options.triple, folder, ("base", *FINE_TUNES)) for folder in sets.values() or (None,)]
    if any(reasons):
        print(f"bench_wer_methods measured nothing: {next(filter(None, reasons))}")
        return
    about = {**rows.about(PACKAGES), "model": model_name(options.triple)}
    measured = []
    for row in measure(options.triple, sets, options.limit, options.batch):
        rows.append("wer_methods", [{**about, **row}], options.results)
        measured.append(row)
    print("\n".join([table(measured), "", CAVEATS]))


if __name__ == "__main__":
    main()
