"""What a method computes from sources that stay in memory is computed once, up to a number of bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import hsa
from hsa.backends import kept_values
from hsa.backends.kept_values import KeptValues
from hsa.methods import subspace_method, subspaces

SHAPES = {"encoder.layers.0.fc1.weight": (40, 24), "encoder.layers.1.fc1.weight": (24, 40), "norm.weight": (24,)}


def models(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count + 1)]


def test_arrays_are_kept_until_the_limit_is_reached() -> None:
    made: Counter[str] = Counter()

    def make(name: str, elements: int) -> Any:
        made[name] += 1
        return np.zeros(elements), None

    kept = KeptValues(limit=100)
    for _ in range(3):
        for name, elements in {"a": 10, "b": 5, "c": 2}.items():
            assert kept.of(name, lambda name=name, elements=elements: make(name, elements))[0].size == elements
    assert made == {"a": 1, "b": 3, "c": 1}
    assert kept.nbytes == 96


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices of the sources that are decomposed."""
    shapes: list[tuple[int, ...]] = []

    def counting(matrix: Any) -> Any:
        shapes.append(matrix.shape)
        return subspaces.decompose(matrix)

    monkeypatch.setattr(subspace_method, "decompose", counting)
    return shapes


@pytest.mark.parametrize(
    ("method", "settings", "matrices"),
    [
        ("tsv_m", [{"lam": 1.0}, {"lam": 0.5, "share": 0.5}, {"lam": 1.5, "share": 1.0}], 3),
        ("iso_c", [{"lam": 1.0}, {"lam": 0.5}], 1),
        ("iso_cts", [{"lam": 1.0}, {"lam": 0.5, "common_share": 0.5}], 1),
    ],
)
def test_a_merger_decomposes_its_sources_once(
    method: str,
    settings: list[dict[str, Any]],
    matrices: int,
    decomposed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And writes what one writes that keeps nothing."""
    base, *others = models()
    merger = hsa.Merger(method=method, base=base, models=others, backend="cpu", threads=2)
    found = [merger.merge(**each) for each in settings]
    assert len(decomposed) == 2 * matrices
    decomposed.clear()
    monkeypatch.setattr(kept_values, "LIMIT", 0)
    keeping_nothing = hsa.Merger(method=method, base=base, models=others, backend="cpu", threads=2)
    expected = [keeping_nothing.merge(**each) for each in settings]
    assert len(decomposed) == 2 * matrices * len(settings)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_what_does_not_fit_is_decomposed_at_each_merge(
    decomposed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_values, "LIMIT", 0)
    base, *others = models()
    merger = hsa.Merger(method="tsv_m", base=base, models=others, backend="cpu", threads=1)
    first = merger.merge(lam=1.0)
    second = merger.merge(lam=1.0)
    assert len(decomposed) == 12
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
