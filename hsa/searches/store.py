"""What a search keeps: `study.db`, Optuna's storage with the trials, and the transcripts beside it.

A study `search` has what the sampler drew, and one named `baselines` the models that are scored before. Both have the
candidate and its result with every trial. A trial that a killed run left unfinished is asked again under its number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.errors import DestinationError, MachineError, RequestError, listed, shown
from hsa.option_names import option
from hsa.searches.candidates import Candidate, Result
from hsa.searches.samplers import quiet_optuna
from hsa.searches.trials import Trial
from hsa.system import fsio

DEV, SOURCES = "dev", "sources"
"""Parts of a request that stand for what they are made of by digests."""

DATABASE = "study.db"
TRANSCRIPTS = "transcripts"
SEARCH, BASELINES = "search", "baselines"
"""The names of the two studies."""

REQUEST, CANDIDATE, RESULT, BASELINE = "request", "candidate", "result", "baseline"
"""User attributes: of a study what was asked for; of a trial what it tries, what came of it, and which baseline it
repeats, so that the sampler knows of that."""


@dataclass(frozen=True)
class Kept:
    """A finished trial as it is kept: candidate, result, and what was drawn."""

    candidate: Candidate
    result: Result
    drawn: Mapping[str, Any]


class Store:
    """The studies of one output directory.

    Raises RequestError where they were begun with another request, MachineError where the storage fails.
    """

    def __init__(self, url: str, objectives: int, request: Mapping[str, Any]) -> None:
        import optuna

        with quiet_optuna(), _storage_errors(url):
            self.storage = optuna.storages.RDBStorage(url)
            self._refuse_other(request)
            self.search = self._study(SEARCH, objectives)
            self.baselines = self._study(BASELINES, objectives)
            if REQUEST not in self.search.user_attrs:
                self.search.set_user_attr(REQUEST, json.dumps(request, sort_keys=True))

    def _study(self, name: str, objectives: int) -> Any:
        import optuna

        directions = ["minimize"] * objectives
        return optuna.create_study(storage=self.storage, study_name=name, directions=directions, load_if_exists=True)

    def _refuse_other(self, request: Mapping[str, Any]) -> None:
        """RequestError where an earlier search here was asked for something else."""
        for summary in self.storage.get_all_studies():
            kept = summary.user_attrs.get(REQUEST)
            if summary.study_name != SEARCH or kept is None:
                continue
            earlier = json.loads(kept)
            now = json.loads(json.dumps(request, sort_keys=True))
            differing = [key for key in {**request, **earlier} if earlier.get(key) != now.get(key)]
            if differing:
                raise RequestError(
                    f"the search in this {option('output')} was begun with {_change(differing[0], earlier, now)}; give "
                    f"the same again to go on, or another {option('output')}"
                )

    def retry_unfinished(self) -> None:
        """Ask the trials again that a run left unfinished. Only while no other run takes part."""
        import optuna

        for trial in self.search.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            self.storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.WAITING)

    def kept_baselines(self) -> list[Kept]:
        return _kept(self.baselines)

    def kept_trials(self) -> list[Kept]:
        """The finished trials of the sampler, without the baselines that it was told of."""
        return [each for each in _kept(self.search) if each.drawn.get(BASELINE) is None]

    def finished(self) -> int:
        """How many trials of the sampler are finished, the baselines that it was told of included."""
        return sum(trial.state.is_finished() for trial in self.search.get_trials(deepcopy=False))

    def waiting(self) -> bool:
        """Whether a trial waits to be asked."""
        import optuna

        return bool(self.search.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))

    def add_baseline(self, trial: Trial) -> None:
        """Keep a baseline, in one transaction."""
        with quiet_optuna():
            self.baselines.add_trial(_frozen(trial, {}, {}, {}))

    def tell_of_baseline(self, trial: Trial, drawn: Mapping[str, Any], distributions: Mapping[str, Any]) -> None:
        """Let the sampler know of a baseline that it could have drawn, once."""
        known = {each.user_attrs.get(BASELINE) for each in self.search.get_trials(deepcopy=False)}
        if trial.name not in known:
            with quiet_optuna():
                self.search.add_trial(_frozen(trial, drawn, distributions, {BASELINE: trial.name}))

    def tell(self, asked: Any, trial: Trial) -> None:
        """Keep what came of a trial that was asked."""
        import optuna

        asked.set_user_attr(CANDIDATE, trial.candidate.as_dict())
        asked.set_user_attr(RESULT, trial.result.as_dict())
        states = optuna.trial.TrialState
        with quiet_optuna():
            if trial.state == "failed":
                self.search.tell(asked, state=states.FAIL)
            elif trial.state == "stopped":
                asked.report(trial.value, step=len(trial.result.errors))
                self.search.tell(asked, state=states.PRUNED)
            else:
                self.search.tell(asked, list(trial.values))

    def close(self) -> None:
        self.storage.remove_session()
        self.storage.engine.dispose()


def _change(key: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of a request has changed, in words."""
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


