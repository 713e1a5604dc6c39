"""The merge benchmarks' own machinery: what is measured is measured right, and damaged outputs are never reported."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import bench_merge
import bench_sweep
import pytest
import report
import rows
from bench_merge import check_space, chosen_cases, fill_cache, programs
from cases import MergeCase, model_bytes
from gates import Gate
from helpers import poke, read_tensors, write_tensors
from programs import Program, measure

import hsa

Triple = dict[str, Path]
TARGET = "model.encoder.layers.1.self_attn.q_proj.weight"
COPIED = "model.decoder.layers.0.fc1.weight"
MIB = 1 << 20


def python(code: str, *more: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *more)


def nothing() -> None:
    """A page cache that is good as it is."""


# --- what is measured -----------------------------------------------------------------------------------------


WRITER = """
import subprocess, sys, time
path, *rest = sys.argv[1:]
open(path, "wb").write(bytes(3 << 20))
if rest:
    subprocess.run([sys.executable, "-c", rest[1], rest[0]], check=True)
else:
    while time.process_time() < 0.5:
        pass
"""


def test_bytes_and_cpu_time_of_children_count(tmp_path: Path) -> None:
    spawning = python(WRITER, str(tmp_path / "own"), str(tmp_path / "childs"), WRITER)
    run = measure(Program("spawning", spawning), tmp_path / "out", nothing)
    assert 6 * MIB <= run.io["syscall_written"] < 7 * MIB
    assert run.cpu >= 0.5, "the child's time is missing"
    assert run.seconds >= 0.5


def test_memory_of_the_whole_family_is_seen(tmp_path: Path) -> None:
    hold = "import time; held = bytearray(64 << 20); held[::4096] = b'x' * (64 << 8); time.sleep(0.5)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); {hold}"
    run = measure(Program("holder", python(code, hold)), tmp_path / "out", nothing)
    assert 128 * MIB <= run.peak <= 200 * MIB
    assert run.peak < run.peak_rss


def test_a_program_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    program = Program("broken", python("raise SystemExit('no such luck')"))
    with pytest.raises(SystemExit, match=r"broken failed with exit code 1: no such luck"):
        measure(program, tmp_path / "out", nothing)


def test_every_run_gets_a_fresh_destination(tmp_path: Path) -> None:
    made = Program("maker", python("import os, sys; os.mkdir(sys.argv[1])", "{out}"))
    for _ in range(2):
        measure(made, tmp_path / "out", nothing)
    assert (tmp_path / "out").is_dir()


def test_a_whole_case_writes_complete_rows(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sync", lambda: time.sleep(0.05))
    case = MergeCase("tiny", "float32", rounds=2, slow_rounds=1, cold_rounds=1)
    said: list[str] = []
    measured = bench_merge.measure_case(case, shared_triple["base"].parent, tmp_path / "out", None, said.append)
    found = list(bench_merge.rows_of(case, [program for program in measured if program.runs]))
    by_name = {(str(row["program"]), str(row["cache"])): row for row in found}
    assert by_name.keys() == {
        ("cp -r, then sync", "warm"),
        ("hsa merge", "warm"),
        ("cp -r", "warm"),
        ("hsa merge --no-hash --no-sync", "warm"),
        ('python -c "import torch"', "warm"),
        ("full load (transformers)", "warm"),
        ("full load (transformers), then sync", "warm"),
        ("cp -r, then sync", "cold"),
        ("hsa merge", "cold"),
    }
    ended, synced = (by_name[f"full load (transformers){then}", "warm"] for then in ("", ", then sync"))
    assert float(str(synced["median_s"])) >= float(str(ended["median_s"])) + 0.049
    assert {key for key in ended if ended[key] != synced[key]} == {"program", "median_s", "min_s", "max_s"}
    merged = by_name["hsa merge", "warm"]
    assert merged["rounds"] == 2
    size = {role: (path / "model.safetensors").stat().st_size for role, path in shared_triple.items()}
    assert int(str(merged["bytes_read_base"])) < size["base"] // 2
    assert int(str(merged["bytes_read"])) > size["primary"]
    assert int(str(merged["syscall_read"])) >= int(str(merged["bytes_read"])), "the kernel saw fewer reads than claimed"
    assert len(said) == 13
    rows.append("merge", found, tmp_path)
    rows.append("merge", found, tmp_path)
    assert len(rows.read("merge", tmp_path)) == 2 * len(found)


def test_cold_leaves_nothing_in_the_page_cache(shared_triple: Triple, tmp_path: Path) -> None:
    triple = shared_triple["base"].parent
    gate = Gate(triple, every=True)
    reader = Program("reader", python("open(__import__('sys').argv[1], 'rb').read()", str(triple / "primary" / "x")))
    weights = triple / "primary" / "model.safetensors"
    os.sync()  # what is not on the disk yet cannot be dropped
    fill_cache(triple, gate, reader, cold=False)
    assert _cached_share(weights) == 1.0
    fill_cache(triple, gate, reader, cold=True)
    if _cached_share(weights) == 1.0:
        pytest.skip("this filesystem keeps pages that it was told to drop, as tmpfs must")
    assert _cached_share(weights) == 0.0


def _cached_share(path: Path) -> float:
    """The share of a file's pages that mincore(2) finds in memory."""
    import ctypes
    import mmap

    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size, mmap.MAP_SHARED) as mapped:
        states = (ctypes.c_ubyte * pages)()
        view = (ctypes.c_char * size).from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(view), ctypes.c_size_t(size), states)
        del view
    assert failed == 0
    return sum(state & 1 for state in states) / pages


