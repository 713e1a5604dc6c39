"""The search itself: baselines first, then trials by ask and tell, each kept before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsa.searches.baselines import GreedySoup, baselines, default_name
from hsa.searches.candidates import Candidate, Result
from hsa.searches.dev_sets import DevSets
from hsa.searches.evaluators import Evaluator
from hsa.searches.objectives import Objective
from hsa.searches.options import SearchOptions
from hsa.searches.samplers import METHOD, SteadySampler, distributions, grid_points, quiet_optuna, suggest
from hsa.searches.sources import SearchSources
from hsa.searches.space import MethodSpace
from hsa.searches.store import Kept, Store, Transcripts
from hsa.searches.trials import Trial, best_of, make_trial

LEARNING = ("tpe", "cmaes")
"""Samplers that learn from trials of one method alone."""


@dataclass(frozen=True)
class SearchStep:
    """How far a search is: trials that are finished, of how many, and the best so far."""

    finished: int
    trials: int
    best: Trial | None
    last: Trial


@dataclass
class Asked:
    """A trial that the sampler was asked for: Optuna's handle, what to try, and what was drawn."""

    handle: Any
    candidate: Candidate
    drawn: Mapping[str, Any]


@dataclass
class Session:
    """One search. `dev` and `transcripts` are None where a scoring function of the caller's own is used."""

    sources: SearchSources
    spaces: Mapping[str, MethodSpace]
    options: SearchOptions
    objective: Objective
    evaluator: Evaluator
    store: Store
    dev: DevSets | None
    transcripts: Transcripts | None
    progress: Callable[[SearchStep], None] | None = None
    trials: list[Trial] = field(default_factory=list)

    def run(self) -> None:
        """Score the baselines and search until enough trials are finished or time is up. Raises what scoring raises;
        whatever was finished before is kept then."""
        started = time.monotonic()
        self.store.retry_unfinished()
        self._score_baselines()
        self._tell_of_defaults()
        for kept in self.store.kept_trials():
            self._add(kept.candidate, kept.result, kept.drawn)
        first = len(self.trials) - len(self.store.kept_trials())
        grid = self._grid(first)
        while len(self.trials) < self.options.trials and not self._is_late(started):
            asked = self.ask(grid)
            if asked is None:
                break
            result = self.evaluator.evaluate(asked.candidate, self.rival())
            self.tell(asked, result)

    def ask(self, grid: list[dict[str, Any]] | None) -> Asked | None:
        """The next trial of the sampler; None where a grid has no further point."""
        finished = self.store.finished()
        drawn_before = sum(trial.candidate.kind == "sampled" for trial in self.trials)
        with quiet_optuna():
            self.store.search.sampler = SteadySampler(self.options.sampler, self.options.seed, finished)
            if grid is not None and not self.store.waiting():
                if drawn_before >= len(grid):
                    return None
                self.store.search.enqueue_trial(grid[drawn_before])
            handle = self.store.search.ask()
            method, drawn = suggest(handle, self.spaces, whole=self.options.sampler == "nsga2")
        settings = self.spaces[method].settings(drawn)
        candidate = Candidate(f"trial {len(self.trials) + 1}", "sampled", method, settings)
        return Asked(handle, candidate, {**({METHOD: method} if len(self.spaces) > 1 else {}), **drawn})

    def tell(self, asked: Asked, result: Result) -> Trial:
        """Keep what came of a trial."""
        self._keep_texts(result)
        trial = self._make(asked.candidate, result, asked.drawn)
        self.store.tell(asked.handle, trial)
        self._append(trial)
        return trial

    def rival(self) -> tuple[int, ...] | None:
        """The errors of the best so far, against which candidates race; None where they do not."""
        if not self.options.racing or self.objective.kind == "pareto" or self.dev is None:
            return None
        best = best_of(self.trials)
        return None if best is None else best.result.errors

    # --- baselines ------------------------------------------------------------------------------------------------

    def _score_baselines(self) -> None:
        kept = {each.candidate.name: each for each in self.store.kept_baselines()}
        for candidate in baselines(self.sources, self.spaces):
            self._score_baseline(candidate, kept)
        if self.options.soup is not None:
            soup = GreedySoup(self.sources, tuple(self.trials))
            for candidate in soup.candidates():
                soup.take(self._score_baseline(candidate, kept))

    def _score_baseline(self, candidate: Candidate, kept: Mapping[str, Kept]) -> Trial:
        """Score a model without a race, or take what an earlier run made of it."""
        if candidate.name in kept:
            earlier = kept[candidate.name]
            return self._add(earlier.candidate, earlier.result, {})
        result = self.evaluator.evaluate(candidate, None)
        self._keep_texts(result)
        trial = self._make(candidate, result, {})
        self.store.add_baseline(trial)
        self._append(trial)
        return trial

    def _tell_of_defaults(self) -> None:
        """Let the sampler begin with what the methods' defaults came to, where they lie in the space."""
        if self.options.sampler not in LEARNING:
            return
        by_name = {trial.name: trial for trial in self.trials}
        for space in self.spaces.values():
            drawn, trial = space.defaults(), by_name.get(default_name(space))
            if drawn is None or trial is None or trial.state != "complete":
                continue
            chosen = {METHOD: space.method} if len(self.spaces) > 1 else {}
            self.store.tell_of_baseline(trial, {**chosen, **drawn}, distributions(space, list(self.spaces)))

    # --- trials ---------------------------------------------------------------------------------------------------

    def _make(self, candidate: Candidate, result: Result, drawn: Mapping[str, Any]) -> Trial:
        return make_trial(len(self.trials) + 1, candidate, result, self.objective, self.dev, drawn)

    def _add(self, candidate: Candidate, result: Result, drawn: Mapping[str, Any]) -> Trial:
        """A trial of an earlier run."""
        trial = self._make(candidate, result, drawn)
        self.trials.append(trial)
        self._learn(result)
        return trial

    def _append(self, trial: Trial) -> None:
        self.trials.append(trial)
        if self.progress is not None:
            total = max(self.options.trials, len(self.trials))
            self.progress(SearchStep(len(self.trials), total, best_of(self.trials), trial))

    def _learn(self, result: Result) -> None:
        """Let the evaluator know what an earlier run has found, so that equal weights are not scored again."""
        if self.transcripts is not None:
            texts = self.transcripts.get(result.weights)
            if texts:
                self.evaluator.learn(result.weights, texts)
        elif result.score is not None:
            self.evaluator.learn(result.weights, result.score)

    def _keep_texts(self, result: Result) -> None:
        if self.transcripts is not None:
            self.transcripts.put(result.weights, result.texts)

    def _grid(self, scored: int) -> list[dict[str, Any]] | None:
        if self.options.sampler != "grid":
            return None
        return grid_points(self.spaces, max(0, self.options.trials - scored))

    def _is_late(self, started: float) -> bool:
        return self.options.time is not None and time.monotonic() - started >= self.options.time