def _frozen(
    trial: Trial, drawn: Mapping[str, Any], distributions: Mapping[str, Any], attributes: Mapping[str, Any]
) -> Any:
    import optuna

    failed = trial.state == "failed"
    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        state=states.FAIL if failed else states.COMPLETE,
        values=None if failed else list(trial.values),
        params=dict(drawn),
        distributions=dict(distributions),
        user_attrs={CANDIDATE: trial.candidate.as_dict(), RESULT: trial.result.as_dict(), **attributes},
    )


def _kept(study: Any) -> list[Kept]:
    found = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and RESULT in trial.user_attrs:
            drawn = dict(trial.params)
            if BASELINE in trial.user_attrs:
                drawn[BASELINE] = trial.user_attrs[BASELINE]
            candidate = Candidate.from_dict(trial.user_attrs[CANDIDATE])
            found.append(Kept(candidate, Result.from_dict(trial.user_attrs[RESULT]), drawn))
    return found


class _storage_errors:  # noqa: N801
    """Say in one line that a storage cannot be used."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        if isinstance(error, SQLAlchemyError):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise MachineError(f"the storage {self._url} cannot be used: {lines[0]}") from error


def sqlite_url(folder: Path) -> str:
    """The URL of the database in a directory. DestinationError where SQLAlchemy could not read it."""
    path = os.fspath(folder / DATABASE)
    if "?" in path:
        raise DestinationError(f"output {folder} has a ? in its path, which no database URL can hold; choose another")
    return f"sqlite:///{path}"


class Transcripts:
    """What candidates wrote, one file for each digest of weights: `{"weights": ..., "texts": [...]}`.

    Texts are in the order of the search; a file is replaced by one with more of them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / TRANSCRIPTS
        with fsio.map_write_errors(self._folder):
            self._folder.mkdir(exist_ok=True)

    def put(self, weights: str, texts: Sequence[str]) -> None:
        if not weights or len(texts) <= len(self.get(weights)):
            return
        path = self._path(weights)
        data = json.dumps({"weights": weights, "texts": list(texts)}, ensure_ascii=False)
        part = path.with_suffix(".part")
        with fsio.map_write_errors(part):
            part.write_bytes(data.encode("utf-8", "surrogatepass"))
            os.replace(part, path)

    def get(self, weights: str) -> tuple[str, ...]:
        """The texts of the model with these weights; none where they are not known."""
        try:
            document = json.loads(self._path(weights).read_bytes().decode("utf-8", "surrogatepass"))
        except (OSError, ValueError):
            return ()
        if not isinstance(document, dict) or document.get("weights") != weights:
            return ()
        texts = document.get("texts")
        return tuple(texts) if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else ()

    def _path(self, weights: str) -> Path:
        return self._folder / f"{weights[:32]}.json"
