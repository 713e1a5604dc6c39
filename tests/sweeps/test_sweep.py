"""Sweeps: every point is what its merge would be, sources are read once, and a sweep that was killed ends the same."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, poke, read_tensors, run_hsa, snapshot

import hsa
from hsa.backends.cpu import CpuWorker
from hsa.methods.tensors import TensorTask
from hsa.outputs import patch_format
from hsa.sweeps import sweep as sweep_module
from hsa.system import manifest, strict_json
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

pytestmark = pytest.mark.long

Triple = dict[str, Path]
GRID: dict[str, Any] = {"k": (0.2, 0.6), "lam": (0.1, 0.5), "targets": ("encoder-qkv", "attention-all")}
POINTS = [
    f"{targets}_k{k}_lambda{lam}_alpha0.2" for targets in GRID["targets"] for k in GRID["k"] for lam in GRID["lam"]
]


def sweep(triple: Triple, output: Path, **options: Any) -> hsa.SweepReport:
    return hsa.sweep(**triple, output=output, **{"sync": False, **GRID, **options})


def parameters(name: str) -> dict[str, Any]:
    targets, k, lam, _ = name.split("_")
    return {"targets": targets, "k": float(k[1:]), "lam": float(lam.removeprefix("lambda"))}


def index(output: Path) -> dict[str, Any]:
    points = json.loads((output / "index.json").read_text())["points"]
    return {entry["place"].removesuffix(".safetensors"): entry for entry in points}


@pytest.fixture(scope="module")
def swept(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep to read."""
    output = tmp_path_factory.mktemp("swept") / "out"
    report = sweep(shared_triple, output)
    assert report.made == tuple(POINTS)
    return output


@pytest.mark.parametrize("name", POINTS)
def test_every_point_is_its_merge(shared_triple: Triple, swept: Path, name: str, tmp_path: Path) -> None:
    """The patch is that of a single merge, and applied it is the merge, byte for byte."""
    hsa.merge_patch(**shared_triple, output=tmp_path / "p.safetensors", sync=False, **parameters(name))
    assert (swept / f"{name}.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()
    hsa.merge(**shared_triple, output=tmp_path / "merged", sync=False, **parameters(name))
    hsa.apply(shared_triple["primary"], swept / f"{name}.safetensors", output=tmp_path / "applied", sync=False)
    assert snapshot(tmp_path / "merged") == snapshot(tmp_path / "applied")


def test_checkpoints_are_those_of_merges(shared_triple: Triple, tmp_path: Path) -> None:
    sweep(shared_triple, tmp_path / "one", full=True)
    sweep(shared_triple, tmp_path / "three", full=True, jobs=3, threads=2)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "three")
    assert sorted(os.listdir(tmp_path / "one")) == sorted([*POINTS, "index.csv", "index.json"])
    for name in POINTS:
        hsa.merge(**shared_triple, output=tmp_path / name, sync=False, **parameters(name))
        assert snapshot(tmp_path / name) == snapshot(tmp_path / "one" / name), name


def test_sources_are_read_and_heads_scored_once(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    measure = CpuWorker.measure

    def counted(self: CpuWorker, task: TensorTask, *arguments: Any) -> Any:
        scored.append(task.name)
        return measure(self, task, *arguments)

    monkeypatch.setattr(CpuWorker, "measure", counted)
    one = hsa.merge_patch(**shared_triple, output=tmp_path / "p.safetensors", targets="attention-all", sync=False)
    expected, scored = sorted(scored), []
    many = sweep(shared_triple, tmp_path / "many", lam=[n / 10 for n in range(11)])
    assert sorted(scored) == expected
    assert dict(many.bytes_read_by_source).keys() == {"base", "primary", "secondary", "patch"}
    for role in ("base", "primary", "secondary"):
        assert many.bytes_read_by_source[role] == one.bytes_read_by_source[role]
    held = [json.loads(json.dumps(entry)) for entry in index(tmp_path / "many").values()]
    assert len(held) == 44
    headers = sum(p.stat().st_size for p in (tmp_path / "many").glob("*.safetensors")) - sum(
        e["rows_bytes"] for e in held
    )
    assert many.bytes_read_by_source["patch"] <= headers  # of the patches no rows are read again


def test_the_index_says_what_is_where(shared_triple: Triple, swept: Path, tmp_path: Path) -> None:
    entries = index(swept)
    assert sorted(entries) == sorted(POINTS)
    with (swept / "index.csv").open() as file:
        rows = {row["place"].removesuffix(".safetensors"): row for row in csv.DictReader(file)}
    for name, entry in entries.items():
        report = hsa.merge(**shared_triple, output=tmp_path / name, sync=False, **parameters(name))
        assert (swept / entry["place"]).is_file()
        assert entry["selected"] == {n: list(t.selected) for n, t in report.tensors.items()}
        assert (entry["selected_heads"], entry["total_heads"]) == (report.selected_heads, report.total_heads)
        assert report.narrowest is not None
        assert (entry["min_margin"], entry["min_margin_tensor"]) == (report.narrowest.margin, report.narrowest.name)
        row = rows[name]
        assert {k: float(row[k]) for k in ("k", "lambda", "alpha")} == {k: entry[k] for k in ("k", "lambda", "alpha")}
        assert int(row["selected_heads"]) == entry["selected_heads"]
        assert float(row["all_from_secondary"]) == entry["distances"]["all"]["from_secondary"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-2)])