# --- gates ----------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(shared_triple: Triple, tmp_path: Path) -> Path:
    return hsa.merge(**shared_triple, output=tmp_path / "out", sync=False).output


def test_a_sound_output_passes(shared_triple: Triple, merged: Path) -> None:
    gate = Gate(shared_triple["base"].parent, every=True)
    gate.hsa(merged)
    gate.full_load(merged)


@pytest.mark.parametrize("name", [TARGET, COPIED])
def test_one_bit_is_enough_to_refuse(shared_triple: Triple, merged: Path, name: str) -> None:
    value = read_tensors(merged)[name].flatten()[7].numpy().tobytes()
    poke(merged / "model.safetensors", name, 7, bytes([value[0] ^ 1, *value[1:]]))
    with pytest.raises(SystemExit, match=f"{name} of hsa merge differs from the oracle"):
        Gate(shared_triple["base"].parent, every=True).hsa(merged)


@pytest.mark.parametrize("check", ["full_load", "task_arithmetic"])
def test_primary_itself_is_no_merge(shared_triple: Triple, check: str) -> None:
    with pytest.raises(SystemExit, match="is off by"):
        getattr(Gate(shared_triple["base"].parent, every=True), check)(shared_triple["primary"])


def test_a_tensor_left_out_is_refused(shared_triple: Triple, merged: Path) -> None:
    tensors = read_tensors(merged)
    del tensors[COPIED]
    write_tensors(merged, tensors)
    with pytest.raises(SystemExit, match=f"another set of tensors.*{COPIED}"):
        Gate(shared_triple["base"].parent, every=True).hsa(merged)


def test_task_arithmetic_is_known_when_it_is_right(shared_triple: Triple, tmp_path: Path) -> None:
    base, primary, secondary = (read_tensors(path) for path in shared_triple.values())
    out = Path(shutil.copytree(shared_triple["primary"], tmp_path / "out"))
    mixed = {name: (0.5 * primary[name].double() + 0.5 * secondary[name].double()).float() for name in base}
    write_tensors(out, mixed)
    Gate(shared_triple["base"].parent, every=True).task_arithmetic(out)


def test_few_names_hold_both_ends_and_other_kinds(shared_triple: Triple) -> None:
    names = Gate(shared_triple["base"].parent, every=False).names
    assert sum("encoder.layers.0.self_attn" in name for name in names) == 3
    assert sum("encoder.layers.1.self_attn" in name for name in names) == 3
    assert any(name.startswith("model.decoder") for name in names)


def test_a_damaged_merger_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = hsa.Merger.apply_

    def damaged(self: hsa.Merger, model: object, **parameters: float) -> object:
        apply(self, model, **parameters)  # type: ignore[arg-type]
        model[TARGET][0, 0] += 1  # type: ignore[index]
        return model

    bench_sweep.gate(tmp_path / "sound", "float32")
    monkeypatch.setattr(hsa.Merger, "apply_", damaged)
    with pytest.raises(SystemExit, match=f"{TARGET} in memory differs"):
        bench_sweep.gate(tmp_path / "damaged", "float32")


# --- sweeps ---------------------------------------------------------------------------------------------------


