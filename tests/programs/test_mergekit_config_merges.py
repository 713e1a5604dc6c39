"""The same file of mergekit's run by this package's engine and by mergekit itself: the tensors of both."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors, write_tensors

import hsa
from hsa.actions.mergekit_config.merge_methods import METHODS
from hsa.cli.app import run
from hsa.methods.registry import methods
from hsa.testing.whisper_checkpoints import SHAPES, write_checkpoint

Models = Mapping[str, Path]
ROLES = ("base", "a", "b", "c")
WHISPER = replace(SHAPES["test"], encoder_layers=5, decoder_layers=3)

TOLERANCE = 3e-7
"""The largest difference relative to a tensor's norm: rounding of float32."""

TOLERANCES = {"karcher": 1e-6}
"""mergekit rounds unit vectors."""


@pytest.fixture(scope="module")
def whispers(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Four Whispers in float32 whose numbers use all bits of the mantissa."""
    root = tmp_path_factory.mktemp("whispers")
    found = {role: write_checkpoint(root / role, WHISPER, role="base") for role in ROLES}
    return continuous(found)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Models:
    writer = pytest.importorskip("hsa.testing.llama_checkpoints", reason="this hsa reads no checkpoints of any family")
    root = tmp_path_factory.mktemp("llamas")
    return continuous({role: writer.write_llama(root / role) for role in ROLES})


def continuous(models: Models) -> Models:
    """Weights and task vectors of the size that fine-tuning leaves, in float32.

    In a tensor no two elements of a task vector have the same magnitude: of elements that tie at a cut, mergekit keeps
    those that its sort puts first, and this package keeps all.
    """
    random = torch.Generator().manual_seed(7)
    tensors = read_tensors(models["base"])
    base = {name: 0.01 * torch.randn(tensor.shape, generator=random) for name, tensor in tensors.items()}
    for role, path in models.items():
        own = {name: tensor if role == "base" else fine_tuned(tensor, random) for name, tensor in base.items()}
        write_tensors(path, own)
    return models


def fine_tuned(base: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A tensor plus a task vector without ties."""
    tensor = base + 0.003 * torch.randn(base.shape, generator=random)
    while (ties := tied(tensor - base)).any():
        tensor[ties] = base[ties] + 0.003 * torch.randn(int(ties.sum()), generator=random)
    return tensor


def tied(vector: torch.Tensor) -> torch.Tensor:
    """Bool: which elements have the magnitude of another one."""
    _, inverse, counts = vector.abs().unique(return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def both(document: Mapping[str, Any], folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors that this package and mergekit make of a document."""
    file = folder / "config.yml"
    file.write_text(json.dumps(document, indent=1), encoding="utf-8")  # which is YAML, without anchors
    hsa.merge(config=file, output=folder / "ours", sync=False)
    assert run(["mergekit", str(file), str(folder / "theirs")]) == 0
    return read_tensors(folder / "ours"), read_tensors(folder / "theirs")


def largest_difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Relative to the norm of each tensor."""
    assert ours.keys() == theirs.keys()
    found = []
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        expected = tensor.double()
        found.append(float((ours[name].double() - expected).norm() / expected.norm()))
    return max(found)


OVER_LAYERS: dict[str, Any] = {
    "weight": [0.2, 1.0, 0.6],
    "density": [0.3, 0.9],
    "t": [0, 0.5, 1],
    "lambda": [0.5, 1.5],
    "select_topk": [0.2, 0.9],
    "gamma": [0.0, 0.02],
    "epsilon": 0.1,
}
BY_FILTER: dict[str, Any] = {
    name: [{"filter": "self_attn", "value": value}, {"filter": "layers.1.", "value": 0.7}, {"value": 0.4}]
    for name, value in OVER_LAYERS.items()
    if name != "epsilon"
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def document_of(name: str, models: Models) -> dict[str, Any]:
    """A file of three fine-tunes, or of as many as the method takes, with a list over layers and filters."""
    method = METHODS[name]
    own: list[dict[str, Any]] = []
    for number in range(3):
        values = (OVER_LAYERS, BY_FILTER, {"weight": 0.9 - 0.3 * number})[number]
        names = [each.name for each in method.parameters if each.scope != "shared" and each.name in values]
        own.append({each: values[each] for each in names if not (name in RANDOM and each in ("density", "epsilon"))})
    count = {"slerp": 1, "nearswap": 1, "nuslerp": 2}.get(name, 3)
    document: dict[str, Any] = {
        "merge_method": name,
        "models": [
            {"model": str(models[role]), "parameters": parameters}
            for role, parameters in list(zip(ROLES[1:], own, strict=True))[:count]
        ],
        "parameters": {
            each.name: BY_FILTER[each.name]
            for each in method.parameters
            if each.scope == "shared" and each.kind == "number" and each.name in BY_FILTER
        },
    }
    if name == "ram":
        document["parameters"] = {"epsilon": 0.004}
    if method.base == "required":
        document["base_model"] = str(models["base"])
    return document


@pytest.mark.parametrize("family", ["whispers", "llamas"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "hsa"])
def test_every_method_gives_mergekits_tensors(
    name: str, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name not in methods():
        pytest.skip(f"this hsa has no method {name}")
    document = document_of(name, request.getfixturevalue(family))
    assert largest_difference(*both(document, tmp_path)) <= TOLERANCES.get(name, TOLERANCE)


@pytest.mark.parametrize("family", ["whispers", "llamas"])
def test_base_counts_as_a_model_of_linear(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    models = request.getfixturevalue(family)
    document = document_of("linear", models) | {
        "base_model": str(models["base"]),
        "parameters": {"weight": [0.5, 1], "normalize": False},
    }
    assert largest_difference(*both(document, tmp_path)) <= TOLERANCE


def test_slices_of_whole_layers(llamas: Models, tmp_path: Path) -> None:
    def part(first: int, end: int, **parameters: Any) -> dict[str, Any]:
        sources = [
            {"model": str(llamas[role]), "layer_range": [first, end], "parameters": {"weight": [number, 1.5]}}
            for number, role in enumerate(("a", "b"), 1)
        ]
        return {"sources": sources, "parameters": parameters}

    document = {"merge_method": "linear", "slices": [part(0, 2, normalize=True), part(2, 3)]}
    assert largest_difference(*both(document, tmp_path)) <= TOLERANCE


def test_modules_with_slices(whispers: Models, tmp_path: Path) -> None:
    def part(first: int, end: int, weight: Any) -> dict[str, Any]:
        sources = [{"model": str(whispers[role]), "layer_range": [first, end]} for role in ("base", "a", "b")]
        return {"sources": sources, "parameters": {"weight": weight}}

    document = {
        "merge_method": "task_arithmetic",
        "base_model": str(whispers["base"]),
        "modules": {
            "encoder": {"slices": [part(0, 3, [0, 1]), part(3, 5, [{"filter": "fc1", "value": 2}, {"value": 0.5}])]},
            "decoder": {
                "models": [{"model": str(whispers[role])} for role in ("a", "b")],
                "parameters": {"weight": [1, 0.2]},
            },
        },
        "parameters": {"lambda": [0.7, 1.1]},
    }
    assert largest_difference(*both(document, tmp_path)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [{"out_dtype": "float16"}, {"dtype": "float32", "out_dtype": "bfloat16"}])
def test_the_element_type_of_the_output(dtype: dict[str, str], whispers: Models, tmp_path: Path) -> None:
    ours, theirs = both(document_of("task_arithmetic", whispers) | dtype, tmp_path)
    assert {str(tensor.dtype) for tensor in ours.values()} == {f"torch.{dtype['out_dtype']}"}
    assert largest_difference(ours, theirs) < 1e-4  # where the last bits of float32 decide how a value is rounded
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0]["dtype"] == configs[1]["dtype"] == dtype["out_dtype"]


def test_hsa_gives_the_bytes_of_hsa_mergekit(whispers: Models, tmp_path: Path) -> None:
    document = {
        "merge_method": "hsa",
        "base_model": str(whispers["base"]),
        "models": [
            {"model": str(whispers["a"]), "parameters": {"role": "secondary"}},
            {"model": str(whispers["b"]), "parameters": {"role": "primary"}},
        ],
        "parameters": {"k": 0.4, "lambda": 0.3},
    }
    ours, theirs = both(document, tmp_path)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
