"""The full-load baseline: three transformers models in memory, merged with plain torch operations, saved.

This is what people run today, in the order of the formula's steps. It holds three models, a copy of base's parameters
and every merged tensor at once. The benchmarks time it, and the tests hold `--numerics reference` to its bytes.

    python bench/full_load.py BASE PRIMARY SECONDARY OUTPUT [--k 0.6] [--lambda 0.5] [--alpha 0.2]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration

SELF = r"model\.(encoder)\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(?:weight|bias)"
BOTH = r"model\.(encoder|decoder)\.layers\.(\d+)\.(?:self_attn|encoder_attn)\.[qkv]_proj\.(?:weight|bias)"
OUT = r"model\.(encoder|decoder)\.layers\.(\d+)\.(?:self_attn|encoder_attn)\.out_proj\.weight"
TARGETS = {
    "encoder-qkv": re.compile(SELF),
    "attention-qkv": re.compile(BOTH),
    "attention-all": re.compile(f"{BOTH}|{OUT}"),
}


def load(path: Path, dtype: str) -> WhisperForConditionalGeneration:
    """A model as transformers reads it; `dtype` is `auto` or `float32`."""
    return WhisperForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()


def selected_heads(proxy: torch.Tensor, heads: int, k: float, axis: int = 0) -> torch.Tensor:
    """Which heads are merged: bool [heads], from the proxy [d_out, d_in] or [d_out]; heads lie along `axis`."""
    if k <= 0:
        return torch.zeros(heads, dtype=torch.bool)
    if k >= 1:
        return torch.ones(heads, dtype=torch.bool)
    channels = proxy.norm(p=2, dim=1 - axis) if proxy.ndim == 2 else proxy.abs()
    scores = channels.view(heads, -1).pow(2).sum(dim=1).sqrt()
    kept = torch.topk(scores, max(1, round(k * heads))).values
    return scores >= kept.min()


@torch.no_grad()
def merge_models(
    base: WhisperForConditionalGeneration,
    primary: WhisperForConditionalGeneration,
    secondary: WhisperForConditionalGeneration,
    *,
    k: float = 0.6,
    lam: float = 0.5,
    alpha: float = 0.2,
    attention_scale: float = 1.0,
    non_attention_scale: float = 1.0,
    targets: str = "encoder-qkv",
    num_heads: int | None = None,
    num_layers: int | None = None,
) -> dict[str, torch.Tensor]:
    """Merged tensors by name; base's own parameters are left as they are."""
    first, second = dict(primary.named_parameters()), dict(secondary.named_parameters())
    start = {name: value.detach().clone() for name, value in base.named_parameters()}
    merged = {}
    for name, value in start.items():
        tv1 = first[name] - value
        match = TARGETS[targets].fullmatch(name)
        if match is None:
            merged[name] = value + float(non_attention_scale) * tv1
            continue
        tv2 = second[name] - value
        stack, layer = (found for found in match.groups() if found is not None)
        heads = num_heads or getattr(base.config, f"{stack}_attention_heads")
        layers = num_layers or getattr(base.config, f"{stack}_layers")
        axis = 1 if ".out_proj." in name else 0
        chosen = selected_heads(tv1.abs() + tv2.abs(), heads, k, axis).to(value.dtype)
        mask = chosen.repeat_interleave(value.shape[axis] // heads)
        if value.ndim == 2:
            mask = mask.unsqueeze(1 - axis).expand_as(value)
        weight = lam ** (alpha * ((int(layer) + 1) / layers))
        blended = weight * tv1 + (1.0 - weight) * tv2
        merged[name] = value + float(attention_scale) * (mask * blended + (1.0 - mask) * tv1)
    return merged


@torch.no_grad()
def full_load_merge(
    base: Path, primary: Path, secondary: Path, output: Path, *, load_dtype: str = "auto", **parameters: Any
) -> None:
    """Load three models, merge them and save the result with transformers."""
    models = [load(path, load_dtype) for path in (base, primary, secondary)]
    merged = merge_models(*models, **parameters)
    for name, value in models[0].named_parameters():
        value.copy_(merged[name])
    models[0].save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "primary", "secondary", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--k", type=float, default=0.6)
    parser.add_argument("--lambda", dest="lam", type=float, default=0.5)
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--load-dtype", choices=("auto", "float32"), default="auto")
    options = parser.parse_args()
    full_load_merge(
        options.base,
        options.primary,
        options.secondary,
        options.output,
        load_dtype=options.load_dtype,
        k=options.k,
        lam=options.lam,
        alpha=options.alpha,
    )


if __name__ == "__main__":
    main()