def test_a_sweep_is_measured_and_reported(shared_triple: Triple, tmp_path: Path) -> None:
    triple = shared_triple["base"].parent
    judge = Gate(triple, every=True)
    taken, peaks, nbytes = bench_sweep.once(triple, tmp_path, judge)
    hsa.merge_patch(**shared_triple, output=tmp_path / "p.safetensors", lam=0.0, sync=False)
    assert nbytes == (tmp_path / "p.safetensors").stat().st_size
    assert taken.keys() == bench_sweep.CASES.keys()
    assert min(*taken.values(), *peaks.values()) > 0
    assert os.listdir(tmp_path) == ["p.safetensors"]
    fixed = {"patch": 2.0, "sweep": 9.0, "cached": 5.0, "direct": 4.0, "merger": 1.0, "apply": 0.1}
    fixed["python"] = 0.00075
    found = bench_sweep.report("tiny", "float32", [fixed], [{"patch": 10 << 20, "sweep": 30 << 20}], 100)
    notes = {row["case"]: str(row["note"]) for row in found}
    assert "one patch and 1.40 times" in notes[report.SWEEP]
    assert "(1.75 times past it)" in notes[report.SWEEP]
    assert "+20 MiB over one patch's 10" in notes[report.SWEEP]
    assert {report.ONE_PATCH, report.SWEEP, report.TEN, report.APPLIED} <= notes.keys()
    assert {str(row["median_s"]) for row in found if "Python" in str(row["case"])} == {"0.000750"}


def test_a_damaged_patch_is_never_timed(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge_patch(**shared_triple, output=tmp_path / "p.safetensors", sync=False)
    judge = Gate(shared_triple["base"].parent, every=True)
    judge.patch(tmp_path / "p.safetensors")
    poke(tmp_path / "p.safetensors", TARGET, 5, b"\0\0\0\0")
    with pytest.raises(SystemExit, match=f"{TARGET} of a patch differs"):
        judge.patch(tmp_path / "p.safetensors")


@pytest.mark.parametrize("direct", [False, True])
def test_the_bytes_are_written_and_removed(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Path, "unlink", lambda path: (seen.append(path.stat().st_size), os.unlink(path)))
    assert bench_sweep.write_files(tmp_path, [5 << 20, 4096], direct=direct) > 0
    assert seen == [5 << 20, 4096]
    assert os.listdir(tmp_path) == []


# --- cases and rows -------------------------------------------------------------------------------------------


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"full": False, "shape": None, "dtype": None, "rounds": None, **changes})


def test_cases() -> None:
    assert [case.name for case in chosen_cases(options())] == ["tiny-float32", "small-float32", "large-v3-float32"]
    every = {case.name for case in chosen_cases(options(full=True))}
    assert len(every) == 10 and {"medium-float16", "large-v3-turbo-float32"} <= every
    (one,) = chosen_cases(options(shape=["small"], dtype=["float16"], rounds=2))
    assert (one.name, one.rounds, one.slow_rounds) == ("small-float16", 2, 2)


def test_sizes_are_the_published_ones() -> None:
    assert model_bytes("large-v3", "float32") == 4 * 1_543_490_560


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=20 * 10**9))
    with pytest.raises(SystemExit, match=r"26\.\d GB are needed in .*, 20\.0 GB are free"):
        check_space([MergeCase("large-v3", "float32")], tmp_path)
    check_space([MergeCase("small", "float32")], tmp_path)


def test_programs_that_are_compared_get_the_same_sources(shared_triple: Triple) -> None:
    triple = shared_triple["base"].parent
    every = programs(triple, "float32", Gate(triple, every=True), "python-of-mergekit")
    assert len({program.name for program in every}) == len(every) == 7
    for program in every:
        given = [role for role in shared_triple if any(str(triple / role) in part for part in program.command)]
        assert given in ([], ["primary"], list(shared_triple)), program.name


def test_rows_are_appended_and_never_mixed(tmp_path: Path) -> None:
    rows.append("some", [{"run": "2026-01-01", "shape": "tiny", "figure": 1}], tmp_path)
    rows.append("some", [{"run": "2026-01-02", "shape": "tiny", "figure": 2}], tmp_path)
    rows.append("some", [{"run": "2026-01-01", "shape": "small", "figure": 3}], tmp_path)
    with pytest.raises(SystemExit, match="nothing was added"):
        rows.append("some", [{"run": "2026-01-02", "shape": "tiny"}], tmp_path)
    held = rows.read("some", tmp_path)
    assert [row["figure"] for row in held] == ["1", "2", "3"]
    assert [row["figure"] for row in rows.newest(held, lambda row: row["shape"])] == ["2", "3"]
    assert rows.read("none", tmp_path) == []


def test_rows_name_no_directory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/bench/bench_merge.py", "--folder=/data/me", "--shape", "tiny"])
    known = rows.about(("torch", "no-such-package"))
    assert known["command"] == "bench_merge.py --folder=me --shape tiny"
    assert "torch 2" in known["versions"] and "no-such-package none" in known["versions"]
    assert not any("/home" in value for value in known.values())
