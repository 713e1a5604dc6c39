"""Small random checkpoints with edge cases, on which any merge method is tested.

Their tensors have no elements, one element, or more elements than a slice, and one axis or three. Some have few
distinct values, some are unchanged, and some change equally in all elements. Element types and shards differ between
the sources.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hsa.testing.whisper_checkpoints import WhisperShape, write_checkpoint

if TYPE_CHECKING:
    from torch import Generator, Tensor

Family = Literal["generic", "whisper"]
Kind = Literal["free", "sparse", "few values", "even", "zero", "same"]
"""How a tensor changes from base to a fine-tune, in the order of the names: by normal numbers; by normal numbers in
some elements; by numbers of which many have the same magnitude; by one number in all elements; not at all, but in the
source's element type; not at all, with the same bytes in all sources."""

DTYPES = ("float32", "float16", "bfloat16")

WHISPER = WhisperShape(
    d_model=24,
    encoder_layers=2,
    decoder_layers=1,
    encoder_heads=3,
    decoder_heads=2,
    ffn_dim=10,
    vocab_size=271,
    max_source_positions=50,
    max_target_positions=6,
)
"""The shape of the models of the family `whisper`."""

GENERIC: dict[str, tuple[tuple[int, ...], Kind]] = {
    "embed_tokens.weight": ((37, 6), "free"),
    "layers.0.fc.weight": ((13, 9), "free"),
    "layers.0.fc.bias": ((13,), "sparse"),
    "layers.0.conv.weight": ((5, 3, 4), "sparse"),
    "layers.1.fc.weight": ((6, 29), "few values"),
    "layers.1.fc.bias": ((6,), "few values"),
    "layers.1.norm.weight": ((31,), "even"),
    "layers.2.fc.bias": ((5,), "free"),
    "layers.1.norm.running_mean": ((7,), "free"),
    "large.weight": ((57, 83), "sparse"),
    "long": ((4099,), "few values"),
    "one.weight": ((1,), "free"),
    "one_by_one.weight": ((1, 1), "free"),
    "row.weight": ((1, 11), "free"),
    "column.weight": ((11, 1), "free"),
    "scalar": ((), "free"),
    "empty": ((0,), "free"),
    "empty_rows.weight": ((3, 0), "free"),
    "zeros.weight": ((4, 5), "zero"),
    "frozen.weight": ((8, 7), "zero"),
    "same.weight": ((9, 5), "same"),
}
"""The tensors of the family `generic`, with their shapes and kinds of change. `zeros.weight` is 0 in all sources."""

MISMATCHED = ("embed_tokens.weight", "layers.0.fc.weight", "layers.1.norm.running_mean", "long")
"""Tensors of the family `generic` that a source may lack, or have in another shape."""

_WHISPER_KINDS: dict[str, Kind] = {
    "encoder.layers.0.self_attn.q_proj.weight": "few values",
    "encoder.layers.0.self_attn.q_proj.bias": "even",
    "encoder.layers.0.self_attn.k_proj.weight": "zero",
    "encoder.layers.0.self_attn.v_proj.weight": "sparse",
    "encoder.layers.1.self_attn.v_proj.weight": "same",
    "encoder.layers.1.self_attn.v_proj.bias": "zero",
    "decoder.layers.0.encoder_attn.q_proj.weight": "few values",
}


@dataclass(frozen=True)
class DrawnModels:
    """A base and its fine-tunes, in the order of the models: their directories, and the tensors of each by stored
    name."""

    family: Family
    base: Path
    models: Sequence[Path]
    tensors: Mapping[Path, Mapping[str, Tensor]] = field(repr=False)


