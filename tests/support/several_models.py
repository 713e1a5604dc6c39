"""More fine-tunes of the base of a triple: each has heads of its own that it moved far."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from helpers import read_tensors, write_tensors

DELTA = 1e-3


def write_fine_tune(base: Path, place: Path, seed: int, dtype: torch.dtype | None = None) -> Path:
    """A fine-tune of a base, with other numbers for each seed; its element type is base's unless told."""
    tensors = read_tensors(base)
    shutil.copytree(base, place)
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, tensor in tensors.items():
        gains = 0.5 + torch.rand((len(tensor), *[1] * (tensor.ndim - 1)), generator=generator)
        moved = tensor.float() + DELTA * gains * torch.randn(tensor.shape, generator=generator)
        tuned[name] = moved.to(dtype or tensor.dtype)
    write_tensors(place, tuned)
    return place


def with_more(
    triple: Mapping[str, Path], folder: Path, models: int, dtypes: Sequence[torch.dtype | None] = ()
) -> dict[str, Path]:
    """The first sources of a triple, and further fine-tunes, so that there are so many models; by role."""
    sources = dict(list(triple.items())[: models + 1])
    for number in range(3, models + 1):
        dtype = dtypes[number - 3] if number - 3 < len(dtypes) else None
        sources[f"model{number}"] = write_fine_tune(triple["base"], folder / f"m{number}", number, dtype)
    return sources
