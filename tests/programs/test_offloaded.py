"""Models that accelerate has offloaded: hooks bring a layer's weights when it is used, and leave none between uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import merged, raw_bytes
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.integrations.transformers import hsa_merge_

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: make test-integrations installs it")

Triple = dict[str, Path]
ENCODER, DECODER = "model.encoder", "model.decoder"


def offloaded(path: Path, folder: Path, **places: str) -> Any:
    """A model of which some modules are on the disk or in the memory that accelerate keeps for them."""
    model = WhisperForConditionalGeneration.from_pretrained(path, local_files_only=True)
    device_map = {ENCODER: "cpu", DECODER: "cpu", "proj_out": "cpu", **places}
    return accelerate.dispatch_model(
        model, device_map=device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def test_a_model_whose_targets_are_offloaded_is_refused_everywhere(shared_triple: Triple, tmp_path: Path) -> None:
    model = offloaded(shared_triple["primary"], tmp_path / "offloaded", **{ENCODER: "disk"})
    pattern = r"target tensor model\.encoder\S+ is on the meta device, where no data is \(offloaded by a device_map"
    with pytest.raises(hsa.RequestError, match=f"^model: {pattern}"):
        hsa.Merger(**shared_triple).apply_(model)
    with pytest.raises(hsa.RequestError, match=f"^model: {pattern}"):
        hsa_merge_(model, shared_triple["base"], shared_triple["secondary"])
    for role in ("base", "primary", "secondary"):
        with pytest.raises(hsa.RequestError, match=f"^{role}: {pattern}"):
            hsa.Merger(**{**shared_triple, role: model})


def test_a_model_of_which_other_tensors_are_offloaded_is_merged(shared_triple: Triple, tmp_path: Path) -> None:
    expected = merged(shared_triple, tmp_path / "out")
    model = offloaded(shared_triple["primary"], tmp_path / "offloaded", **{DECODER: "disk"})
    assert any(parameter.is_meta for parameter in model.model.decoder.parameters())
    merger = hsa.Merger(**shared_triple)
    merger.apply_(model)
    assert merger.warnings == []
    held = model.state_dict()
    assert [name for name in merger.scores if raw_bytes(held[name]) != raw_bytes(expected[name])] == []
