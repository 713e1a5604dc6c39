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
from hsa.searches.databases import ANSWER_SECONDS, open_storage, storage_errors, without_password
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
        ("postgresql://me:se?cr/et#s@[::1]:5432/studies", "postgresql://me:***@[::1]:5432/studies"),
        ("postgresql://me:s%40cret@host/studies", "postgresql://me:***@host/studies"),
        ("x://me:secret@host:port/y", "x://..."),
        ("postgresql://me:secret", "postgresql://..."),
        ("postgresql://host/studies?user=me&password=secret", "postgresql://host/studies?..."),
        ("postgresql://host/studies?password=s&cret=x", "postgresql://host/studies?..."),
        ("postgresql://me@host:port/db?password=secret", "postgresql://..."),
        ("postgresql+psycopg2://me:s@cret@host/x", "postgresql+psycopg2://..."),
        ("postgresql://me:s@cr/et@host/x", "postgresql://..."),
        ("postgresql://me:s@cr?et@host/x", "postgresql://..."),
        ("postgresql://m/e:secret@host/x", "postgresql://..."),
        ("postgresql://host/me:secret", "postgresql://..."),
        ("me:secret@host/x", "..."),
        ("study.db", "study.db"),
        ("sqlite:////data/me/study.db", "sqlite:////data/me/study.db"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
    assert "cret" not in shown


def refusal_of(url: str) -> str:
    """The message with which a storage is refused, whose traceback shows no other error."""
    with pytest.raises((MachineError, RequestError)) as caught, storage_errors(url):
        open_storage(url, shared=True)
    cause = caught.value.__cause__
    assert "cret" not in f"{caught.value}{'' if cause is None else cause}"
    assert cause is not None or caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def test_an_at_sign_in_a_password_is_refused_before_a_host_is_looked_up() -> None:
    message = refusal_of("postgresql+psycopg2://me:s@cret@127.0.0.1:1/x")
    assert "has an @ in the name of its host" in message and "as %40" in message


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg2://me:s@cret.invalid/tail@127.0.0.1/x",
        "postgresql+psycopg2://me:s@cret.invalid?tail@127.0.0.1/x",
        "postgresql+psycopg2://127.0.0.1:1/x?password=secret&sslmode=secret",
    ],
)
def test_what_a_driver_says_is_left_out_where_it_may_show_a_password(url: str) -> None:
    """psycopg2 repeats an unknown host and an invalid sslmode in its message."""
    assert "Error, whose text may show a part of the password" in refusal_of(url)


def test_what_a_driver_says_of_a_name_that_is_the_password_too_is_shown() -> None:
    message = refusal_of("postgresql+psycopg2://me:127.0.0.1@127.0.0.1:1/x")
    assert 'connection to server at "127.0.0.1", port 1 failed' in message


def test_a_number_of_a_port_that_is_none_is_a_url_that_is_none() -> None:
    assert "must be the URL of a database" in refusal_of("postgresql://me:secret")


@pytest.mark.parametrize(
    ("url", "installed", "expected"),
    [
        ("mysql://host/x", ["pymysql"], "mysql+pymysql://host/x"),
        ("mysql://host/x", ["MySQLdb"], "mysql+mysqldb://host/x"),
        ("mysql://host/x", ["MySQLdb", "pymysql"], "mysql+pymysql://host/x"),
        ("mariadb://host/x", ["pymysql"], "mariadb+pymysql://host/x"),
        ("mysql+mysqldb://host/x", ["pymysql"], "mysql+mysqldb://host/x"),
        ("postgresql+pg8000://host/x", ["psycopg"], "postgresql+pg8000://host/x"),
        ("postgresql://host/x", ["psycopg"], "postgresql+psycopg://host/x"),
    ],
)
def test_a_driver_that_is_installed_is_taken(
    url: str, installed: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules without content stand for the drivers, which are looked for and not imported here."""
    for module in installed:
        (tmp_path / f"{module}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert databases._with_driver(url) == expected


@pytest.mark.parametrize(
    ("driver", "knows_it"),
    [
        ("postgresql+psycopg", True),
        ("postgresql+psycopg2", True),
        ("mysql+pymysql", True),
        ("mysql+mysqldb", True),
        ("mariadb+pymysql", True),
        ("postgresql+pg8000", False),
        ("postgresql+asyncpg", False),
        ("mysql+mysqlconnector", False),
        ("sqlite", False),
    ],
)
def test_the_wait_for_an_answer_is_given_to_drivers_that_know_it(driver: str, knows_it: bool) -> None:
    expected = {"connect_args": {"connect_timeout": ANSWER_SECONDS}} if knows_it else {}
    assert databases._timeout(f"{driver}://host/x") == expected
    assert databases._timeout(f"{driver}://host/x?connect_timeout=3") == {}
