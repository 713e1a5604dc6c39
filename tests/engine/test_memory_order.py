"""Memory is reserved in the order in which work is drawn, so that no thread waits for one that waits for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import hsa
from hsa.engine import buffer_pool, compute, consumers, pipeline, streamed
from hsa.engine.buffer_pool import BufferPool
from hsa.methods.tensors import TensorTask
from hsa.planning import file_layout
from hsa.system.plugins import VARIABLE

Triple = dict[str, Path]
PASSES = Path(__file__).parents[1] / "support" / "two_pass_method.py"
SECONDS = 30
"""Far more than the merge takes; it waited for ever."""


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_small_tensor_does_not_wait_for_a_large_one_that_is_written_after_it(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Small tensors ask for memory late. Those who write wait for them, and compute the rest of the large ones."""
    monkeypatch.setenv(VARIABLE, str(PASSES))
    monkeypatch.setattr(buffer_pool, "BUDGET_BYTES", 1)
    monkeypatch.setattr(streamed, "KEPT_BYTES", 1 << 30)
    monkeypatch.setattr(file_layout, "MAX_WHOLE", 4096)
    monkeypatch.setattr(file_layout, "SLICE_ELEMENTS", 1024)
    monkeypatch.setattr(consumers, "CACHED_PIECE", 8192)
    monkeypatch.setattr(consumers, "DIRECT_PIECE", 8192)
    monkeypatch.setattr(pipeline, "AHEAD_BYTES", 0)
    take, cost = BufferPool.take, compute.Calculator.cost
    small: set[int] = set()

    def noted(calculator: compute.Calculator, tasks: list[TensorTask]) -> int:
        found = cost(calculator, tasks)
        small.add(found)
        return found

    def late(pool: BufferPool, cost: int) -> None:
        if cost in small:
            time.sleep(0.01)
        take(pool, cost)

    monkeypatch.setattr(compute.Calculator, "cost", noted)
    monkeypatch.setattr(BufferPool, "take", late)
    base, *models = triple.values()

    def merge() -> None:
        hsa.merge(method="two_passes", base=base, models=models, output=tmp_path / "out", threads=threads, sync=False)

    thread = threading.Thread(target=merge, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "the merge still waits"
    assert small
    assert hsa.verify(tmp_path / "out", base=base, models=models).ok
