"""The objective that a search minimises: the mean or the worst of the sets' word error rates, one set's, or all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsa.errors import RequestError, listed, shown
from hsa.option_names import option
from hsa.searches.dev_sets import DevSets

PARETO = "pareto"
KINDS = ("mean", "worst", PARETO)
OWN = "own"
"""The objective of a search with the caller's own scoring function."""


@dataclass(frozen=True)
class Objective:
    """`kind` is mean, worst, pareto, own, or `set` for the single set with this name."""

    kind: str
    name: str = ""

    @property
    def text(self) -> str:
        """The objective in words.

        Example:
            >>> Objective("worst").text
            'WER of the worst set'
        """
        texts = {
            "mean": "mean WER of the sets",
            "worst": "WER of the worst set",
            "pareto": "WER of each set",
            OWN: "score",
        }
        return texts.get(self.kind, f"WER of {self.name}")

    def values(self, rates: Mapping[str, float]) -> tuple[float, ...]:
        """The values to minimise, from the word error rates of the sets."""
        if self.kind == "pareto":
            return tuple(rates.values())
        if self.kind == "worst":
            return (max(rates.values()),)
        return (rates[self.name] if self.kind == "set" else sum(rates.values()) / len(rates),)

    def shares(self, dev: DevSets, incumbent_rates: Mapping[str, float]) -> list[float]:
        """The contribution of one error of each utterance to the value, times the number of utterances that count.

        The mean of `shares * errors` over the utterances that count (with a share above 0) is the value itself, because
        the word error rate of a set is the sum of its errors over a known sum of words. For `worst`, only the set
        counts on which the incumbent is worst: a candidate with a higher rate there has a higher worst rate.
        """
        words = dev.words
        if self.kind == "mean":
            weights = {name: 1.0 / (len(dev.names) * words[name]) for name in dev.names}
        else:
            one = self.name if self.kind == "set" else max(incumbent_rates, key=lambda name: incumbent_rates[name])
            weights = {name: 1.0 / words[name] if name == one else 0.0 for name in dev.names}
        count = sum(weights[item.set] > 0.0 for item in dev.items)
        return [count * weights[item.set] for item in dev.items]


def objective_of(text: str, sets: Sequence[str]) -> Objective:
    """Parse the name of an objective. RequestError if it is neither a kind nor a set.

    Example:
        >>> objective_of("noisy", ["clean", "noisy"])
        Objective(kind='set', name='noisy')
    """
    if text in KINDS:
        return Objective(text)
    if text in sets:
        return Objective("set", text)
    raise RequestError(
        f"{option('objective')} must be {listed(KINDS, 'or')}, or the name of a dev set ({listed(sets)}), got "
        f"{shown(text)}"
    )
