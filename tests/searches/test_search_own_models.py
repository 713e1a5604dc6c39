"""A score of one's own for models that are no speech models: whatever transformers loads is searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hsa
from hsa.errors import SourceError

Sources = dict[str, Any]


def write_language_models(folder: Path) -> Sources:
    """Base and two fine-tunes of a small Llama, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(5)
    model = LlamaForCausalLM(config)
    paths = []
    for name in ("base", "one", "two"):
        if name != "base":
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.add_(torch.randn_like(tensor), alpha=0.02)
        model.save_pretrained(folder / name)
        paths.append(str(folder / name))
    return {"base": paths[0], "models": paths[1:]}


def loss(model: Any) -> float:
    """How badly a model foresees one text."""
    tokens = torch.arange(48).reshape(1, -1) % 7
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_language_model_is_searched(workers: int, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    sources = write_language_models(tmp_path)
    study = hsa.search(
        sources, output=tmp_path / "out", method="task_arithmetic,ties", evaluate=loss, trials=12, workers=workers
    )
    values = {trial.value for trial in study.trials if trial.candidate.is_merge}
    assert len(values) > 6
    assert study.best.value == min(values)
    written = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "best").eval()
    assert loss(written) == pytest.approx(study.best.value, rel=1e-6)
    assert load_file(tmp_path / "out" / "best" / "model.safetensors").keys() == written.state_dict().keys()


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    sources = write_language_models(tmp_path)
    for place in (sources["base"], *sources["models"]):
        path = Path(place) / "config.json"
        path.write_text(path.read_text(encoding="utf-8").replace("LlamaForCausalLM", "OfNoLibrary"), encoding="utf-8")
    with pytest.raises(SourceError, match=r"its config.json says 'OfNoLibrary', expected a class of transformers"):
        hsa.search(sources, output=tmp_path / "out", method="ties", evaluate=loss, trials=5)
