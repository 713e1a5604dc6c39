"""Small models with task vectors that are awkward for masks and votes, and what the oracles make of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import read_tensors, write_tensors

from hsa.reference import masks_and_votes
from hsa.testing.whisper_checkpoints import SHAPES, write_checkpoint

MASKING = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della_linear", "della")
RANDOM = {"dare_linear", "dare_ties", "della_linear", "della"}
METHODS = (*MASKING, "sce", "ram", "nearswap")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MIXED = ("bfloat16", "float32", "float16")
MOST = 5
SHAPE = replace(SHAPES["test"], encoder_layers=1, decoder_layers=1)

WEIGHTS = (0.5, -0.25, 2.0, 1.0, 0.1)
DENSITIES = (0.5, 0.3, 1.0, 0.7, 0.0)


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Methods with their options, of which tuples hold one number for each model."""
    options: list[dict[str, Any]] = [
        {},
        {"density": 0.5},
        {"density": 0.0},
        {"density": 0.3, "rescale": True},
        {"density": 0.6, "rescale": "density", "lam": -0.3},
        {"density": 0.4, "rescale": False, "normalize": True, "lam": 1.3, "weights": WEIGHTS},
        {"density": DENSITIES, "normalize": True},
        {"density": 0.7, "normalize": False, "weights": (1.0, -1.0, 1.0, -1.0, 0.0)},
    ]
    found = [(method, each) for method in MASKING for each in options]
    found += [("breadcrumbs", {"density": 0.5, "gamma": gamma}) for gamma in (0.0, 0.3, 0.9)]
    found += [("della", {"density": 0.5, "epsilon": epsilon, "seed": 1 << 40}) for epsilon in (0.0, 0.49)]
    found += [("sce", {"select_topk": topk}) for topk in (1.0, 0.5, 0.01, 0.0)]
    found += [("ram", {"epsilon": epsilon}) for epsilon in (1e-5, 0.0, 0.01)]
    return found + [("nearswap", {"t": t}) for t in (0.0, 1e-6, 0.003, 100.0)]


def write_family(folder: Path, dtypes: Sequence[str], count: int = MOST) -> dict[str, Path]:
    """A base and models by role, each in one of these element types, in turn."""
    base = read_tensors(write_checkpoint(folder / "start", SHAPE))
    base["model.decoder.layer_norm.bias"] = torch.full((64,), -0.0)
    paths = {}
    for number in range(count + 1):
        role = f"model{number}" if number else "base"
        paths[role] = Path(shutil.copytree(folder / "start", folder / role))
        tensors = _changed(base, number) if number else base
        dtype = DTYPES[dtypes[number % len(dtypes)]]
        write_tensors(paths[role], {name: tensor.to(dtype) for name, tensor in tensors.items()}, shards=1 + number % 3)
    return paths


def _changed(base: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """A fine-tune: a fifth of the elements stay, some change alike in all models, one tensor does not change, one
    holds few values, and of one only the first model changes."""
    random = torch.Generator().manual_seed(number)
    changed = {}
    for name, tensor in base.items():
        change = 0.01 * torch.randn(tensor.shape, generator=random)
        change *= torch.rand(tensor.shape, generator=random) < 0.8
        change.view(-1)[:9] = 0.005
        if name.endswith("fc2.bias"):
            change = change.sign() * 0.0078125
        if name.endswith("encoder.layer_norm.weight") or (name.endswith("conv1.bias") and number > 1):
            change = change * 0
        changed[name] = tensor + change
    changed["model.decoder.layer_norm.bias"][::2] = -0.0
    return changed


def per_model(value: Any, count: int) -> Any:
    """The numbers of the first models, where there is one for each."""
    return list(value[:count]) if isinstance(value, tuple) else value


def settings_for(options: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The options for so many models."""
    return {name: per_model(value, count) for name, value in options.items()}


def expected(
    method: str, sources: Mapping[str, Path], options: Mapping[str, Any], numbers: Sequence[int] | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor as the oracle merges it; base is the first source."""
    base, *models = (read_tensors(path) for path in sources.values())
    result = {}
    for name, first in models[0].items():
        every = [base[name], *(model[name] for model in models)]
        if all(tensor.dtype == first.dtype and _bits(tensor).equal(_bits(first)) for tensor in every):
            result[name] = first
            continue
        masks = {"name": name.removeprefix("model."), "numbers": numbers} if method in RANDOM else {}
        result[name] = getattr(masks_and_votes, method)(every[0], every[1:], **masks, **options)
    return result


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def chosen(family: Mapping[str, Path], count: int) -> dict[str, Path]:
    """Base and the first models of a family."""
    return dict(list(family.items())[: count + 1])
