"""Models side by side on a set: word error rates with intervals, and how far the best candidate lies from each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hsa.evaluation.scores import Difference, Score, UtteranceScore, scores_of

Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Comparison:
    """A model on a set, and the best candidate's word error rate minus its (`difference`, None of the best itself).

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
        """What the interval of the difference shows of the best candidate; None of the best itself."""
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
    """An utterance of which the best candidate gets many words wrong, and what another model makes of it."""

    id: str
    set: str
    reference: str
    best: str
    other: str
    best_errors: int
    other_errors: int

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def compare(scores: Mapping[str, Sequence[UtteranceScore]], best: str, confidence: float) -> tuple[Comparison, ...]:
    """Every model on every set, the best candidate first; `scores` are of the same utterances, by model."""
    ours = _plain(scores[best])
    rows = [Comparison(best, each.name, each, None) for each in scores_of(ours, confidence=confidence) if _is_set(each)]
    for model, theirs in scores.items():
        if model == best:
            continue
        other = _plain(theirs)
        paired = scores_of(ours, confidence=confidence, baseline=other)
        differences = {each.name: each.difference for each in paired if _is_set(each)}
        rows += [
            Comparison(model, each.name, each, differences[each.name])
            for each in scores_of(other, confidence=confidence)
            if _is_set(each)
        ]
    return tuple(rows)


def worst_utterances(
    best: Sequence[UtteranceScore], other: Sequence[UtteranceScore], count: int
) -> tuple[WorstUtterance, ...]:
    """The utterances with the most errors of the best candidate, beside what the other model wrote."""
    theirs = {(score.set, score.id): score for score in other}
    ordered = sorted(best, key=lambda score: (-score.words.errors, score.set, score.id))
    found = []
    for score in ordered[:count]:
        other = theirs[score.set, score.id]
        found.append(
            WorstUtterance(
                score.id,
                score.set,
                score.reference,
                score.hypothesis,
                other.hypothesis,
                score.words.errors,
                other.words.errors,
            )
        )
    return tuple(found)


def _is_set(score: Score) -> bool:
    return score.group == "set"


def _plain(scores: Sequence[UtteranceScore]) -> list[UtteranceScore]:
    """Without domains, of which nothing is said here."""
    return [replace(score, domain=None) for score in scores]
