"""`hsa verify` of patches, and of the directories of sweeps and releases."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forger import Forger
from helpers import merge_arguments, poke, run_hsa, snapshot

import hsa
from hsa.errors import RequestError, SourceChanged
from hsa.system.manifest import PROVENANCE
from hsa.verification.decisions import Answers

Triple = dict[str, Path]
NAME = "p.safetensors"
TARGET = "model.encoder.layers.1.self_attn.v_proj.weight"


def told(report: hsa.VerifyReport) -> str:
    return "\n".join(f"{problem.file}: {problem.what}" for problem in report.problems)


def named(report: hsa.VerifyReport) -> set[str]:
    return {problem.file for problem in report.problems}


# --- patches ------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "every projection": {"targets": "attention-all", "k": 0.3},
    "none": {"k": 0},
    "all": {"k": 1, "lam": 0.25},
    "other heads": {"num_heads": 2, "num_layers": 7},
    "files of base": {"assets_from": "base", "max_shard_size": 100_000, "card": {"license": "mit"}},
    "files of secondary": {"assets_from": "secondary"},
    "ids": {"base_id": "org/base", "primary_id": "org/one@abc", "threads": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_sound_patch(shared_triple: Triple, tmp_path: Path, way: str) -> None:
    made = hsa.merge_patch(**shared_triple, output=tmp_path / NAME, sync=False, **WAYS[way])
    before = snapshot(tmp_path)
    seen: list[tuple[int, int]] = []
    plain = hsa.verify(tmp_path / NAME, progress=lambda done, total: seen.append((done, total)))
    assert told(plain) == "" and plain.kind == "patch" and plain.files == 1 and not plain.sources_compared
    assert plain.record is not None and plain.bytes_read >= (tmp_path / NAME).stat().st_size and seen
    ids = {name: value for name, value in WAYS[way].items() if name.endswith("_id")}
    full = hsa.verify(tmp_path / NAME, **shared_triple, **ids)
    assert told(full) == "" and full.sources_compared and full.notes == ()
    document = full.as_dict()
    assert (document["kind"], document["ok"], document["members"]) == ("patch", True, [])
    assert document["selected_heads"] == made.selected_heads
    assert snapshot(tmp_path) == before


def test_any_flipped_bit_of_a_patch_is_found(shared_triple: Triple, tmp_path: Path) -> None:
    path = tmp_path / NAME
    hsa.merge_patch(**shared_triple, output=path, sync=False)
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    for place in [*range(0, length, 97), *range(length, len(raw), 997), len(raw) - 1]:
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 7
        path.write_bytes(changed)
        assert named(hsa.verify(path)) == {NAME}, place
    path.write_bytes(raw)
    assert hsa.verify(path).ok


@pytest.mark.parametrize("cut", [0, 7, 100, 5000, -1])
def test_a_truncated_patch_is_a_problem_and_no_error(shared_triple: Triple, tmp_path: Path, cut: int) -> None:
    path = tmp_path / NAME
    hsa.merge_patch(**shared_triple, output=path, sync=False)
    path.write_bytes(path.read_bytes()[:cut])
    report = hsa.verify(path, **shared_triple)
    assert named(report) == {NAME} and report.record is None and not report.sources_compared


def change_row(forged: Forger) -> None:
    rows = forged.array(forged.target)
    rows.reshape(-1)[-1] *= 1.5
    forged.put(forged.target, rows)


def change_score(forged: Forger) -> None:
    """One that the margin does not depend on, by so little that the selection stays."""
    scores = forged.decision["scores"]
    scores[scores.index(max(scores))] *= 1 + 1e-9


def change_score_and_margin(forged: Forger) -> None:
    """The lowest score of a selected head, and the margin that it gives."""
    scores = forged.decision["scores"]
    last = min(forged.decision["selected"], key=lambda head: scores[head])
    scores[last] *= 1 + 1e-6
    forged.fit_margin()


def change_distance(forged: Forger) -> None:
    forged.document["distances"]["all"]["primary"] *= 1.001


def change_file(forged: Forger) -> None:
    forged.document["files"]["vocab.json"] = "0" * 64


def change_base(forged: Forger) -> None:
    forged.document["sources"]["base"]["targets_blake3"] = "0" * 64


def change_size(forged: Forger) -> None:
    forged.document["sources"]["secondary"]["files"]["model.safetensors"]["bytes"] += 1


def change_id(forged: Forger) -> None:
    forged.document["sources"]["base"]["id"] = "openai/whisper-large-v3"


def swap_heads(forged: Forger) -> None:
    """The rows given as those of other heads, each one further on, and scores that say so."""
    scores = forged.decision["scores"]
    scores.insert(0, scores.pop())
    forged.decision["selected"] = sorted((head + 1) % 4 for head in forged.decision["selected"])


FORGERIES: dict[str, tuple[Callable[[Forger], None], str, str]] = {
    "a row": (change_row, NAME, "bytes are not what the sources give"),
    "a score": (change_score, NAME, f"target tensor {TARGET}: scores .* is recorded, the sources give"),
    "a score and its margin": (change_score_and_margin, NAME, f"target tensor {TARGET}: scores .* the sources give"),
    "heads": (swap_heads, NAME, f"target tensor {TARGET}: selected .* is recorded, the sources give"),
    "a distance": (change_distance, NAME, "its distances of all are not what the sources give"),
    "a small file": (change_file, NAME, "small files are not those that the sources give: vocab.json"),
    "the targets of base": (change_base, "base", "is not the recorded source: its targets"),
    "the size of secondary": (change_size, "secondary", "is not the recorded source: model.safetensors has"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_patch_that_only_the_sources_tell(shared_triple: Triple, tmp_path: Path, what: str) -> None:
    change, file, text = FORGERIES[what]
    hsa.merge_patch(**shared_triple, output=tmp_path / NAME, sync=False)
    forged = Forger.of(tmp_path / NAME)
    change(forged)
    forged.write()
    assert told(hsa.verify(tmp_path / NAME)) == ""
    report = hsa.verify(tmp_path / NAME, **shared_triple)
    assert file in named(report)
    assert any(problem.file == file and re.search(text, problem.what) for problem in report.problems), told(report)


def test_a_changed_row_names_tensor_and_head(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge_patch(**shared_triple, output=tmp_path / NAME, targets="attention-all", sync=False)
    for target, axis in ((TARGET, 0), (TARGET.replace("v_proj", "out_proj"), 1)):
        raw = (tmp_path / NAME).read_bytes()
        forged = Forger.of(tmp_path / NAME)
        rows = forged.array(target)
        index = tuple(1 if n == axis else 0 for n in range(3))
        rows[index] += 0.5
        forged.put(target, rows)
        forged.write()
        report = hsa.verify(tmp_path / NAME, **shared_triple)
        (what,) = [problem.what for problem in report.problems]
        assert report.record is not None
        (record,) = [each for each in report.record.targets if each.name == target]
        assert f"target tensor {target}, head {record.selected[1]}: " in what and "not what the sources give" in what
        (tmp_path / NAME).write_bytes(raw)


def test_a_forged_id_of_a_patch_is_named(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge_patch(**shared_triple, output=tmp_path / NAME, sync=False)
    forged = Forger.of(tmp_path / NAME)
    change_id(forged)
    forged.write()
    report = hsa.verify(tmp_path / NAME, **shared_triple)
    assert any("base is recorded as 'openai/whisper-large-v3', given is 'base'" in note for note in report.notes)
    assert named(hsa.verify(tmp_path / NAME, **shared_triple, base_id="org/base")) == {"base"}


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_source_of_a_patch_with_other_targets_is_named(triple: Triple, tmp_path: Path, role: str) -> None:
    hsa.merge_patch(**triple, output=tmp_path / NAME, sync=False)
    poke(triple[role] / "model.safetensors", TARGET, 0, np.float32(0.25).tobytes())
    report = hsa.verify(tmp_path / NAME, **triple)
    assert role in named(report) and "is not the recorded source: its targets" in told(report)


def test_a_source_of_a_patch_with_nan(triple: Triple, tmp_path: Path) -> None:
    hsa.merge_patch(**triple, output=tmp_path / NAME, sync=False)
    poke(triple["secondary"] / "model.safetensors", TARGET, 0, b"\x00\x00\xc0\x7f")
    report = hsa.verify(tmp_path / NAME, **triple)
    assert named(report) == {"sources"} and "NaN" in told(report) and not report.sources_compared


def test_a_patch_that_is_replaced_while_it_is_read(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge_patch(**shared_triple, output=tmp_path / NAME, sync=False)
    replaced: list[int] = []

    def replace_once(done: int, total: int) -> None:
        if not replaced:
            replaced.append(done)
            hsa.merge_patch(**shared_triple, output=tmp_path / NAME, k=0.9, sync=False, overwrite=True)

    report = hsa.verify(tmp_path / NAME, progress=replace_once)
    assert report.ok and report.record is not None and report.record.parameters["k"] == 0.9
    assert "was replaced while it was read" in report.notes[0]

    def remove(done: int, total: int) -> None:
        (tmp_path / NAME).unlink(missing_ok=True)

    with pytest.raises(SourceChanged, match="was removed while it was read"):
        hsa.verify(tmp_path / NAME, progress=remove)


def test_the_command_line_on_a_patch(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge_patch(**shared_triple, output=tmp_path / NAME, sync=False)
    sources = merge_arguments(shared_triple, tmp_path)[1:4]
    done = run_hsa("verify", tmp_path / NAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"{tmp_path / NAME}: sound"
    assert done.stdout.splitlines()[1] == "  base, primary, secondary"
    done = run_hsa("verify", tmp_path / NAME, "--sources", *sources)
    assert done.returncode == 0 and "every row recomputed from the sources" in done.stdout
    forged = Forger.of(tmp_path / NAME)
    change_row(forged)
    forged.write()
    done = run_hsa("verify", tmp_path / NAME, "--sources", *sources, "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 2 and document["kind"] == "patch" and not document["ok"]


def test_a_file_that_is_no_patch_is_refused(shared_triple: Triple, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path, text in (
        (shared_triple["primary"] / "model.safetensors", "holds weights and is no patch; give the directory"),
        (shared_triple["primary"] / "config.json", "neither a directory nor a patch"),
        (tmp_path / "notes.txt", "neither a directory nor a patch"),
    ):
        with pytest.raises(RequestError, match=text):
            hsa.verify(path)


# --- sweeps ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patches(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("patches") / "sweep"
    hsa.sweep(**shared_triple, output=output, k=[0.3, 0.6], targets=["encoder-qkv", "attention-all"], sync=False)
    return output


@pytest.fixture(scope="module")
def checkpoints(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("checkpoints") / "sweep"
    hsa.sweep(**shared_triple, output=output, k=[0.3, 0.6], full=True, sync=False)
    return output


@pytest.fixture(params=["patches", "checkpoints"])
def swept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "sweep"))


def points(sweep: Path) -> list[Path]:
    return sorted(path for path in sweep.iterdir() if path.name.startswith(("encoder", "attention")))


def weights_of(point: Path) -> Path:
    return point / "model.safetensors" if point.is_dir() else point


def test_a_sound_sweep(swept: Path, shared_triple: Triple) -> None:
    before = snapshot(swept)
    report = hsa.verify(swept)
    assert told(report) == "" and report.kind == "sweep" and not report.sources_compared and report.record is None
    assert [member.output for member in report.members] == points(swept)
    full = hsa.verify(swept, **shared_triple)
    assert told(full) == "" and full.sources_compared and full.ok
    document = full.as_dict()
    assert document["kind"] == "sweep" and len(document["members"]) == len(points(swept))
    assert snapshot(swept) == before
    done = run_hsa("verify", swept)
    assert (
        done.returncode == 0 and f"sweep: {len(points(swept))} of {len(points(swept))} points are sound" in done.stdout
    )


def test_a_flipped_bit_in_a_point_is_named(swept: Path) -> None:
    path = weights_of(points(swept)[-1])
    raw = bytearray(path.read_bytes())
    raw[-200] ^= 1
    path.write_bytes(raw)
    report = hsa.verify(swept)
    assert {file.split("/")[0] for file in named(report)} == {points(swept)[-1].name}
    assert [member.ok for member in report.members] == [True] * (len(points(swept)) - 1) + [False]
    done = run_hsa("verify", swept)
    assert done.returncode == 2 and points(swept)[-1].name in done.stderr


def test_a_forged_row_in_a_sweep_is_named_with_the_sources(
    patches: Path, shared_triple: Triple, tmp_path: Path
) -> None:
    sweep = Path(shutil.copytree(patches, tmp_path / "sweep"))
    forged = Forger.of(points(sweep)[1])
    change_row(forged)
    forged.write()
    report = hsa.verify(sweep, **shared_triple)
    assert points(sweep)[1].name in named(report) and "not what the sources give" in told(report)
    assert not {path.name for path in points(sweep)} & named(report) - {points(sweep)[1].name}


def remove_point(sweep: Path) -> None:
    point = points(sweep)[0]
    shutil.rmtree(point) if point.is_dir() else point.unlink()


def rename_point(sweep: Path) -> None:
    point = points(sweep)[0]
    point.rename(sweep / point.name.replace("k0.3", "k0.4"))


def edit_index(sweep: Path) -> None:
    document = json.loads((sweep / "index.json").read_text())
    document["points"][0]["selected_heads"] += 1
    (sweep / "index.json").write_text(json.dumps(document, indent=1) + "\n")


def edit_table(sweep: Path) -> None:
    text = (sweep / "index.csv").read_text()
    (sweep / "index.csv").write_text(text.replace(",0.3,", ",0.30,"))


def link_point(sweep: Path) -> None:
    point = points(sweep)[0]
    point.rename(sweep / "elsewhere")
    point.symlink_to("elsewhere")


def pipe_for_index(sweep: Path) -> None:
    (sweep / "index.csv").unlink()
    os.mkfifo(sweep / "index.csv")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a point less": (remove_point, "index.csv", "lists what is not there"),
    "a point of another name": (rename_point, "index.csv", "lists no 'encoder|lists no 'attention"),
    "a changed index": (edit_index, "index.json", "is not what the points give"),
    "a changed table": (edit_table, "index.csv", "is not what the points give"),
    "no index": (lambda sweep: (sweep / "index.json").unlink(), "index.json", "is missing; run the sweep"),
    "no table": (lambda sweep: (sweep / "index.csv").unlink(), "index.csv", "is missing; run the sweep"),
    "a link": (link_point, "", "is a link"),
    "a pipe": (pipe_for_index, "index.csv", "regular file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sweep(swept: Path, damage: str) -> None:
    change, file, text = DAMAGES[damage]
    file = file or points(swept)[0].name
    change(swept)
    report = hsa.verify(swept)
    assert file in named(report), told(report)
    assert any(re.search(text, problem.what) for problem in report.problems if problem.file == file), told(report)


def test_a_point_under_another_points_name(swept: Path) -> None:
    rename_point(swept)
    report = hsa.verify(swept)
    assert "its parameters are those of the point" in told(report)


def test_a_point_of_other_sources_is_named(patches: Path, triple: Triple, tmp_path: Path) -> None:
    sweep = Path(shutil.copytree(patches, tmp_path / "sweep"))
    poke(triple["secondary"] / "model.safetensors", TARGET, 0, np.float32(0.25).tobytes())
    (first, *_) = [point for point in points(sweep) if point.name.startswith("encoder")]
    hsa.merge_patch(**triple, output=first, k=0.3, sync=False, overwrite=True)
    report = hsa.verify(sweep)
    assert "secondary are recorded otherwise than in" in told(report)
    assert not hsa.verify(sweep, **triple).ok


def test_what_lies_beside_the_points_is_a_note(swept: Path) -> None:
    (swept / "wer.json").touch()
    (swept / ".notes").mkdir()
    report = hsa.verify(swept)
    assert report.ok and report.notes == ("2 entries that are no points were not looked at, such as '.notes'",)


# --- releases -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("release")
    lines = [f"  {role}: {path}" for role, path in shared_triple.items()]
    recipe = ["title: A", "defaults:", "  group: g", *lines, "merges:", "  - name: one", "  - name: two", "    k: 0.3"]
    (place / "recipe.yaml").write_text("\n".join(recipe) + "\n")
    report = hsa.release(place / "recipe.yaml", place / "tree", sync=False)
    assert report.ok
    return place / "tree"


@pytest.fixture
def tree(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "tree"))


def test_a_sound_release(tree: Path, shared_triple: Triple) -> None:
    report = hsa.verify(tree)
    assert told(report) == "" and report.kind == "release"
    assert [member.output for member in report.members] == [tree / "g" / "one", tree / "g" / "two"]
    assert report.notes == ("README.md of the release was not compared, for its recipe says what it holds",)
    with pytest.raises(RequestError, match="each output of which has sources of its own: run hsa release"):
        hsa.verify(tree, **shared_triple)
    done = run_hsa("verify", tree)
    assert done.returncode == 0 and "release: 2 of 2 outputs are sound" in done.stdout


def replace_in_index(tree: Path, old: str, new: str) -> None:
    text = (tree / "index.json").read_text()
    assert old in text
    (tree / "index.json").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "file", "text"),
    [
        (lambda tree: shutil.rmtree(tree / "g" / "one"), "g/one", "is listed as complete, and is no directory there"),
        (lambda tree: (tree / "g" / "one" / "vocab.json").write_text("{}"), "g/one/vocab.json", "its BLAKE3"),
        (lambda tree: (tree / "g" / "one" / PROVENANCE).unlink(), f"g/one/{PROVENANCE}", "hsa did not write this"),
        (
            lambda tree: (shutil.rmtree(tree / "g" / "one"), shutil.copytree(tree / "g" / "two", tree / "g" / "one")),
            "index.json",
            "of g/one are not what the output's record says",
        ),
        (
            lambda tree: replace_in_index(tree, '"g/one"', '"../one"'),
            "index.json",
            "has the path",
        ),
        (lambda tree: replace_in_index(tree, '"path"', '"way"'), "index.json", "'path' is"),
        (
            lambda tree: replace_in_index(tree, '"g/one"', "[3]"),
            "index.json",
            "no index that",
        ),
        (
            lambda tree: os.truncate(tree / "index.json", (tree / "index.json").stat().st_size - 300),
            "index.json",
            "does not end as an index does",
        ),
        (
            lambda tree: replace_in_index(tree, '"lambda": 0.5', '"lambda": 0.4'),
            "index.json",
            "its parameters of g/one are not what the output's record says",
        ),
    ],
)
def test_a_damaged_release(tree: Path, damage: Callable[[Path], Any], file: str, text: str) -> None:
    damage(tree)
    report = hsa.verify(tree)
    assert file in named(report) and text in told(report), told(report)


def test_outputs_that_the_index_does_not_list_are_a_note(tree: Path) -> None:
    shutil.copytree(tree / "g" / "one", tree / "g" / "three")
    report = hsa.verify(tree)
    assert report.ok and any("does not list were not looked at, such as 'g/three'" in note for note in report.notes)


def test_a_member_that_is_a_link_is_not_followed(tree: Path, tmp_path: Path) -> None:
    (tree / "g" / "one").rename(tmp_path / "one")
    (tree / "g" / "one").symlink_to(tmp_path / "one")
    report = hsa.verify(tree)
    assert named(report) == {"g/one"} and len(report.members) == 1


def test_reports_name_every_field(patches: Path) -> None:
    """What `--json` prints for a directory has the keys of every report."""
    report = hsa.verify(patches)
    keys = set(report.as_dict())
    assert all(set(member) == keys for member in report.as_dict()["members"])
    own = {field.name for field in dataclasses.fields(report)} - {"record", "answers"}
    assert own | {field.name for field in dataclasses.fields(Answers)} <= keys
