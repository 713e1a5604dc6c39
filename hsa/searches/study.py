"""The result of a search: the best candidate, all trials, and the comparison of the best with the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsa.errors import RequestError
from hsa.outputs.report import MergeReport
from hsa.searches.best import command, merge_candidate
from hsa.searches.comparisons import Comparison, WorstUtterance
from hsa.searches.objectives import Objective
from hsa.searches.sources import SearchSources
from hsa.searches.trials import Trial, best_of, front_of
from hsa.searches.unchanged_sources import check_unchanged
from hsa.system.types import PathLike

FORMAT = 1


@dataclass(frozen=True)
class Savings:
    """Utterances of the dev sets that were decoded, and those that were skipped: because a candidate lost its race
    (`raced`), or because its weights equal an earlier one's (`equal`)."""

    decoded: int
    raced: int
    equal: int


@dataclass(frozen=True)
class Study:
    """A finished search.

    Args:
        output: its directory.
        objective: the minimised objective.
        trials: every scored model, the baselines first.
        dev, test: the best candidate, the baselines and the fine-tunes side by side, by set; `test` is empty without
            test sets, `dev` with a score of your own.
        worst: the utterances with the most word errors of the best candidate.
        importance: by method, the importance of each drawn number as a share; shares sum to 1.
        savings: utterances that were not decoded; None with a score of your own.
        seconds, merging: the time of all trials, summed over workers, and the part of it spent on merging.
        notes: plain sentences that a user should know.
        warnings: of the merge that was written as the best.
        request: the arguments that are stored with the trials.
        best_baseline: the name of the best baseline.
        confidence: of the intervals.

    Example:
        >>> sources = {"base": "whisper-small", "models": ["m1", "m2"]}
        >>> study = hsa.search(sources, method="linear", dev=["dev.tsv"], trials=6, output="search")
        >>> len(study.trials), study.best in study.trials
        (6, True)
    """

    output: Path
    objective: Objective
    sources: SearchSources
    trials: tuple[Trial, ...]
    dev: tuple[Comparison, ...] = ()
    test: tuple[Comparison, ...] = ()
    worst: tuple[WorstUtterance, ...] = ()
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    savings: Savings | None = None
    seconds: float = 0.0
    merging: float = 0.0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    request: Mapping[str, Any] = field(default_factory=dict)
    best_baseline: str | None = None
    confidence: float = 0.95

    @property
    def best(self) -> Trial:
        """The merge with the smallest objective; for a Pareto search, with the smallest mean of its sets."""
        found = best_merge(self.trials)
        if found is None:
            reasons = [trial.result.failure for trial in self.trials if trial.candidate.is_merge]
            raise RequestError(
                f"no merge could be scored: {next((text for text in reasons if text), 'none was tried')}"
            )
        return found

    @property
    def baselines(self) -> tuple[Trial, ...]:
        """The models that were scored before anything was drawn."""
        return tuple(trial for trial in self.trials if trial.candidate.kind != "sampled")

    @property
    def front(self) -> tuple[Trial, ...]:
        """The Pareto front: the non-dominated trials."""
        return tuple(front_of(self.trials)) if self.objective.kind == "pareto" else (self.best,)

    @property
    def command(self) -> str:
        """The command that reproduces `best`."""
        return command(self.sources, self.best.candidate, "merged")

    def merge(self, output: PathLike, **options: Any) -> MergeReport:
        """Write the best candidate as `hsa.merge` does, with options such as `overwrite`.

        The sources are read once more first. Raises the errors of `hsa.merge`, and SourceChanged if they differ from
        those that the search scored.
        """
        check_unchanged(self.sources, [digest for _, digest in self.request["sources"]])
        return merge_candidate(self.sources, self.best.candidate, output, **options)

    def as_dict(self) -> dict[str, Any]:
        """The data of a report, as JSON."""
        return {
            "format": FORMAT,
            "objective": {"kind": self.objective.kind, "name": self.objective.name, "text": self.objective.text},
            "best": self.best.name,
            "command": self.command,
            "request": dict(self.request),
            "trials": [trial.as_dict() for trial in self.trials],
            "front": [trial.name for trial in self.front],
            "importance": {method: dict(found) for method, found in self.importance.items()},
            "dev": [row.as_dict() for row in self.dev],
            "test": [row.as_dict() for row in self.test],
            "worst": [row.as_dict() for row in self.worst],
            "best_baseline": self.best_baseline,
            "confidence": self.confidence,
            "savings": None if self.savings is None else dict(vars(self.savings)),
            "seconds": round(self.seconds, 1),
            "merging": round(self.merging, 1),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def best_merge(trials: Sequence[Trial]) -> Trial | None:
    """The best trial that is a merge."""
    return best_of([trial for trial in trials if trial.candidate.is_merge])


def savings_of(trials: Sequence[Trial], utterances: int) -> Savings:
    """The decoding saved by racing and equal weights, with `utterances` per candidate."""
    scored = [trial.result for trial in trials if trial.state != "failed"]
    decoded = sum(result.decoded for result in scored)
    raced = sum(utterances - len(result.errors) for result in scored)
    equal = sum(len(result.errors) - result.decoded for result in scored)
    return Savings(decoded, raced, equal)
