"""The search itself: baselines first, then trials by ask and tell, as many at a time as the pool can run.

Finished trials are read from the storage, where other runs of a shared search also store theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hsa.errors import MachineError
from hsa.searches.baselines import GreedySoup, baselines, default_name
from hsa.searches.candidates import Candidate, Result
from hsa.searches.databases import MOST_RETRIES
from hsa.searches.dev_sets import DevSets
from hsa.searches.heartbeats import GRACE
from hsa.searches.objectives import Objective
from hsa.searches.options import SearchOptions
from hsa.searches.pools import Pool
from hsa.searches.samplers import METHOD, SteadySampler, distributions, grid_points, quiet_optuna, suggest
from hsa.searches.sources import SearchSources
from hsa.searches.space import MethodSpace
from hsa.searches.store import CANDIDATE, POINT, Store
from hsa.searches.tasks import Score
from hsa.searches.transcripts import Transcripts
from hsa.searches.trials import Trial, best_of, make_trial

MODEL_BASED = ("tpe", "cmaes")
"""Samplers that model the scores of finished trials."""

POLL = 1.0
"""Seconds between two polls of the other runs of a shared search."""


@dataclass(frozen=True)
class SearchStep:
    """The progress of a search: the number of finished trials, the total, the best so far and the last."""

    finished: int
    trials: int
    best: Trial | None
    last: Trial


@dataclass(frozen=True)
class Asked:
    """A trial that was asked for: Optuna's study and handle, and its candidate."""

    study: Any
    handle: Any
    candidate: Candidate