def test_distances_are_those_of_the_merged_tensors(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """Measured on the output in float64; a narrow type differs by its rounding."""
    triple = write_triple(tmp_path / "sources", SHAPES["test"], dtype=dtype)
    sweep(triple, tmp_path / "out")
    one, two = (read_tensors(triple[role]) for role in ("primary", "secondary"))
    for name, entry in index(tmp_path / "out").items():
        hsa.merge(**triple, output=tmp_path / name, sync=False, **parameters(name))
        merged = read_tensors(tmp_path / name)
        for stack, known in entry["distances"].items():
            names = [n for n in entry["selected"] if stack == "all" or f".{stack}." in n]
            for other, way in ((one, "from_primary"), (two, "from_secondary")):
                above = sum((merged[n].double() - other[n].double()).square().sum() for n in names)
                below = sum(other[n].double().square().sum() for n in names)
                measured = float(torch.as_tensor(above / below).sqrt())
                assert known[way] == pytest.approx(measured, rel=tolerance, abs=1e-9), (name, stack, way)


# --- again, further, and after a kill ----------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["patches", "checkpoints"])
def test_finished_points_are_verified_and_skipped(shared_triple: Triple, full: bool, tmp_path: Path) -> None:
    first = sweep(shared_triple, tmp_path / "out", full=full)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = sweep(shared_triple, tmp_path / "out", full=full)
    assert (again.made, again.skipped, again.bytes_written) == ((), first.made, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    more = sweep(shared_triple, tmp_path / "out", full=full, k=(0.4, 0.6), lam=(0.5,))
    assert len(more.made) == len(more.skipped) == 2
    assert len(more.entries) == len(POINTS) + 2


@pytest.mark.parametrize("full", [False, True], ids=["patches", "checkpoints"])
def test_a_damaged_point_is_made_anew(shared_triple: Triple, full: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(shared_triple, out, full=full)
    expected = snapshot(out)
    damaged = out / POINTS[3] / "model.safetensors" if full else out / f"{POINTS[3]}.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-500] ^= 1
    damaged.write_bytes(raw)
    lost = out / POINTS[5] if full else out / f"{POINTS[5]}.safetensors"
    shutil.rmtree(lost) if full else lost.unlink()
    for name in ("index.json", "index.csv"):
        (out / name).unlink()
    report = sweep(shared_triple, out, full=full)
    assert report.made == (POINTS[3], POINTS[5])
    assert "is damaged and is rebuilt" in " ".join(report.notes)
    assert snapshot(out) == expected


def test_points_of_other_sources_are_refused(triple: Triple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(triple, out)
    before = snapshot(out)
    poke(triple["secondary"] / "model.safetensors", "model.encoder.layers.1.self_attn.v_proj.weight", 7, b"\0\0\0\0")
    with pytest.raises(hsa.DestinationError, match="was made otherwise: its sources differ"):
        sweep(triple, out)
    assert snapshot(out) == before
    report = sweep(triple, out, overwrite=True)
    assert report.made == tuple(POINTS)
    after = snapshot(out)
    assert all(after[f"{name}.safetensors"] != before[f"{name}.safetensors"] for name in POINTS)
    with pytest.raises(hsa.DestinationError, match="its parameters differ"):
        sweep(triple, out, card={"title": "another"})
    with pytest.raises(hsa.DestinationError, match="its sources differ"):
        sweep(triple, out, base_id="org/base")


def test_where_a_sweep_may_be_written(triple: Triple, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(hsa.DestinationError, match=r"is no earlier sweep: it holds notes.txt and no index.json"):
        sweep(triple, mine, overwrite=True)
    for place in (triple["base"], triple["base"] / "sweep", tmp_path / "sources"):
        with pytest.raises(hsa.DestinationError, match="source"):
            sweep(triple, place)
    (mine / "index.json").write_text('{"format": 1, "points": 3}')
    with pytest.raises(hsa.DestinationError, match="is no index of a sweep"):
        sweep(triple, mine)
    assert sorted(os.listdir(mine)) == ["index.json", "notes.txt"]


def test_files_of_others_are_left_alone(triple: Triple, tmp_path: Path) -> None:
    """Under the name of a point: what is no patch, of another version, unreadable, a directory, a link."""
    out = tmp_path / "out"
    sweep(triple, out)
    place = out / f"{POINTS[0]}.safetensors"
    sound = place.read_bytes()
    length = 8 + int.from_bytes(sound[:8], "little")
    listed = json.loads(sound[8:length])
    document = json.loads(listed["__metadata__"][patch_format.KEY]) | {"format": 3}
    document["digest"] = manifest.document_digest(document)
    listed["__metadata__"][patch_format.KEY] = json.dumps(document)
    text = json.dumps(listed).encode()
    newer = len(text).to_bytes(8, "little") + text + sound[length:]
    for raw, message in ((b"my thesis", "is no patch of hsa"), (newer, "format is 3, this version reads 1 and 2")):
        place.write_bytes(raw)
        for overwrite in (False, True):
            with pytest.raises(hsa.DestinationError, match=message):
                sweep(triple, out, overwrite=overwrite)
        assert place.read_bytes() == raw
    place.unlink()
    place.mkdir()
    with pytest.raises(hsa.DestinationError, match="is no point of a sweep"):
        sweep(triple, out)
    place.rmdir()
    (tmp_path / "elsewhere").write_bytes(sound)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(hsa.DestinationError, match="is no point of a sweep"):
        sweep(triple, out)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / f"{POINTS[0]}.safetensors").write_bytes(b"my thesis")
    with pytest.raises(hsa.DestinationError, match="is no earlier sweep"):
        sweep(triple, fresh)
    assert os.listdir(fresh) == [f"{POINTS[0]}.safetensors"]


def test_a_disk_that_cannot_read_a_point_does_not_cost_it(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    sweep(triple, out)
    before = snapshot(out)
    preadv = os.preadv

    def failing(fd: int, views: Any, offset: int) -> int:
        if POINTS[2] in os.readlink(f"/proc/self/fd/{fd}") and offset > 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(hsa.MachineError, match="Input/output error"):
        sweep(triple, out)
    monkeypatch.undo()
    assert snapshot(out) == before


def test_checkpoints_are_verified_against_the_sources(triple: Triple, tmp_path: Path) -> None:
    """Not by digests alone, which may be left out, and which know nothing of what primary is by now."""
    out = tmp_path / "out"
    one: dict[str, Any] = {"full": True, "k": (0.6,), "lam": (0.5,), "targets": ("encoder-qkv",)}
    sweep(triple, out, digest=False, **one)
    name = sweep(triple, out, digest=False, **one).skipped[0]
    weights = out / name / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-9] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(hsa.DestinationError, match="its copied tensors or small files differ"):
        sweep(triple, out, digest=False, **one)
    assert sweep(triple, out, overwrite=True, **one).made == (name,)
    (out / name / "extra.bin").write_bytes(b"x")
    with pytest.raises(hsa.DestinationError, match="its list of files differ"):
        sweep(triple, out, **one)
    (out / name / "extra.bin").unlink()
    assert sweep(triple, out, **one).skipped == (name,)
    poke(triple["primary"] / "model.safetensors", "model.decoder.layers.0.fc1.weight", 3, b"\0\0\0\0")
    with pytest.raises(hsa.DestinationError, match="its copied tensors or small files differ"):
        sweep(triple, out, **one)
    sweep(triple, out, overwrite=True, **one)
    edit_json(triple["primary"] / "generation_config.json", max_length=77)
    with pytest.raises(hsa.DestinationError, match="its copied tensors or small files differ"):
        sweep(triple, out, **one)
    sweep(triple, out, overwrite=True, **one)
    assert hsa.verify(out / name, **triple).ok


def test_a_checkpoint_that_is_there_is_read_twice(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for its digests and once beside the merge computed again; its targets once more for NaN and Inf."""
    one: dict[str, Any] = {"full": True, "k": (0.6,), "lam": (0.5,), "targets": ("encoder-qkv",), "digest": True}
    (name,) = sweep(shared_triple, tmp_path / "out", **one).made
    weights = tmp_path / "out" / name / "model.safetensors"
    preadv = os.preadv
    sizes: list[int] = []  # several threads read, and appending is atomic

    def counted(fd: int, views: Any, offset: int) -> int:
        ours = os.readlink(f"/proc/self/fd/{fd}") == str(weights)
        nbytes = preadv(fd, views, offset)
        sizes.append(nbytes if ours else 0)
        return nbytes

    monkeypatch.setattr(os, "preadv", counted)
    assert sweep(shared_triple, tmp_path / "out", **one).skipped == (name,)
    size = weights.stat().st_size
    targets = 4 * sum(math.prod(tensor.shape) for tensor in hsa.inspect(weights.parent).tensors.values())
    assert 2 * size <= sum(sizes) <= 2 * size + targets + size // 20  # the header, at each opening


def test_one_directory_does_not_mix_sources(triple: Triple, tmp_path: Path) -> None:
    """Fine-tunes of one model have the same headers, sizes and, in one place, names; grids that do not meet."""
    for full in (False, True):
        out = tmp_path / f"out{full}"
        sweep(triple, out, lam=(0.1,), full=full)
        poke(
            triple["primary"] / "model.safetensors", "model.encoder.layers.0.self_attn.k_proj.weight", full, b"\0\0\0\0"
        )
        with pytest.raises(hsa.DestinationError, match="holds points of other sources"):
            sweep(triple, out, lam=(0.2,), full=full)
        for name in ("index.json", "index.csv"):
            (out / name).unlink()
        with pytest.raises(hsa.DestinationError, match="holds points of other sources"):
            sweep(triple, out, lam=(0.2,), full=full)


def test_the_index_is_made_of_what_stands(shared_triple: Triple, swept: Path, tmp_path: Path) -> None:
    """Whatever somebody wrote into it; and patches and checkpoints in one directory are listed apart."""
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    sound = (out / "index.json").read_text()
    for lie in ('"k": "0.6"', '"k": 1e999', '"place": 5', '"place": "../../etc/passwd"', '"selected_heads": "=cmd()"'):
        key = lie.partition(":")[0]
        line = next(line for line in sound.splitlines() if line.strip().startswith(key))
        (out / "index.json").write_text(sound.replace(line.strip().rstrip(","), lie, 1))
        assert sweep(shared_triple, out).made == ()
        assert snapshot(out) == snapshot(swept)
    report = sweep(shared_triple, out, full=True, lam=(0.5,), k=(0.6,), targets=("encoder-qkv",))
    (name,) = report.made
    places = [entry["place"] for entry in json.loads((out / "index.json").read_text())["points"]]
    assert {name, f"{name}.safetensors"} <= set(places) and len(places) == len(POINTS) + 1
    both = [entry for entry in report.entries if entry.place.startswith(name)]
    assert both[0].distances == both[1].distances and both[0].selected == both[1].selected
    again = sweep(shared_triple, out, lam=(0.1,))
    assert again.made == () and len(again.entries) == len(places)


def test_large_grids_of_many_heads_can_be_resumed(tmp_path: Path) -> None:
    """Their index is larger than what is read of a stranger's."""
    shape = replace(SHAPES["test"], d_model=32, encoder_layers=8, decoder_layers=8, encoder_heads=32, decoder_heads=32)
    triple = write_triple(tmp_path / "sources", shape)
    grid: dict[str, Any] = {"targets": ("attention-all",), "k": (1.0,), "lam": tuple(n / 31 for n in range(32))}
    first = sweep(triple, tmp_path / "out", **grid)
    assert strict_json.count_marks((tmp_path / "out/index.json").read_bytes()) > strict_json.MAX_MARKS
    assert sweep(triple, tmp_path / "out", **grid).skipped == first.made


def test_few_open_files_are_enough(shared_triple: Triple, swept: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hsa", "sweep", f"--output={tmp_path / 'out'}", "--no-sync", "--quiet"]
    command += [part for role, path in shared_triple.items() for part in (f"--{role}", str(path))]
    command += ["--k=0.2,0.6", "--lambda=0.1,0.5", "--targets=encoder-qkv,attention-all"]
    limited = ["bash", "-c", 'ulimit -n 70; exec "$@"', "sweep", *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert snapshot(tmp_path / "out") == snapshot(swept)


@pytest.mark.parametrize("full", [False, True], ids=["patches", "checkpoints"])
def test_a_killed_sweep_ends_with_the_same_files(full: bool, tmp_path: Path) -> None:
    """Killed at random moments, started again until it ends."""
    triple = write_triple(tmp_path / "sources", SHAPES["demo"], dtype="float16")
    options = {"lam": tuple(n / 10 for n in range(6)), "targets": ("encoder-qkv",), "k": (0.6,)}
    started = time.monotonic()
    sweep(triple, tmp_path / "whole", full=full, **options)
    took = time.monotonic() - started
    command = [sys.executable, "-m", "hsa", "sweep", "--output", str(tmp_path / "out"), "--lambda", "0:0.5:0.1"]
    command += [part for role, path in triple.items() for part in (f"--{role}", str(path))] + ["--no-sync", "--quiet"]
    chance = random.Random(3)
    kills = 0
    for number in range(6):
        process = subprocess.Popen([*command, *(["--full"] if full else [])], stderr=subprocess.DEVNULL)
        try:
            process.wait(chance.uniform(0.15, 0.4 + took))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL if number % 2 == 0 else signal.SIGTERM)
            kills += 1
        process.wait()
    done = subprocess.run([*command, *(["--full"] if full else [])], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert kills >= 2
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_full_disk_is_found_before_the_work(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module.fsio, "free_bytes", lambda path: 1000)
    for full in (False, True):
        with pytest.raises(hsa.MachineError, match=r"8 points need [0-9]+ bytes and 1000 are free"):
            sweep(shared_triple, tmp_path / "out", full=full)
        assert not (tmp_path / "out").exists()


def test_many_passes_give_the_same_files(shared_triple: Triple, swept: Path, tmp_path: Path) -> None:
    sweep(shared_triple, tmp_path / "out", jobs=3, threads=1)
    assert snapshot(tmp_path / "out") == snapshot(swept)


@pytest.mark.parametrize("jobs", [0, -1, 129, True, 1.5])
def test_bad_jobs(shared_triple: Triple, jobs: Any, tmp_path: Path) -> None:
    with pytest.raises(hsa.RequestError, match="jobs must be a whole number from 1 to 128"):
        sweep(shared_triple, tmp_path / "out", jobs=jobs)


def test_the_command_line(shared_triple: Triple, swept: Path, tmp_path: Path) -> None:
    command = ["sweep", *(part for role, path in shared_triple.items() for part in (f"--{role}", str(path)))]
    grid = ["--k", "0.2,0.6", "--lambda", "0.1:0.5:0.4", "--targets", "encoder-qkv,attention-all"]
    done = run_hsa(*command, *grid, "--output", str(tmp_path / "out"), "--json", "--no-sync")
    report = json.loads(done.stdout)
    assert (done.returncode, report["made"], report["skipped"]) == (0, POINTS, [])
    assert snapshot(tmp_path / "out") == snapshot(swept)
    assert report["points"] == json.loads((swept / "index.json").read_text())["points"]
    done = run_hsa(*command, *grid, "--output", str(tmp_path / "out"))
    assert "0 points made, 8 were there and verified" in done.stdout
    for flags, message in (
        (["--lambda", "0:1"], "lambda takes numbers such as"),
        (["--lambda", "0.5,1.5"], r"lambda must be in [0, 1], got 1.5"),
        (["--targets", "heads"], "targets must be one of"),
    ):
        done = run_hsa(*command, "--output", str(tmp_path / "bad"), *flags)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "bad").exists()


def test_real_weights(real: Triple, tmp_path: Path) -> None:
    report = hsa.sweep(**real, output=tmp_path / "out", lam=[n / 10 for n in range(11)], sync=False)
    assert len(report.made) == 11
    hsa.merge(**real, output=tmp_path / "merged", lam=0.3, sync=False)
    place = tmp_path / "out" / "encoder-qkv_k0.6_lambda0.3_alpha0.2.safetensors"
    hsa.apply(real["primary"], place, output=tmp_path / "applied", sync=False)
    assert snapshot(tmp_path / "merged") == snapshot(tmp_path / "applied")
