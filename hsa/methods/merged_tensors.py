"""How much a merge of whole tensors merges, and how far the output moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.methods.copied import COPIED
from hsa.methods.distance_sums import MergeDistances
from hsa.methods.geometry import percent
from hsa.methods.tensors import Outcome, TensorRecord

SAMPLE_TEXT = "(estimated from a sample of the elements)"


@dataclass(frozen=True)
class TensorCount:
    """How much a merge of whole tensors merges, or will merge if it is `planned`. `copied` counts the tensors that are
    equal in all sources. `distances` says how far the output moved, if it was computed.

    Example:
        >>> TensorCount(12).text
        '12 tensors merged'
        >>> TensorCount(12, copied=2).text
        '10 of 12 tensors merged; the other 2 are equal in all sources and were copied'
    """

    tensors: int
    planned: bool = False
    copied: int = 0
    distances: MergeDistances | None = None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> TensorCount:
        """The count of a finished merge."""
        copied = sum(outcome.decision is COPIED for outcome in outcomes)
        return cls(len(outcomes), copied=copied, distances=MergeDistances.of(outcomes))

    @classmethod
    def of_records(cls, records: Sequence[TensorRecord]) -> TensorCount:
        """The count as far as records show it: they contain no norms."""
        return cls(len(records), copied=sum(record.decision is COPIED for record in records))

    @property
    def counted(self) -> str:
        if self.planned:
            return f"{self.tensors} tensors to merge"
        return f"{self.tensors - self.copied} of {self.tensors} tensors merged" if self.copied else self._all_merged

    @property
    def headline(self) -> str:
        return self.counted

    @property
    def details(self) -> str:
        return "; ".join(self._details())

    @property
    def text(self) -> str:
        return "; ".join((self.headline, *self._details()))

    def counts(self) -> dict[str, Any]:
        return {}

    def margins(self) -> dict[str, Any]:
        return {}

    def as_dict(self) -> dict[str, Any]:
        found = self.distances
        if found is None or not found.with_base:
            return {} if found is None else {"moved": found.relative, "sampled": found.sampled}
        sources = found.sources
        return {
            "moved": found.relative,
            "change": found.change,
            "task_vectors": {role: sources.size(place) for place, role in enumerate(sources.models)},
            "cosines": {
                ", ".join(sources.models[place] for place in pair): sources.cosine(pair) for pair in sources.products
            },
            "sampled": found.sampled,
        }

    @property
    def _all_merged(self) -> str:
        return f"{self.tensors} tensors merged"

    def _details(self) -> Iterator[str]:
        if self.copied:
            one = self.copied == 1
            which = "all" if self.copied == self.tensors else f"the other {self.copied}"
            yield f"{which} {'is' if one else 'are'} equal in all sources and {'was' if one else 'were'} copied"
        if self.distances is not None and self.copied < self.tensors:
            yield from _distance_text(self.distances)


def _distance_text(found: MergeDistances) -> Iterator[str]:
    """How far the output moved, where that is known."""
    first = found.sources.models[0]
    if found.relative is None:
        return
    sample = f" {SAMPLE_TEXT}" if found.sampled else ""
    if not found.with_base:
        yield f"the output differs from {first} by {percent(found.relative)} % of its norm{sample}"
        return
    change = "" if found.change is None else f", and from {first} by {percent(found.change)} % of its task vector"
    yield f"the output differs from base by {percent(found.relative)} % of base's norm{change}{sample}"