@dataclass
class Session:
    """One search. `dev` and `transcripts` are None with the caller's own scoring function."""

    sources: SearchSources
    spaces: Mapping[str, MethodSpace]
    options: SearchOptions
    objective: Objective
    pool: Pool
    store: Store
    dev: DevSets | None
    transcripts: Transcripts | None
    progress: Callable[[SearchStep], None] | None = None
    trials: list[Trial] = field(default_factory=list)
    _before: list[Candidate] = field(default_factory=list)
    _told: int = 0
    _seen: dict[tuple[str, int], Trial] = field(default_factory=dict)
    _taken: int = 0

    def run(self) -> None:
        """Score the baselines and search until enough trials are finished or time is up. Raises the errors of scoring;
        earlier results are then kept."""
        started = time.monotonic()
        self._refresh(quiet=True)
        self._score_baselines()
        self._tell_of_defaults()
        budget = max(0, self.options.trials - len(self._before))
        if self.options.sampler == "grid":
            self.store.queue_points(grid_points(self.spaces, budget))
        self.store.search.sampler = SteadySampler(self.options.sampler, self.options.seed)

        def is_late() -> bool:
            return self.options.time is not None and time.monotonic() - started >= self.options.time

        self._work(self.store.search, lambda: None if is_late() else self._ask(budget), is_late)

    def incumbent(self) -> tuple[int, ...] | None:
        """The errors of the best trial so far, against which candidates race; None if they do not race."""
        if not self.options.racing or self.objective.kind == "pareto" or self.dev is None:
            return None
        best = best_of(self.trials)
        return None if best is None else best.result.errors

    @property
    def notes(self) -> list[str]:
        """Notes to the user about how the search went."""
        if not self._taken:
            return []
        return [
            f"{self._taken} results were dropped: the database had received no heartbeat from this run for {GRACE} "
            f"seconds, so other runs took over the trials; was the machine suspended, or is the database slow?"
        ]

    # --- baselines ------------------------------------------------------------------------------------------------

    def _score_baselines(self) -> None:
        self._score(baselines(self.sources, self.spaces), first=True)
        if self.options.soup is not None:
            soup = GreedySoup(self.sources, tuple(self.trials))
            for candidate in soup.candidates():
                (trial,) = self._score([candidate])
                soup.take(trial)

    def _score(self, candidates: Sequence[Candidate], *, first: bool = False) -> list[Trial]:
        """Score models without a race, unless an earlier run or another one has done so."""
        self._before += candidates
        for _ in range(MOST_RETRIES):
            self.store.queue_baselines(candidates, first=first)
            self._refresh(quiet=True)
            self._work(self.store.baselines, self._ask_baseline)
            by_name = {trial.name: trial for trial in self.trials}
            if all(candidate.name in by_name for candidate in candidates):
                return [by_name[candidate.name] for candidate in candidates]
        missing = next(candidate.name for candidate in candidates if candidate.name not in by_name)
        raise MachineError(f"{missing} could not be scored: every run that tried it stopped")

    def _ask_baseline(self) -> Asked | None:
        study = self.store.baselines
        while self.store.waiting(study):
            handle = self.store.ask(study)
            if CANDIDATE in handle.user_attrs:
                return Asked(study, handle, Candidate.from_dict(handle.user_attrs[CANDIDATE]))
            self.store.discard(study, handle)  # another run was faster
        return None

    def _tell_of_defaults(self) -> None:
        """Tell the sampler the results of the methods' defaults, if they are within the space."""
        if self.options.sampler not in MODEL_BASED:
            return
        by_name = {trial.name: trial for trial in self.trials}
        for space in self.spaces.values():
            drawn, trial = space.defaults(), by_name.get(default_name(space))
            if drawn is None or trial is None or trial.state != "complete":
                continue
            chosen = {METHOD: space.method} if len(self.spaces) > 1 else {}
            self.store.tell_of_baseline(trial, {**chosen, **drawn}, distributions(space, list(self.spaces)))
            self._told += 1

    # --- trials ---------------------------------------------------------------------------------------------------

    def _ask(self, budget: int) -> Asked | None:
        """The next trial of the sampler; None if there are enough, or a grid has no further point."""
        study = self.store.search
        while True:
            if self.store.begun() >= budget or (self.options.sampler == "grid" and not self.store.waiting(study)):
                return None
            handle = self.store.ask(study)
            is_stray = self.options.sampler == "grid" and POINT not in handle.user_attrs
            if not (is_stray or self.store.is_doubled(handle) or self.store.begun(handle.number) >= budget):
                return self._drawn(handle)
            self.store.discard(study, handle)  # another run was faster

    def _drawn(self, handle: Any) -> Asked:
        """The candidate of a trial: the one it had before its run was lost, or one that the sampler draws now."""
        study = self.store.search
        with quiet_optuna():
            method, drawn = suggest(handle, self.spaces, whole=self.options.sampler == "nsga2")
        if CANDIDATE in handle.user_attrs:
            return Asked(study, handle, Candidate.from_dict(handle.user_attrs[CANDIDATE]))
        name = f"trial {len(self._before) + handle.number - self._told + 1}"
        candidate = Candidate(name, "sampled", method, self.spaces[method].settings(drawn))
        handle.set_user_attr(CANDIDATE, candidate.as_dict())
        return Asked(study, handle, candidate)

    # --- one trial after another, or several at a time ------------------------------------------------------------

    def _work(self, study: Any, ask: Callable[[], Asked | None], is_late: Callable[[], bool] = lambda: False) -> None:
        """Score the trials that `ask` returns until it returns None. Then wait, unless time is up, until no other run
        is working on a trial of the study."""
        under_way: dict[int, Asked] = {}
        try:
            while True:
                while len(under_way) < self.pool.size and (asked := ask()) is not None:
                    under_way[self.pool.submit(Score(asked.candidate, self._incumbent_of(asked)))] = asked
                if under_way:
                    for number, result in self.pool.collect(POLL if self.store.shared else None):
                        self._tell(under_way.pop(number), result)
                elif is_late() or not self.store.running(study):
                    return
                else:
                    time.sleep(POLL)
                if self.store.shared:
                    self.store.retry_lost(study)
                    self._refresh()
        finally:
            for asked in under_way.values():
                self.store.give_back(asked.handle)

    def _incumbent_of(self, asked: Asked) -> tuple[int, ...] | None:
        """The incumbent of a trial; baselines are always decoded whole."""
        return self.incumbent() if asked.candidate.kind == "sampled" else None

    def _tell(self, asked: Asked, result: Result) -> None:
        """Store the result of a trial."""
        if self.transcripts is not None:
            self.transcripts.put(result.weights, result.texts)
        trial = self._make(asked.candidate, result, {})
        if self.store.tell(asked.study, asked.handle, trial):
            self._refresh()
        else:
            self._taken += 1

    def _make(self, candidate: Candidate, result: Result, drawn: Mapping[str, Any]) -> Trial:
        return make_trial(len(self.trials) + 1, candidate, result, self.objective, self.dev, drawn)

    def _refresh(self, *, quiet: bool = False) -> None:
        """Read the finished trials: the baselines in their order, then the others by number."""
        kept = {each.candidate.name: ("baselines", each) for each in reversed(self.store.kept_baselines())}
        ordered = [kept[candidate.name] for candidate in self._before if candidate.name in kept]
        ordered += [("search", each) for each in self.store.kept_trials()]
        new = [(study, each) for study, each in ordered if (study, each.number) not in self._seen]
        for study, each in new:
            self._seen[study, each.number] = self._make(each.candidate, each.result, each.drawn)
            self._add_cached(each.result)
        found = [self._seen[study, each.number] for study, each in ordered]
        self.trials[:] = [
            trial if trial.number == number else replace(trial, number=number) for number, trial in enumerate(found, 1)
        ]
        if self.progress is not None and not quiet:
            total = max(self.options.trials, len(self.trials))
            for study, each in new:
                last = self._seen[study, each.number]
                self.progress(SearchStep(len(self.trials), total, best_of(self.trials), last))

    def _add_cached(self, result: Result) -> None:
        """Share stored results with the workers, so that equal weights are not scored again."""
        if self.transcripts is not None:
            texts = self.transcripts.get(result.weights)
            if texts:
                self.pool.add_cached((result.weights, texts))
        elif result.score is not None:
            self.pool.add_cached((result.weights, result.score))
