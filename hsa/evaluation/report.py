"""The result of an evaluation: the scores of each model, and the data and options of the measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.errors import RequestError, listed, one_line, shown
from hsa.evaluation.model_scores import ModelScores
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import PreparedSet
from hsa.evaluation.table import render

KIND = "hsa-evaluation"
FORMAT = 1


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    `models` are in the order given; a baseline that is not among them comes first. `normalizer` is the one that was
    used, never `auto`. `decoded` counts the utterances that this run decoded, `audio_seconds` is their length, and
    `seconds` the wall time of the run. Transcripts of earlier runs in `output` were reused. `notes` concern the
    figures, `run_notes` only this run.

    Example:
        >>> found = hsa.evaluate(["m1", "merged"], "test.tsv", baseline="m1")
        >>> [model.name for model in found.models], found["merged"].scores[0].difference.interval
        (['m1', 'merged'], Interval(low=..., high=...))
    """

    models: tuple[ModelScores, ...]
    sets: tuple[PreparedSet, ...]
    baseline: str | None
    normalizer: str
    confidence: float
    options: DecodingOptions
    device: str
    output: Path | None
    decoded: int
    audio_seconds: float
    seconds: float
    notes: tuple[str, ...]
    run_notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ModelScores:
        """The scores of a model by its name. RequestError if there is no such model."""
        for each in self.models:
            if each.name == name:
                return each
        raise RequestError(
            f"no model is named {shown(name)}; there is {listed(shown(each.name) for each in self.models)}"
        )

    def __repr__(self) -> str:
        rates = ", ".join(f"{each.name} {100 * each.wer:.2f} %" for each in self.models)
        return one_line(f"<hsa.Evaluation: WER {rates}>")

    @property
    def table(self) -> str:
        """The scores as text, as `hsa eval` prints them."""
        return render(
            self.models,
            self.sets,
            normalizer=self.normalizer,
            confidence=self.confidence,
            baseline=self.baseline,
        )

    def scores_dict(self) -> dict[str, Any]:
        """The content of scores.json. It does not depend on when or in how many runs it was measured."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "baseline": self.baseline,
            "normalizer": self.normalizer,
            "confidence": self.confidence,
            "decoding": {**self.options.as_dict(), "device": self.device},
            "sets": [_set(each) for each in self.sets],
            "models": [each.as_dict() for each in self.models],
            "notes": list(self.notes),
        }

    def as_dict(self) -> dict[str, Any]:
        """The content that `hsa eval --json` prints: scores.json, and facts about this run."""
        run = {
            "output": None if self.output is None else str(self.output),
            "decoded": self.decoded,
            "audio_seconds": self.audio_seconds,
            "seconds": self.seconds,
            "notes": list(self.run_notes),
        }
        return {**self.scores_dict(), "run": run}


def _set(data: PreparedSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "path": str(data.path),
        "utterances": len(data.utterances),
        "audio_seconds": sum(data.seconds.values()),
        "digest": data.digest,
    }
