"""Tensors without elements: nothing is computed of them, so that they stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors, write_tensors

import hsa
from hsa.testing.llama_checkpoints import LlamaShape, write_llamas

EMPTY = "model.layers.1.mlp.more.weight"


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("method", ["linear", "ties", "iso_c"])
def test_a_tensor_without_elements_stays_as_it_is(tmp_path: Path, method: str, shape: tuple[int, ...]) -> None:
    """It was a target of which nothing was ever computed, and the merge ended with a KeyError."""
    paths = write_llamas(tmp_path, ("base", "one", "two"), LlamaShape(tied=True))
    for role, path in paths.items():
        own = (2, *shape[1:]) if role == "two" else shape
        write_tensors(path, {**read_tensors(path), EMPTY: torch.ones(own)})
    base, one, two = paths.values()
    sources: dict[str, Any] = {} if method == "linear" else {"base": base}
    cases = (([one, one], "first"), ([one, two], "first"), ([one, two, one], "skip-model"))
    for number, (models, mode) in enumerate(cases):
        output = tmp_path / f"out{number}"
        arguments = {**sources, "method": method, "models": models, "on_mismatch": mode}
        report = hsa.merge(**arguments, output=output, dtype="float16", sync=False)
        assert not any("of some of the models" in note for note in report.notes)
        found = read_tensors(output)
        assert (found[EMPTY].shape, found[EMPTY].dtype) == (shape, torch.float16)
        record = json.loads((output / "hsa_merge.json").read_text(encoding="utf-8"))
        assert EMPTY not in record["targets"] and len(record["targets"]) == len(found) - 1
        assert hsa.verify(output, **sources, models=models).ok
        merger = hsa.Merger(**arguments)
        assert merger.merge().keys() == record["targets"].keys()
        merger.apply_({name: tensor.clone() for name, tensor in found.items()})
