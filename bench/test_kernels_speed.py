"""The cases of bench_kernels under pytest-benchmark, each after the correctness gate, on a GPU where there is one.

    .venv/bin/python -m pytest bench/test_kernels_speed.py --benchmark-only

Times are wall time until the device is done: on a GPU they hold the host's share too, which bench_kernels leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from bench_kernels import Clock, problem_of, volume_of
from kernel_cases import CASES, Case, Problem
from kernel_shapes import MIXES, SHAPES, TRAFFIC

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEASURED = {
    "cuda": [("tiny", "float32"), ("tiny", "float16"), ("large-v3", "float32"), ("large-v3", "float16")],
    "cpu": [("tiny", "float32"), ("tiny", "float16"), ("base", "float32"), ("base", "float16-base")],
}
ROUNDS = {"cuda": 20, "cpu": 5}


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock(DEVICE)


@pytest.fixture(scope="module", params=MEASURED[DEVICE], ids="-".join)
def admitted(request: pytest.FixtureRequest) -> Iterator[tuple[str, Problem, dict[str, Case]]]:
    """What a problem is called, the problem, and its cases by name, after the gate."""
    shape, dtype = request.param
    with closing(problem_of(SHAPES[shape], MIXES[dtype], DEVICE)) as problem:
        yield f"{shape}, {dtype}", problem, {case.name: case for case in problem.admitted()}


@pytest.mark.parametrize("name", CASES[DEVICE])
def test_speed(benchmark, admitted: tuple[str, Problem, dict[str, Case]], clock: Clock, name: str) -> None:
    benchmark.group, problem, cases = admitted
    case = cases[name]
    if case.missing:
        pytest.skip(case.missing)
    rounds = iter(range(1 << 30))

    def ready() -> tuple[tuple[int], dict[str, object]]:
        i = next(rounds) % len(problem.sets)
        problem.sets[i].restore()
        clock.clear()
        wait()
        return (i,), {}

    def call(i: int) -> None:
        case.call(i)
        wait()

    benchmark.extra_info["bytes"] = round(TRAFFIC[name](volume_of(problem.shape, problem.mix), problem.share))
    benchmark.pedantic(call, setup=ready, rounds=ROUNDS[DEVICE], warmup_rounds=1)


def wait() -> None:
    """Wait until the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
