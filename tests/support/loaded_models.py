"""What the tests of merges into loaded models share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raw_bytes
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.integrations.transformers import hsa_merge_

TARGET = "model.encoder.layers.1.self_attn.v_proj.weight"


def load(path: Path, kind: Any = WhisperForConditionalGeneration) -> Any:
    return kind.from_pretrained(path, dtype="auto", local_files_only=True)


def differing(model: torch.nn.Module, expected: Mapping[str, torch.Tensor]) -> list[str]:
    held = model.state_dict()
    return [
        name
        for name, tensor in expected.items()
        if held[name].dtype != tensor.dtype or raw_bytes(held[name]) != raw_bytes(tensor)
    ]


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: raw_bytes(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}


def refused(model: Any, base: Any, secondary: Any, pattern: str, **more: Any) -> None:
    """A RequestError in one line, and a model that is as it was."""
    before = bytes_of(model)
    with pytest.raises(hsa.RequestError, match=pattern) as caught:
        hsa_merge_(model, base, secondary, **more)
    assert "\n" not in str(caught.value)
    assert bytes_of(model) == before
