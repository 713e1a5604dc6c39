"""What the tests of warnings share: the warnings of a merge, and checkpoints with other tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from helpers import read_tensors, write_tensors

import hsa

Triple = Mapping[str, Path]
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

EVERY = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def warnings_of(sources: Triple, output: Path, **parameters: Any) -> str:
    """All warnings of a merge, in one text."""
    return " | ".join(hsa.merge(**sources, output=output, sync=False, **parameters).warnings)


def rewritten(source: Path, directory: Path, change: Change) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    directory.chmod(0o755)
    write_tensors(directory, change(read_tensors(source)))
    return directory


def random_like(seed: int, std: float | None = None) -> Change:
    """Random tensors of equal shapes: each of its own standard deviation, or all of one."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (torch.randn(t.shape, generator=generator) * (std or float(t.float().std()))).to(t.dtype)
            for name, t in tensors.items()
        }

    return change
