"""Word and character error rates of utterances and groups of them, with intervals and differences from a baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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
