"""Methods that mask and vote against mergekit's own, on continuous float32 tensors of Whisper's and Llama's shapes.

Two distances, relative to the norm of the merged tensor: both evaluated in float64, where the formulas are the same;
and both in float32, where each rounds in its own order. mergekit's random masks are replaced by ours.

Elements that tie at a cut are left out, and counted: hsa keeps all of them, mergekit as many as its sort puts first.
Task vectors of float32 models tie because models round. `-s` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from parity import Distances, Measured, limit_of, measured, settings_text
from torch import Tensor

from hsa.reference import masks_and_votes as oracle
from hsa.reference.masking import at_random, by_rank

mergekit = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is in the environment of integrations")

SHAPES = {
    "whisper attention": (384, 384),
    "whisper embedding": (1501, 384),
    "whisper convolution": (384, 80, 3),
    "whisper bias": (1536,),
    "llama mlp": (1376, 512),
    "llama norm": (512,),
}
NAME = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = [0.5, 0.3, 0.9]
SIGNED = [0.5, -0.3, 0.9]
NAMES = {"weights": "weight", "lam": "lambda"}
"""mergekit's names, where they differ."""

# Name, models, parameters under our names.
MERGES: list[tuple[str, int, dict[str, Any]]] = [
    ("ties", 3, {"weights": WEIGHTS}),
    ("ties", 3, {"weights": WEIGHTS, "density": 0.5}),
    ("ties", 3, {"weights": SIGNED, "density": [0.5, 0.2, 1.0], "lam": 0.7}),
    ("ties", 2, {"weights": WEIGHTS[:2], "density": 0.3, "normalize": False, "rescale": True}),
    ("dare_linear", 3, {"weights": WEIGHTS, "density": 0.5}),
    ("dare_linear", 3, {"weights": WEIGHTS, "density": [0.1, 0.9, 1.0], "normalize": True, "rescale": False}),
    ("dare_ties", 3, {"weights": WEIGHTS, "density": 0.5, "lam": 1.3}),
    ("dare_ties", 3, {"weights": SIGNED, "density": 0.3, "normalize": True}),
    ("breadcrumbs", 3, {"weights": WEIGHTS, "density": 0.9}),
    ("breadcrumbs", 3, {"weights": SIGNED, "density": 0.5, "gamma": 0.7, "rescale": True, "normalize": True}),
    ("breadcrumbs_ties", 3, {"weights": WEIGHTS, "density": 0.9, "gamma": [0.0, 0.01, 0.05]}),
    ("della_linear", 3, {"weights": WEIGHTS, "density": 0.5}),
    ("della", 3, {"weights": WEIGHTS, "density": 0.6, "epsilon": [0.1, 0.2, 0.3]}),
    ("sce", 3, {}),
    ("sce", 3, {"select_topk": 0.5}),
    ("sce", 2, {"select_topk": 0.1}),
    ("ram", 3, {"epsilon": 2e-4}),
    ("nearswap", 1, {"t": 3e-4}),
]


