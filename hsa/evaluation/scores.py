"""Word and character error rates of utterances and groups of them, with intervals and differences from a baseline.

jiwer counts the errors and finds their smallest possible number. Words are separated by spaces. Characters include the
spaces between words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from hsa.errors import DataError, shown
from hsa.evaluation.bootstrap import check_confidence, check_seed, percentile_interval, resampled_sums
from hsa.evaluation.extras import needed_for_evaluation
from hsa.evaluation.normalized import normalized_hypothesis, normalized_reference
from hsa.evaluation.utterance import Utterance

if TYPE_CHECKING:
    from hsa.evaluation.bootstrap import Integers

Group = Literal["all", "set", "domain", "speaker"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """Errors in words or in characters; `reference` is the number of words or characters in the references.

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
        """Errors over the length of the reference. Insertions may raise it above 1. NaN without a reference."""
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

    `is_empty` says that the normalised reference is empty: `scores_of` leaves such utterances out and counts them.
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
    """Word error rate of this model minus the baseline's: if it is below 0, this model is better.

    `interval` is None if the group has only one utterance, from which nothing can be resampled.
    """

    wer: float
    interval: Interval | None

    @property
    def reversed(self) -> Difference:
        """The baseline's word error rate minus this model's.

        Example:
            >>> Difference(-0.25, Interval(-0.5, 0.0)).reversed
            Difference(wer=0.25, interval=Interval(low=0.0, high=0.5))
        """
        interval = self.interval
        return Difference(  # unlike a minus sign, this gives 0.0 and not -0.0
            0.0 - self.wer, None if interval is None else Interval(0.0 - interval.high, 0.0 - interval.low)
        )


@dataclass(frozen=True)
class Score:
    """Error rates of one group of utterances: of all, of a set, a domain or a speaker.

    `utterances` were scored; `dropped` more were not, because their normalised references are empty. Intervals are None
    if the group has only one utterance. They were drawn over `speakers` speakers, or over utterances if that is 0.
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
    speakers: int = 0


# --- one utterance ------------------------------------------------------------------------------------------------


def score_utterance(
    utterance: Utterance, hypothesis: str, *, set_name: str, normalize: Callable[[str], str]
) -> UtteranceScore:
    """Count the errors of a hypothesis. Both texts are normalised first, with one space between words.

    Raises DataError, which names the utterance, for a text that cannot be normalised, and RequestError if jiwer is not
    installed.

    Example:
        >>> utterance = Utterance("a", Path("/a.wav"), "Good morning, all.")
        >>> score_utterance(utterance, "good evening", set_name="test", normalize=normalizer("plain")).words
        ErrorCounts(substitutions=1, deletions=1, insertions=0, reference=3)
    """
    reference = normalized_reference(utterance, set_name, normalize)
    heard = normalized_hypothesis(hypothesis, utterance, set_name, normalize)
    words, characters = error_counts(reference, heard)
    return UtteranceScore(
        utterance.id, set_name, utterance.speaker, utterance.domain, reference, heard, words, characters
    )


def error_counts(reference: str, hypothesis: str) -> tuple[ErrorCounts, ErrorCounts]:
    """The errors in words and in characters of a normalised text.

    Example:
        >>> error_counts("a b", "a c")[0].errors
        1
    """
    if not reference:  # jiwer rejects an empty reference
        return ErrorCounts(0, 0, len(hypothesis.split()), 0), ErrorCounts(0, 0, len(hypothesis), 0)
    jiwer = _jiwer()
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return _counts(words), _counts(characters)


def _counts(found: Any) -> ErrorCounts:
    length = found.hits + found.substitutions + found.deletions
    return ErrorCounts(found.substitutions, found.deletions, found.insertions, length)


def alignment(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """Align the words of two normalised texts: equal, substitute, delete or insert, then the reference's word and the
    hypothesis's. The missing word of a deletion or an insertion is "".

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
        for ours_word, heard_word in zip_longest(ours, heard, fillvalue=""):
            pairs.append((str(chunk.type), ours_word, heard_word))
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
    groups: Collection[Group] = GROUPS,
) -> tuple[Score, ...]:
    """Scores of all utterances, then of each set in order, and of each domain and speaker by name. Only the kinds in
    `groups` are scored, because the intervals of each group take time.

    Utterances with an empty normalised reference are counted (`Score.dropped`) but not scored; a group without others
    is left out. Intervals are percentiles of 10,000 bootstrap resamples (fewer for more than 100,000 units). Speakers
    are resampled if every utterance of the group has one and there are at least two, else utterances. A speaker named
    in several sets is one speaker. `baseline` are the scores of another model on the same utterances; both are
    resampled together, and `difference` is this model minus that. The order of utterances within a set has no effect.

    Raises DataError if nothing is left to score, an utterance occurs twice, or the baseline was scored on other
    utterances; RequestError for an invalid confidence or seed.

    Example:
        >>> scores_of([score])[0].words.rate  # doctest: +SKIP
        0.25
    """
    check_confidence(confidence)
    check_seed(seed)
    ours = _by_key(utterances)
    theirs = None if baseline is None else _baseline(ours, baseline)
    if all(score.is_empty for score in utterances):
        raise DataError(
            f"all {len(utterances)} references are empty once normalised, expected at least one with a word; look at "
            f"the texts, or choose another normalizer"
        )
    found = []
    for (group, name), members in _groups(ours, dict.fromkeys(score.set for score in utterances)).items():
        kept = [score for score in members if not score.is_empty]
        if kept and group in groups:
            others = None if theirs is None else [theirs[score.set, score.id] for score in kept]
            found.append(_score(group, name, kept, len(members) - len(kept), others, confidence, seed))
    return tuple(found)


