"""The trials of a search in Optuna's storage: `study.db` in its output, or a database that several machines share.

The study NAME contains the sampler's trials, the study `NAME baselines` the baselines. Every trial has its candidate
and its result. Baselines and the points of a grid are queued. A trial that a killed run left unfinished is queued
again.

In a shared database, every run sends heartbeats for its trials. If they stop for GRACE seconds, the trial is marked as
failed, and another is queued in its place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.errors import RequestError, listed, shown
from hsa.option_names import option
from hsa.searches.candidates import Candidate, Result
from hsa.searches.databases import PATIENCE, open_storage, storage_errors
from hsa.searches.heartbeats import Heartbeats
from hsa.searches.samplers import quiet_optuna
from hsa.searches.trials import Trial

DEV, SOURCES = "dev", "sources"
"""Parts of a request that are digests of their content."""

SEARCH = "search"
"""The default name of a study."""

REQUEST, QUEUED = "request", "queued"
"""User attributes of a study: the request, and whether its baselines are queued."""

CANDIDATE, RESULT, BASELINE, POINT = "candidate", "result", "baseline", "point"
"""User attributes of a trial: its candidate, its result, the baseline that it repeats for the sampler, and the number
of its grid point."""


@dataclass(frozen=True)
class Kept:
    """A finished trial as stored: its number in its study, candidate, result, and the drawn values."""

    number: int
    candidate: Candidate
    result: Result
    drawn: Mapping[str, Any]


class Store:
    """The studies of one search; `shared` if other runs may take part.

    Raises RequestError if they were begun with another request, MachineError if the storage fails.

    Example:
        >>> store = Store(sqlite_url(output), objectives=1, request=request)  # doctest: +SKIP
        >>> handle = store.search.ask()  # doctest: +SKIP
    """

    def __init__(
        self, url: str, objectives: int, request: Mapping[str, Any], *, name: str = SEARCH, shared: bool = False
    ) -> None:
        self.shared, self._objectives = shared, objectives
        self._joined = False
        self._read: dict[int, Kept] = {}  # by the trial's id: finished trials do not change
        with quiet_optuna(), storage_errors(url):
            self.storage = open_storage(url, shared=shared)
            self.search = self._begin(name, request)
            self.baselines = self._study(f"{name} baselines")
        self._heartbeats = Heartbeats(self.storage, self.storage.heartbeat_interval) if shared else None
        self._watched: set[int] = set()
        if not shared:
            self._retry_unfinished()

    # --- beginning ------------------------------------------------------------------------------------------------

    def _begin(self, name: str, request: Mapping[str, Any]) -> Any:
        """Create the study of the search, or load one that was begun with the same request."""
        import optuna

        text = json.dumps(request)
        try:
            study = self._study(name, load=False)
        except optuna.exceptions.DuplicatedStudyError:
            study, self._joined = self._study(name), True
            self._wait_for(study, REQUEST)
        if self._joined and REQUEST in study.user_attrs:
            self._refuse_other(json.loads(study.user_attrs[REQUEST]), json.loads(text))
            return study
        if self._joined and study.get_trials(deepcopy=False):
            raise RequestError(
                f"the database has a study named {shown(name)} that hsa search did not make; give another "
                f"{option('study' if self.shared else 'output')}"
            )
        study.set_user_attr(REQUEST, text)
        return study

    def _study(self, name: str, *, load: bool = True) -> Any:
        import optuna

        directions = ["minimize"] * self._objectives
        return optuna.create_study(storage=self.storage, study_name=name, directions=directions, load_if_exists=load)

    def _wait_for(self, study: Any, attribute: str) -> None:
        """Wait until the run that creates the study has set an attribute, or is considered lost."""
        end = time.monotonic() + (PATIENCE if self.shared and self._joined else 0.0)
        while attribute not in study.user_attrs and time.monotonic() < end:
            time.sleep(0.1)

    def _refuse_other(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = [key for key in {**now, **earlier} if earlier.get(key) != now.get(key)]
        if differing:
            where, another = "output", option("output")
            if self.shared:
                where, another = "storage", option("study")
            raise RequestError(
                f"the search in this {where} was begun with {_change(differing[0], earlier, now)}; use the same again "
                f"to resume it, or another {another} for a new search"
            )

    def _retry_unfinished(self) -> None:
        """Queue the trials again that an earlier run left unfinished. No other run takes part."""
        import optuna

        for study in (self.baselines, self.search):
            for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
                self.storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.WAITING)

    # --- what waits -----------------------------------------------------------------------------------------------

    def queue_baselines(self, candidates: Sequence[Candidate], *, first: bool = False) -> None:
        """Queue candidates that are not queued already. `first` says that they are those with which every run
        begins."""
        if first:
            self._wait_for(self.baselines, QUEUED)
        import optuna

        waiting = {
            trial.user_attrs[CANDIDATE]["name"]
            for trial in _real(self.baselines.get_trials(deepcopy=False))
            if CANDIDATE in trial.user_attrs
        }
        state = optuna.trial.TrialState.WAITING
        with quiet_optuna():
            for candidate in candidates:
                if candidate.name not in waiting:
                    attributes = {CANDIDATE: candidate.as_dict()}
                    self.baselines.add_trial(optuna.trial.create_trial(state=state, user_attrs=attributes))
            if first:
                self.baselines.set_user_attr(QUEUED, True)

    def queue_points(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Queue the points of a grid that are not queued already, in their order."""
        there = {trial.user_attrs.get(POINT) for trial in _real(self.search.get_trials(deepcopy=False))}
        with quiet_optuna():
            for number, point in enumerate(points):
                if number not in there:
                    self.search.enqueue_trial(dict(point), user_attrs={POINT: number})

    def waiting(self, study: Any) -> bool:
        """Whether a trial of a study is queued."""
        import optuna

        return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))

    def running(self, study: Any) -> bool:
        """Whether a trial of a study is in progress, in this run or in another."""
        import optuna

        return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)))

    # --- what is finished -----------------------------------------------------------------------------------------

    def kept_baselines(self) -> list[Kept]:
        return self._kept(self.baselines)

    def kept_trials(self) -> list[Kept]:
        """The finished trials of the sampler, without the baselines that it was told."""
        return self._kept(self.search)

    def _kept(self, study: Any) -> list[Kept]:
        found = []
        for trial in _real(study.get_trials(deepcopy=False)):
            if trial.state.is_finished():
                if trial._trial_id not in self._read:
                    self._read[trial._trial_id] = _read(trial)
                found.append(self._read[trial._trial_id])
        return found

    def begun(self, below: int | None = None) -> int:
        """The number of the sampler's trials that are in progress or finished, optionally only those numbered below
        `below`."""
        import optuna

        return sum(
            trial.state != optuna.trial.TrialState.WAITING
            for trial in _real(self.search.get_trials(deepcopy=False))
            if below is None or trial.number < below
        )

    def is_doubled(self, asked: Any) -> bool:
        """Whether a trial repeats a grid point of another trial: two runs may queue points at once."""
        point = asked.user_attrs.get(POINT)
        real = _real(self.search.get_trials(deepcopy=False))
        return point is not None and asked.number not in {trial.number for trial in real}

    def tell_of_baseline(self, trial: Trial, drawn: Mapping[str, Any], distributions: Mapping[str, Any]) -> None:
        """Tell the sampler, once, the result of a baseline that it could have drawn."""
        import optuna

        known = {each.user_attrs.get(BASELINE) for each in self.search.get_trials(deepcopy=False)}
        if trial.name not in known:
            with quiet_optuna():
                self.search.add_trial(
                    optuna.trial.create_trial(
                        state=optuna.trial.TrialState.COMPLETE,
                        values=list(trial.values),
                        params=dict(drawn),
                        distributions=dict(distributions),
                        user_attrs={BASELINE: trial.name},
                    )
                )

    # --- one trial ------------------------------------------------------------------------------------------------

    def ask(self, study: Any) -> Any:
        """Take a queued trial or a new one, and announce to other runs that this run works on it."""
        with quiet_optuna():
            handle = study.ask()
        if self._heartbeats is not None:
            self._heartbeats.begin(handle._trial_id)
        return handle

    def tell(self, study: Any, asked: Any, trial: Trial) -> bool:
        """Store the result of a trial. False if another run has taken the trial over."""
        import optuna

        states = optuna.trial.TrialState
        try:
            asked.set_user_attr(CANDIDATE, trial.candidate.as_dict())
            asked.set_user_attr(RESULT, trial.result.as_dict())
            with quiet_optuna():
                if trial.state == "failed":
                    study.tell(asked, state=states.FAIL)
                elif trial.state == "stopped":
                    asked.report(trial.value, step=len(trial.result.errors))
                    study.tell(asked, state=states.PRUNED)
                else:
                    study.tell(asked, list(trial.values))
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        except ValueError:
            if not self._is_finished(study, asked):
                raise
            return False
        finally:
            self._end_heartbeat(asked)
        return True

    def _is_finished(self, study: Any, asked: Any) -> bool:
        return any(
            trial.number == asked.number and trial.state.is_finished() for trial in study.get_trials(deepcopy=False)
        )

    def discard(self, study: Any, asked: Any) -> None:
        """End a trial that is not needed; it does not count."""
        import optuna

        with quiet_optuna():
            study.tell(asked, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
        self._end_heartbeat(asked)

    def give_back(self, asked: Any) -> None:
        """Queue a trial again that this run will not finish."""
        import optuna

        self._end_heartbeat(asked)
        try:
            self.storage.set_trial_state_values(asked._trial_id, optuna.trial.TrialState.WAITING)
        except optuna.exceptions.UpdateFinishedTrialError:  # another run has taken it over
            return

    def retry_lost(self, study: Any) -> None:
        """Queue the trials of lost runs again."""
        import optuna

        if self._heartbeats is None:
            return
        with quiet_optuna():
            for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
                if trial._trial_id not in self._watched:  # for runs that were lost before their first heartbeat
                    self._watched.add(trial._trial_id)
                    self._heartbeats.beat(trial._trial_id)
            optuna.storages.fail_stale_trials(study)

    def close(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.close()
        self.storage.remove_session()
        self.storage.engine.dispose()

    def _end_heartbeat(self, asked: Any) -> None:
        if self._heartbeats is not None:
            self._heartbeats.end(asked._trial_id)


def _change(key: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe a changed part of a request."""
    if key == DEV:
        return "dev sets of other audio, ids or references"
    before, after = earlier.get(key), now.get(key)
    if key == SOURCES and isinstance(before, list) and isinstance(after, list):
        names = [[name for name, _ in each] for each in (before, after)]
        if names[0] == names[1]:
            changed = [name for (name, one), (_, other) in zip(before, after, strict=True) if one != other]
            return f"other weights or files of {listed(changed)}"
        before, after = names
    return f"{key} {shown(before)}, and now it is {shown(after)}"


def _real(trials: Sequence[Any]) -> list[Any]:
    """The trials that count. Baselines that the sampler was told are left out. So are trials that ended without a
    result, because their runs were lost or they were not needed. Each point of a grid counts once."""
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    found: list[Any] = []
    points: set[int] = set()
    for trial in trials:
        is_lost = trial.state.is_finished() and (RESULT not in trial.user_attrs or trial.number in retried)
        point = trial.user_attrs.get(POINT)
        if BASELINE in trial.user_attrs or is_lost or point in points:
            continue
        found.append(trial)
        if point is not None:
            points.add(point)
    return found


def _read(trial: Any) -> Kept:
    candidate, result = (trial.user_attrs[name] for name in (CANDIDATE, RESULT))
    return Kept(trial.number, Candidate.from_dict(candidate), Result.from_dict(result), dict(trial.params))
