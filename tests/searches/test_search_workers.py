"""Searches by several processes: the same scores, and no trial lost where a process is."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.errors import MachineError, MismatchError, RequestError
from hsa.searches.processes import _devices, portable
from hsa.searches.ray_actors import Share, check_versions, shares, versions
from hsa.searches.session import SearchStep

pytestmark = pytest.mark.long

Case = dict[str, Any]
GRID = ["weights=1", "lambda=0:1.2", "normalize=off"]
TRIALS = 12


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("workers")
    sources = write_models(folder / "models")
    dev, test = (write_speech(folder / name, sources, 6, seed) for seed, name in enumerate(("dev", "heldout")))
    return {"sources": sources, "dev": str(dev), "test": str(test), "folder": folder}


def run(case: Case, output: Path, **changes: Any) -> hsa.Study:
    """A grid, whose settings do not depend on which trial is finished first."""
    arguments = {"method": "task_arithmetic", "sampler": "grid", "space": GRID, "racing": False, "trials": TRIALS}
    arguments |= {"dev": [case["dev"]], "normalizer": NORMALIZER, "batch": 4}
    return hsa.search(case["sources"], output=output, **{**arguments, **changes})


@pytest.fixture(scope="module")
def alone(case: Case) -> hsa.Study:
    return run(case, case["folder"] / "alone", test=[case["test"]])


def outcome(study: hsa.Study) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.name, dict(t.settings), t.state, t.values, dict(t.drawn), t.result.errors, t.result.weights)
        for t in study.trials
    ]


def test_two_workers_find_what_one_process_does(case: Case, alone: hsa.Study, tmp_path: Path) -> None:
    found = run(case, tmp_path / "two", test=[case["test"]], workers=2)
    assert outcome(found) == outcome(alone)
    assert [row.as_dict() for row in found.test] == [row.as_dict() for row in alone.test]
    assert [row.as_dict() for row in found.dev] == [row.as_dict() for row in alone.dev]
    best = "best/model.safetensors"
    assert (found.output / best).read_bytes() == (alone.output / best).read_bytes()
    assert not multiprocessing.active_children()


def test_a_killed_worker_loses_no_trial(case: Case, alone: hsa.Study, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(step: SearchStep) -> None:
        if step.finished in (3, 8):
            process = multiprocessing.active_children()[0]
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

    found = run(case, tmp_path / "killed", workers=2, progress=kill)
    assert len(set(killed)) == 2
    assert outcome(found) == outcome(alone)


def test_a_search_by_two_workers_goes_on_with_one(case: Case, alone: hsa.Study, tmp_path: Path) -> None:
    def ends(step: SearchStep) -> None:
        if step.finished == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(case, tmp_path / "ended", workers=2, progress=ends)
    assert not multiprocessing.active_children()
    assert outcome(run(case, tmp_path / "ended")) == outcome(alone)


SCRIPT = """
import json, multiprocessing, sys
import hsa
sources, arguments = json.loads(sys.argv[1])
def step(done):
    print(json.dumps([done.finished, [each.pid for each in multiprocessing.active_children()]]), flush=True)
hsa.search(sources, **arguments, progress=step)
"""


def test_workers_end_with_a_search_that_is_killed(case: Case, alone: hsa.Study, tmp_path: Path) -> None:
    """By a script without `if __name__ == "__main__"`, which new processes would run again if they knew of it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    arguments = {"method": "task_arithmetic", "sampler": "grid", "space": GRID, "racing": False, "trials": TRIALS}
    arguments |= {"dev": [case["dev"]], "normalizer": NORMALIZER, "batch": 4, "workers": 2}
    arguments |= {"output": str(tmp_path / "killed")}
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps([case["sources"], arguments])], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    finished, workers = json.loads([process.stdout.readline() for _ in range(6)][-1])
    assert finished == 6
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 60
    while any(map(_is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_is_alive, workers))
    assert outcome(run(case, tmp_path / "killed")) == outcome(alone)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- scores of one's own --------------------------------------------------------------------------------------------


def norm(model: Any) -> float:
    return float(sum(tensor.detach().float().norm() for tensor in model.parameters()))


def kills(model: Any) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return norm(model)


def fails(model: Any) -> float:
    raise MismatchError("this model does not fit")


def divides(model: Any) -> float:
    return norm(model) / 0.0


