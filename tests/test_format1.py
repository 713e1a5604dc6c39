"""Files of format 1, the first format of hsa's records, are read for ever.

`tests/format1` holds small sources and what hsa 0.1.0 wrote from them: outputs, patches, a sweep of patches and one of
checkpoints, and a release. tests/golden/make_format1.py says how, and `contents.json` lists all of it. Users have such
files, so every later version must verify, apply, inspect, compare and resume them. Where a test fails, mend the code:
the files are never written again.

A record names the version of the program and of the libraries that wrote it. Verification, `apply` and `release` do not
mind others. A sweep does: it keeps an existing point only where the same versions wrote it, and otherwise refuses to go
on in that directory. That is tested as it is, with versions put in the place of the installed ones, on which the tests
therefore do not depend.

Every test works on a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import read_safetensors, run_hsa, same_tensors, snapshot

import hsa

FILES = Path(__file__).resolve().parent / "format1"
CONTENTS: dict[str, Any] = json.loads((FILES / "contents.json").read_text(encoding="utf-8"))
OUTPUTS: list[str] = sorted(CONTENTS["outputs"])
PATCHES: list[str] = [name for name in OUTPUTS if CONTENTS["outputs"][name]["patch"]]
SOURCES = {role: f"sources/{role}" for role in ("base", "primary", "secondary")}
RECORD, CARD = "hsa_merge.json", "README.md"
GRID = ("--targets=encoder-qkv,attention-all", "--k=0.5", "--lambda=0.1,0.5")
FULL_GRID = ("--full", "--lambda=0.1,0.5")
POINTS = [f"{targets}_k0.5_lambda{lam}_alpha0.2" for targets in ("encoder-qkv", "attention-all") for lam in (0.1, 0.5)]
FULL_POINTS = [f"encoder-qkv_k0.6_lambda{lam}_alpha0.2" for lam in (0.1, 0.5)]

LAUNCHER = """
import importlib.metadata, json, platform, sys
versions = json.loads(sys.argv.pop(1))
import hsa._version
hsa._version.__version__ = versions["hsa"]
platform.python_version = lambda: versions["python"]
installed = importlib.metadata.version
importlib.metadata.version = lambda name: versions.get(name) or installed(name)
from hsa.__main__ import main
main()
"""
"""Runs the command line as if these versions were installed."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the files, for reading alone."""
    place = Path(shutil.copytree(FILES, tmp_path_factory.mktemp("format1") / "files"))
    before = snapshot(place)
    yield place
    assert snapshot(place) == before, "a test that only reads has written"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy of the files that a test may change."""
    return Path(shutil.copytree(FILES, tmp_path / "files"))


def sources_of(place: Path, name: str | None = None) -> dict[str, Path]:
    """The sources of an output, or those of sweep and release."""
    found = SOURCES if name is None else CONTENTS["outputs"][name]["sources"]
    return {role: place / path for role, path in found.items()}


def ids_of(name: str) -> dict[str, str]:
    found: dict[str, str] = CONTENTS["outputs"][name]["ids"]
    return found


def options(sources: Mapping[str, Path]) -> list[str]:
    return [f"--{role}={path}" for role, path in sources.items()]


def touched(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file but a sweep's or a release's index: equal where none was written again."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.relative_to(root).as_posix() not in ("index.json", "index.csv", CARD):
            found[path.relative_to(root).as_posix()] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def recorded(place: Path) -> dict[str, Any]:
    """The record of an output as a plain document."""
    found: dict[str, Any] = json.loads((place / RECORD).read_text(encoding="utf-8"))
    assert found["format"] == 1
    return found


def patch_document(patch: Path) -> dict[str, Any]:
    header, _ = read_safetensors(patch)
    found: dict[str, Any] = json.loads(header["__metadata__"]["hsa_patch"])
    assert found["format"] == 1
    return found


def with_versions(
    document: Mapping[str, Any], arguments: Sequence[str], **others: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line under the versions that a record names, but for `others`."""
    versions = {"hsa": document["program"]["version"], **document["libraries"], **others}
    command = [sys.executable, "-c", LAUNCHER, json.dumps(versions), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def sweep_json(document: Mapping[str, Any], place: Path, output: str, *grid: str, **others: str) -> dict[str, Any]:
    """What `hsa sweep --json` prints, of the sources of format 1, under the versions of a record."""
    arguments = ["sweep", *options(sources_of(place)), f"--output={place / output}", *grid, "--json", "--no-sync"]
    done = with_versions(document, arguments, **others)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- the files themselves ---------------------------------------------------------------------------------------------


def test_the_files_are_those_that_were_written() -> None:
    """No checkout has converted them, and nobody has written them again."""
    found = {
        path.relative_to(FILES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FILES.rglob("*")
        if path.is_file() and path.name != "contents.json"
    }
    assert found == CONTENTS["files"]


def test_every_record_is_of_format_1() -> None:
    records = [path for path in FILES.rglob(RECORD) if recorded(path.parent)]
    patches = [path for folder in ("patches", "sweep") for path in (FILES / folder).glob("*.safetensors")]
    assert len(records) == len(OUTPUTS) + len(FULL_POINTS) + 2
    assert len([patch for patch in patches if patch_document(patch)]) == len(PATCHES) + len(POINTS)


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_verified(shared: Path, name: str) -> None:
    report = hsa.verify(shared / "outputs" / name)
    assert (report.kind, report.ok, report.sources_compared) == ("output", True, False), report.problems
    about, expected = report.as_dict(), recorded(shared / "outputs" / name)
    assert about["parameters"] == expected["parameters"]
    assert about["target_tensors"] == len(expected["targets"])
    assert about["selected_heads"] == sum(len(target["selected"]) for target in expected["targets"].values())


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_computed_again(shared: Path, name: str) -> None:
    """The scores of reference numerics are sums by torch, whose last bits another CPU may round otherwise: they stand
    in the record and the card."""
    report = hsa.verify(shared / "outputs" / name, **sources_of(shared, name), **ids_of(name))
    assert report.sources_compared
    allowed = {RECORD, CARD} if name == "reference" else set()
    assert {problem.file for problem in report.problems} <= allowed, report.problems


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_verified_and_computed_again(shared: Path, name: str) -> None:
    patch = shared / "patches" / f"{name}.safetensors"
    assert (hsa.verify(patch).kind, hsa.verify(patch).problems) == ("patch", ())
    report = hsa.verify(patch, **sources_of(shared, name), **ids_of(name))
    assert (report.sources_compared, report.problems) == (True, ())


@pytest.mark.parametrize(("name", "points"), [("sweep", POINTS), ("sweep-full", FULL_POINTS)])
def test_a_sweep_is_verified_and_computed_again(shared: Path, name: str, points: list[str]) -> None:
    report = hsa.verify(shared / name)
    assert (report.kind, report.problems, len(report.members)) == ("sweep", (), len(points))
    report = hsa.verify(shared / name, **sources_of(shared))
    assert (report.sources_compared, report.problems) == (True, ())


def test_a_release_is_verified(shared: Path) -> None:
    report = hsa.verify(shared / "release")
    assert (report.kind, report.problems, len(report.members)) == ("release", (), 2)


def test_the_command_line_verifies(shared: Path) -> None:
    done = run_hsa("verify", shared / "outputs" / "plain", "--sources", *options(sources_of(shared)))
    assert done.returncode == 0, done.stderr
    assert "sound" in done.stdout and "every weight recomputed from the sources" in done.stdout


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", RECORD])
def test_damage_is_found(files: Path, file: str) -> None:
    """So that the tests above cannot pass by looking at nothing."""
    place = files / "outputs" / "plain" / file
    raw = bytearray(place.read_bytes())
    raw[len(raw) // 2] ^= 1
    place.write_bytes(raw)
    assert file in {problem.file for problem in hsa.verify(files / "outputs" / "plain").problems}


def test_other_sources_are_found(shared: Path) -> None:
    sources = sources_of(shared)
    exchanged = {**sources, "primary": sources["secondary"], "secondary": sources["primary"]}
    report = hsa.verify(shared / "outputs" / "plain", **exchanged)
    assert {"primary", "secondary"} <= {problem.file for problem in report.problems}


# --- apply ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_applied(shared: Path, tmp_path: Path, name: str) -> None:
    """To the files of the merge, but for record and card, which are of the format of the day."""
    sources = sources_of(shared, name)
    patch = shared / "patches" / f"{name}.safetensors"
    hsa.apply(sources["primary"], patch, output=tmp_path / "applied", assets=[sources["secondary"]], sync=False)
    found, expected = snapshot(tmp_path / "applied"), snapshot(shared / "outputs" / name)
    assert found.keys() == expected.keys()
    assert {file for file in found if found[file] != expected[file]} <= {RECORD, CARD}
    report = hsa.verify(tmp_path / "applied", **sources, **ids_of(name))
    assert (report.sources_compared, report.problems) == (True, ())


def test_a_point_of_a_sweep_is_applied(shared: Path, tmp_path: Path) -> None:
    primary, patch = shared / "sources" / "primary", shared / "sweep" / f"{POINTS[0]}.safetensors"
    done = run_hsa("apply", primary, patch, "--output", tmp_path / "applied", "--json", "--no-sync")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["selected_heads"] == sum(map(len, selected(patch).values()))
    merged = tmp_path / "merged"
    hsa.merge(**sources_of(shared), output=merged, k=0.5, lam=0.1, sync=False)
    same_tensors(tmp_path / "applied", merged)


def selected(patch: Path) -> dict[str, list[int]]:
    """The selected heads of each target, as the patch holds them."""
    header, data = read_safetensors(patch)
    start, stop = header["hsa.selected"]["data_offsets"]
    flags, found = data[start:stop], {}
    for name, (heads, _, _) in patch_document(patch)["targets"].items():
        found[name] = [head for head in range(heads) if flags[head]]
        flags = flags[heads:]
    assert flags == b""
    return found


def test_a_patch_is_refused_for_another_primary(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(hsa.PatchError):
        hsa.apply(shared / "sources" / "base", shared / "patches" / "plain.safetensors", output=tmp_path / "out")


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_inspected(shared: Path, name: str) -> None:
    found = hsa.inspect(shared / "outputs" / name).as_dict()
    document = recorded(shared / "outputs" / name)
    assert found["parameters"] == document["parameters"]
    assert found["written_by"] == {**document["program"], "libraries": document["libraries"]}
    assert found["sources"] == document["sources"]
    for target, expected in document["targets"].items():
        shown = found["tensors"][target]
        assert (shown["selected"], shown["scores"]) == (expected["selected"], expected["scores"]), target
    assert found["tensors"].keys() == document["targets"].keys()


def test_an_output_is_inspected_with_its_sources(shared: Path, tmp_path: Path) -> None:
    views = [f"--{kind}={tmp_path / 'heads'}.{kind}" for kind in ("csv", "html")]
    done = run_hsa("inspect", shared / "outputs" / "plain", *options(sources_of(shared)), "--json", *views)
    assert done.returncode == 0, done.stderr
    found, document = json.loads(done.stdout), recorded(shared / "outputs" / "plain")
    assert found["energy"] is not None and found["verification"]["ok"]
    for target, expected in document["targets"].items():
        assert found["tensors"][target]["selected"] == expected["selected"]
    rows = (tmp_path / "heads.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + sum(target["heads"] for target in document["targets"].values())
    assert (tmp_path / "heads.html").stat().st_size > 0


def test_outputs_are_compared(shared: Path, tmp_path: Path) -> None:
    """With each other, and with the same merge of today."""
    first, second = shared / "outputs" / "plain", shared / "outputs" / "everything"
    found = json.loads(run_hsa("inspect", "--diff", first, second, "--json").stdout)
    assert not found["identical"]
    assert found["parameters"]["k"] == {"a": 0.6, "b": 25.0}
    assert (found["files"]["vocab.json"], found["files"]["normalizer.json"]) == ("same", "different")
    hsa.merge(**sources_of(shared), output=tmp_path / "today", sync=False)
    found = json.loads(run_hsa("inspect", "--diff", first, tmp_path / "today", "--json").stdout)
    assert {file for file, state in found["files"].items() if state != "same"} <= {RECORD, CARD}
    assert found["jaccard"] == 1.0


def rows(patch: Path) -> dict[str, bytes]:
    """The rows of each target in a patch; format 1 holds its decisions beside them."""
    header, data = read_safetensors(patch)
    return {
        name: data[slice(*entry["data_offsets"])]
        for name, entry in header.items()
        if not name.startswith(("hsa.", "__metadata__"))
    }


# --- sweep ------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_resumed(files: Path) -> None:
    """Every point is kept; one that is lost is made again."""
    before, document = touched(files / "sweep"), patch_document(files / "sweep" / f"{POINTS[0]}.safetensors")
    report = sweep_json(document, files, "sweep", *GRID)
    assert (report["made"], report["skipped"], report["warnings"]) == ([], POINTS, [])
    assert touched(files / "sweep") == before
    place = files / "sweep" / f"{POINTS[2]}.safetensors"
    lost = rows(place)
    place.unlink()
    report = sweep_json(document, files, "sweep", *GRID)
    assert (report["made"], len(report["skipped"])) == ([POINTS[2]], len(POINTS) - 1)
    assert rows(place) == lost
    assert hsa.verify(files / "sweep", **sources_of(files)).problems == ()


def test_a_sweep_is_extended(files: Path) -> None:
    """A larger grid adds points, and the index lists all."""
    before, document = touched(files / "sweep"), patch_document(files / "sweep" / f"{POINTS[0]}.safetensors")
    report = sweep_json(document, files, "sweep", "--k=0.5", "--lambda=0.9")
    assert (len(report["made"]), report["skipped"], report["notes"]) == (1, [], [])
    assert before.items() <= touched(files / "sweep").items()
    listed = json.loads((files / "sweep" / "index.json").read_text(encoding="utf-8"))["points"]
    assert {point["place"] for point in listed} == {path.name for path in (files / "sweep").glob("*.safetensors")}
    assert len(listed) == len(POINTS) + 1


@pytest.mark.parametrize(("other", "what"), [({"numpy": "2.99.0"}, "libraries"), ({"hsa": "0.99.0"}, "program")])
def test_a_sweep_under_other_versions_is_refused(files: Path, other: dict[str, str], what: str) -> None:
    """Present behaviour: versions count as settings of the points. Nothing is changed. The points themselves stay
    readable (see above), whatever is installed."""
    before, document = snapshot(files), patch_document(files / "sweep" / f"{POINTS[0]}.safetensors")
    arguments = ["sweep", *options(sources_of(files)), f"--output={files / 'sweep'}", *GRID, "--no-sync"]
    done = with_versions(document, arguments, **other)
    assert (done.returncode, f"was made otherwise: its {what} differ" in done.stderr) == (2, True), done.stderr
    assert snapshot(files) == before


def test_a_sweep_is_made_anew_where_that_is_asked_for(files: Path) -> None:
    """Under other versions, with the same rows."""
    places = {point: files / "sweep" / f"{point}.safetensors" for point in POINTS}
    document = patch_document(places[POINTS[0]])
    before = {point: rows(place) for point, place in places.items()}
    report = sweep_json(document, files, "sweep", *GRID, "--overwrite", numpy="2.99.0")
    assert (report["made"], report["skipped"]) == (POINTS, [])
    assert {point: rows(place) for point, place in places.items()} == before


def test_a_sweep_of_checkpoints_is_resumed(files: Path) -> None:
    document, before = recorded(files / "sweep-full" / FULL_POINTS[0]), touched(files / "sweep-full")
    report = sweep_json(document, files, "sweep-full", *FULL_GRID)
    assert (report["made"], report["skipped"], report["warnings"]) == ([], FULL_POINTS, [])
    assert touched(files / "sweep-full") == before
    weights = files / "sweep-full" / FULL_POINTS[1] / "model.safetensors"
    expected = weights.read_bytes()
    weights.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    report = sweep_json(document, files, "sweep-full", *FULL_GRID)
    assert (report["made"], report["skipped"]) == (FULL_POINTS[1:], FULL_POINTS[:1])
    assert weights.read_bytes() == expected


# --- release ----------------------------------------------------------------------------------------------------------


def test_a_release_is_resumed(files: Path) -> None:
    """Every entry is verified and kept, whatever versions wrote it; one that is lost is built again."""
    before = touched(files / "release")
    command = ("release", files / "recipe.yaml", "--output", files / "release", "--json", "--no-sync")
    done = run_hsa(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["built"], report["verified"], report["failed"]) == (0, 2, 0)
    assert touched(files / "release") == before
    lost = snapshot(files / "release" / "second" / "cast")
    shutil.rmtree(files / "release" / "second" / "cast")
    report = json.loads(run_hsa(*command).stdout)
    assert (report["built"], report["verified"], report["failed"]) == (1, 1, 0)
    made = snapshot(files / "release" / "second" / "cast")
    assert {file for file in {*made, *lost} if made.get(file) != lost.get(file)} <= {RECORD, CARD}
    states = json.loads((files / "release" / "index.json").read_text(encoding="utf-8"))["entries"]
    assert {entry["path"]: entry["state"] for entry in states} == {"first/plain": "complete", "second/cast": "complete"}
    assert hsa.verify(files / "release").problems == ()


def test_a_changed_recipe_is_seen(files: Path) -> None:
    recipe, before = files / "recipe.yaml", touched(files / "release")
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("lambda: 0.3", "lambda: 0.4"), encoding="utf-8")
    report = hsa.release(recipe, files / "release", sync=False)
    assert [entry.result for entry in report.entries] == ["verified", "failed"]
    assert "lambda is 0.3, the recipe says 0.4" in (report.entries[1].problem or "")
    assert touched(files / "release") == before


# --- as a source, and in the way --------------------------------------------------------------------------------------


def test_an_output_as_a_source_is_recognized(shared: Path, tmp_path: Path) -> None:
    """Its record tells that a merge is merged again."""
    sources = {**sources_of(shared), "base": shared / "outputs" / "plain"}
    report = hsa.merge(**sources, output=tmp_path / "again", sync=False)
    assert any("base is an output of hsa" in warning for warning in report.warnings), report.warnings


def test_an_output_is_replaced_where_that_is_asked_for(files: Path) -> None:
    output = files / "outputs" / "everything"
    with pytest.raises(hsa.DestinationError):
        hsa.merge(**sources_of(files), output=output, sync=False)
    hsa.merge(**sources_of(files), output=output, sync=False, overwrite=True)
    assert sorted(os.listdir(output)) == sorted(os.listdir(files / "outputs" / "plain"))
    same_tensors(output, files / "outputs" / "plain")