def draw_models(
    folder: Path,
    count: int,
    draw: random.Random,
    *,
    family: Family = "generic",
    one_dtype: bool = False,
    mismatched: bool = False,
) -> DrawnModels:
    """Write a base and `count` fine-tunes of it into `folder`, with element types and shards drawn for each.

    With `one_dtype`, all sources have the same element type, which is required by methods that repeat another program's
    arithmetic. With `mismatched`, one source lacks some of MISMATCHED, or has them in another shape.

    Example:
        >>> draw_models(Path("folder"), 2, random.Random(0)).models  # doctest: +SKIP
        (PosixPath('folder/model1'), PosixPath('folder/model2'))
    """
    import torch

    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    mixed = draw.random() < 0.7 and not one_dtype
    dtypes = draw.choices(DTYPES, k=count + 1) if mixed else [draw.choice(DTYPES)] * (count + 1)
    origin = _generic(generator) if family == "generic" else _whisper(folder / "origin")
    kinds = {name: _kind(family, name) for name in origin}
    other = draw.randrange(count + 1) if mismatched else None
    paths, tensors = [], {}
    for number in range(count + 1):
        path = folder / (f"model{number}" if number else "base")
        held = {}
        for name, start in origin.items():
            value = start + _change(kinds[name], tuple(start.shape), number, generator)
            held[name] = value.to(getattr(torch, dtypes[1 if kinds[name] == "same" else number]))
        if number == other:
            for name in draw.sample(MISMATCHED, draw.randint(1, len(MISMATCHED))):
                _misfit(held, name, draw)
        if family == "generic":
            held["steps"] = torch.arange(3) + number
        _write(path, held, dtypes[number], draw.choice((1, 1, 2, 3)), family)
        paths.append(path)
        tensors[path] = held
    return DrawnModels(family, paths[0], tuple(paths[1:]), tensors)


def _misfit(held: dict[str, Tensor], name: str, draw: random.Random) -> None:
    """Remove a tensor, or give it more rows."""
    tensor = held.pop(name)
    if draw.random() < 0.5:
        held[name] = tensor.repeat(2, *[1] * (tensor.dim() - 1))


def _kind(family: Family, name: str) -> Kind:
    if family == "generic":
        return GENERIC[name][1]
    return _WHISPER_KINDS.get(name.removeprefix("model."), "free")


def _generic(generator: Generator) -> dict[str, Tensor]:
    """Base's tensors: float32, with numbers that every element type represents exactly."""
    import torch

    made = {name: torch.randn(shape, generator=generator) for name, (shape, _) in GENERIC.items()}
    made["zeros.weight"].zero_()
    made["layers.1.norm.weight"].view(-1)[::2] = -0.0
    made["layers.1.norm.running_mean"].abs_()
    return {name: (tensor * 0.25).bfloat16().float() for name, tensor in made.items()}


def _whisper(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = write_checkpoint(folder, WHISPER, processor=False)
    return {name: tensor.bfloat16().float() for name, tensor in load_file(path / "model.safetensors").items()}


def _change(kind: Kind, shape: tuple[int, ...], number: int, generator: Generator) -> Tensor:
    """The task vector of a model, float32. Base is number 0; its task vector is zero."""
    import torch

    if not number or kind in ("zero", "same"):
        return torch.zeros(shape)
    normal = 0.02 * torch.randn(shape, generator=generator)
    if kind == "even" or math.prod(shape) == 1:
        return torch.full(shape, 2.0**-6 * number)  # the same direction for all models: opposite ones cancel
    if kind == "few values":
        return normal.sign().mul(2.0**-7)
    if kind == "sparse":
        normal *= torch.rand(shape, generator=generator) < 0.7
        normal.view(-1)[:9] = 0.005
    return normal


def _write(path: Path, tensors: Mapping[str, Tensor], dtype: str, shards: int, family: Family) -> None:
    """Write a checkpoint directory: config, and weights distributed over `shards` files."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "drawn", "architectures": ["DrawnModel"], "dtype": dtype}
    if family == "whisper":
        config = json.loads((path.parent / "origin" / "config.json").read_text(encoding="utf-8")) | {"dtype": dtype}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
