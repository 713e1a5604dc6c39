"""Linear combinations against mergekit's own functions, on continuous float32 tensors of Whisper's and Llama's shapes.

Three distances, relative to the norm of the merged tensor:

- both evaluated in float64: the formulas are the same;
- the oracle in float32 against mergekit in float64: how far hsa's bytes are from the exact value;
- the oracle against mergekit, both in float32, where mergekit's own distance from the exact value is no larger than
  that: its float32 norms are off by up to 1e-5 for tensors of a million elements, and the angle with them.

`-s` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
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

# Name, models, with a base, our parameters, mergekit's.
MERGES: list[tuple[str, int, bool, dict[str, Any], dict[str, Any]]] = [
    ("linear", 3, False, {"weights": WEIGHTS}, {"weight": WEIGHTS}),
    ("linear", 3, False, {"weights": WEIGHTS, "normalize": False}, {"weight": WEIGHTS, "normalize": False}),
    ("task_arithmetic", 3, True, {"weights": WEIGHTS, "lam": 0.7}, {"weight": WEIGHTS, "lambda": 0.7}),
    ("task_arithmetic", 2, True, {**PAIR, "normalize": True}, {**THEIR_PAIR, "normalize": True}),
    ("slerp", 1, True, {"t": 0.4}, {"t": 0.4}),
    ("nuslerp", 2, True, PAIR, THEIR_PAIR),
    ("nuslerp", 2, False, PAIR, THEIR_PAIR),
    ("nuslerp", 2, True, {**PAIR, "flatten": False}, {**THEIR_PAIR, "nuslerp_flatten": False}),
    (
        "nuslerp",
        2,
        True,
        {**PAIR, "flatten": False, "row_wise": True},
        {**THEIR_PAIR, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    ("multislerp", 3, True, {"weights": WEIGHTS}, {"weight": WEIGHTS}),
    ("multislerp", 3, False, {"weights": WEIGHTS}, {"weight": WEIGHTS}),
    ("karcher", 3, False, {}, {}),
    ("model_stock", 3, True, {}, {}),
    ("model_stock", 2, True, {"filter_wise": True}, {"filter_wise": True}),
]


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


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows = [f"{'method':52} {'tensor':20} {'formula':>9} {'hsa':>9} {'mergekit':>9} {'between':>9}"]
    yield rows
    print("", *rows, sep="\n")


@pytest.mark.parametrize("tensor", SHAPES)
@pytest.mark.parametrize(
    ("name", "count", "with_base", "ours", "parameters"), MERGES, ids=[f"{m[0]}-{m[1]}-{m[2]}-{m[4]}" for m in MERGES]
)
def test_the_oracle_is_mergekit_within_float32_rounding(
    name: str,
    count: int,
    with_base: bool,
    ours: dict[str, Any],
    parameters: dict[str, Any],
    tensor: str,
    table: list[str],
) -> None:
    base, models = tensors(SHAPES[tensor])
    origin, models = base if with_base else None, models[:count]
    exact = theirs(origin, models, name, parameters, torch.float64)
    single = theirs(origin, models, name, parameters, None)
    assert (exact.dtype, single.dtype) == (torch.float64, torch.float32)
    merge = getattr(oracle, name)
    formula = relative(merge(origin, models, **ours, dtype=torch.float64), exact)
    merged = merge(origin, models, **ours)
    error, their_error, between = relative(merged, exact), relative(single, exact), relative(merged, single)
    label = f"{name} {count} {'base' if with_base else ''} {({k: v for k, v in ours.items() if k != 'weights'}) or ''}"
    table.append(f"{label:52} {tensor:20} {formula:9.1e} {error:9.1e} {their_error:9.1e} {between:9.1e}")
    assert formula <= 1e-12
    assert error <= 3e-7
    allowed = 1e-6 if name == "karcher" else 3e-7
    assert between <= max(allowed, 1.01 * their_error + error)


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
