"""Models side by side on a set: word error rates with intervals, and their differences from the best candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hsa.evaluation.scores import Difference, Group, Score, UtteranceScore, scores_of

Verdict = Literal["better", "worse", "no difference shown"]

SETS: tuple[Group, ...] = ("set",)
"""The groups that are compared."""


@dataclass(frozen=True)
class Comparison:
    """A model on a set. `difference` is the best candidate's word error rate minus the model's, None for the best
    itself.

    Example:
        >>> row.model, row.set, row.verdict  # doctest: +SKIP
        ('primary', 'noisy', 'better')
    """

    model: str
    set: str
    score: Score
    difference: Difference | None

    @property
    def verdict(self) -> Verdict | None:
        """The conclusion about the best candidate from the interval of the difference; None for the best itself."""
        if self.difference is None:
            return None
        interval = self.difference.interval
        if interval is None or interval.low <= 0.0 <= interval.high:
            return "no difference shown"
        return "better" if interval.high < 0.0 else "worse"

    def as_dict(self) -> dict[str, Any]:
        words, interval = self.score.words, self.score.wer
        paired = None if self.difference is None else self.difference.interval
        return {
            "model": self.model,
            "set": self.set,
            "utterances": self.score.utterances,
            "dropped": self.score.dropped,
            "words": words.reference,
            "errors": words.errors,
            "wer": words.rate,
            "interval": None if interval is None else [interval.low, interval.high],
            "cer": self.score.characters.rate,
            "difference": None if self.difference is None else self.difference.wer,
            "difference_interval": None if paired is None else [paired.low, paired.high],
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class WorstUtterance:
    """An utterance with many word errors of the best candidate, and another model's text for it."""

    id: str
    set: str
    reference: str
    best: str
    other: str
    best_errors: int
    other_errors: int

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def compare(
    scores: Mapping[str, Sequence[UtteranceScore]],
    best: str,
    confidence: float,
    dropped: Mapping[str, int] | None = None,
) -> tuple[Comparison, ...]:
    """Compare every model on every set, the best candidate first.

    `scores` are of the same utterances, by model. `dropped` counts, by set, the utterances that are not among them
    because their normalised references are empty.
    """
    left_out = dropped or {}
    rows = []
    for model in dict.fromkeys([best, *scores]):
        baseline = None if model == best else scores[best]
        for score in scores_of(scores[model], confidence=confidence, baseline=baseline, groups=SETS):
            difference = None if score.difference is None else score.difference.reversed
            all_dropped = score.dropped + left_out.get(score.name, 0)
            rows.append(Comparison(model, score.name, replace(score, dropped=all_dropped, difference=None), difference))
    return tuple(rows)


def worst_utterances(
    best: Sequence[UtteranceScore], other: Sequence[UtteranceScore], count: int
) -> tuple[WorstUtterance, ...]:
    """The utterances with the most errors of the best candidate, with the other model's text. Those with an empty
    normalised reference do not count towards its score and are left out."""
    theirs = {(score.set, score.id): score for score in other}
    scored = [score for score in best if not score.is_empty]
    ordered = sorted(scored, key=lambda score: (-score.words.errors, score.set, score.id))
    found = []
    for score in ordered[:count]:
        compared = theirs[score.set, score.id]
        found.append(
            WorstUtterance(
                score.id,
                score.set,
                score.reference,
                score.hypothesis,
                compared.hypothesis,
                score.words.errors,
                compared.words.errors,
            )
        )
    return tuple(found)
