"""A triple of real checkpoints: Whisper tiny.en and two fine-tunes of it.

The fixtures `real` and `clips` say which.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import full_load
import pytest
import torch
from helpers import RATE, raw_bytes, read_clips, read_tensors, same_tensors, word_edits

import hsa
from hsa import reference

Triple = dict[str, Path]


def is_target(name: str) -> bool:
    return full_load.TARGETS["encoder-qkv"].fullmatch(name) is not None


@pytest.mark.parametrize("k", [0.2, 0.6, 1.0])
def test_heads_are_the_oracles_and_all_else_is_primarys(real: Triple, k: float, tmp_path: Path) -> None:
    report = hsa.merge(**real, output=tmp_path / "out", k=k, lam=0.3)
    base, primary, secondary, merged = (read_tensors(path) for path in (*real.values(), tmp_path / "out"))
    config = json.loads((real["primary"] / "config.json").read_text())
    heads, layers = config["encoder_attention_heads"], config["encoder_layers"]
    assert merged.keys() == primary.keys()
    assert report.tensors.keys() == {name for name in primary if is_target(name)}
    assert len(report.tensors) == 5 * layers
    for name, tensor in primary.items():
        if not is_target(name):
            assert raw_bytes(merged[name]) == raw_bytes(tensor), name
            continue
        oracle = reference.merge_tensor(
            base[name],
            tensor,
            secondary[name],
            k=k,
            lam=0.3,
            alpha=0.2,
            layer=int(name.split(".")[3]),
            layers=layers,
            heads=heads,
        )
        assert report.tensors[name].selected == oracle.selected, name
        assert len(oracle.selected) >= round(k * heads)
        assert report.tensors[name].scores == pytest.approx(oracle.squared_scores.sqrt().tolist(), rel=1e-12)
        assert raw_bytes(merged[name]) == raw_bytes(oracle.value), name
        rows = merged[name].reshape(heads, -1)
        changed = [h for h in range(heads) if raw_bytes(rows[h]) != raw_bytes(tensor.reshape(heads, -1)[h])]
        assert changed == list(oracle.selected), name
    assert report.warnings == ()


@pytest.mark.parametrize("load_dtype", ["auto", "float32"])
@pytest.mark.parametrize("parameters", [{}, {"k": 0.2, "lam": 0.1, "alpha": 1.0}, {"k": 1.0, "lam": 0.3}])
def test_reference_numerics_are_the_scripts(
    real: Triple, load_dtype: Any, parameters: dict[str, float], tmp_path: Path
) -> None:
    full_load.full_load_merge(**real, output=tmp_path / "theirs", load_dtype=load_dtype, **parameters)
    hsa.merge(
        **real,
        output=tmp_path / "ours",
        numerics="reference",
        load_dtype=load_dtype,
        **parameters,  # type: ignore[arg-type]
    )
    same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_margins_are_as_clear_as_the_triple_promises(real: Triple, tmp_path: Path) -> None:
    """At k 0.6 every correct program selects the same heads: the sets of exact and reference numerics agree."""
    exact = hsa.merge(**real, output=tmp_path / "exact")
    script = hsa.merge(**real, output=tmp_path / "script", numerics="reference", load_dtype="float32")
    assert exact.narrowest is not None and exact.narrowest.margin is not None
    assert exact.narrowest.margin > 1e-5
    assert {n: t.selected for n, t in exact.tensors.items()} == {n: t.selected for n, t in script.tensors.items()}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_output_loads_and_transcribes(real: Triple, clips: Path, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    hsa.merge(**real, output=tmp_path / "out")
    model, info = WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = WhisperProcessor.from_pretrained(tmp_path / "out", local_files_only=True)
    wrong = total = 0
    for _, text, samples in read_clips(clips)[:4]:
        features = processor(samples, sampling_rate=RATE, return_tensors="pt").input_features
        tokens = model.generate(features, max_new_tokens=64, num_beams=1, do_sample=False)
        (heard,) = processor.batch_decode(tokens, skip_special_tokens=True)
        wrong += word_edits(words(text), words(heard))
        total += len(words(text))
    # Primary's own word error rate is 7 %, base's 52 %: half the words wrong would mean that the merge broke it.
    assert wrong < 0.3 * total, f"{wrong} of {total} words are wrong"


@torch.no_grad()
def test_merger_writes_the_model_that_hsa_merge_wrote(real: Triple, clips: Path, tmp_path: Path) -> None:
    """Logits on a clip, after other candidates were tried on the same model."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    def load(path: Path) -> WhisperForConditionalGeneration:
        return WhisperForConditionalGeneration.from_pretrained(path, dtype="auto", local_files_only=True).eval()

    hsa.merge(**real, output=tmp_path / "out", k=0.6, lam=0.1)
    processor = WhisperProcessor.from_pretrained(tmp_path / "out", local_files_only=True)
    _, _, samples = read_clips(clips)[0]
    features = processor(samples, sampling_rate=RATE, return_tensors="pt").input_features
    start = torch.tensor([[50257, 50362]])

    def logits(model: WhisperForConditionalGeneration) -> torch.Tensor:
        return model(input_features=features.to(model.dtype), decoder_input_ids=start).logits

    model = load(real["primary"])
    untouched = logits(model)
    merger = hsa.Merger(real["base"], model, real["secondary"])
    merger.apply_(model, k=1.0, lam=0.0)
    merger.apply_(model, k=0.6, lam=0.1)
    assert torch.equal(logits(model), logits(load(tmp_path / "out")))
    assert not torch.equal(logits(model), untouched)


def test_output_loads(real: Triple, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    hsa.merge(**real, output=tmp_path / "out", targets="attention-all", dtype="bfloat16", max_shard_size="20MB")
    model, info = WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype="auto", local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    assert state["proj_out.weight"].dtype == torch.bfloat16
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert torch.equal(state[name], tensor), name
