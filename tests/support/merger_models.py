"""What the tests of `hsa.Merger` on loaded models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raw_bytes
from transformers import WhisperForConditionalGeneration

import hsa

TARGET = "model.encoder.layers.1.self_attn.v_proj.weight"


def load(path: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(path, dtype="auto", local_files_only=True)


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def contents(model: Any) -> dict[str, bytes]:
    held = model.state_dict() if isinstance(model, torch.nn.Module) else model
    return {
        name: raw_bytes(tensor.detach().contiguous())
        for name, tensor in held.items()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_neg())
    }


def refused(call: Callable[[], Any], pattern: str, model: Any = None, kind: type[hsa.HsaError] = hsa.HsaError) -> None:
    """One line that matches, and a model that is as it was."""
    before = None if model is None else contents(model)
    with pytest.raises(kind, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert model is None or contents(model) == before


def wrong(model: Any, expected: Mapping[str, torch.Tensor]) -> list[str]:
    held = model.state_dict() if isinstance(model, torch.nn.Module) else model
    return [name for name, tensor in expected.items() if raw_bytes(held[name].contiguous()) != raw_bytes(tensor)]
