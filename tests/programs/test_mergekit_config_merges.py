"""The same file of mergekit's run by this package's engine and by mergekit itself: the tensors of both.

Random methods draw from different generators: mergekit is given the random words of this package here, and compares
them with the probabilities that it computes itself. Methods that mergekit lacks are compared with their formulas.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors, write_tensors
from parity import ROUNDING, Distances, Limit, Measured, limit_of, measured

import hsa
from hsa.actions.mergekit_config.merge_methods import METHODS
from hsa.cli.app import run
from hsa.reference import philox, subspaces
from hsa.testing.llama_checkpoints import write_llama
from hsa.testing.whisper_checkpoints import SHAPES, write_checkpoint

Models = Mapping[str, Path]
ROLES = ("base", "a", "b", "c")
WHISPER = replace(SHAPES["test"], encoder_layers=5, decoder_layers=3)


@pytest.fixture(scope="module")
def table() -> Iterator[Measured]:
    yield from measured("files")


@pytest.fixture(scope="module")
def formulas() -> Iterator[Measured]:
    yield from measured("formulas")


@pytest.fixture(scope="module")
def whispers(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Four Whispers in float32 whose numbers use all bits of the mantissa."""
    root = tmp_path_factory.mktemp("whispers")
    found = {role: write_checkpoint(root / role, WHISPER, role="base") for role in ROLES}
    return continuous(found)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("llamas")
    return continuous({role: write_llama(root / role) for role in ROLES})


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
    "density": [0.3, 0.8],
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


def replay_masks(monkeypatch: pytest.MonkeyPatch, models: Mapping[str, int]) -> list[str]:
    """Make mergekit keep an element where this package's random word of it is below its probability by mergekit.

    `models` are their paths, with their places from 0. Gives the tensors whose masks were drawn so, filled as it runs.
    """
    arithmetic = importlib.import_module("mergekit.merge_methods.generalized_task_arithmetic")
    method = arithmetic.GeneralizedTaskArithmeticMerge
    merge_group, waiting, drawn = method.merge_group, [], []

    def merged(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        name = group.metadata.name.removeprefix("model.")
        densities = [parameters["density"][entry.id] for entry in group.non_base]
        places = [models[str(entry.id.model.path)] for entry in group.non_base]
        waiting[:] = [(name, place) for place, density in zip(places, densities, strict=True) if 0 < density < 1]
        tensor: torch.Tensor = merge_group(self, group, **parameters)
        assert not waiting
        return tensor

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        name, place = waiting.pop(0)
        drawn.append(name)
        words = philox.words(0, probabilities.numel(), philox.key_of(0, place, name)).reshape(probabilities.shape)
        return (words < (probabilities.double() * 2.0**32).floor()).to(probabilities.dtype)

    monkeypatch.setattr(method, "merge_group", merged)
    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return drawn


def document_of(name: str, models: Models) -> dict[str, Any]:
    """A file of three fine-tunes, or of as many as the method takes, with a list over layers and filters."""
    method = METHODS[name]
    own: list[dict[str, Any]] = []
    for number in range(3):
        values = (OVER_LAYERS, BY_FILTER, {"weight": 0.9 - 0.3 * number})[number]
        names = [each.name for each in method.parameters if each.scope != "shared" and each.name in values]
        own.append({each: values[each] for each in names})
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
    name: str,
    family: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    table: Measured,
) -> None:
    models = request.getfixturevalue(family)
    drawn = None
    if name in RANDOM:
        drawn = replay_masks(monkeypatch, {str(models[role]): place for place, role in enumerate(ROLES[1:])})
    found = largest_difference(*both(document_of(name, models), tmp_path))
    table.add(name, family, Distances(found), limit_of(name))
    assert found <= limit_of(name).most
    assert drawn is None or drawn, "no mask was drawn from this package's words"


@pytest.mark.parametrize("family", ["whispers", "llamas"])
@pytest.mark.parametrize("name", ["tsv_m", "tsv_m_boosted", "iso_c", "iso_cts"])
def test_subspace_methods_give_their_formulas(
    name: str, family: str, tmp_path: Path, request: pytest.FixtureRequest, formulas: Measured
) -> None:
    models = request.getfixturevalue(family)
    base, *others = (models[role] for role in ROLES)
    hsa.merge(method=name, base=base, models=others, output=tmp_path / "ours", sync=False)
    start, *tunes = map(read_tensors, (base, *others))
    combine, wide = getattr(subspaces, name), torch.float64
    expected = {
        stored: combine(tensor, [tune[stored] for tune in tunes], name=stored.removeprefix("model."), dtype=wide)
        for stored, tensor in start.items()
    }
    found = {stored: tensor.double() for stored, tensor in read_tensors(tmp_path / "ours").items()}
    distance = largest_difference(found, expected)
    formulas.add(name, family, Distances(distance), Limit(ROUNDING))
    assert distance <= ROUNDING


@pytest.mark.parametrize("family", ["whispers", "llamas"])
def test_base_counts_as_a_model_of_linear(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    models = request.getfixturevalue(family)
    document = document_of("linear", models) | {
        "base_model": str(models["base"]),
        "parameters": {"weight": [0.5, 1], "normalize": False},
    }
    assert largest_difference(*both(document, tmp_path)) <= ROUNDING


def test_slices_of_whole_layers(llamas: Models, tmp_path: Path) -> None:
    def part(first: int, end: int, **parameters: Any) -> dict[str, Any]:
        sources = [
            {"model": str(llamas[role]), "layer_range": [first, end], "parameters": {"weight": [number, 1.5]}}
            for number, role in enumerate(("a", "b"), 1)
        ]
        return {"sources": sources, "parameters": parameters}

    document = {"merge_method": "linear", "slices": [part(0, 2, normalize=True), part(2, 3)]}
    assert largest_difference(*both(document, tmp_path)) <= ROUNDING


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
    assert largest_difference(*both(document, tmp_path)) <= ROUNDING


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
