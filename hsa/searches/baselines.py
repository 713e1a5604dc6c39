"""What every search scores before it draws anything: the sources, their average, each method's defaults, and soups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hsa.errors import RequestError, shown
from hsa.methods.registry import method_named
from hsa.searches.candidates import Candidate
from hsa.searches.sources import AVERAGE, SearchSources
from hsa.searches.space import MethodSpace
from hsa.searches.trials import Trial

AVERAGE_NAME = "average"


def baselines(sources: SearchSources, spaces: Mapping[str, MethodSpace]) -> list[Candidate]:
    """Base, every fine-tune, the plain average of the fine-tunes, and each method with its defaults.

    Raises RequestError where two have one name, by which the report tells them apart.
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
    for name in names:
        if names.count(name) > 1:
            raise RequestError(
                f"two models of the search would be named {shown(name)} in its reports; give each model once, or "
                f"rename its directory"
            )
    return found


def is_average(space: MethodSpace) -> bool:
    """Whether the defaults of a method are the plain average, which is scored anyway."""
    return space.method == AVERAGE and not space.fixed


def default_name(space: MethodSpace) -> str:
    """The name of the baseline that a method's defaults are."""
    return AVERAGE_NAME if is_average(space) else f"{space.method} defaults"


@dataclass
class GreedySoup:
    """The greedy soup of Wortsman et al., ICML 2022, arXiv 2203.05482: models by their scores, the best first, each
    added to the average where that does not make it worse.

    `candidates` gives the averages to score; `take` must be told of each before the next.
    """

    sources: SearchSources
    scored: Sequence[Trial]
    kept: list[int] = field(default_factory=list)
    value: float = 0.0
    tried: list[int] = field(default_factory=list)

    def candidates(self) -> Iterator[Candidate]:
        """The averages to score, one after another."""
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
        """Keep the model that was added last where the average is no worse with it."""
        if trial.state == "complete" and trial.value <= self.value:
            self.kept, self.value = self.tried, trial.value


def _number(trial: Trial) -> int:
    assert trial.candidate.source is not None
    return trial.candidate.source
