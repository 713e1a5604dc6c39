"""Release trees: the shipped recipe on small models, what is skipped, and what fails alone."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import (
    edit_json,
    poke,
    read_tensors,
    run_hsa,
    snapshot,
    write_adapter,
    write_openai,
    write_pickle,
    write_tensors,
)
from release_trees import build, results, write_recipe

import hsa
from hsa.outputs.card import FIELDS
from hsa.releases.plan import plan_release
from hsa.system.manifest import PROVENANCE
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


def states(output: Path) -> dict[str, str]:
    return {entry["path"]: entry["state"] for entry in json.loads((output / "index.json").read_text())["entries"]}


def touched(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every path: equal where nothing was written at all."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(root.rglob("*"))}


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
