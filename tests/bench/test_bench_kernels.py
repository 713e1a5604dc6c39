"""The benchmark of the kernels: the bytes that it counts, its correctness gate, and the rows that it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import bench_kernels
import kernel_cases
import numpy as np
import pytest
import torch
from hsa.kernels import compile_check
from kernel_cases import CASES, CpuProblem
from kernel_shapes import MIXES, SHAPES, TRAFFIC, Mix, Shape, volume
from rows import read

from hsa.backends.base import Merged, TaskBuffers
from hsa.backends.cpu import CpuWorker
from hsa.methods.hsa import HsaDecision
from hsa.methods.settings import Settings

LITTLE = Shape("little", layers=2, width=64, heads=4)
COPY_OF_H200 = 4.3e12
"""Bytes a second, of PERFORMANCE's table."""

Q = {"float16": 314.6e6, "float32": 629.1e6}
TABLE = [
    ("one pass, in place", 3 + 0.6, {"float16": 0.263, "float32": 0.527}),
    ("one pass, new buffer", 3 + 1, {"float16": 0.293, "float32": 0.585}),
    ("two launches, in place", 3 + 1.8 + 0.6, {"float16": 0.395, "float32": 0.790}),
    ("apply only, scores cached, in place", 1.8 + 0.6, {"float16": 0.176, "float32": 0.351}),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets torch's number of threads, which other tests share."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", Q)
@pytest.mark.parametrize(("case", "units", "floors"), TABLE)
def test_bytes_of_the_kernels(case: str, units: float, floors: dict[str, float], dtype: str) -> None:
    moved = TRAFFIC[case](volume(SHAPES["large-v3"], MIXES[dtype]), 0.6)
    assert moved == pytest.approx(units * Q[dtype], rel=2e-4)
    assert round(moved / COPY_OF_H200 * 1e3, 3) == floors[dtype]


def test_bytes_of_a_mix() -> None:
    """Base 2 bytes an element, primary, secondary and result 4; half of the heads selected."""
    shape = Shape("", layers=1, width=8, heads=2)
    n = 3 * 8 * 8
    wanted = {
        "one pass, in place": 10 * n + 2 * n,
        "one pass, new buffer": 10 * n + 4 * n,
        "two launches, in place": 10 * n + 5 * n + 2 * n,
        "apply only, scores cached, in place": 5 * n + 2 * n,
        "CPU backend, merge": 10 * n + 2 * n,
        "CPU backend, apply only, scores cached": 5 * n + 2 * n + 4 * n,
        "eager torch, tensor by tensor": 10 * n + 2 * n,
        "eager torch, stacked": 10 * n + 2 * n,
        "torch.compile, tensor by tensor": 10 * n + 2 * n,
        "torch.compile, stacked": 10 * n + 2 * n,
    }
    moved = volume(shape, MIXES["float16-base"])
    assert {case: traffic(moved, 0.5) for case, traffic in TRAFFIC.items()} == wanted


def test_mixes_are_those_that_the_kernels_are_compiled_for() -> None:
    def dtypes(mix: Mix) -> tuple[torch.dtype, ...]:
        return mix.base, mix.primary, mix.secondary, mix.out

    compiled = {name: variant.dtypes for name, variant in compile_check.MIXES.items() if variant.in_place}
    assert {name: dtypes(mix) for name, mix in MIXES.items()} == compiled


@pytest.mark.parametrize("dtype", MIXES)
def test_the_gate_admits_what_is_right(dtype: str) -> None:
    with closing(CpuProblem(LITTLE, MIXES[dtype], sets=2, threads=2)) as problem:
        cases = list(problem.admitted())
        assert [case.name for case in cases] == list(CASES["cpu"])
        assert not any(case.missing for case in cases)
        assert problem.share == 0.5
        assert not torch.equal(problem.sets[0].out, problem.sets[0].kept), "the merge changed nothing"
        assert torch.equal(problem.sets[0].primary, problem.sets[0].kept), "primary was not put back"


def flip_a_bit(
    worker: CpuWorker, task: object, decision: HsaDecision, sources: object, out: np.ndarray, *rest: object
) -> None:
    APPLY(worker, task, decision, sources, out, *rest)
    out[-1] ^= 1


def leave_unselected(worker: CpuWorker, task: object, decision: HsaDecision, *arguments: object) -> None:
    APPLY(worker, task, with_heads(decision, (0,)), *arguments)


def name_another_head(worker: CpuWorker, job: TaskBuffers) -> Merged:
    merged = MERGE(worker, job)
    return replace(merged, decision=with_heads(merged.decision, (0, 1)))


def with_heads(decision: HsaDecision, selected: tuple[int, ...]) -> HsaDecision:
    return replace(decision, selection=replace(decision.selection, selected=selected))


def drop_secondary(base, primary, secondary, *arguments):
    return FORMULA(base, primary, primary, *arguments)


def select_all(base, primary, secondary, c1, keep, heads):
    return FORMULA(base, primary, secondary, c1, heads, heads)


APPLY, MERGE, FORMULA = CpuWorker.apply, CpuWorker.merge, kernel_cases.formula


@pytest.mark.parametrize(
    ("owner", "name", "damaged", "message"),
    [
        (CpuWorker, "apply", flip_a_bit, "CPU backend, merge differs from the oracle in projection 0"),
        (CpuWorker, "apply", leave_unselected, "CPU backend, merge differs from the oracle in projection 0"),
        (CpuWorker, "merge", name_another_head, "CPU backend, merge selects other heads of projection 0"),
        (kernel_cases, "formula", drop_secondary, "eager torch, tensor by tensor differs from the oracle"),
        (kernel_cases, "formula", select_all, "eager torch, tensor by tensor differs from the oracle"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16-base"])
def test_the_gate_refuses_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, damaged: Callable[..., object], message: str, dtype: str
) -> None:
    monkeypatch.setattr(owner, name, damaged)
    wrong = pytest.raises(SystemExit, match=f"correctness gate: {message}")
    with closing(CpuProblem(LITTLE, MIXES[dtype], sets=1, threads=1)) as problem, wrong:
        list(problem.admitted())


def test_the_gate_looks_at_the_apply_step_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    write = kernel_cases.CpuResident.write

    def stale(self: kernel_cases.CpuResident, settings: Settings, out: Sequence[torch.Tensor]) -> None:
        write(self, settings, [*out[:-1], out[-1].clone()])

    monkeypatch.setattr(kernel_cases.CpuResident, "write", stale)
    wrong = pytest.raises(SystemExit, match="apply only, scores cached differs from the oracle in projection 5")
    with closing(CpuProblem(LITTLE, MIXES["float16"], sets=1, threads=1)) as problem, wrong:
        list(problem.admitted())


def test_a_case_of_torch_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("no compiler\nfurther lines")

    monkeypatch.setattr(kernel_cases, "formula", fails)
    monkeypatch.setattr(kernel_cases, "MOST_TEMPORARIES", 6 * 4 * LITTLE.elements - 1)
    with closing(CpuProblem(LITTLE, MIXES["float32"], sets=1, threads=1)) as problem:
        missing = {case.name: case.missing for case in problem.admitted()}
    assert missing["CPU backend, merge"] == ""
    assert missing["eager torch, tensor by tensor"] == "RuntimeError: no compiler"
    assert missing["eager torch, stacked"].startswith("its temporaries take")


KERNELS = """
import sys
sys.path[:0] = ["bench", "tests/support"]
import gpu  # which makes the interpreter faster
import kernel_cases as cases
import kernel_shapes as shapes
from hsa.kernels import launch
mix, damaged = sys.argv[1:]
problem = cases.GpuProblem(shapes.Shape("little", 1, 64, 4), shapes.MIXES[mix], sets=2, device="cpu")
problem.others = lambda: cases.Problem.others(problem)
if damaged:
    apply = launch.apply_heads
    launch.apply_heads = lambda held, scores, keep, c1, c2: apply(held, scores, keep, c2, c1)
print([case.name for case in problem.admitted()])
"""


@pytest.mark.parametrize("dtype", ["float16", "float32-secondary"])
@pytest.mark.parametrize("damaged", ["", "coefficients exchanged"])
def test_the_gate_holds_the_kernels(dtype: str, damaged: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, dtype, damaged],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    if damaged:
        assert done.returncode == 1
        assert "correctness gate: two launches, in place differs from the oracle in projection 0" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str([name for name in CASES["cuda"] if "compile" not in name])


COLUMNS = (
    "run machine cpu gpu driver versions commit command device threads shape dtype case repetitions median_ms min_ms "
    "max_ms share_selected bytes gb_s copy_gb_s of_copy floor_ms times_eager times_compile"
)


def test_a_run_writes_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SHAPES, "little", LITTLE)
    monkeypatch.setitem(bench_kernels.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(bench_kernels, "cache_bytes", lambda device: 1 << 20)
    results = tmp_path / "results"
    what = ["--shape=little", "--dtype=float16", "--dtype=float16-base"]
    bench_kernels.main(["--device=cpu", *what, "--repetitions=3", f"--results={results}", "--commit=abc"])
    rows = read("kernels", results)
    assert list(rows[0]) == COLUMNS.split()
    assert [(row["dtype"], row["case"]) for row in rows] == [
        (dtype, case) for dtype in ("float16", "float16-base") for case in CASES["cpu"]
    ]
    for row in rows:
        assert (row["device"], row["shape"], row["repetitions"], row["commit"]) == ("cpu", "little", "3", "abc")
        assert row["threads"] == str(bench_kernels.usable_cores())
        low, median, high = (float(row[name]) for name in ("min_ms", "median_ms", "max_ms"))
        assert 0 < low <= median <= high
        moved = TRAFFIC[row["case"]](volume(LITTLE, MIXES[row["dtype"]]), 0.5)
        assert int(row["bytes"]) == moved
        assert float(row["gb_s"]) == pytest.approx(moved / median / 1e6, abs=0.1)
        assert float(row["of_copy"]) == pytest.approx(float(row["floor_ms"]) / median, abs=2e-3, rel=1e-2)
        assert (row["times_eager"] != "") == (row["case"] == "CPU backend, merge")
        assert row["times_compile"] == ""
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows)
    assert printed[2].startswith("| little | float16 | CPU backend, merge | ")


def test_ratios_are_of_the_faster_way_in_torch() -> None:
    problem = CpuProblem(LITTLE, MIXES["float32"], sets=1, threads=1)
    problem.share = 0.5
    problem.close()
    times = {
        "one pass, in place": [1.0, 2.0, 9.0],
        "eager torch, tensor by tensor": [40.0],
        "eager torch, stacked": [30.0],
        "torch.compile, stacked": [5.0],
    }
    rows = bench_kernels.rows_of("cuda", problem, "float32", times, 1e9, {})
    assert [(row["times_eager"], row["times_compile"]) for row in rows] == [("15.00", "2.50"), *[("", "")] * 3]
    n = 6 * 64 * 64
    assert (rows[0]["bytes"], rows[0]["floor_ms"]) == (14 * n, f"{14 * n / 1e6:.4f}")
    assert rows[0]["of_copy"] == f"{14 * n / 2e-3 / 1e9:.3f}"


def test_copies_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    one = volume(LITTLE, MIXES["float32"]).sources
    monkeypatch.setattr(bench_kernels, "cache_bytes", lambda device: one)
    with closing(bench_kernels.problem_of(LITTLE, MIXES["float32"], "cpu")) as problem:
        assert len(problem.sets) == 4
        assert len({block.data_ptr() for of in problem.sets for block in (of.base, of.primary, of.secondary)}) == 12
    assert bench_kernels.cache_bytes("cpu") == one


def test_a_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bench_kernels.main(["--dry-run", "--dtype", "float32", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| large-v3 | float32 | one pass, in place | 60.0% | 2264924160 | 0.527 |" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "shapes", "dtypes"),
    [
        (["--device", "cpu"], ("tiny", "small", "large-v3"), ("float32", "float16", "float16-base")),
        (["--device", "cuda"], ("large-v3",), ("float32", "float16", "bfloat16", "float16-base", "float32-secondary")),
        (["--device", "cuda", "--all"], tuple(SHAPES), tuple(MIXES)),
        (["--device", "cpu", "--all", "--shape", "base"], ["base"], tuple(MIXES)),
    ],
)
def test_what_is_measured(arguments: list[str], shapes: Sequence[str], dtypes: Sequence[str]) -> None:
    options = bench_kernels.parse(arguments)
    assert (options.shape, options.dtype) == (shapes, dtypes)


def test_too_few_repetitions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_kernels.parse(["--device", "cuda", "--repetitions", "19"])
    assert "--repetitions: expected at least 20, found 19" in capsys.readouterr().err
