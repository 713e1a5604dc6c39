"""A whole merge by the oracle, and a check of `hsa.merge` against it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors, same_tensors

import hsa
from hsa import reference

ATTENTION = re.compile(
    r"(encoder|decoder)\.layers\.(\d+)\.(self_attn|encoder_attn)\.(q_proj|k_proj|v_proj|out_proj)\.(weight|bias)"
)


def bare(name: str) -> str:
    return name.removeprefix("model.")


def canonical(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {bare(name): tensor for name, tensor in tensors.items()}


def is_target(name: str, preset: str) -> bool:
    """Whether a preset of targets names a tensor."""
    match = ATTENTION.fullmatch(bare(name))
    if match is None:
        return False
    stack, _, _, projection, part = match.groups()
    if projection == "out_proj":
        return preset == "attention-all" and part == "weight"
    return stack == "encoder" or preset != "encoder-qkv"


def expected_merge(
    triple: Mapping[str, Path],
    *,
    k: Any = 0.6,
    lam: Any = 0.5,
    alpha: Any = 0.2,
    targets: str = "encoder-qkv",
    attention_scale: float = 1.0,
    non_attention_scale: float = 1.0,
    dtype: str = "auto",
    num_heads: int | None = None,
    num_layers: int | None = None,
    weights: Sequence[float] | float | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, reference.MergedTensor]]:
    """Every output tensor under primary's names, and what the oracle says of each target. Roles besides base and
    primary are secondaries, in their order."""
    base = canonical(read_tensors(triple["base"]))
    secondaries = [canonical(read_tensors(triple[role])) for role in triple if role not in ("base", "primary")]
    given = [weights] * len(secondaries) if isinstance(weights, float) else weights
    config = json.loads((triple["primary"] / "config.json").read_text())
    out_dtype = None if dtype == "auto" else getattr(torch, dtype)
    tensors, merged = {}, {}

    def value(parameter: Any, name: str) -> float:
        return parameter[name] if isinstance(parameter, Mapping) else parameter

    for name, primary in read_tensors(triple["primary"]).items():
        if not is_target(name, targets):
            if non_attention_scale == 1.0:
                cast = out_dtype is not None and primary.is_floating_point()
                tensors[name] = primary.to(out_dtype) if cast else primary
            else:
                tensors[name] = reference.merge_other(
                    base[bare(name)], primary, scale=non_attention_scale, out_dtype=out_dtype
                )
            continue
        stack, layer = bare(name).split(".")[0], int(bare(name).split(".")[2])
        merged[name] = reference.merge_tensor(
            base[bare(name)],
            primary,
            [secondary[bare(name)] for secondary in secondaries],
            k=value(k, name),
            lam=value(lam, name),
            alpha=value(alpha, name),
            layer=layer,
            layers=num_layers or config[f"{stack}_layers"],
            heads=num_heads or config[f"{stack}_attention_heads"],
            head_axis=1 if "out_proj" in name else 0,
            attention_scale=attention_scale,
            weights=given,
            out_dtype=out_dtype,
        )
        tensors[name] = merged[name].value
    return tensors, merged


def arguments(sources: Mapping[str, Path]) -> dict[str, Any]:
    """Sources by role as `hsa.merge` takes them: several secondaries as a list."""
    base, primary, *secondaries = sources.values()
    return {"base": base, "primary": primary, "secondary": secondaries[0] if len(secondaries) == 1 else secondaries}


def merge(triple: Mapping[str, Path], output: Path, **options: Any) -> hsa.MergeReport:
    """Without waiting for the disk: durability is another module's subject."""
    return hsa.merge(**arguments(triple), output=output, **{"sync": False, **options})


def check(triple: Mapping[str, Path], output: Path, **parameters: Any) -> hsa.MergeReport:
    """Merge, and compare every tensor, selection, score and margin with the oracle's."""
    report = merge(triple, output, **parameters)
    known = {key: value for key, value in parameters.items() if key not in ("threads", "max_shard_size", "sync")}
    tensors, merged = expected_merge(triple, **known)
    same_tensors(output, tensors)
    assert report.tensors.keys() == merged.keys()
    assert len(merged) > 0
    k = known.get("k", 0.6)
    for name, oracle in merged.items():
        ours = report.tensors[name]
        assert ours.selected == oracle.selected, name
        assert ours.scores == pytest.approx(oracle.squared_scores.sqrt().tolist(), rel=1e-12, abs=0)
        margin = reference.margin(oracle.squared_scores, k[name] if isinstance(k, Mapping) else k)
        assert ours.margin == (None if margin is None else pytest.approx(margin, rel=1e-6)), name
    return report


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def check_loading(output: Path) -> Any:
    """The model, loaded offline without a missing, unexpected or mismatched key, with the file's own numbers."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model, info = WhisperForConditionalGeneration.from_pretrained(
        output, dtype="auto", local_files_only=True, output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    state = model.state_dict()
    for name, tensor in read_tensors(output).items():
        assert torch.equal(state[name], tensor), name
    processor = WhisperProcessor.from_pretrained(output, local_files_only=True)
    assert processor.tokenizer.decode(processor.tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"
    return model
