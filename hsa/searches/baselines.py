"""The candidates that every search scores before it samples: sources, their average, method defaults, and soups."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hsa.errors import RequestError, shown
from hsa.methods.registry import method_named
from hsa.searches.candidates import Candidate
from hsa.searches.sources import AVERAGE, SearchSources
from hsa.searches.space import MethodSpace
from hsa.searches.trials import Trial

AVERAGE_NAME = "average"

_RESERVED = re.compile(r"trial [1-9][0-9]*|soup .*", re.DOTALL)
"""The names of sampled trials and of soups, which no source may have."""


def baselines(sources: SearchSources, spaces: Mapping[str, MethodSpace]) -> list[Candidate]:
    """Base, every fine-tune, the plain average of the fine-tunes, and each method with its defaults.

    Raises RequestError if two models have the same name, or a source has the name of a trial or a soup, because reports
    and stored scores identify models by name.
    """
    found = [Candidate(sources.name_of(number), "model", source=number) for number in sources.numbers]
    if len(sources.models) >= method_named(AVERAGE).contract.least:
        found.append(Candidate(AVERAGE_NAME, "average", AVERAGE))
    for space in spaces.values():
        settings = dict(space.fixed)
        complete = method_named(space.method).Settings(**settings).complete
        if complete and not is_average(space):
            found.append(Candidate(f"{space.method} defaults", "default", space.method, settings))
    names = [candidate.name for candidate in found]
    for candidate in found:
        if names.count(candidate.name) > 1:
            raise RequestError(
                f"two models of the search would be named {shown(candidate.name)} in its reports; give each model "
                f"once, or rename its directory"
            )
        if candidate.source is not None and _RESERVED.fullmatch(candidate.name):
            raise RequestError(
                f"a model of the search is named {shown(candidate.name)}, a name that the search gives to models of "
                f"its own; rename its directory"
            )
    return found


def check_soup_names(sources: SearchSources) -> None:
    """Raise RequestError if two soups of different models could have the same name.

    The name of a soup joins the names of its models by +. Two such names can be equal only if one model's name begins
    with another's and a +.

    Example:
        >>> check_soup_names(SearchSources(None, ("x/a", "x/a+b"), "", ("a", "a+b")))
        Traceback (most recent call last):
        hsa.errors.RequestError: soups of 'a' and of 'a+b' could have the same name; rename the directory of one
    """
    for one, other in itertools.permutations(sources.names, 2):
        if other.startswith(f"{one}+"):
            raise RequestError(
                f"soups of {shown(one)} and of {shown(other)} could have the same name; rename the directory of one"
            )


def is_average(space: MethodSpace) -> bool:
    """Whether the defaults of a method equal the plain average, which is scored anyway."""
    return space.method == AVERAGE and not space.fixed


def default_name(space: MethodSpace) -> str:
    """The name of the baseline with a method's defaults."""
    return AVERAGE_NAME if is_average(space) else f"{space.method} defaults"


@dataclass
class GreedySoup:
    """The greedy soup of Wortsman et al., ICML 2022, arXiv 2203.05482. Models are added to the average in the order of
    their scores, best first. Each is kept only if the score does not get worse.

    `candidates` yields the averages to score. `take` must be called with the trial of each before the next.
    """

    sources: SearchSources
    scored: Sequence[Trial]
    kept: list[int] = field(default_factory=list)
    value: float = 0.0
    tried: list[int] = field(default_factory=list)

    def candidates(self) -> Iterator[Candidate]:
        """Yield the averages to score, one after another."""
        alone = [trial for trial in self.scored if trial.candidate.source is not None and trial.state == "complete"]
        ordered = sorted((t for t in alone if (t.candidate.source or 0) >= 0), key=lambda trial: trial.value)
        if not ordered:
            return
        self.kept, self.value = [_number(ordered[0])], ordered[0].value
        for trial in ordered[1:]:
            self.tried = [*self.kept, _number(trial)]
            weights = [float(number in self.tried) for number in range(len(self.sources.models))]
            names = "+".join(self.sources.name_of(number) for number in sorted(self.tried))
            yield Candidate(f"soup {names}", "soup", AVERAGE, {"weights": weights})

    def take(self, trial: Trial) -> None:
        """Keep the last added model if the average is no worse with it."""
        if trial.state == "complete" and trial.value <= self.value:
            self.kept, self.value = self.tried, trial.value


def _number(trial: Trial) -> int:
    assert trial.candidate.source is not None
    return trial.candidate.source
