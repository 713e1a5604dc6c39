"""The memory of computations under way: a budget, and what widens it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from helpers import read_tensors

import hsa
from hsa.backends.cpu import CpuBackend
from hsa.engine import compute
from hsa.engine.buffer_pool import BUDGET_BYTES, BufferPool
from hsa.methods.subspaces import work_bytes
from hsa.system import threads


def most_at_once(pool: BufferPool, costs: list[int]) -> int:
    """How many of these computations are under way at once, at most, where each has a thread."""
    lock, running, most = threading.Lock(), 0, 0

    def work(cost: int) -> None:
        nonlocal running, most
        with pool.reserve(cost):
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.05)
            with lock:
                running -= 1

    workers = [threading.Thread(target=work, args=(cost,)) for cost in costs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return most


@pytest.mark.parametrize(
    ("budget", "costs", "most"),
    [
        (0, [BUDGET_BYTES + 1] * 3, 1),
        (0, [BUDGET_BYTES // 2] * 4, 2),
        (2 * (BUDGET_BYTES + 1), [BUDGET_BYTES + 1] * 4, 2),
        (1, [BUDGET_BYTES // 2] * 4, 2),
    ],
)
def test_computations_wait_for_the_budget(budget: int, costs: list[int], most: int) -> None:
    pool = BufferPool(CpuBackend())
    pool.widen(budget)
    assert most_at_once(pool, costs) == most


def test_each_core_computes_a_matrix(
    shared_triple: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget becomes what the largest matrix takes, once for every core."""
    widened: list[int] = []
    monkeypatch.setattr(BufferPool, "widen", lambda pool, budget: widened.append(budget))
    monkeypatch.setattr(compute, "usable_cores", lambda: 3)
    base, *models = shared_triple.values()
    hsa.merge(method="tsv_m", base=base, models=models, output=tmp_path / "out", sync=False, only="*.0.fc1.weight")
    rows, columns = read_tensors(models[0])["model.encoder.layers.0.fc1.weight"].shape
    buffers = 4 * rows * columns * 4
    assert set(widened) == {3 * (work_bytes(rows, columns, 2, 2 * (columns // 2)) + buffers)}


def test_methods_without_work_of_their_own_widen_nothing(
    shared_triple: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BufferPool, "widen", lambda pool, budget: pytest.fail("it was widened"))
    base, *models = shared_triple.values()
    hsa.merge(method="task_arithmetic", base=base, models=models, output=tmp_path / "out", sync=False)


def test_threads_are_the_cores_and_one_more() -> None:
    assert threads.default_threads() == min(threads.usable_cores() + 1, threads.MAX_THREADS)
