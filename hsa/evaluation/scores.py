"""Word and character error rates of utterances and groups of them, with intervals and differences from a baseline.

jiwer counts the errors, with the least number of them in all. Words are what lies between spaces; characters include
the spaces between words.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hsa.errors import DataError, shown
from hsa.evaluation.bootstrap import check_confidence, percentile_interval, resampled_sums
from hsa.evaluation.extras import needed_for_evaluation
from hsa.evaluation.utterance import Utterance

if TYPE_CHECKING:
    from hsa.evaluation.bootstrap import Integers

Group = Literal["all", "set", "domain", "speaker"]


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """Errors in words or in characters; `reference` is how many of them the references have.

    Example:
        >>> counts = ErrorCounts(substitutions=1, deletions=0, insertions=1, reference=8)
        >>> counts.errors, counts.rate
        (2, 0.25)
    """

    substitutions: int
    deletions: int
    insertions: int
    reference: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors over the length of the reference; insertions may take it above 1. NaN without a reference."""
        return self.errors / self.reference if self.reference else math.nan

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference + other.reference,
        )


@dataclass(frozen=True, slots=True)
class UtteranceScore:
    """The errors of one utterance. `reference` and `hypothesis` are the normalised texts that were compared.

    `is_empty` says that nothing is left of the reference: `scores_of` leaves such utterances out and counts them.
    """

    id: str
    set: str
    speaker: str | None
    domain: str | None
    reference: str
    hypothesis: str
    words: ErrorCounts
    characters: ErrorCounts

    @property
    def is_empty(self) -> bool:
        return not self.reference


@dataclass(frozen=True)
class Interval:
    """The two ends of an interval, as rates: 0.05 is 5 %."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Word error rate of this model minus the baseline's: below 0 this model is better.

    `interval` is None where the group has one utterance alone, of which nothing can be drawn.
    """

    wer: float
    interval: Interval | None


@dataclass(frozen=True)
class Score:
    """Error rates of one group of utterances: of all, of a set, a domain or a speaker.

    `utterances` were scored; `dropped` more were not, because nothing is left of their references. Intervals are None
    where the group has one utterance alone.
    """

    group: Group
    name: str
    utterances: int
    words: ErrorCounts
    characters: ErrorCounts
    wer: Interval | None
    cer: Interval | None
    difference: Difference | None
    dropped: int = 0


# --- one utterance ------------------------------------------------------------------------------------------------


def score_utterance(
    utterance: Utterance, hypothesis: str, *, set_name: str, normalize: Callable[[str], str]
) -> UtteranceScore:
    """Count the errors of a hypothesis. Both texts are normalised first, and one space left between words.

    Raises RequestError where jiwer is not installed.

    Example:
        >>> utterance = Utterance("a", Path("/a.wav"), "Good morning, all.")
        >>> score_utterance(utterance, "good evening", set_name="test", normalize=normalizer("plain")).words
        ErrorCounts(substitutions=1, deletions=1, insertions=0, reference=3)
    """
    reference, heard = (" ".join(normalize(text).split()) for text in (utterance.text, hypothesis))
    words, characters = error_counts(reference, heard)
    return UtteranceScore(
        utterance.id, set_name, utterance.speaker, utterance.domain, reference, heard, words, characters
    )


def error_counts(reference: str, hypothesis: str) -> tuple[ErrorCounts, ErrorCounts]:
    """The errors in words and in characters of a text that is normalised.

    Example:
        >>> error_counts("a b", "a c")[0].errors
        1
    """
    if not reference:  # jiwer refuses it
        return ErrorCounts(0, 0, len(hypothesis.split()), 0), ErrorCounts(0, 0, len(hypothesis), 0)
    jiwer = _jiwer()
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return _counts(words), _counts(characters)


def _counts(found: Any) -> ErrorCounts:
    length = found.hits + found.substitutions + found.deletions
    return ErrorCounts(found.substitutions, found.deletions, found.insertions, length)


def alignment(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """Words of two normalised texts side by side: equal, substitute, delete or insert, then the reference's word and
    the hypothesis's, of which a deletion lacks the latter and an insertion the former ("").

    Example:
        >>> alignment("a b c", "a d")
        [('equal', 'a', 'a'), ('delete', 'b', ''), ('substitute', 'c', 'd')]
    """
    if not reference.strip():
        return [("insert", "", word) for word in hypothesis.split()]
    found = _jiwer().process_words(" ".join(reference.split()), " ".join(hypothesis.split()))
    pairs = []
    for chunk in found.alignments[0]:
        ours = found.references[0][chunk.ref_start_idx : chunk.ref_end_idx]
        heard = found.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]
        for place in range(max(len(ours), len(heard))):
            pairs.append((str(chunk.type), *("".join(side[place : place + 1]) for side in (ours, heard))))
    return pairs


def _jiwer() -> Any:
    with needed_for_evaluation("jiwer"):
        import jiwer
    return jiwer


# --- groups of utterances -------------------------------------------------------------------------------------------


