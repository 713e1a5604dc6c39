"""Linear combinations against mergekit's own functions, on continuous float32 tensors of Whisper's and Llama's shapes.

Four distances, relative to the norm of the merged tensor:

- both evaluated in float64: the formulas are the same;
- the oracle in float32 from mergekit in float64: how far hsa's bytes are from the exact value;
- mergekit in float32 from itself in float64;
- the oracle from mergekit, both in float32: at most what `parity.limit_of` allows, but for EXCEPTIONS.

`-s` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from parity import ROUNDING, Distances, Limit, Measured, limit_of, measured, settings_text
from torch import Tensor

from hsa.reference import linear_combinations as oracle

mergekit = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit is in the environment of integrations")

SHAPES = {
    "whisper attention": (384, 384),
    "whisper embedding": (1501, 384),
    "whisper convolution": (384, 80, 3),
    "whisper bias": (1536,),
    "llama mlp": (1376, 512),
    "llama norm": (512,),
}
WEIGHTS = [0.5, 0.3, 0.9]
PAIR = {"weights": WEIGHTS[:2]}
THEIR_PAIR = {"weight": WEIGHTS[:2]}


@dataclass(frozen=True)
class Merge:
    """A merge of so many models, with a base or without: our settings, and mergekit's parameters."""

    method: str
    models: int
    based: bool
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """What the documentation calls it."""
        base = ["base"] if self.based else []
        return ", ".join([f"{self.models} model{'s' * (self.models > 1)}", *base, *settings_text(self.ours)])

    @property
    def label(self) -> str:
        return f"{self.method}, {self}"

    @property
    def limit(self) -> Limit:
        return EXCEPTIONS.get(self.label, limit_of(self.method))


