"""Searches that share a database: runs join a study and take over what a lost run left, and no password is shown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.errors import MachineError, RequestError
from hsa.searches import databases, store
from hsa.searches.databases import without_password
from hsa.searches.heartbeats import Heartbeats
from hsa.searches.samplers import quiet_optuna

pytestmark = pytest.mark.long

Case = dict[str, Any]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("storage")
    sources = write_models(folder / "models")
    return {"sources": sources, "dev": str(write_speech(folder / "dev", sources, 5, 0)), "folder": folder}


def arguments(case: Case, output: Path, **changes: Any) -> Case:
    given = {"method": "task_arithmetic,ties", "dev": [case["dev"]], "trials": 10, "normalizer": NORMALIZER, "batch": 4}
    return {**given, "output": str(output), **changes}


def run(case: Case, output: Path, **changes: Any) -> hsa.Study:
    return hsa.search(case["sources"], **arguments(case, output, **changes))


def outcome(study: hsa.Study) -> list[tuple[Any, ...]]:
    return [(t.name, dict(t.settings), t.state, t.values, t.result.errors, t.result.weights) for t in study.trials]


def test_a_second_run_joins_the_study_of_the_first(case: Case, tmp_path: Path) -> None:
    """With one run after the other the study is that of one run without a shared database."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = run(case, tmp_path / "first", storage=url, study="mine")
    second = run(case, tmp_path / "second", storage=url, study="mine", trials=13)
    assert outcome(second)[:10] == outcome(first)
    assert outcome(second) == outcome(run(case, tmp_path / "alone", trials=13))
    assert (tmp_path / "second" / "best" / "model.safetensors").is_file()
    assert not (tmp_path / "second" / "study.db").exists()
    with pytest.raises(RequestError, match=r"search in this storage was begun with seed 0.*or another study"):
        run(case, tmp_path / "third", storage=url, study="mine", seed=1)
    other = run(case, tmp_path / "other", storage=url, study="other", seed=1, trials=8)
    assert len(other.trials) == 8
    study = _optuna_study(url, "mine")
    assert len([trial for trial in study.trials if "result" in trial.user_attrs]) == 6


def _optuna_study(url: str, name: str) -> Any:
    import optuna

    with quiet_optuna():
        return optuna.load_study(study_name=name, storage=url)


SCRIPT = """
import json, sys
import hsa
sources, arguments = json.loads(sys.argv[1])
hsa.search(sources, **arguments, progress=lambda step: print(step.finished, flush=True))
"""


@pytest.mark.parametrize("steps", [2, 8], ids=["a baseline", "a trial"])
def test_what_a_killed_run_left_is_taken_over(
    steps: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    given = arguments(case, tmp_path / "killed", storage=url)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps([case["sources"], given])], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(steps):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(databases, "GRACE", 2)
    monkeypatch.setattr(databases, "INTERVAL", 1)
    found = run(case, tmp_path / "found", storage=url)
    assert len(found.trials) == 10
    assert len({trial.name for trial in found.trials}) == 10
    assert all(trial.values for trial in found.trials)
    monkeypatch.undo()
    baselines = outcome(run(case, tmp_path / "alone"))[:7]
    assert outcome(found)[:7] == baselines


def test_a_result_that_comes_too_late_does_not_count(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No heartbeat reaches the storage, so that another run takes the trial over while this one works on it."""
    import optuna

    url = f"sqlite:///{tmp_path / 'shared.db'}"
    monkeypatch.setattr(Heartbeats, "beat", lambda self, trial: None)
    put, taken = store.Store.tell, []

    def late(self: store.Store, study: Any, asked: Any, trial: Any) -> bool:
        if trial.name == "trial 9" and not taken:
            taken.append(asked)
            frozen = next(each for each in study.get_trials() if each.number == asked.number)
            self.storage.set_trial_state_values(asked._trial_id, optuna.trial.TrialState.FAIL)
            with quiet_optuna():
                optuna.storages.RetryHeartbeatStaleTrialCallback()(study, frozen)
        return put(self, study, asked, trial)

    monkeypatch.setattr(store.Store, "tell", late)
    found = run(case, tmp_path / "late", storage=url)
    assert len(taken) == 1
    assert [trial.name for trial in found.trials][7:] == ["trial 8", "trial 9", "trial 11"]
    assert any("1 results were dropped" in note for note in found.notes)


def test_a_grid_that_two_runs_let_wait_at_once_is_tried_once(case: Case, tmp_path: Path) -> None:
    """Two runs, each of which sees no point that waits, add all of them."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    given = {"sampler": "grid", "method": "task_arithmetic", "racing": False, "trials": 14}
    given["space"] = ["weights=1", "lambda=0:1.2", "normalize=off"]
    queue = store.Store.queue_points

    def twice(self: store.Store, points: Any) -> None:
        queue(self, points)
        for number, point in enumerate(points):
            self.search.enqueue_trial(dict(point), user_attrs={store.POINT: number})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Store, "queue_points", twice)
        found = run(case, tmp_path / "twice", storage=url, **given)
    alone = run(case, tmp_path / "alone", **given)
    assert [row[1:] for row in outcome(found)] == [row[1:] for row in outcome(alone)]
    assert len({json.dumps(dict(trial.settings)) for trial in found.trials if trial.candidate.kind == "sampled"}) == 8


def test_an_output_that_held_another_search_gives_it_no_transcripts(case: Case, tmp_path: Path) -> None:
    """Weights that were scored in it before are decoded again: the utterances are others, or decoded otherwise."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    run(case, tmp_path / "out", storage=url, study="one", trials=7)
    again = run(case, tmp_path / "out", storage=url, study="two", trials=7, seed=1, max_tokens=3)
    fresh = run(case, tmp_path / "fresh", trials=7, seed=1, max_tokens=3)
    assert outcome(again) == outcome(fresh)
    assert [row.as_dict() for row in again.dev] == [row.as_dict() for row in fresh.dev]
    assert again.savings == fresh.savings


def test_an_output_may_have_braces_in_its_path(case: Case, tmp_path: Path) -> None:
    found = run(case, tmp_path / "{a}", trials=7)
    assert (tmp_path / "{a}" / "study.db").is_file()
    assert outcome(run(case, tmp_path / "{a}", trials=7)) == outcome(found)


def test_a_storage_that_cannot_be_used_is_one_line_without_its_password(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot be used: .*unable to open database file"):
        run(case, tmp_path / "a", storage=f"sqlite:///{tmp_path / 'missing' / 'shared.db'}")
    with pytest.raises(RequestError, match=r"needs a driver that is not installed: .*pip install pymysql") as missing:
        run(case, tmp_path / "b", storage="mysql+pymysql://me:secret@127.0.0.1:1/studies")
    assert "secret" not in str(missing.value)
    with pytest.raises(RequestError, match="must be the URL of a database") as wrong:
        run(case, tmp_path / "c", storage="nothing://me:secret@host:port/x")
    assert "secret" not in str(wrong.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/studies", "postgresql://me:***@host/studies"),
        ("postgresql://host/studies", "postgresql://host/studies"),
        ("x://me:secret@host:port/y", "...@host:port/y"),
        ("postgresql://host/studies?user=me&password=secret", "postgresql://host/studies?password=...&user=me"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