def own(case: Case, output: Path, score: Any, **changes: Any) -> hsa.Study:
    arguments = {"method": "task_arithmetic", "sampler": "grid", "space": GRID, "trials": 9, "workers": 2}
    return hsa.search(case["sources"], output=output, evaluate=score, **{**arguments, **changes})


def test_workers_score_by_a_function_of_ones_own(case: Case, tmp_path: Path) -> None:
    assert outcome(own(case, tmp_path / "two", norm)) == outcome(own(case, tmp_path / "one", norm, workers=1))


def test_a_model_that_ends_every_worker_ends_the_search(case: Case, tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"3 workers stopped while they worked on the same task; the last error: signal 9 ended its"
    ):
        own(case, tmp_path / "out", kills)
    assert not multiprocessing.active_children()


def test_errors_in_workers_are_raised_here(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="this model does not fit"):
        own(case, tmp_path / "own", fails)
    with pytest.raises(RuntimeError, match=r"in a worker of the search:\n(.|\n)*in divides(.|\n)*ZeroDivisionError"):
        own(case, tmp_path / "other", divides)


def test_a_function_that_cannot_be_sent_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"evaluate cannot be sent to worker processes: .*at the top of a module"):
        own(case, tmp_path / "out", lambda model: 0.0)


def test_errors_of_the_machine_are_one_line_in_a_worker_too() -> None:
    assert str(portable(OSError(28, "No space left on device"))) == "[Errno 28] No space left on device"
    assert isinstance(portable(MemoryError()), MachineError)
    assert "out of memory" in str(portable(MemoryError()))


def test_workers_get_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsa.searches.processes.gpus", lambda: 2)
    assert _devices("auto", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert _devices("cuda:1", 2) == ["cuda:1", "cuda:1"]
    assert _devices("cpu", 2) == ["cpu", "cpu"]


def test_a_node_with_other_versions_is_refused() -> None:
    check_versions(versions())
    with pytest.raises(
        MachineError, match=r"has hsa .*, and the search runs with 9\.9; install one version on all nodes"
    ):
        check_versions({**versions(), "hsa": "9.9"})


# --- what is refused, and shares of a cluster -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be a whole number from 1 to 1024, got 0"),
        ({"workers": True}, "workers must be a whole number"),
        (
            {"by_layer": "0-1", "method": "linear", "space": None},
            "by_layer gives each range of layers a lambda and alpha of its own, but the search draws neither for",
        ),
        ({"ray": "nowhere"}, "ray takes HOST:PORT or ray://HOST:PORT, got 'nowhere'"),
        ({"storage": "postgres"}, "storage must be the URL of a database such as postgresql://user@host/name"),
        ({"study": "mine"}, "study names a search in a shared database; give storage too"),
        ({"storage": "sqlite:///x.db", "study": " "}, "study must be a name, got ' '"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_says_where_to_run_is_checked(case: Case, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        run(case, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("nodes", "device", "count", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 2.0}], "cpu", 2, (2, Share(4, 0))),
        ([{"CPU": 8.0}, {"CPU": 2.0}], "auto", 3, (3, Share(2, 0))),
        ([{"CPU": 1.0}, {"CPU": 1.0}, {}], "auto", None, (2, Share(1, 0))),
        ([{"CPU": 16.0}], "auto", None, (4, Share(4, 0))),
        ([{"CPU": 64.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}], "auto", None, (3, Share(1, 1))),
        ([{"CPU": 64.0, "GPU": 2.0}], "cuda", 1, (1, Share(1, 1))),
        ([{"CPU": 8.0, "GPU": 2.0}], "cpu", None, (2, Share(4, 0))),
    ],
)
def test_shares_of_a_cluster(
    nodes: list[dict[str, float]], device: str, count: int | None, expected: tuple[int, Share]
) -> None:
    assert shares(nodes, device, count) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "count", "message"),
    [
        ([{"CPU": 4.0}], "cuda", None, "the Ray cluster has no GPU; give device='cpu'"),
        ([{"CPU": 4.0}], "cpu", 5, "the Ray cluster has 4 cores, fewer than workers=5 asks for"),
        ([{"CPU": 4.0, "GPU": 1.0}], "auto", 2, "the Ray cluster has 1 GPUs, fewer than workers=2"),
        ([{}], "auto", None, "the Ray cluster has 0 cores"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    nodes: list[dict[str, float]], device: str, count: int | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        shares(nodes, device, count)
