"""What an evaluation found: the scores of each model, and what they were measured on and with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.errors import RequestError, listed, one_line, shown
from hsa.evaluation.models import OpenModel
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import PreparedSet
from hsa.evaluation.scores import Group, Interval, Score, UtteranceScore

KIND = "hsa-evaluation"
FORMAT = 1

COLUMNS = (
    "group",
    "name",
    "utterances",
    "dropped",
    "words",
    "substitutions",
    "deletions",
    "insertions",
    "wer",
    "wer_low",
    "wer_high",
    "characters",
    "character_errors",
    "cer",
    "cer_low",
    "cer_high",
    "difference",
    "difference_low",
    "difference_high",
)
"""Of a score, in scores.csv and scores.json. Rates are shares: 0.05 is 5 %. `words` and `characters` are those of the
references, `difference` is the word error rate minus the baseline's."""


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model: of all utterances first, then of each set, domain and speaker.

    `utterances` are the scores of each utterance, in the order of the sets.

    Example:
        >>> scores = hsa.evaluate("merged", "test.tsv").models[0]  # doctest: +SKIP
        >>> scores.wer, scores.score("speaker", "anna").words.errors  # doctest: +SKIP
        (0.0797, 4)
    """

    model: OpenModel
    scores: tuple[Score, ...]
    utterances: tuple[UtteranceScore, ...]

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def wer(self) -> float:
        """Word error rate over all sets, as a share."""
        return self.scores[0].words.rate

    @property
    def cer(self) -> float:
        """Character error rate over all sets, as a share."""
        return self.scores[0].characters.rate

    def score(self, group: Group, name: str) -> Score:
        """The score of a set, a domain or a speaker. RequestError where there is none of that name."""
        found = {each.name: each for each in self.scores if each.group == group}
        if name not in found:
            names = listed(map(shown, found)) if found else "none"
            raise RequestError(f"there is no {group} named {shown(name)}; there is {names}")
        return found[name]

    def as_dict(self) -> dict[str, Any]:
        return {**self.model.as_dict(), "given": self.model.given, "scores": [score_row(each) for each in self.scores]}


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    `models` are in the order given; a baseline that is none of them comes first. `normalizer` is the one that was used,
    which `auto` is not. `decoded` counts the utterances that this run decoded, `audio_seconds` how long they are and
    `seconds` the wall time of the run; transcripts of earlier runs in `output` were read. `notes` concern
    the figures, `run_notes` this run alone.

    Example:
        >>> found = hsa.evaluate(["primary", "merged"], "test.tsv", baseline="primary")  # doctest: +SKIP
        >>> found["merged"].scores[0].difference.interval  # doctest: +SKIP
        Interval(low=-0.068, high=-0.004)
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
        """The scores of a model by its name. RequestError where there is none of that name."""
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
        from hsa.evaluation.table import render

        return render(self)

    def scores_dict(self) -> dict[str, Any]:
        """What stands in scores.json: nothing in it depends on when and in how many runs it was measured."""
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
        """What `hsa eval --json` prints: scores.json, and what this run did."""
        run = {
            "output": None if self.output is None else str(self.output),
            "decoded": self.decoded,
            "audio_seconds": self.audio_seconds,
            "seconds": self.seconds,
            "notes": list(self.run_notes),
        }
        return {**self.scores_dict(), "run": run}


def score_row(score: Score) -> dict[str, Any]:
    """A score by the names of its columns.

    Example:
        >>> score_row(score)["wer"]  # doctest: +SKIP
        0.0797
    """
    words, characters, difference = score.words, score.characters, score.difference
    values = (
        *(score.group, score.name, score.utterances, score.dropped),
        *(words.reference, words.substitutions, words.deletions, words.insertions),
        *(_rate(words.rate), *_ends(score.wer)),
        *(characters.reference, characters.errors, _rate(characters.rate), *_ends(score.cer)),
        *((None, None, None) if difference is None else (difference.wer, *_ends(difference.interval))),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _rate(value: float) -> float | None:
    return None if math.isnan(value) else value


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)


def _set(data: PreparedSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "path": str(data.path),
        "utterances": len(data.utterances),
        "audio_seconds": sum(data.seconds.values()),
        "digest": data.digest,
    }


def sets_text(sets: Sequence[PreparedSet]) -> str:
    """Sets in a few words.

    Example:
        >>> sets_text(sets)  # doctest: +SKIP
        '2 sets, 120 utterances, 9.3 minutes of speech'
    """
    utterances = sum(len(each.utterances) for each in sets)
    seconds = sum(sum(each.seconds.values()) for each in sets)
    sets_named = f"{len(sets)} sets" if len(sets) > 1 else f"set {sets[0].name}"
    speech = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"
    return f"{sets_named}, {utterances} utterance{'s' * (utterances != 1)}, {speech} of speech"
