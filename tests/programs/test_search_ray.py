"""A search on a real cluster of Ray: several nodes on this machine, one of which is killed in the middle."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.errors import DataError, MachineError, RequestError, SourceError
from hsa.searches.session import SearchStep

pytest.importorskip("ray", reason="ray is not installed: pip install 'hsa-merge[ray]'")
pytest.importorskip("optuna", reason="optuna is not installed: pip install 'hsa-merge[search]'")

Case = dict[str, Any]
GRID = ["weights=1", "lambda=0:1.2", "normalize=off"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("ray")
    sources = write_models(folder / "models")
    dev, test = (write_speech(folder / name, sources, 6, seed) for seed, name in enumerate(("dev", "heldout")))
    return {"sources": sources, "dev": str(dev), "test": str(test), "folder": folder}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs no actors, and two nodes of one core each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def run(case: Case, output: Path, **changes: Any) -> hsa.Study:
    """A grid, whose settings do not depend on which trial is finished first."""
    arguments = {"method": "task_arithmetic", "sampler": "grid", "space": GRID, "racing": False, "trials": 16}
    arguments |= {"dev": [case["dev"]], "test": [case["test"]], "normalizer": NORMALIZER, "batch": 4}
    return hsa.search(case["sources"], output=output, **{**arguments, **changes})


@pytest.fixture(scope="module")
def alone(case: Case) -> hsa.Study:
    return run(case, case["folder"] / "alone")


def outcome(study: hsa.Study) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.name, dict(t.settings), t.state, t.values, dict(t.drawn), t.result.errors, t.result.weights)
        for t in study.trials
    ]


def test_two_actors_find_what_one_process_does(case: Case, alone: hsa.Study, cluster: Any, tmp_path: Path) -> None:
    found = run(case, tmp_path / "out", ray=cluster.address)
    assert outcome(found) == outcome(alone)
    assert [row.as_dict() for row in found.test] == [row.as_dict() for row in alone.test]
    best = "best/model.safetensors"
    assert (found.output / best).read_bytes() == (alone.output / best).read_bytes()


def test_a_killed_node_loses_no_trial(case: Case, alone: hsa.Study, cluster: Any, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    assert isinstance(cluster, Cluster)
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()

    def kill(step: SearchStep) -> None:
        if step.finished == 9:
            cluster.remove_node(node, allow_graceful=False)

    found = run(case, tmp_path / "out", ray=cluster.address, workers=3, progress=kill)
    assert outcome(found) == outcome(alone)
    assert len([each for each in cluster.list_all_nodes() if each is node]) == 0


def test_a_signal_ends_the_search_and_the_next_one_goes_on(
    case: Case, alone: hsa.Study, cluster: Any, tmp_path: Path
) -> None:
    words = ["--method=task_arithmetic", "--sampler=grid", *(f"--space={each}" for each in GRID)]
    words += ["--no-racing", "--trials=16", f"--dev={case['dev']}", f"--test={case['test']}", "--batch=4"]
    words += [f"--normalizer={NORMALIZER}", f"--base={case['sources']['base']}", f"--output={tmp_path / 'out'}"]
    words += [*(f"--model={path}" for path in case["sources"]["models"]), "--ray", cluster.address]
    command = [sys.executable, "-m", "hsa", "search", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    database = tmp_path / "out" / "study.db"
    end = time.monotonic() + 300
    while not (database.is_file() and _finished(database) >= 3) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "finished trials are kept; run the same command again to resume" in said
    assert outcome(run(case, tmp_path / "out")) == outcome(alone)


def _finished(database: Path) -> int:
    """How many trials of a search are finished."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        try:
            return int(connection.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0])
        except sqlite3.OperationalError:  # it has no tables yet
            return 0


def test_a_score_of_ones_own_is_sent_to_the_actors(case: Case, cluster: Any, tmp_path: Path) -> None:
    """Ray sends functions by value: any function will do."""
    how = {"dev": None, "test": None, "evaluate": lambda model: float(next(model.parameters()).detach().norm())}
    found = run(case, tmp_path / "out", ray=cluster.address, trials=9, **how)
    assert len(found.trials) == 9
    assert len({trial.value for trial in found.trials}) > 3


def test_errors_of_actors_are_raised_here(case: Case, cluster: Any, tmp_path: Path) -> None:
    def fails(model: Any) -> float:
        raise DataError("nothing to score")

    with pytest.raises(DataError, match="nothing to score"):
        run(case, tmp_path / "out", ray=cluster.address, dev=None, test=None, evaluate=fails)


def test_what_a_cluster_lacks_is_refused(case: Case, cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the Ray cluster has no GPU"):
        run(case, tmp_path / "gpu", ray=cluster.address, device="cuda")
    with pytest.raises(RequestError, match=r"fewer than workers=9 asks for"):
        run(case, tmp_path / "nine", ray=cluster.address, workers=9)
    with pytest.raises(MachineError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        run(case, tmp_path / "address", ray="127.0.0.1:1")


def test_other_files_on_another_machine_are_refused(
    case: Case, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that change between the look of this process and that of an actor are as those of another machine."""
    from hsa.searches import search

    def changes(*arguments: Any, **keywords: Any) -> Any:
        found = open_files(*arguments, **keywords)
        return search.Files(found.folders, {**found.digests, 0: "0" * 64}, found.dtype)

    open_files = search.open_files
    monkeypatch.setattr(search, "open_files", changes)
    with pytest.raises(SourceError, match=r"primary on this machine differs from the one that the search began with"):
        run(case, tmp_path / "out", ray=cluster.address)
