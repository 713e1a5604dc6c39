"""Candidates and results of a search. They consist of JSON values, so other processes can do the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["model", "average", "default", "soup", "sampled"]


@dataclass(frozen=True)
class Candidate:
    """A model to score: an unchanged source (`source` is its number, -1 for base), or a merge.

    `settings` are the Python keywords of the merge besides its sources, as JSON values.

    Example:
        >>> Candidate("ties defaults", "default", method="ties").is_merge
        True
    """

    name: str
    kind: Kind
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: int | None = None

    @property
    def is_merge(self) -> bool:
        return self.method is not None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "method": self.method,
            "settings": dict(self.settings),
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Candidate:
        return cls(**entry)


@dataclass(frozen=True)
class Result:
    """The result of scoring a candidate.

    Args:
        weights: digest of the model's tensors; equal for candidates that are the same model.
        errors: word errors of each utterance in the order of the search, as far as they were counted.
        texts: the model's texts for them; empty if they are stored elsewhere.
        decoded: number of utterances decoded for it; the others were reused from equal weights.
        stopped: whether it lost the race, so that the remaining utterances were not decoded.
        score: the value of the caller's own scoring function.
        failure: the reason why it could not be scored.
        seconds: the time it took; `merging`: the part of it spent on computing the merge.
    """

    weights: str = ""
    errors: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    decoded: int = 0
    stopped: bool = False
    score: float | None = None
    failure: str | None = None
    seconds: float = 0.0
    merging: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values, without the texts, which are long."""
        return {
            "weights": self.weights,
            "errors": list(self.errors),
            "decoded": self.decoded,
            "stopped": self.stopped,
            "score": self.score,
            "failure": self.failure,
            "seconds": round(self.seconds, 3),
            "merging": round(self.merging, 3),
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Result:
        return cls(**{**entry, "errors": tuple(entry["errors"])})