_Key = tuple[str, str]
_Groups = dict[tuple[Group, str], list[UtteranceScore]]


def _by_key(utterances: Iterable[UtteranceScore]) -> dict[_Key, UtteranceScore]:
    scores: dict[_Key, UtteranceScore] = {}
    for score in utterances:
        if (score.set, score.id) in scores:
            raise DataError(f"utterance {shown(score.id)} of set {shown(score.set)} is scored twice, expected once")
        scores[score.set, score.id] = score
    return scores


def _baseline(ours: Mapping[_Key, UtteranceScore], baseline: Sequence[UtteranceScore]) -> dict[_Key, UtteranceScore]:
    theirs = _by_key(baseline)
    if ours.keys() != theirs.keys():
        key = min(ours.keys() ^ theirs.keys())
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


def _groups(scores: Mapping[_Key, UtteranceScore], sets: Iterable[str]) -> _Groups:
    """The utterances of each group, sorted by set and id."""
    domains = sorted({score.domain for score in scores.values() if score.domain})
    speakers = sorted({score.speaker for score in scores.values() if score.speaker})
    groups: _Groups = {("all", "all"): []}
    groups.update({("set", name): [] for name in sets})
    groups.update({("domain", name): [] for name in domains})
    groups.update({("speaker", name): [] for name in speakers})
    for key in sorted(scores):
        score = scores[key]
        groups["all", "all"].append(score)
        groups["set", score.set].append(score)
        if score.domain:
            groups["domain", score.domain].append(score)
        if score.speaker:
            groups["speaker", score.speaker].append(score)
    return groups


def _score(
    group: Group,
    name: str,
    members: list[UtteranceScore],
    dropped: int,
    baseline: list[UtteranceScore] | None,
    confidence: float,
    seed: int,
) -> Score:
    words, characters = _total(score.words for score in members), _total(score.characters for score in members)
    intervals = _intervals(members, members if baseline is None else baseline, confidence, seed)
    difference = None
    if baseline is not None:
        wer = words.rate - _total(score.words for score in baseline).rate
        difference = Difference(wer, intervals.difference)
    return Score(
        group,
        name,
        len(members),
        words,
        characters,
        intervals.wer,
        intervals.cer,
        difference,
        dropped,
        intervals.speakers,
    )


def _total(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    return sum(counts, ErrorCounts(0, 0, 0, 0))


# --- intervals --------------------------------------------------------------------------------------------------------


class _Intervals(NamedTuple):
    """The intervals of the word error rate, of the character error rate, and of the difference in word error rate."""

    wer: Interval | None = None
    cer: Interval | None = None
    difference: Interval | None = None
    speakers: int = 0


def _intervals(
    members: list[UtteranceScore], baseline: list[UtteranceScore], confidence: float, seed: int
) -> _Intervals:
    if len(members) < 2:
        return _Intervals()
    speakers = _speakers(members)
    word_errors, words, character_errors, characters, their_errors = resampled_sums(
        _units(members, baseline, speakers), seed
    ).T
    wer, cer, difference = (
        Interval(*percentile_interval(values, confidence))
        for values in (word_errors / words, character_errors / characters, (word_errors - their_errors) / words)
    )
    return _Intervals(wer, cer, difference, len(speakers))


def _speakers(members: list[UtteranceScore]) -> dict[str, int]:
    """The indices of the speakers; empty unless all are known and there are at least two."""
    names = {score.speaker: None for score in members}
    if None in names or len(names) < 2:
        return {}
    return {name: place for place, name in enumerate(names) if name is not None}


def _units(members: list[UtteranceScore], baseline: list[UtteranceScore], speakers: dict[str, int]) -> Integers:
    """The resampled units, int64 [units, 5]: word errors, words, character errors, characters, baseline word errors."""
    import numpy as np

    counts = np.array(
        [
            (score.words.errors, score.words.reference, score.characters.errors, score.characters.reference, other)
            for score, other in zip(members, (score.words.errors for score in baseline), strict=True)
        ],
        dtype=np.int64,
    )
    if not speakers:
        return counts
    sums = np.zeros((len(speakers), counts.shape[1]), dtype=np.int64)
    np.add.at(sums, [speakers[score.speaker] for score in members if score.speaker is not None], counts)
    return sums
