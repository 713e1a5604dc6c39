"""Release trees: the shipped recipe on small models, what is skipped, what fails alone, and what is refused whole."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import (
    edit_json,
    mounted,
    poke,
    read_tensors,
    run_hsa,
    snapshot,
    write_adapter,
    write_openai,
    write_pickle,
    write_tensors,
)
from hub_server import TOKEN, Servers, running
from markdown_it import MarkdownIt

import hsa
from hsa.errors import DestinationError, HsaError, RequestError
from hsa.outputs.card import FIELDS
from hsa.releases.index import MARKER
from hsa.releases.plan import ROOM_FOR_METADATA, plan_release
from hsa.system import fsio
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput, staging_path
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "whisper-scaling.yaml"
TARGET = "model.encoder.layers.0.self_attn.q_proj.weight"
COPIED = "model.decoder.layers.0.fc1.weight"
NAN = b"\x00\x00\xc0\x7f"


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> list[Triple]:
    """Triples of five sizes, as a scaling study has them."""
    folder = tmp_path_factory.mktemp("five")
    shapes = [replace(SHAPES["test"], encoder_layers=layers, decoder_layers=1) for layers in (1, 2, 3, 4, 5)]
    return [write_triple(folder / str(seed), shape, seed=seed) for seed, shape in enumerate(shapes)]


def write_recipe(path: Path, sources: Mapping[str, Path], *merges: dict[str, Any], **defaults: Any) -> Path:
    """A recipe of merges in group `g` of the same three sources."""
    shared = {"group": "g", **{role: str(place) for role, place in sources.items()}, **defaults}
    path.write_text(yaml.safe_dump({"defaults": shared, "merges": list(merges)}, sort_keys=False), encoding="utf-8")
    return path


def build(recipe: Path, output: Path, **options: Any) -> hsa.ReleaseReport:
    return hsa.release(recipe, output, sync=False, threads=2, **options)


def results(report: hsa.ReleaseReport) -> dict[str, str]:
    return {entry.path: entry.result for entry in report.entries}


def states(output: Path) -> dict[str, str]:
    return {entry["path"]: entry["state"] for entry in json.loads((output / "index.json").read_text())["entries"]}


def touched(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every path: equal where nothing was written at all."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(root.rglob("*"))}


@pytest.fixture
def recipe(triple: Triple, tmp_path: Path) -> Path:
    """Three merges of one triple."""
    merges = ({"name": "a"}, {"name": "b", "k": 0.3}, {"name": "c", "targets": "attention-qkv"})
    return write_recipe(tmp_path / "recipe.yaml", triple, *merges)


# --- the shipped recipe -----------------------------------------------------------------------------------------------


def test_the_shipped_recipe_on_small_models(five: list[Triple], tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    document = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    for merge, triple in zip(document["merges"], five, strict=True):
        merge |= {role: str(path) for role, path in triple.items()}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document), encoding="utf-8")
    output = tmp_path / "tree"
    done = run_hsa("release", recipe, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n  5 built, 0 verified, 0 failed of 5 merges; index written\n"
    for merge, triple in zip(document["merges"], five, strict=True):
        place = output / "whisper-scaling" / merge["name"]
        model, info = WhisperForConditionalGeneration.from_pretrained(
            place, local_files_only=True, output_loading_info=True
        )
        assert {key: names for key, names in info.items() if names} == {}
        assert len(model.model.encoder.layers) == len(five[: five.index(triple) + 1])
        WhisperProcessor.from_pretrained(place, local_files_only=True)
        alone = tmp_path / "alone"
        said = {"release_group": "whisper-scaling", **document["defaults"]["card"]}
        card = {field: said[field] for field in FIELDS if field in said}
        hsa.merge(**triple, output=alone, k=0.6, lam=0.5, alpha=0.2, card=card, overwrite=True, sync=False)
        assert snapshot(place) == snapshot(alone), "an entry is what hsa merge writes, to the byte"
        text = (place / "README.md").read_text(encoding="utf-8")
        for label in ("Release group: whisper", "Role: composed model", "Adaptation context: ", "Source artifact: "):
            assert f"- {label}" in text
    before = touched(output)
    again = run_hsa("release", recipe, "--output", output)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{output}\n  nothing to do: all 5 merges stand, verified, and so does the index\n"
    assert again.stderr.count("stands and is as the recipe says") == 5
    assert touched(output) == before
    quiet = run_hsa("release", recipe, "--output", output, "--json")
    report = json.loads(quiet.stdout)
    assert (report["ok"], report["built"], report["verified"], report["failed"]) == (True, 0, 5, 0)
    assert (report["bytes_written"], quiet.stderr) == (0, "")


# --- what stands ------------------------------------------------------------------------------------------------------


def test_only_what_differs_is_built_anew_and_only_when_asked(recipe: Path, triple: Triple, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    first = build(recipe, output)
    assert results(first) == {"g/a": "built", "g/b": "built", "g/c": "built"}
    assert first.index_written and first.ok
    before = touched(output)
    second = build(recipe, output)
    assert results(second) == {"g/a": "verified", "g/b": "verified", "g/c": "verified"}
    assert not second.index_written
    assert touched(output) == before
    changed = write_recipe(
        recipe,
        triple,
        {"name": "a"},
        {"name": "b", "k": 0.5, "lambda": 0.1, "card": {"role": "x"}, "primary_id": "org/other"},
        {"name": "c", "targets": "attention-qkv"},
    )
    third = build(changed, output)
    assert results(third) == {"g/a": "verified", "g/b": "failed", "g/c": "verified"}
    (problem,) = [entry.problem for entry in third.failed]
    assert problem == (
        "it was made otherwise than the recipe says: k is 0.3, the recipe says 0.5; lambda is 0.5, the recipe says "
        "0.1; card field role is None, the recipe says 'x'; primary is primary, the recipe's is org/other; give "
        "overwrite=True to build it again"
    )
    assert touched(output / "g") == {path: time for path, time in before.items() if path.startswith(f"{output / 'g'}/")}
    assert states(output) == {"g/a": "complete", "g/b": "other", "g/c": "complete"}
    done = run_hsa("release", changed, "--output", output, "--no-sync")
    assert done.returncode == 1
    assert "hsa: error: g/b: it was made otherwise than the recipe says: k is 0.3" in done.stderr
    assert done.stdout.splitlines()[1:] == [
        "  0 built, 2 verified, 1 failed of 3 merges; index unchanged",
        "  failed: g/b",
        "  mend what the errors name and run again: what stands is kept",
    ]
    fourth = build(changed, output, overwrite=True)
    assert results(fourth) == {"g/a": "verified", "g/b": "built", "g/c": "verified"}
    assert states(output) == {"g/a": "complete", "g/b": "complete", "g/c": "complete"}
    for name in ("a", "c"):
        assert touched(output / "g" / name).items() <= before.items()
    build(changed, tmp_path / "fresh")
    assert snapshot(output) == snapshot(tmp_path / "fresh"), "however it was made, the tree is the same"


def test_whatever_a_merge_may_say_is_verified_the_next_time(triple: Triple, tmp_path: Path) -> None:
    weights = read_tensors(triple["base"])
    names = [name for name in weights if re.search(r"encoder.*self_attn\.[qkv]_proj", name)]
    write_adapter(tmp_path / "adapter", {name: weights[name] for name in names if name.endswith("q_proj.weight")})
    pickled = Path(shutil.copytree(triple["secondary"], tmp_path / "pickled"))
    write_pickle(pickled, read_tensors(triple["secondary"]))
    write_openai(tmp_path / "whisper.pt", triple["base"])
    merges = (
        {"name": "reference", "numerics": "reference", "load_dtype": "float32", "k": 60},
        {"name": "scaled", "attention_scale": 0.9, "non_attention_scale": 1.1, "dtype": "bfloat16"},
        {"name": "sharded", "max_shard_size": "200KB", "assets_from": "secondary"},
        {"name": "each", "lambda": dict.fromkeys(names, 0.25), "targets": "encoder-qkv"},
        {"name": "heads", "num_heads": 2, "num_layers": 3, "alpha": "1e-1"},
        {"name": "adapter", "secondary": "./adapter", "secondary_id": "org/adapter@main"},
        {"name": "pickle", "secondary": "pickled"},
        {"name": "openai", "base": "whisper.pt", "base_id": "openai/whisper-test"},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", triple, *merges)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("'1e-1'", "1e-1"), encoding="utf-8")
    output = tmp_path / "tree"
    first = build(recipe, output)
    assert first.ok, first.failed
    before = touched(output)
    second = build(recipe, output)
    assert second.ok, second.failed
    assert second.count("verified") == len(merges)
    assert touched(output) == before
    assert states(output) == {f"g/{merge['name']}": "complete" for merge in merges}


def test_a_damaged_entry_is_found_and_built_anew_when_asked(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    build(recipe, output)
    whole = snapshot(output)
    poke(output / "g" / "a" / "model.safetensors", COPIED, 3, b"\x01\x02\x03\x04")
    provenance = output / "g" / "b" / PROVENANCE
    provenance.write_bytes(provenance.read_bytes().replace(b'"keep": 1', b'"keep": 2', 1))
    (output / "g" / "c" / "vocab.json").unlink()
    damaged = snapshot(output / "g")
    report = build(recipe, output)
    assert not report.ok
    a, b, c = (entry.problem or "" for entry in report.entries)
    assert a.startswith("it is damaged: model.safetensors: its BLAKE3 is ")
    assert f"tensor {COPIED}: 4 bytes are not what the sources give" in a
    assert re.match(r".*/g/b/hsa_merge\.json: its digest is ", b)
    assert c.startswith("it is damaged: vocab.json: is missing")
    assert all(problem.endswith("; give overwrite=True to build it again") for problem in (a, b, c))
    assert snapshot(output / "g") == damaged
    assert set(states(output).values()) == {"damaged"}
    again = build(recipe, output, overwrite=True)
    assert results(again) == {"g/a": "built", "g/b": "failed", "g/c": "built"}
    assert "its record lists no file, for it is damaged" in (again.failed[0].problem or "")
    shutil.rmtree(output / "g" / "b")
    assert results(build(recipe, output)) == {"g/a": "verified", "g/b": "built", "g/c": "verified"}
    assert snapshot(output) == whole


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_source_trained_again_in_its_place_is_noticed(
    recipe: Path, triple: Triple, tmp_path: Path, role: str
) -> None:
    """Its header, size and name are what they were."""
    output = tmp_path / "tree"
    build(recipe, output)
    poke(triple[role] / "model.safetensors", TARGET, 0, b"\x00\x00\x80\x3f")
    seen = plan_release(recipe, output)
    assert {each.action for each in seen.entries} == {"verify"}, "headers cannot tell"
    report = build(recipe, output)
    assert {entry.result for entry in report.entries} == {"failed"}
    for entry in report.entries:
        assert f"it was made from other sources: {role}: is not the recorded source: its targets have BLAKE3" in (
            entry.problem or ""
        )
    assert set(states(output).values()) == {"other"}
    assert build(recipe, output, overwrite=True).ok
    assert build(recipe, output).count("verified") == 3


def test_a_change_of_primary_outside_the_targets_is_noticed(recipe: Path, triple: Triple, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    build(recipe, output)
    poke(triple["primary"] / "model.safetensors", COPIED, 0, b"\x00\x00\x80\x3f")
    edit_json(triple["primary"] / "preprocessor_config.json", dither=0.5)
    report = build(recipe, output)
    for entry in report.entries:
        assert entry.problem is not None
        assert f"tensor {COPIED}: " in entry.problem
        assert "preprocessor_config.json: is not what the sources give" in entry.problem
    assert build(recipe, output, overwrite=True).ok


def test_other_weights_files_are_noticed_by_the_plan(recipe: Path, triple: Triple, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    build(recipe, output)
    write_tensors(triple["secondary"], read_tensors(triple["secondary"]), shards=2)
    seen = plan_release(recipe, output)
    assert {each.action for each in seen.entries} == {"refuse"}
    assert seen.entries[0].why.endswith("the weights files of secondary are not those that it was made from")


def test_what_the_recipe_does_not_name_is_left_alone(recipe: Path, triple: Triple, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    build(recipe, output)
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    (output / "g" / "figures").mkdir()
    shorter = write_recipe(recipe, triple, {"name": "a"})
    report = build(shorter, output)
    assert report.ok and report.index_written
    assert report.notes == ("2 outputs in the tree are not of this recipe and left alone, such as g/b",)
    assert states(output) == {"g/a": "complete"}
    (output / "g" / "a" / "figure.png").write_bytes(b"mine")
    again = build(shorter, output)
    (note,) = again.entries[0].notes
    assert again.ok and note == "1 files beside the output were not looked at, such as 'figure.png'"
    assert (output / "g" / "c" / PROVENANCE).is_file() and (output / "notes.txt").read_text() == "mine"


# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_entry_that_fails_stops_nothing_else(shared_triple: Triple, triple: Triple, tmp_path: Path) -> None:
    """A NaN in a target is found while it is merged, and by no header."""
    poke(triple["primary"] / "model.safetensors", TARGET, 0, NAN)
    merges = ({"name": "a"}, {"name": "b", "primary": str(triple["primary"])}, {"name": "c", "k": 0.3})
    recipe = write_recipe(tmp_path / "recipe.yaml", shared_triple, *merges)
    output = tmp_path / "tree"
    done = run_hsa("release", recipe, "--output", output, "--no-sync")
    assert done.returncode == 1
    assert f"hsa: error: g/b: primary {triple['primary']}/model.safetensors: tensor {TARGET}, head 0 holds NaN" in (
        done.stderr
    )
    assert done.stdout.splitlines()[1:3] == [
        "  2 built, 0 verified, 1 failed of 3 merges; index written",
        "  failed: g/b",
    ]
    assert sorted(path.name for path in (output / "g").iterdir()) == ["a", "c"]
    assert states(output) == {"g/a": "complete", "g/b": "missing", "g/c": "complete"}
    text = (output / "README.md").read_text(encoding="utf-8")
    assert "## Not complete\n\n- `g/b`: not built yet\n" in text
    assert str(tmp_path) not in text + (output / "index.json").read_text(encoding="utf-8")
    shutil.copytree(shared_triple["primary"], triple["primary"], dirs_exist_ok=True)
    report = build(recipe, output)
    assert results(report) == {"g/a": "verified", "g/b": "built", "g/c": "verified"}
    assert (output / "README.md").read_text(encoding="utf-8").count("not built yet") == 0


def test_all_that_cannot_be_done_is_named_before_the_first_byte(
    shared_triple: Triple, five: list[Triple], triple: Triple, tmp_path: Path
) -> None:
    (triple["secondary"] / "config.json").unlink()
    merges = (
        {"name": "sound"},
        {"name": "missing", "base": "./nowhere"},
        {"name": "unlike", "secondary": str(five[4]["secondary"])},
        {"name": "bare", "secondary": str(triple["secondary"])},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", shared_triple, *merges)
    output = tmp_path / "tree"
    for more in ([], ["--dry-run"], ["--overwrite"]):
        done = run_hsa("release", recipe, "--output", output, *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert f"{recipe}: 3 of 4 merges cannot be done, nothing was written: g/missing (line " in done.stderr
        assert f"base: {tmp_path}/nowhere cannot be found" in done.stderr
        assert re.search(r"; g/unlike \(line \d+\): target tensor .* is missing from ", done.stderr)
        assert f": secondary: {triple['secondary']} has no config.json" in done.stderr
        assert not output.exists()


def test_a_bad_recipe_is_exit_code_2(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merges:\n- name: a\n", encoding="utf-8")
    done = run_hsa("release", recipe, "--output", tmp_path / "tree")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"hsa: error: {recipe}:2: merge 'a' has no group\n"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_options_out_of_range_are_named_once(recipe: Path, tmp_path: Path) -> None:
    done = run_hsa("release", recipe, "--output", tmp_path / "tree", "--threads=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hsa: error: --threads must be a whole number from 1 to 256, got 0\n"


def test_a_dry_run_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "tree"
    before = snapshot(tmp_path)
    done = run_hsa("release", recipe, "--output", output, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path) == before
    assert done.stdout.startswith(f"{output} (dry run: nothing was written)\n  g/a: build\n    merge   ")
    assert "\n  in all 3 of 3 to build, " in done.stdout
    document = json.loads(run_hsa("release", recipe, "--output", output, "--dry-run", "--json").stdout)
    assert [entry["action"] for entry in document["entries"]] == ["build"] * 3
    build(recipe, output)
    small = ("README.md", PROVENANCE)  # known at the end alone
    written = sum(
        path.stat().st_size for path in (output / "g").rglob("*") if path.is_file() and path.name not in small
    )
    assert document["bytes_to_write"] == written
    before = touched(tmp_path)
    done = run_hsa("release", recipe, "--output", output, "--dry-run")
    assert done.stdout.count(": verify\n") == 3 and "in all 0 of 3 to build" in done.stdout
    assert touched(tmp_path) == before


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


# --- the index --------------------------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script> | cell |",
    "a\n---\nlicense: evil\n---\n# Injected heading",
    "```\n# Injected heading\n<b>bold</b>",
    "[click](javascript:alert(1)) ![image](http://x/y.png) --> <!--",
    "\u202eright to left\x1b[31m\u2028line {{ jinja }}",
)


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_stay_words(shared_triple: Triple, tmp_path: Path, word: str) -> None:
    fields = {"role": word, "adaptation_context": word, "citation": word, "source_artifact": word, "license": word}
    place = tmp_path / "evil | <b>|` ](x)"
    shutil.copytree(shared_triple["primary"], place)
    text = json.dumps(
        {
            "title": word,
            "merges": [
                {"name": "a", "group": "g", **{r: str(p) for r, p in shared_triple.items()}, "card": fields},
                {"name": "b", "group": "g", **{r: str(p) for r, p in shared_triple.items()}, "primary": str(place)},
            ],
        }
    )
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert build(tmp_path / "recipe.yaml", tmp_path / "tree").ok
    readme = (tmp_path / "tree" / "README.md").read_text(encoding="utf-8")
    head, body = readme.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(head)
    assert data["license"] == word
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or []]
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["g", "Citations"]
    assert [token.content.strip() for token in tokens if token.type == "html_block"] == [MARKER]
    assert {token.type for token in inline} & {"html_inline", "image"} == set()
    links = [dict(token.attrs)["href"] for token in inline if token.type == "link_open"]
    assert links == ["g/a/README.md", "g/b/README.md"]
    rows = [token for token in tokens if token.type == "tr_open"]
    cells = [token for token in tokens if token.type == "td_open"]
    assert (len(rows), len(cells)) == (3, 22)
    document = json.loads((tmp_path / "tree" / "index.json").read_text(encoding="ascii"))
    assert document["title"] == word
    assert document["entries"][0]["parameters"]["card"]["role"] == word


def test_what_the_index_says(triple: Triple, tmp_path: Path) -> None:
    names = [name for name in read_tensors(triple["base"]) if re.search(r"encoder.*self_attn\.[qkv]_proj", name)]
    merges = (
        {"name": "a", "base_id": "openai/whisper-tiny@" + "ab" * 20, "card": {"citation": "@misc{one}"}},
        {"name": "b", "group": "h", "lambda": dict.fromkeys(names, 0.25), "card": {"role": "second"}},
        {"name": "c", "k": 0.3, "card": {"citation": "@misc{one}"}},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", triple, *merges, card={"adaptation_context": "children"})
    build(recipe, tmp_path / "tree")
    text = (tmp_path / "tree" / "README.md").read_text(encoding="utf-8")
    revision = "ab" * 20
    heads = {
        entry["name"]: f"{entry['selected_heads']} of {entry['total_heads']}"
        for entry in json.loads((tmp_path / "tree" / "index.json").read_text(encoding="utf-8"))["entries"]
    }
    base = f"[`openai/whisper-tiny` at `{revision[:12]}`](https://huggingface.co/openai/whisper-tiny/tree/{revision})"
    rest = "`primary` | `secondary`"
    assert f"| [a](g/a/README.md) |  | {base} | {rest} | 0.6 | 0.5 | 0.2 | {heads['a']} | children | 1 |\n" in text
    assert (
        f"| [b](h/b/README.md) | second | `base` | {rest} | 0.6 | per tensor | 0.2 | {heads['b']} | children | 2 |"
        in text
    )
    assert f"| [c](g/c/README.md) |  | `base` | {rest} | 0.3 | 0.5 | 0.2 | {heads['c']} | children | 1 |\n" in text
    assert text.index("## g") < text.index("[a]") < text.index("[c]") < text.index("## h") < text.index("[b]")
    assert "1.\n\n```bibtex\n@misc{one}\n```\n\n2.\n\n```bibtex\n@article{shankar2026" in text
    report = hsa.merge(**triple, output=tmp_path / "same", k=0.3, sync=False)
    assert heads["c"] == f"{report.selected_heads} of {report.total_heads}"
    for entry in json.loads((tmp_path / "tree" / "index.json").read_text(encoding="utf-8"))["entries"]:
        written = json.loads((tmp_path / "tree" / entry["path"] / PROVENANCE).read_text(encoding="utf-8"))
        assert entry["provenance"] == written["digest"]
        assert (entry["parameters"], entry["sources"]) == (written["parameters"], written["sources"])


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
