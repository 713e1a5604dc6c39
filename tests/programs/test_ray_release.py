"""`hsa release --ray` on a cluster of three nodes on this machine: a head, and two that run one task each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import run_hsa, snapshot
from release_trees import results, write_recipe

import hsa
from hsa.errors import MachineError, RequestError
from hsa.system.ray_cluster import check_nodes, check_version, connected
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

ray: Any = pytest.importorskip("ray", reason="ray is not installed: pip install 'hsa-merge[ray]'")
cluster_utils: ModuleType = pytest.importorskip("ray.cluster_utils")

Triple = dict[str, Path]
ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
PATIENCE = 180.0
"""Seconds that starting processes may take on a busy machine."""


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the method that waits."""
    return tmp_path_factory.mktemp("waiting")


@pytest.fixture(scope="module")
def cluster(waiting: Path) -> Iterator[Any]:
    """A head and two nodes. Their workers inherit the plugins and the folder of the method that waits."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.setenv("HSA_WAITING", str(waiting))
        environment.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        environment.setenv("HSA_PLUGINS", str(SUPPORT / "waiting_method.py"))
        made = cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, shutdown_at_exit=True
        )
        for _ in range(2):
            made.add_node(num_cpus=1)
        yield made
        made.shutdown()


@pytest.fixture
def recipe(triple: Triple, tmp_path: Path) -> Path:
    merges = (
        {"name": "a"},
        {"name": "b", "k": 0.3},
        {"name": "c", "targets": "attention-qkv"},
        {"name": "d", "k": 0.9},
    )
    return write_recipe(tmp_path / "recipe.yaml", triple, *merges)


def build(recipe: Path, output: Path, **options: Any) -> hsa.ReleaseReport:
    return hsa.release(recipe, output, sync=False, threads=1, **options)


def until(what: Callable[[], Any]) -> Any:
    """What `what` gives, as soon as that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come about in time")


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_the_tree_is_the_same_byte_for_byte_and_stands_the_second_time(
    recipe: Path, tmp_path: Path, cluster: Any
) -> None:
    ended: list[str] = []
    report = build(recipe, tmp_path / "tree", ray=cluster.address, watch=lambda entry: ended.append(entry.path))
    assert results(report) == dict.fromkeys(("g/a", "g/b", "g/c", "g/d"), "built")
    assert sorted(ended) == [entry.path for entry in report.entries] == ["g/a", "g/b", "g/c", "g/d"]
    assert not ray.is_initialized()
    alone = build(recipe, tmp_path / "alone" / "tree")
    assert snapshot(tmp_path / "tree") == snapshot(tmp_path / "alone" / "tree")
    for ours, theirs in zip(report.entries, alone.entries, strict=True):
        assert ours.merge is not None and theirs.merge is not None
        assert (ours.merge.tensors, ours.merge.warnings) == (theirs.merge.tensors, theirs.merge.warnings)
    before = snapshot(tmp_path / "tree")
    again = build(recipe, tmp_path / "tree", ray=cluster.address)
    assert set(results(again).values()) == {"verified"} and not again.index_written
    assert snapshot(tmp_path / "tree") == before


def test_an_entry_that_fails_is_reported_as_without_ray(
    recipe: Path, triple: Triple, tmp_path: Path, cluster: Any
) -> None:
    build(recipe, tmp_path / "tree")
    weights = tmp_path / "tree" / "g" / "b" / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    shutil.copytree(tmp_path / "tree", tmp_path / "alone" / "tree")
    ours, theirs = build(recipe, tmp_path / "tree", ray=cluster.address), build(recipe, tmp_path / "alone" / "tree")
    assert results(ours) == {"g/a": "verified", "g/b": "failed", "g/c": "verified", "g/d": "verified"}
    problems = [(entry.result, entry.problem, entry.exit_code) for entry in ours.entries]
    assert problems == [(entry.result, entry.problem, entry.exit_code) for entry in theirs.entries]
    assert "give overwrite=True to build it again" in (ours.entries[1].problem or "")
    assert snapshot(tmp_path / "tree") == snapshot(tmp_path / "alone" / "tree")
    done = run_hsa("release", recipe, "--output", tmp_path / "tree", "--ray", cluster.address, "--threads=1")
    assert done.returncode == 1
    assert "give --overwrite to build it again" in done.stderr


# --- nodes that are lost ----------------------------------------------------------------------------------------------


@pytest.fixture
def waiting_recipe(triple: Triple, waiting: Path, tmp_path: Path) -> Iterator[Path]:
    """Three merges, each of which waits."""
    models = [str(triple["primary"]), str(triple["secondary"])]
    path = tmp_path / "recipe.yaml"
    merges = [
        {"name": name, "group": "g", "method": "waiting", "models": models, "factor": factor}
        for name, factor in (("a", 1.0), ("b", 0.5), ("c", 0.25))
    ]
    path.write_text(json.dumps({"merges": merges}), encoding="utf-8")
    yield path
    for file in waiting.iterdir():
        file.unlink()


