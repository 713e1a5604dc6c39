"""Small Llamas to merge, and what their merges are in plain torch, for tests of models of no family with heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors
from transformers import LlamaForCausalLM

import hsa
from hsa.system.plugins import VARIABLE
from hsa.testing.llama_checkpoints import LlamaShape, write_llamas

PLUGIN = Path(__file__).with_name("maximum_method.py")
TIED, UNTIED = LlamaShape(tied=True), LlamaShape()
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(PLUGIN))


@pytest.fixture(scope="module")
def shared_llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float32 Llamas with one base, for reading alone."""
    return write_llamas(tmp_path_factory.mktemp("llamas"))


@pytest.fixture
def llamas(shared_llamas: dict[str, Path], tmp_path: Path) -> list[Path]:
    """Two fine-tunes that a test may damage."""
    return [Path(shutil.copytree(shared_llamas[role], tmp_path / "sources" / role)) for role in ("model1", "model2")]


def merge(models: Sequence[Path], output: Path, **keywords: Any) -> hsa.MergeReport:
    return hsa.merge(method="maximum", models=models, output=output, sync=False, **keywords)


def largest(models: Sequence[Path], factor: float = 1.0) -> Tensors:
    """The merge in plain torch: of all models, in the first one's element types."""
    sources = [read_tensors(path) for path in models]
    merged = {}
    for name, first in sources[0].items():
        wide = torch.stack([source[name].to(torch.float32) for source in sources]).amax(0) * factor
        merged[name] = wide.to(first.dtype)
    return merged


def load(path: Path, kind: Any = LlamaForCausalLM) -> Any:
    """The model as transformers loads it, offline, with nothing missing and nothing left over."""
    model, info = kind.from_pretrained(path, output_loading_info=True, local_files_only=True, dtype="auto")
    assert not {key: names for key, names in info.items() if names}
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(1, 12)[None]
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def record_of(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "hsa_merge.json").read_text(encoding="utf-8"))
    return record


def task_arithmetic(paths: Sequence[Path], output: Path, **keywords: Any) -> hsa.MergeReport:
    base, *models = paths
    return hsa.merge(method="task_arithmetic", base=base, models=models, output=output, sync=False, **keywords)
