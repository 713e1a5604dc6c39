"""The scores of one model, and the row of a score in scores.csv."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hsa.errors import RequestError, listed, shown
from hsa.evaluation.models import OpenModel
from hsa.evaluation.scores import Group, Interval, Score, UtteranceScore

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
"""The columns of a score in scores.csv and scores.json. Rates are fractions: 0.05 is 5 %. `words` and `characters`
count those of the references. `difference` is the word error rate minus the baseline's."""


@dataclass(frozen=True)
class ModelScores:
    """The scores of one model: first of all utterances, then of each set, domain and speaker.

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
        """Word error rate over all sets, as a fraction."""
        return self.scores[0].words.rate

    @property
    def cer(self) -> float:
        """Character error rate over all sets, as a fraction."""
        return self.scores[0].characters.rate

    def score(self, group: Group, name: str) -> Score:
        """The score of a set, a domain or a speaker. RequestError if none has that name."""
        found = {each.name: each for each in self.scores if each.group == group}
        if name not in found:
            names = listed(map(shown, found)) if found else "none"
            raise RequestError(f"there is no {group} named {shown(name)}; there is {names}")
        return found[name]

    def as_dict(self) -> dict[str, Any]:
        return {**self.model.as_dict(), "given": self.model.given, "scores": [score_row(each) for each in self.scores]}


def score_row(score: Score) -> dict[str, Any]:
    """A score as a mapping from column names to values.

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
