"""Release trees: where they may stand, the disk, several runs at once, and sources from the Hub."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import (
    mounted,
    run_hsa,
    snapshot,
)
from hub_server import TOKEN, Servers, running
from release_trees import build, results, write_recipe

from hsa.errors import DestinationError, HsaError, RequestError
from hsa.releases.plan import ROOM_FOR_METADATA, plan_release
from hsa.system import fsio
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput, staging_path

Triple = dict[str, Path]


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_disk_too_small_for_all_is_noticed_before_the_first_byte(recipe: Path, tmp_path: Path) -> None:
    (needed,) = {entry.plan.bytes_to_write for entry in plan_release(recipe, tmp_path / "tree").entries}
    size = 2 * needed + 2 * ROOM_FOR_METADATA
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size}", "none") as point:
        before = snapshot(point)
        done = run_hsa("release", recipe, "--output", point / "tree")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"hsa: error: {3 * (needed + ROOM_FOR_METADATA)} bytes are needed for all merges and "
            f"{fsio.free_bytes(point)} are free in {point}; nothing was written: free some space, or "
            f"choose another tree\n"
        )
        assert snapshot(point) == before
        warned = run_hsa("release", recipe, "--output", point / "tree", "--dry-run")
        assert warned.returncode == 0
        assert f"  warning {3 * (needed + ROOM_FOR_METADATA)} bytes are needed for all merges" in warned.stdout


def test_room_that_an_earlier_output_gives_back_counts(recipe: Path, tmp_path: Path) -> None:
    """Two of three stand; to build them anew takes room for one at a time."""
    seen = plan_release(recipe, tmp_path / "tree")
    (needed,) = {entry.plan.bytes_to_write for entry in seen.entries}
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={4 * needed + 3 * ROOM_FOR_METADATA}", "none") as point:
        text = recipe.read_text(encoding="utf-8")
        assert build(recipe, point / "tree").ok
        free = fsio.free_bytes(point)
        recipe.write_text(text.replace("group: g", "group: g\n  alpha: 0.3"), encoding="utf-8")
        assert free < 2 * needed + 3 * ROOM_FOR_METADATA
        assert results(build(recipe, point / "tree", overwrite=True)) == dict.fromkeys(("g/a", "g/b", "g/c"), "built")


# --- where the tree may stand -----------------------------------------------------------------------------------------


def test_trees_that_are_refused(recipe: Path, triple: Triple, tmp_path: Path) -> None:
    home = Path.home()
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    for output, message in (
        (triple["base"], "is the source"),
        (triple["base"].parent, "contains the source"),
        (triple["base"] / "tree", "lies in the source"),
        (Path("/"), "is the root, or is or holds a home directory"),
        (home, "is the root, or is or holds a home directory"),
        (file, "exists and is not a directory"),
    ):
        before = snapshot(tmp_path)
        with pytest.raises(RequestError, match=message):
            build(recipe, output, overwrite=True)
        assert snapshot(tmp_path) == before


def test_other_peoples_files_are_not_replaced(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    output.mkdir()
    for name in ("README.md", "index.json"):
        (output / name).write_text('{"kind": "mine"}', encoding="utf-8")
        with pytest.raises(DestinationError, match=rf"tree/{name} is no index that hsa release wrote"):
            build(recipe, output, overwrite=True)
        assert [path.name for path in output.iterdir()] == [name]
        (output / name).unlink()
    (output / "g" / "b").mkdir(parents=True)
    (output / "g" / "b" / "thesis.txt").write_text("chapter 1", encoding="utf-8")
    with pytest.raises(HsaError, match=r"1 of 3 merges cannot be done, .*g/b .*is no earlier output of hsa"):
        build(recipe, output, overwrite=True)
    assert [path.name for path in output.rglob("*")] == ["g", "b", "thesis.txt"]
    (output / "README.md").symlink_to(tmp_path / "elsewhere.md")
    (output / "g" / "b" / "thesis.txt").unlink()
    with pytest.raises(DestinationError, match=r"tree/README.md is no index"):
        build(recipe, output)


def test_links_that_lead_two_entries_to_one_place(triple: Triple, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", triple, {"name": "a"}, {"name": "a", "group": "h"})
    output = tmp_path / "tree"
    (output / "g").mkdir(parents=True)
    (output / "h").symlink_to("g")
    with pytest.raises(RequestError, match=r"recipe.yaml:\d+: h/a and g/a lead to .*/g/a and .*/g/a; take the links"):
        build(recipe, output)
    assert list((output / "g").iterdir()) == []


# --- several runs -----------------------------------------------------------------------------------------------------


def test_another_run_at_one_entry(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    with StagedOutput(output / "g" / "b", overwrite=False, sync=False):
        report = build(recipe, output)
        assert results(report) == {"g/a": "built", "g/b": "failed", "g/c": "built"}
        assert "another run is writing to" in (report.entries[1].problem or "")
    assert build(recipe, output).ok


def test_two_runs_at_once_leave_one_whole_tree(recipe: Path, tmp_path: Path) -> None:
    output, alone = tmp_path / "tree", tmp_path / "alone"
    command = [sys.executable, "-m", "hsa", "release", str(recipe), f"--output={output}", "--no-sync", "--quiet"]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    assert {run.returncode for run in runs} <= {0, 1}
    for line in "".join(errors).splitlines():
        assert "another run is writing to" in line or "is not empty" in line
    build(recipe, alone)
    assert build(recipe, output).ok
    assert snapshot(output) == snapshot(alone)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_what_is_done_stays_and_the_next_run_goes_on(triple: Triple, tmp_path: Path, number: int) -> None:
    """The signal comes when the middle entry is finished but for the rename that publishes it."""
    recipe = write_recipe(tmp_path / "recipe.yaml", triple, *({"name": name} for name in "abc"))
    output = tmp_path / "tree"
    script = (
        "import signal, sys, time\n"
        "from hsa.cli import app; from hsa.system import publish as publishing\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "publish = publishing.StagedOutput.publish\n"
        "def late(self):\n"
        "    if self.destination.name == 'b':\n"
        "        print('now', flush=True)\n"
        "        time.sleep(60)\n"
        "    publish(self)\n"
        "publishing.StagedOutput.publish = late\n"
        "sys.exit(app.run(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "release", str(recipe), f"--output={output}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "now\n"
        run.send_signal(number)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == (-number if number == signal.SIGKILL else 130)
    names = {path.name for path in (output / "g").iterdir()}
    if number == signal.SIGKILL:
        assert names == {"a", staging_path(output / "g" / "b").name}
    else:
        assert names == {"a"}
        assert "hsa: note: 1 merges ended before and stand; run again to go on\n" in errors
    assert not (output / "index.json").exists()
    assert results(build(recipe, output)) == {"g/a": "verified", "g/b": "built", "g/c": "built"}
    build(recipe, tmp_path / "alone")
    assert snapshot(output) == snapshot(tmp_path / "alone")


def test_a_leftover_of_a_killed_index_is_cleared(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    build(recipe, output)
    whole = snapshot(output)
    (output / "index.json").unlink()
    (output / ".index.hsa-staging").mkdir()
    (output / ".index.hsa-staging" / "README.md").write_text("half of", encoding="utf-8")
    assert build(recipe, output).index_written
    assert snapshot(output) == whole


def test_an_index_that_cannot_be_written_is_a_failure(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    (output).mkdir()
    (output / ".index.hsa-staging").write_text("in the way", encoding="utf-8")
    done = run_hsa("release", recipe, "--output", output, "--no-sync")
    assert done.returncode == 1
    assert "hsa: error: the index: " in done.stderr and "is no staging directory of hsa; move it away" in done.stderr
    assert (output / "g" / "c" / PROVENANCE).is_file()


# --- from the Hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def servers() -> Iterator[Servers]:
    with running() as found:
        yield found


def test_a_tree_from_the_hub(servers: Servers, shared_triple: Triple, tmp_path: Path) -> None:
    """A dry run fetches no weights; what stands and was made from commits is verified without its sources."""
    env = {
        "HF_ENDPOINT": servers.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HSA_CACHE": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    ids = {"base": "org/whisper", "primary": "org/first@v1.0", "secondary": "org/second"}
    for role, name in ids.items():
        servers.add(name.partition("@")[0], shared_triple[role])
    document = {"merges": [{"name": "a", "group": "g", **ids}, {"name": "b", "group": "g", "k": 0.3, **ids}]}
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "tree"
    recipe.write_text(yaml.safe_dump(document), encoding="utf-8")
    done = run_hsa("release", recipe, "--output", output, "--dry-run", "--json", env=env)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    weights = (shared_triple["primary"] / "model.safetensors").stat().st_size
    headers = sum(seen.bytes for seen in servers.of("cdn"))
    assert 0 < headers < plan["bytes_to_fetch"] and not output.exists()
    done = run_hsa("release", recipe, "--output", output, "--json", "--no-sync", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["built"] == 2
    servers.seen.clear()
    shutil.rmtree(tmp_path / "hf")
    done = run_hsa("release", recipe, "--output", output, "--json", "--no-sync", env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["verified"], report["index_written"]) == (2, False)
    again = sum(seen.bytes for seen in servers.of("cdn"))
    assert again <= headers, "no weights of the sources are fetched to verify"
    assert report["bytes_read"] >= 2 * weights
    bare = [f"--{role}={name}" for role, name in ids.items()]
    card = "--card=release_group=g"
    done = run_hsa("merge", *bare, card, f"--output={output / 'g' / 'a'}", "--no-hash", "--overwrite", env=env)
    assert done.returncode == 0, done.stderr
    done = run_hsa("release", recipe, "--output", output, "--json", "--no-sync", env=env)
    assert json.loads(done.stdout)["bytes_read"] >= 3 * weights, "without digests it is computed again"
    repo = servers.repos["org/second"]
    repo.revisions["main"], repo.commits["c" * 40] = "c" * 40, shared_triple["primary"]
    done = run_hsa("release", recipe, "--output", output, "--json", "--no-sync", env=env)
    assert done.returncode == 1
    problem = json.loads(done.stdout)["entries"][0]["problem"]
    assert re.search(r"secondary is org/second@[0-9a-f]{40}, the recipe's is org/second@c{40}", problem)
    assert TOKEN not in done.stdout + done.stderr
