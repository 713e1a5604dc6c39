"""Small families of models for the subspace methods, and what the oracle makes of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import raw_bytes, read_tensors, write_tensors

from hsa.reference import subspaces as oracle

ORACLES: dict[str, Any] = {
    "tsv_m": oracle.tsv_m,
    "tsv_m_boosted": oracle.tsv_m_boosted,
    "iso_c": oracle.iso_c,
    "iso_cts": oracle.iso_cts,
}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
"""Of a tensor's norm. What `hsa verify` allows between machines is 1e-4; both compute in float64 here, so that rounding
to the output's element type is what may differ, where a value lies halfway."""

Family = dict[str, Path]


def write_family(place: Path, base: Path, kind: str, dtypes: Sequence[str]) -> Family:
    """A base and five models: `full` task vectors, `low rank` ones, or `some` tensors alone; their element types are
    those of `dtypes` in turn, base's last."""
    generator = torch.Generator().manual_seed(len(kind))
    start = read_tensors(base)
    family = {}
    for number in range(6):
        role = "base" if number == 5 else f"model{number + 1}"
        family[role] = Path(shutil.copytree(base, place / role))
        dtype = DTYPES[dtypes[number % len(dtypes)]]
        tensors = start if role == "base" else {name: moved(t, name, kind, generator) for name, t in start.items()}
        write_tensors(family[role], {name: tensor.to(dtype) for name, tensor in tensors.items()}, shards=1 + number % 2)
    return family


def moved(tensor: torch.Tensor, name: str, kind: str, generator: torch.Generator) -> torch.Tensor:
    """A tensor after a fine-tune."""
    if kind == "some" and "fc" not in name:
        return tensor.clone()
    if kind == "low rank" and tensor.ndim == 2:
        rows, columns = tensor.shape
        left, right = torch.randn(rows, 3, generator=generator), torch.randn(3, columns, generator=generator)
        return tensor + 0.01 * left @ right
    return tensor + 0.01 * torch.randn(tensor.shape, generator=generator)


def chosen(family: Family, count: int) -> Family:
    """Base and the first models."""
    return {"base": family["base"], **{f"model{n}": family[f"model{n}"] for n in range(1, count + 1)}}


def expected(
    method: str, sources: Mapping[str, Path], settings: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """What the oracle makes of every tensor; a setting may be a function of the tensor's canonical name."""
    base, *models = (read_tensors(path) for path in sources.values())
    merged = {}
    for name in models[0]:
        canonical = name.removeprefix("model.")
        own = {key: value(canonical) if callable(value) else value for key, value in settings.items()}
        own.pop("orthogonalize", None)
        tensors = [model[name] for model in models]
        merged[name] = ORACLES[method](base[name], tensors, name=canonical, dtype=dtype, **own)
    return merged


def assert_merged(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Matrices lie within the tolerance of the oracle's, all else has its bytes."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        if oracle.is_matrix(name.removeprefix("model."), tensor.shape):
            apart = float((found[name].double() - tensor.double()).norm())
            assert apart <= TOLERANCE[tensor.dtype] * float(tensor.double().norm()), (name, apart)
        else:
            assert raw_bytes(found[name]) == raw_bytes(tensor), name