def tensors(shape: tuple[int, ...], count: int) -> tuple[Tensor, list[Tensor]]:
    """A base, and fine-tunes that moved a hundredth of it, partly the same way."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator)

    base, common = normal() * 0.05, normal() * 2e-4
    return base, [base + common + normal() * 4e-4 for _ in range(count)]


def masks(name: str, base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any]) -> list[Tensor]:
    """Our masks of the models whose density is below 1."""
    if not name.startswith(("dare", "della")):
        return []
    density = parameters["density"]
    shares = density if isinstance(density, list) else [density] * len(models)
    epsilon = parameters.get("epsilon", 0.15)
    spreads = epsilon if isinstance(epsilon, list) else [epsilon] * len(models)
    keep = at_random(0, NAME, None) if name.startswith("dare") else by_rank(spreads, 0, NAME, None)
    return [keep(model - base, i, shares[i]) for i, model in enumerate(models) if shares[i] < 1]


def theirs(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    base: Tensor,
    models: list[Tensor],
    parameters: Mapping[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """mergekit's result, with our masks. What it draws with is checked to have the probabilities of ours."""
    waiting = masks(name, base, models, parameters)

    def drawn(probabilities: Tensor) -> Tensor:
        mask = waiting.pop(0)
        expected = probabilities.double().mean().item()
        assert abs(mask.double().mean().item() - expected) < 6 * (expected / mask.numel()) ** 0.5
        return mask.reshape(probabilities.shape).to(probabilities.dtype)

    given = {NAMES.get(key, key): value for key, value in parameters.items()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", drawn)
        merged: Tensor = mergekit.merge_tensors([base, *models], name, parameters=given, base_index=0, dtype=dtype)
    assert not waiting
    return merged


def ours(name: str, base: Tensor, models: list[Tensor], parameters: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    named = {"name": NAME} if name.startswith(("dare", "della")) else {}
    merged: Tensor = getattr(oracle, name)(base, models, **named, **parameters, dtype=dtype)
    return merged


def tied(name: str, base: Tensor, models: Sequence[Tensor], parameters: Mapping[str, Any]) -> Tensor:
    """Bool: where an element ties with others of which a cut keeps some and drops some."""
    deltas = [model - base for model in models]
    cuts: list[tuple[Tensor, int]] = []
    if name == "sce":
        variance = torch.stack(deltas).var(dim=0, unbiased=False)
        cuts.append((variance, int(parameters.get("select_topk", 1.0) * int(variance.count_nonzero()))))
    elif name.startswith(("ties", "breadcrumbs")):
        for i, d in enumerate(deltas):
            density, gamma = _of(parameters.get("density", 1.0), i), _of(parameters.get("gamma", 0.01), i)
            keep, n = int(density * d.numel()), d.numel()
            top = min(int(gamma * n), n - keep) if name.startswith("breadcrumbs") and density < 1 else 0
            cuts += [(d.abs(), top), (d.abs(), top + keep)]
    result = torch.zeros(base.shape, dtype=torch.bool)
    for magnitudes, rank in cuts:
        ordered = magnitudes.flatten().sort(descending=True).values
        if 0 < rank < len(ordered) and ordered[rank - 1] == ordered[rank]:
            result |= magnitudes == ordered[rank]
    return result


def _of(value: Any, model: int) -> float:
    return float(value[model]) if isinstance(value, list) else float(value)


def merge_text(count: int, parameters: Mapping[str, Any]) -> str:
    """What the documentation calls a merge."""
    negative = ["a negative weight"] if parameters.get("weights") == SIGNED else []
    return ", ".join([f"{count} model{'s' * (count > 1)}", *settings_text(parameters), *negative])


@pytest.fixture(scope="module")
def table() -> Iterator[Measured]:
    yield from measured("functions")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize(("name", "count", "parameters"), MERGES, ids=str)
def test_merges_are_mergekits(
    name: str,
    count: int,
    parameters: dict[str, Any],
    shape: tuple[int, ...],
    table: Measured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, models = tensors(shape, count)
    if parameters.get("rescale") is True:  # one element more or less changes all others: task vectors without ties
        base, models = base * 0, [model - base for model in tensors(shape, count)[1]]
        models = [model * torch.linspace(0.9, 1.1, model.numel()).reshape(shape) for model in models]
    left_out = tied(name, base, models, parameters)
    assert int(left_out.sum()) <= 1e-3 * base.numel()
    apart = {}
    for dtype in (torch.float64, torch.float32):
        sources = base.to(dtype), [model.to(dtype) for model in models]
        merged = ours(name, *sources, parameters, dtype)
        difference = (merged - theirs(monkeypatch, name, *sources, parameters, dtype)).double()
        apart[dtype] = float(difference[~left_out].norm() / merged.double().norm())
    found = Distances(between=apart[torch.float32], formulas=apart[torch.float64])
    table.add(name, merge_text(count, parameters), found, limit_of(name))
    assert found.between <= limit_of(name).most
    # On a CPU mergekit draws masks, and multiplies with them, in float32 whatever the tensors are.
    assert apart[torch.float64] <= (1e-8 if name.startswith(("dare", "della")) else 1e-12)
