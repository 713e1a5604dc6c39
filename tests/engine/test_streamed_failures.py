"""A tensor that threads share and that cannot be computed gives its memory back, so that no thread waits for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hsa
from hsa.backends.cpu import CpuWorker
from hsa.engine import buffer_pool, streamed
from hsa.planning import file_layout
from hsa.system.plugins import VARIABLE

Triple = dict[str, Path]
PASSES = Path(__file__).parents[1] / "support" / "two_pass_method.py"
SECONDS = 20
"""Far more than the merge takes; it waited for ever."""


@pytest.mark.parametrize("last", [False, True])
def test_a_damaged_tensor_ends_the_merge_while_others_wait_for_its_memory(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """There is room for one tensor at a time; the damage is in its first slice, or shows when it is written."""
    monkeypatch.setenv(VARIABLE, str(PASSES))
    monkeypatch.setattr(buffer_pool, "BUDGET_BYTES", 1)
    monkeypatch.setattr(streamed, "KEPT_BYTES", 1 << 30)
    monkeypatch.setattr(file_layout, "MAX_WHOLE", 0)
    monkeypatch.setattr(file_layout, "SLICE_ELEMENTS", 1 << 18)
    really = CpuWorker.slice if last else CpuWorker.measure_slice

    def slowly(*arguments: Any) -> Any:
        """Long enough for another thread to ask for memory meanwhile."""
        time.sleep(0.05)
        return really(*arguments)

    monkeypatch.setattr(CpuWorker, "slice" if last else "measure_slice", slowly)
    base, *models = triple.values()
    weights = models[0] / "model.safetensors"
    tensors = load_file(weights)
    for name in sorted(tensors):
        if tensors[name].ndim == 2:
            tensors[name].view(-1)[0] = 3e38 if last else torch.nan
    save_file(tensors, weights, {"format": "pt"})
    raised: list[BaseException] = []

    def merge() -> None:
        more: dict[str, Any] = {"dtype": "float16"} if last else {}
        try:
            hsa.merge(
                method="two_passes", base=base, models=models, output=tmp_path / "out", threads=4, sync=False, **more
            )
        except hsa.HsaError as error:
            raised.append(error)

    thread = threading.Thread(target=merge, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "the merge still waits"
    assert isinstance(raised[0], hsa.NonFiniteError), raised
    assert not (tmp_path / "out").exists()