def started(recipe: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    """`hsa release` in a process of its own, which knows the method that waits."""
    words = ["release", str(recipe), f"--output={output}", "--no-sync", "--threads=1", "--json", *more]
    command = [sys.executable, "-m", "hsa", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_node_that_is_killed_loses_no_entry(
    waiting_recipe: Path, waiting: Path, tmp_path: Path, cluster: Any
) -> None:
    lost = cluster.add_node(num_cpus=1)
    with started(waiting_recipe, tmp_path / "tree", "--ray", cluster.address) as run:
        begun = waiting / f"on-{lost.node_id}"
        until(begun.exists)
        staged = until(lambda: list((tmp_path / "tree" / "g").glob(".*")))
        assert staged and not (waiting / "go").exists()
        cluster.remove_node(lost, allow_graceful=False)
        (waiting / "go").touch()
        printed, said = run.communicate(timeout=PATIENCE)
    assert (run.returncode, said) == (0, "")
    report = json.loads(printed)  # nothing of Ray's own beside it
    assert (report["built"], report["failed"]) == (3, 0)
    with started(waiting_recipe, tmp_path / "alone" / "tree") as alone:
        assert alone.wait(PATIENCE) == 0
    assert snapshot(tmp_path / "tree") == snapshot(tmp_path / "alone" / "tree")


def test_an_entry_whose_result_was_lost_with_its_node_is_verified(recipe: Path, tmp_path: Path, cluster: Any) -> None:
    """Ray begins such a task again, with the plan of a tree in which the entry did not stand."""
    from hsa.releases import on_ray, plan

    planned = plan.plan_release(recipe, tmp_path / "tree", sync=False, threads=1)
    build(recipe, tmp_path / "tree")
    results = on_ray.build_all(planned, cluster.address, overwrite=False, watch=None)
    assert {report.result for report, _ in results} == {"verified"}


def test_an_interrupt_ends_the_tasks_which_clean_up(
    waiting_recipe: Path, waiting: Path, tmp_path: Path, cluster: Any
) -> None:
    with started(waiting_recipe, tmp_path / "tree", "--ray", cluster.address) as run:
        until(lambda: list(waiting.glob("on-*")))
        assert list((tmp_path / "tree" / "g").glob(".*"))
        run.send_signal(signal.SIGTERM)
        time.sleep(3)  # for the tasks to hear of it: a tensor that is begun is finished
        (waiting / "go").touch()
        _, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "ended by SIGTERM" in said
    assert not (tmp_path / "tree").exists() or snapshot(tmp_path / "tree") == {}


# --- what is asked of the cluster -------------------------------------------------------------------------------------


def test_what_no_node_can_give_is_refused_before_anything_is_written(
    recipe: Path, tmp_path: Path, cluster: Any
) -> None:
    with pytest.raises(RequestError, match=r"asks Ray for 2 CPUs, and no node of the cluster has more than 1; give "):
        hsa.release(recipe, tmp_path / "tree", threads=2, ray=cluster.address)
    assert not (tmp_path / "tree").exists()


def test_a_connection_of_the_program_stays_and_another_cluster_is_refused(
    recipe: Path, tmp_path: Path, cluster: Any
) -> None:
    ray.init(cluster.address, log_to_driver=False)
    try:
        assert build(recipe, tmp_path / "tree", ray=True).ok
        assert ray.is_initialized()
        with pytest.raises(RequestError, match=r"is connected to the Ray cluster .* already, not to other:6379; leave"):
            build(recipe, tmp_path / "tree", ray="other:6379")
    finally:
        ray.shutdown()


def test_another_version_of_hsa_is_refused(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(cluster.address) as module:
        monkeypatch.setattr("hsa.system.ray_cluster.__version__", "9.9.9")
        with pytest.raises(
            MachineError, match=rf"hsa 9\.9\.9 runs here, and on the Ray cluster .* has hsa {hsa.__version__}; "
        ):
            check_nodes(module)
        with pytest.raises(MachineError, match=r"has hsa 9\.9\.9, and 1\.2\.3 runs here; install one version"):
            check_version("1.2.3")


def test_an_address_where_nothing_answers(recipe: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = run_hsa("release", recipe, "--output", tmp_path / "tree", "--ray=127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("hsa: error: no Ray cluster answers at 127.0.0.1:9: Connection refused; ")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - begun < PATIENCE
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_where_another_server_listens(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing, and one of another protocol."""
    monkeypatch.setattr("hsa.system.ray_cluster.ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: kept.append(server.accept()[0]) or kept[0].sendall(answer))
        kept: list[socket.socket] = []
        thread.start()
        with (
            pytest.raises(MachineError, match=r"no Ray cluster answers at .*: (timed out|what listens there is no )"),
            connected(f"127.0.0.1:{server.getsockname()[1]}"),
        ):
            pass
        thread.join()
        kept[0].close()


# --- Ray on this machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["ray", "ray-first"])
def test_without_an_address_ray_joins_the_cluster_that_the_environment_names(
    where: str, tmp_path: Path, cluster: Any
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", write_triple(tmp_path / "m", SHAPES["test"]), {"name": "a"})
    words = ["--output", str(tmp_path / "tree"), "--no-sync", "--ray", "--json"]
    order = (
        [str(recipe), *words]
        if where == "ray"
        else ["--ray", str(recipe), *[word for word in words if word != "--ray"]]
    )
    done = run_hsa("release", *order, env={"RAY_ADDRESS": cluster.address}, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["built"] == 1


def test_ray_is_started_on_this_machine_and_stopped_at_the_end(recipe: Path, tmp_path: Path) -> None:
    done = run_hsa("release", recipe, "--output", tmp_path / "tree", "--ray=local", "--no-sync", timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stderr.splitlines())
    assert [line.partition(": built, ")[0] for line in lines] == [f"hsa: g/{name}" for name in "abcd"]
    assert done.stdout == f"{tmp_path / 'tree'}\n  4 built, 0 verified, 0 failed of 4 merges; index written\n"
    build(recipe, tmp_path / "alone" / "tree")
    assert snapshot(tmp_path / "tree") == snapshot(tmp_path / "alone" / "tree")