MERGES = [
    Merge("linear", 3, False, {"weights": WEIGHTS}, {"weight": WEIGHTS}),
    Merge("linear", 3, False, {"weights": WEIGHTS, "normalize": False}, {"weight": WEIGHTS, "normalize": False}),
    Merge("task_arithmetic", 3, True, {"weights": WEIGHTS, "lam": 0.7}, {"weight": WEIGHTS, "lambda": 0.7}),
    Merge("task_arithmetic", 2, True, {**PAIR, "normalize": True}, {**THEIR_PAIR, "normalize": True}),
    Merge("slerp", 1, True, {"t": 0.4}, {"t": 0.4}),
    Merge("nuslerp", 2, True, PAIR, THEIR_PAIR),
    Merge("nuslerp", 2, False, PAIR, THEIR_PAIR),
    Merge("nuslerp", 2, True, {**PAIR, "flatten": False}, {**THEIR_PAIR, "nuslerp_flatten": False}),
    Merge(
        "nuslerp",
        2,
        True,
        {**PAIR, "flatten": False, "row_wise": True},
        {**THEIR_PAIR, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    Merge("multislerp", 3, True, {"weights": WEIGHTS}, {"weight": WEIGHTS}),
    Merge("multislerp", 3, False, {"weights": WEIGHTS}, {"weight": WEIGHTS}),
    Merge("karcher", 3, False),
    Merge("model_stock", 3, True),
    Merge("model_stock", 2, True, {"filter_wise": True}, {"filter_wise": True}),
]

EXCEPTIONS = {
    "nuslerp, 2 models": Limit(6e-6, "mergekit's float32 norms and angle of models that are nearly parallel"),
    "nuslerp, 2 models, base, flatten false": Limit(
        1.3e-5, "mergekit's float32 angles of the three elements that a row of a convolution has"
    ),
    "multislerp, 3 models": Limit(2.6e-5, "mergekit's float32 norms and tangents of models that are nearly parallel"),
    "model_stock, 2 models, base, filter_wise true": Limit(
        5e-4, "mergekit's float32 cosines of the three elements that a row of a convolution has"
    ),
}
"""Merges of which mergekit in float32 is farther than rounding from itself in float64, with upper bounds."""


def tensors(shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """A base, and three fine-tunes that moved a hundredth of it, partly the same way."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator)

    base, common = normal() * 0.05, normal() * 2e-4
    return base, [base + common + normal() * 4e-4 for _ in range(3)]


def theirs(base: Tensor | None, models: list[Tensor], name: str, parameters: Mapping[str, Any], dtype: Any) -> Tensor:
    sources = models if base is None else [base, *models]
    merged: Tensor = mergekit.merge_tensors(
        sources, name, parameters=parameters, base_index=None if base is None else 0, dtype=dtype
    )
    return merged


def relative(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).norm() / two.double().norm())


def distances(merge: Merge, tensor: str) -> Distances:
    """Of one merge of tensors of one shape."""
    base, models = tensors(SHAPES[tensor])
    origin, models = base if merge.based else None, models[: merge.models]
    exact = theirs(origin, models, merge.method, merge.theirs, torch.float64)
    single = theirs(origin, models, merge.method, merge.theirs, None)
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    combine = getattr(oracle, merge.method)
    merged = combine(origin, models, **merge.ours)
    return Distances(
        between=relative(merged, single),
        ours=relative(merged, exact),
        theirs=relative(single, exact),
        formulas=relative(combine(origin, models, **merge.ours, dtype=torch.float64), exact),
    )


@pytest.fixture(scope="module")
def table() -> Iterator[Measured]:
    yield from measured("functions")


@pytest.mark.parametrize("tensor", SHAPES)
@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.label)
def test_the_oracle_is_mergekit_within_float32_rounding(merge: Merge, tensor: str, table: Measured) -> None:
    found = distances(merge, tensor)
    table.add(merge.method, str(merge), found, merge.limit)
    assert found.formulas is not None and found.formulas <= 1e-12
    assert found.ours is not None and found.ours <= limit_of(merge.method).most
    assert found.between <= merge.limit.most


@pytest.mark.parametrize("label", EXCEPTIONS)
def test_an_exception_is_mergekits_own_rounding(label: str) -> None:
    """Ours is within rounding of the exact value where mergekit is not; an exception that is not needed fails."""
    (merge,) = (each for each in MERGES if each.label == label)
    every = [distances(merge, tensor) for tensor in SHAPES]
    assert all(found.ours is not None and found.ours <= ROUNDING for found in every)
    assert max(found.theirs or 0.0 for found in every) > ROUNDING
    assert max(found.between for found in every) > ROUNDING


V, W, ZERO = torch.linspace(-3, 4, 37), torch.cos(torch.arange(37.0)), torch.zeros(37)


@pytest.mark.parametrize(
    ("name", "base", "models", "ours", "parameters"),
    [
        ("slerp", V, [V * 1.01], {"t": 0.3}, {"t": 0.3}),
        ("slerp", V, [-V], {"t": 0.3}, {"t": 0.3}),
        ("nuslerp", None, [V, -V], PAIR, THEIR_PAIR),
        ("nuslerp", None, [V, 2 * V], PAIR, THEIR_PAIR),
        ("nuslerp", V, [V, W], PAIR, THEIR_PAIR),
        ("nuslerp", None, [V * 1e-9, W * 1e-10], PAIR, THEIR_PAIR),
        ("nuslerp", None, [V, W], {"weights": [1.0, -1.0]}, {"weight": [1.0, -1.0]}),
        ("multislerp", V, [2 * V, ZERO], {}, {"weight": [1.0, 1.0]}),
        ("multislerp", V, [V, W, ZERO], {}, {"weight": [1.0, 1.0, 1.0]}),
        ("karcher", None, [V, ZERO, W], {}, {}),
        ("karcher", None, [ZERO, ZERO], {}, {}),
        ("karcher", None, [V, -V], {}, {}),
        ("karcher", None, [V, V, V], {}, {}),
        ("model_stock", V, [V + W, V - W], {}, {}),
        ("model_stock", V, [V, V], {}, {}),
        ("model_stock", ZERO, [V * 1e-6, W * 1e-6], {}, {}),
        ("task_arithmetic", V, [W, ZERO], {"weights": [1.0, -1.0]}, {"weight": [1.0, -1.0], "normalize": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_special_tensors_are_merged_as_mergekit_merges_them(
    name: str, base: Tensor | None, models: list[Tensor], ours: dict[str, Any], parameters: dict[str, Any]
) -> None:
    exact = theirs(base, models, name, parameters, torch.float64)
    merged = getattr(oracle, name)(base, models, **ours, dtype=torch.float64)
    assert float((merged - exact).norm()) <= 1e-12 * (float(exact.norm()) + 1e-300)


def test_slerp_from_a_zero_tensor_is_linear_here_and_at_a_right_angle_in_mergekit() -> None:
    linear = oracle.slerp(ZERO, [V], t=0.5)
    turned = theirs(ZERO, [V], "slerp", {"t": 0.5}, None)
    assert torch.allclose(linear, 0.5 * V) and torch.allclose(turned, 0.5**0.5 * V)
