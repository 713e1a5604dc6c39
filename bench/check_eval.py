"""Hold `hsa eval` to the word error rates that the page of the real set states, measured by plain torch.

    python bench/check_eval.py --triple DIR --real DIR [--sets NAME ...] [--models NAME ...] [--output DIR] [--plain]

`--triple` holds `base`, `primary`, `secondary` and `tertiary` (default: HSA_REAL_TRIPLE), `--real` README.md with the
table of all four sets and the folders of clips (default: the folder above HSA_REAL_CLIPS). Each model of the table is
merged by `hsa.merge` in float32, decoded greedily in float32 on the CPU, and scored by both normalisers. Utterances are
cut after 64 tokens, as those of the table were: base repeats itself without end on seven of the clips. Ends with 1
where a rate is more than two words from the one stated. With `--output` a second run decodes nothing again. With
`--plain` transformers alone decodes every clip too, one at a time, in the same run, and any other count of errors is a
failure: so are transcripts that a batch of 16 changed. All of it takes an hour or more on two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hsa
from hsa.evaluation.transcription import Step
from hsa.evaluation.transformers_calls import quiet_transformers

SETS = {"A dev": "clips_dev", "A test": "clips", "B dev": "clips_noisy_dev", "B test": "clips_noisy_test"}
MOST_WORDS = 2
"""How far the number of errors on a set may be from the one stated: other versions of torch round otherwise."""
MAX_TOKENS = 64
"""With this number, and no other from 20 to 224, the errors of base are those stated, on every set."""


@dataclass(frozen=True)
class Mixture:
    """A merge of the table: its method, its models and settings."""

    method: str
    models: tuple[str, ...]
    settings: dict[str, Any]

    def write(self, triple: Path, output: Path) -> None:
        models = [triple / name for name in self.models]
        based = {} if self.method == "linear" else {"base": triple / "base"}
        hsa.merge(
            method=self.method, models=models, output=output, dtype="float32", sync=False, **based, **self.settings
        )


TWO, THREE = ("primary", "secondary"), ("primary", "secondary", "tertiary")
MODELS: dict[str, Mixture | None] = {
    "base": None,
    "primary": None,
    "secondary": None,
    "tertiary": None,
    "average of primary and secondary": Mixture("linear", TWO, {}),
    "average of all three": Mixture("linear", THREE, {}),
    "task arithmetic 0.7, all three": Mixture("task_arithmetic", THREE, {"weights": [0.7, 0.7, 0.7]}),
    "TIES density 0.5, all three": Mixture("ties", THREE, {"density": 0.5}),
    "HSA k 0.6, lambda 0.1": Mixture("hsa", TWO, {"k": 0.6, "lam": 0.1}),
    "HSA k 1.0, lambda 0.1": Mixture("hsa", TWO, {"k": 1.0, "lam": 0.1}),
}
"""By the names of their rows in the table."""


def stated(page: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """The table: by model and set, basic and english in %."""
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        pairs = [re.fullmatch(r"([0-9.]+) / ([0-9.]+)", cell) for cell in cells[1:5]]
        if len(cells) == 6 and all(pairs):
            values = [(float(pair[1]), float(pair[2])) for pair in pairs if pair]
            rows[cells[0]] = dict(zip(SETS, values, strict=True))
    return rows


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    clips = os.environ.get("HSA_REAL_CLIPS")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triple", type=Path, default=os.environ.get("HSA_REAL_TRIPLE") or None)
    parser.add_argument("--real", type=Path, default=Path(clips).parent if clips else None)
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plain", action="store_true", help="decode with transformers alone as well, and compare")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    if given.triple is None or given.real is None:
        print("check_eval measured nothing: give --triple and --real, or HSA_REAL_TRIPLE and HSA_REAL_CLIPS")
        return 1
    table = stated(given.real / "README.md")
    with tempfile.TemporaryDirectory(prefix="check-eval-") as scratch:
        work = given.output or Path(scratch) / "evaluation"
        models = {name: _model(name, given.triple, Path(scratch)) for name in given.models}
        texts = {}
        if given.plain:
            with quiet_transformers():
                texts = _plain_texts(models, given.real, given.sets)
        wrong = 0
        for place, (column, normalizer) in enumerate((("basic", "plain"), ("english", "whisper"))):
            found = hsa.evaluate(
                [*models.values()],
                [hsa.data(given.real / SETS[name], name=name) for name in given.sets],
                normalizer=normalizer,
                device="cpu",
                max_tokens=MAX_TOKENS,
                output=work,
                progress=_progress if sys.stderr.isatty() else None,
            )
            wrong += _compare(found, models, table, place, column)
            wrong += _compare_plainly(found, models, texts, normalizer) if texts else 0
    as_well = ", and those of transformers alone to the word" if given.plain else ""
    print(f"{wrong} rates are others" if wrong else f"all rates are as stated within {MOST_WORDS} words{as_well}")
    return 1 if wrong else 0


def _model(name: str, triple: Path, scratch: Path) -> Path:
    mixture = MODELS[name]
    if mixture is None:
        return triple / name
    output = scratch / re.sub(r"[^a-zA-Z0-9.]+", "-", name)
    mixture.write(triple, output)
    return output


def _compare(
    found: hsa.Evaluation,
    models: dict[str, Path],
    table: dict[str, dict[str, tuple[float, float]]],
    place: int,
    column: str,
) -> int:
    wrong = 0
    for (name, _), scores in zip(models.items(), found.models, strict=True):
        for data in found.sets:
            words = scores.score("set", data.name).words
            expected = table[name][data.name][place]
            off = words.errors - round(expected / 100 * words.reference)
            wrong += abs(off) > MOST_WORDS
            print(f"{name:34} {data.name:7} {column:8} {100 * words.rate:6.2f} stated {expected:6.2f} {off:+d} words")
    return wrong


def _plain_texts(models: dict[str, Path], real: Path, sets: Sequence[str]) -> dict[tuple[str, str], dict[str, str]]:
    """What transformers makes of each clip, one at a time, in float32: by model and set, then by clip."""
    import soundfile
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    texts: dict[tuple[str, str], dict[str, str]] = {}
    for name, path in models.items():
        model = WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
        processor = WhisperProcessor.from_pretrained(path, local_files_only=True)
        for data in sets:
            found = texts[name, data] = {}
            for clip in sorted((real / SETS[data]).glob("*.flac")):
                samples, rate = soundfile.read(clip, dtype="float32")
                features = processor(samples, sampling_rate=rate, return_tensors="pt").input_features
                tokens = model.generate(features, do_sample=False, num_beams=1, max_new_tokens=MAX_TOKENS)
                (found[clip.name],) = processor.batch_decode(tokens, skip_special_tokens=True)
    return texts


def _compare_plainly(
    found: hsa.Evaluation, models: dict[str, Path], texts: dict[tuple[str, str], dict[str, str]], normalizer: str
) -> int:
    """How many rates differ from those of the texts of transformers, counted by jiwer on all utterances at once."""
    import jiwer

    from hsa.evaluation.normalizers import normalizer as named

    wrong = 0
    for (name, path), scores in zip(models.items(), found.models, strict=True):
        normalize = named(normalizer, model=path)
        for data in found.sets:
            references = [" ".join(normalize(each.text).split()) for each in data.utterances]
            heard = [" ".join(normalize(texts[name, data.name][each.audio.name]).split()) for each in data.utterances]
            ours = [each.hypothesis for each in scores.utterances if each.set == data.name]
            counted = jiwer.process_words(references, heard)
            expected = counted.substitutions + counted.deletions + counted.insertions
            errors = scores.score("set", data.name).words.errors
            changed = sum(one != other for one, other in zip(ours, heard, strict=True))
            wrong += errors != expected or changed > 0
            print(f"{name:34} {data.name:7} {errors} errors, transformers {expected}; {changed} transcripts differ")
    return wrong


def _progress(step: Step) -> None:
    print(f"\r{step.done} of {step.total} utterances", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