def scores_of(
    utterances: Sequence[UtteranceScore],
    *,
    confidence: float = 0.95,
    baseline: Sequence[UtteranceScore] | None = None,
    seed: int = 0,
) -> tuple[Score, ...]:
    """Scores of all utterances, then of each set in order, and of each domain and speaker by name.

    Utterances of whose reference nothing is left are not scored, but counted (`Score.dropped`); a group that has no
    others is left out. Intervals are percentiles of 10,000 bootstrap resamples: of speakers where every utterance of
    the group has one and there are two or more, of utterances otherwise. `baseline` are the scores of another model on
    the same utterances; resamples of both are the same, and `difference` is this model minus that.

    Raises DataError where nothing is left to score, where an utterance occurs twice, and where the baseline was scored
    on others; RequestError for a confidence that is none.

    Example:
        >>> scores_of([score])[0].words.rate  # doctest: +SKIP
        0.25
    """
    check_confidence(confidence)
    ours = _by_key(utterances)
    theirs = None if baseline is None else _baseline(ours, baseline)
    kept = [ours[key] for key in sorted(ours) if not ours[key].is_empty]
    if not kept:
        raise DataError(
            f"all {len(utterances)} references are empty once normalised, expected at least one with a word; look at "
            f"the texts, or choose another normalizer"
        )
    empty = [score for score in ours.values() if score.is_empty]
    return tuple(
        _score(group, name, members, len(_members(group, name, empty)), theirs, confidence, seed)
        for group, name in _groups(utterances)
        if (members := _members(group, name, kept))
    )


_Key = tuple[str, str]


def _by_key(utterances: Iterable[UtteranceScore]) -> dict[_Key, UtteranceScore]:
    scores: dict[_Key, UtteranceScore] = {}
    for score in utterances:
        if (score.set, score.id) in scores:
            raise DataError(f"utterance {shown(score.id)} of set {shown(score.set)} is scored twice, expected once")
        scores[score.set, score.id] = score
    return scores


def _baseline(ours: Mapping[_Key, UtteranceScore], baseline: Sequence[UtteranceScore]) -> dict[_Key, UtteranceScore]:
    theirs = _by_key(baseline)
    for key in ours.keys() ^ theirs.keys():
        has, lacks = ("model", "baseline") if key in ours else ("baseline", "model")
        raise DataError(
            f"utterance {shown(key[1])} of set {shown(key[0])} is scored for the {has} and not for the {lacks}, "
            f"expected the same utterances of both"
        )
    for key, score in ours.items():
        if theirs[key].reference != score.reference:
            raise DataError(
                f"utterance {shown(key[1])} of set {shown(key[0])} has another normalised reference for the baseline; "
                f"score both with one normalizer"
            )
    return theirs


def _groups(utterances: Sequence[UtteranceScore]) -> list[tuple[Group, str]]:
    groups: list[tuple[Group, str]] = [("all", "all")]
    groups += [("set", name) for name in dict.fromkeys(score.set for score in utterances)]
    groups += [("domain", name) for name in sorted({score.domain for score in utterances if score.domain})]
    groups += [("speaker", name) for name in sorted({score.speaker for score in utterances if score.speaker})]
    return groups


def _members(group: Group, name: str, scores: Sequence[UtteranceScore]) -> list[UtteranceScore]:
    return list(scores) if group == "all" else [score for score in scores if getattr(score, group) == name]


def _score(
    group: Group,
    name: str,
    members: list[UtteranceScore],
    dropped: int,
    baseline: Mapping[_Key, UtteranceScore] | None,
    confidence: float,
    seed: int,
) -> Score:
    theirs = None if baseline is None else [baseline[score.set, score.id] for score in members]
    words, characters = _total(score.words for score in members), _total(score.characters for score in members)
    intervals = _intervals(f"{group} {name}", members, theirs, confidence, seed)
    difference = None
    if theirs is not None:
        difference = Difference(words.rate - _total(score.words for score in theirs).rate, intervals[2])
    return Score(group, name, len(members), words, characters, intervals[0], intervals[1], difference, dropped)


def _total(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    return sum(counts, ErrorCounts(0, 0, 0, 0))


def _intervals(
    key: str,
    members: list[UtteranceScore],
    baseline: list[UtteranceScore] | None,
    confidence: float,
    seed: int,
) -> tuple[Interval | None, Interval | None, Interval | None]:
    """Of the word error rate, of the character error rate, and of the difference in word error rate."""
    units = _units(members, baseline if baseline is not None else members)
    if len(units) < 2:
        return None, None, None
    sums = resampled_sums(units, key, seed)
    wer, cer, other = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3], sums[:, 4] / sums[:, 1]
    ends = [Interval(*percentile_interval(values, confidence)) for values in (wer, cer, wer - other)]
    return ends[0], ends[1], ends[2] if baseline is not None else None


def _units(members: list[UtteranceScore], baseline: list[UtteranceScore]) -> Integers:
    """What is drawn, one row each: word errors, words, character errors, characters, the baseline's word errors."""
    import numpy as np

    speakers = {score.speaker for score in members}
    by_speaker = len(speakers) > 1 and all(speakers)
    rows: dict[object, Any] = defaultdict(lambda: np.zeros(5, dtype=np.int64))
    for place, (score, other) in enumerate(zip(members, baseline, strict=True)):
        words, characters = score.words, score.characters
        counts = (words.errors, words.reference, characters.errors, characters.reference, other.words.errors)
        rows[score.speaker if by_speaker else place] += counts
    return np.stack(list(rows.values()))
