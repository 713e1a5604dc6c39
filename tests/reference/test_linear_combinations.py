"""The oracles of linear combinations against their formulas, written again in numpy on whole tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hsa.reference import linear_combinations as oracle
from hsa.reference import sums

SHAPES = [(), (1,), (7,), (1, 5), (5, 3), (33, 65), (4, 3, 3), (2, 700), (2500,)]
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
Whole = Callable[..., Any]


def draw(shape: tuple[int, ...], models: int, seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    """A base and fine-tunes of it, float32, that lie at various angles."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    common = torch.randn(shape, generator=generator)
    return base, [base + common * 0.1 * n + 0.3 * torch.randn(shape, generator=generator) for n in range(1, models + 1)]


def close(result: Tensor, expected: Any, tolerance: float) -> None:
    """The distance relative to the norm of the expected tensor."""
    found = result.double().numpy()
    assert found.shape == np.shape(expected)
    assert np.linalg.norm(found - expected) <= tolerance * (np.linalg.norm(expected) + 1e-30)


# --- the formulas, elementwise, as papers and mergekit write them --------------------------------------------------


def whole_linear(base: Any, models: Any, weights: Sequence[float], normalize: bool) -> Any:
    return sum(w * m for w, m in zip(weights, models, strict=True)) / (sum(weights) if normalize else 1)


def whole_task_arithmetic(base: Any, models: Any, weights: Sequence[float], lam: float, normalize: bool) -> Any:
    weighted = sum(w * (m - base) for w, m in zip(weights, models, strict=True))
    return base + lam * weighted / (sum(weights) if normalize else 1)


def arc(one: Any, two: Any, t: float, threshold: float) -> Any:
    """Spherical interpolation along the last axis."""
    norms = [np.linalg.norm(v, axis=-1, keepdims=True) for v in (one, two)]
    cosine = np.clip((one * two).sum(-1, keepdims=True) / (norms[0] * norms[1]), -1, 1)
    angle = np.arccos(cosine)
    straight = np.abs(cosine) > threshold
    sine = np.where(straight, 1, np.sin(angle))
    return np.where(straight, (1 - t) * one + t * two, (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / sine)


def whole_slerp(base: Any, models: Any, t: float) -> Any:
    return arc(base.reshape(-1), models[0].reshape(-1), t, 0.9995).reshape(base.shape)


def whole_nuslerp(base: Any, models: Any, weights: Sequence[float], flatten: bool, row_wise: bool) -> Any:
    one, two = [m if base is None else m - base for m in models]
    shape, t = one.shape, weights[1] / sum(weights)
    if flatten or one.ndim < 2:
        merged = arc(one.reshape(-1), two.reshape(-1), t, 1 - 1e-14).reshape(shape)
    elif row_wise:
        merged = np.swapaxes(arc(np.swapaxes(one, 0, -1), np.swapaxes(two, 0, -1), t, 1 - 1e-14), 0, -1)
    else:
        merged = arc(one, two, t, 1 - 1e-14)
    return merged if base is None else base + merged


def whole_multislerp(base: Any, models: Any, weights: Sequence[float], normalize_weights: bool, eps: float) -> Any:
    """With the step along the tangent at the mean, whose length is zero up to rounding."""
    vectors = np.stack([(m if base is None else m - base).reshape(-1) for m in models])
    share = np.array(weights) / (sum(weights) if normalize_weights else 1)
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / (norms + eps)[:, None]
    mean = share @ units
    mean /= np.linalg.norm(mean)
    tangent = share @ (units - (units @ mean)[:, None] * mean)
    length = np.linalg.norm(tangent) + eps
    merged = (mean * np.cos(length) + tangent * (np.sin(length) / length)) * (share @ norms)
    return merged.reshape(models[0].shape) + (0 if base is None else base)


def whole_karcher(base: Any, models: Any, max_iter: int, tol: float) -> Any:
    vectors = [m.reshape(-1) for m in models]
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True) if n > tol]
    mean = sum(units) / len(units)
    mean = mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            angle = np.arccos(np.clip(mean @ unit, -1, 1))
            if angle >= tol:
                tangent += angle / np.sin(angle) * (unit - (mean @ unit) * mean) / len(units)
        step = np.linalg.norm(tangent)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) * tangent / step
    return (np.mean(norms) * mean).reshape(models[0].shape)


def whole_model_stock(base: Any, models: Any, filter_wise: bool) -> Any:
    shape = base.shape
    if not filter_wise or base.ndim < 2:
        base, models = base.reshape(-1), [m.reshape(-1) for m in models]
    deltas, count = [m - base for m in models], len(models)
    cosines = [
        np.clip((a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-6), -1, 1)
        for n, a in enumerate(deltas)
        for b in deltas[n + 1 :]
    ]
    cosine = np.mean(cosines, axis=0)[..., None]
    t = count * cosine / (1 + (count - 1) * cosine)
    return (t * np.mean(models, axis=0) + (1 - t) * base).reshape(shape)


WEIGHTS = [0.7, -0.2, 1.3, 0.4, 0.05]
MERGES: list[tuple[str, Whole, dict[str, Any], Sequence[int], bool | None]] = [
    ("linear", whole_linear, {"normalize": True}, (1, 2, 3, 5), False),
    ("linear", whole_linear, {"normalize": False}, (2, 4), False),
    ("task_arithmetic", whole_task_arithmetic, {"lam": 0.3, "normalize": False}, (1, 2, 3, 5), True),
    ("task_arithmetic", whole_task_arithmetic, {"lam": 1.5, "normalize": True}, (2, 4), True),
    *[("slerp", whole_slerp, {"t": t}, (1,), True) for t in (0.0, 0.3, 0.5, 1.0)],
    *[
        ("nuslerp", whole_nuslerp, {"flatten": flat, "row_wise": rows}, (2,), None)
        for flat, rows in ((True, False), (True, True), (False, False), (False, True))
    ],
    ("multislerp", whole_multislerp, {"normalize_weights": True, "eps": 1e-8}, (2, 3, 5), None),
    ("multislerp", whole_multislerp, {"normalize_weights": False, "eps": 1e-6}, (2, 3), None),
    ("karcher", whole_karcher, {"max_iter": 10, "tol": 1e-5}, (2, 3, 5), False),
    ("karcher", whole_karcher, {"max_iter": 1, "tol": 1e-9}, (4,), False),
    ("model_stock", whole_model_stock, {"filter_wise": False}, (2, 3, 5), True),
    ("model_stock", whole_model_stock, {"filter_wise": True}, (2, 3), True),
]
CASES = [
    pytest.param(
        name, whole, parameters, count, with_base, id=f"{name}-{'-'.join(map(str, parameters.values()))}-{count}-{bare}"
    )
    for name, whole, parameters, counts, based in MERGES
    for count in counts
    for with_base in ((True, False) if based is None else (based,))
    for bare in ["base" if with_base else "bare"]
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "whole", "parameters", "count", "with_base"), CASES)
def test_the_formula_in_float64_and_float32(
    name: str, whole: Whole, parameters: dict[str, Any], count: int, with_base: bool, shape: tuple[int, ...]
) -> None:
    base, models = draw(shape, count)
    weighted = {"weights": WEIGHTS[:count]} if name in ("linear", "task_arithmetic", "nuslerp", "multislerp") else {}
    merge = getattr(oracle, name)
    origin = base if with_base else None
    expected = whole(
        base.double().numpy() if with_base else None, [m.double().numpy() for m in models], **weighted, **parameters
    )
    wide = merge(origin, models, **weighted, **parameters, dtype=torch.float64)
    assert wide.dtype == torch.float64
    # Vectors of one or two elements can be nearly opposite, where the arc's coefficients are large.
    short = min(shape, default=1) < 3
    close(wide, expected, 1e-5 if short else 1e-11)
    narrow = merge(origin, models, **weighted, **parameters)
    assert narrow.dtype == torch.float32
    size = max(float(np.linalg.norm(each)) for each in [expected, base.double(), *(m.double() for m in models)])
    difference = float((narrow.double() - wide).norm())
    assert difference <= (1e-4 if short else 3e-6) * size


@pytest.mark.parametrize(
    "name", ["linear", "task_arithmetic", "slerp", "nuslerp", "multislerp", "karcher", "model_stock"]
)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_element_types_are_widened_exactly_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    base, models = draw((9, 130), 1 if name == "slerp" else 2)
    mixed = [m.to(each) for m, each in zip(models, (dtype, torch.bfloat16), strict=False)]
    origin = None if name in ("linear", "karcher") else base.to(torch.float16)
    more = {"t": 0.4} if name == "slerp" else {}
    merge = getattr(oracle, name)
    single = merge(
        None if origin is None else origin.float(), [m.float() for m in mixed], out_dtype=torch.float32, **more
    )
    assert torch.equal(merge(origin, mixed, **more), single.to(dtype))
    for final in FLOATING:
        assert torch.equal(merge(origin, mixed, out_dtype=final, **more), single.to(final))


def test_the_arithmetic_rounds_every_product_and_sum_to_float32_in_the_order_of_the_models() -> None:
    base, models = draw((5, 301), 4)
    weights = [0.1, 0.7, -0.3, 0.45]
    single = [m.numpy() for m in models]
    acc = np.float32(0.3 * weights[0]) * (single[0] - base.numpy())
    for weight, model in zip(weights[1:], single[1:], strict=True):
        acc = acc + np.float32(0.3 * weight) * (model - base.numpy())
    result = oracle.task_arithmetic(base, models, weights=weights, lam=0.3)
    np.testing.assert_array_equal(result.numpy(), base.numpy() + acc)
    bare = np.float32(0.1 / math.fsum(weights)) * single[0]
    for weight, model in zip(weights[1:], single[1:], strict=True):
        bare = bare + np.float32(weight / math.fsum(weights)) * model
    np.testing.assert_array_equal(oracle.linear(None, models, weights=weights).numpy(), bare)


# --- sums ---------------------------------------------------------------------------------------------------------


def in_lanes(block: list[float]) -> float:
    return by_halves([in_order(block[lane::64]) for lane in range(64)])


def in_order(values: list[float]) -> float:
    result = values[0]
    for value in values[1:]:
        result += value
    return result


def by_halves(values: list[float]) -> float:
    half = len(values) // 2
    return values[0] if not half else by_halves([a + b for a, b in zip(values[:half], values[half:], strict=True)])


def in_pairs(values: list[float]) -> float:
    return values[0] if len(values) == 1 else in_pairs([a + b for a, b in zip(values[::2], values[1::2], strict=True)])


@pytest.mark.parametrize("length", [0, 1, 2, 1023, 1024, 1025, 2048, 5000])
def test_sums_are_made_in_the_stated_order(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    spread = 10.0 ** torch.randint(-12, 13, (length,), generator=generator).double()
    values = torch.randn(length, generator=generator, dtype=torch.float64) * spread
    padded = values.tolist() + [0.0] * (-length % 1024)
    blocks = [in_lanes(padded[first : first + 1024]) for first in range(0, len(padded), 1024)]
    assert sums.block_sums(values).tolist() == blocks
    running = 0.0
    for block in blocks:
        running += block
    assert sums.added_blocks(torch.tensor(blocks, dtype=torch.float64)).item() == running
    if length:
        rows = values.tolist() + [0.0] * ((1 << (length - 1).bit_length()) - length)
        both = torch.stack([values, -values], dim=1)
        assert sums.column_sums(both).tolist() == [in_pairs(rows), -in_pairs(rows)]


def test_rows_are_merged_as_if_each_were_a_tensor() -> None:
    base, models = draw((6, 1500), 3)
    merged = oracle.model_stock(base, models, filter_wise=True)
    pairs = oracle.nuslerp(base, models[:2], weights=[0.3, 0.6], flatten=False)
    for row in range(6):
        of_row = base[row], [m[row] for m in models]
        assert torch.equal(merged[row], oracle.model_stock(*of_row))
        assert torch.equal(pairs[row], oracle.nuslerp(of_row[0], of_row[1][:2], weights=[0.3, 0.6]))


# --- special cases ------------------------------------------------------------------------------------------------

V = torch.tensor([3.0, -1.0, 2.0, 0.5])
ORTHOGONAL = torch.tensor([1.0, 3.0, 0.0, 0.0])
ZERO = torch.zeros(4)


def test_equal_vectors_stay_where_they_are() -> None:
    close(oracle.linear(None, [V, V, V]), V.double().numpy(), 3e-7)
    assert torch.equal(oracle.slerp(V, [V], t=0.25), V)
    for base in (None, ZERO):
        assert torch.equal(oracle.nuslerp(base, [V, V], weights=[3, 1]), V)
        close(oracle.multislerp(base, [V, V, V]), V.double().numpy(), 3e-7)
    close(oracle.karcher(None, [V, V, V]), V.double().numpy(), 3e-7)
    close(oracle.model_stock(ZERO, [V, V, V]), V.double().numpy(), 3e-7)


@pytest.mark.parametrize("factor", [2.0, -1.0, -2.0, -3.0])
def test_collinear_vectors_are_merged_on_the_line_between_them(factor: float) -> None:
    other, t = V * factor, 0.25
    line = (1 - t) * V + t * other
    close(oracle.slerp(V, [other], t=t), line.double().numpy(), 3e-7)
    close(oracle.nuslerp(None, [V, other], weights=[3, 1]), line.double().numpy(), 3e-7)
    close(oracle.nuslerp(ZERO, [V, other], weights=[3, 1]), line.double().numpy(), 3e-7)


def test_nuslerp_stays_on_the_line_where_opposite_vectors_differ_by_rounding() -> None:
    generator = torch.Generator().manual_seed(5)
    one = torch.randn(70, 70, generator=generator)
    line = 0.5 * one + 0.5 * (one * -3.0)
    close(oracle.nuslerp(None, [one, one * -3.0]), line.double().numpy(), 1e-6)


def test_slerp_with_a_zero_vector_is_linear_and_nuslerp_sees_a_right_angle() -> None:
    assert torch.equal(oracle.slerp(ZERO, [V], t=0.25), 0.25 * V)
    assert torch.equal(oracle.slerp(V, [ZERO], t=0.25), 0.75 * V)
    assert torch.equal(oracle.slerp(ZERO, [ZERO], t=0.25), ZERO)
    close(oracle.nuslerp(None, [ZERO, V], weights=[3, 1]), math.sin(0.25 * math.pi / 2) * V.double().numpy(), 1e-7)
    close(oracle.nuslerp(V, [V, 2 * V], weights=[3, 1]), (1 + math.sin(math.pi / 8)) * V.double().numpy(), 1e-7)


def test_nuslerp_takes_the_middle_where_weights_cancel() -> None:
    assert torch.equal(
        oracle.nuslerp(None, [V, ORTHOGONAL], weights=[1, -1]), oracle.nuslerp(None, [V, ORTHOGONAL], weights=[1, 1])
    )


def test_multislerp_where_the_directions_cancel() -> None:
    assert torch.equal(oracle.multislerp(None, [V, -V], weights=[1, 1]), ZERO)
    assert torch.equal(oracle.multislerp(V, [3 * V, -V], weights=[1, 1]), V)
    with pytest.raises(ValueError, match="cancel"):
        oracle.multislerp(None, [V, -V, ZERO])
    with pytest.raises(ValueError, match="cancel"):
        oracle.multislerp(None, [V, -3 * V, V, -V])
    assert torch.equal(oracle.multislerp(V, [V, V, V]), V)
    assert torch.equal(oracle.multislerp(None, [ZERO, ZERO, ZERO], eps=0.0), ZERO)
    close(oracle.multislerp(None, [V, ZERO, ZERO], eps=0.0), V.double().numpy() / 3, 1e-7)


def test_weights_that_sum_to_zero() -> None:
    for merge in (oracle.linear, oracle.multislerp):
        with pytest.raises(ValueError, match="sum to 0"):
            merge(None, [V, ORTHOGONAL], weights=[1, -1])
    assert torch.equal(oracle.linear(None, [V, ORTHOGONAL], weights=[1, -1], normalize=False), V - ORTHOGONAL)
    unchanged = oracle.task_arithmetic(ZERO, [V, ORTHOGONAL], weights=[1, -1], normalize=True)
    assert torch.equal(unchanged, V - ORTHOGONAL)


def test_karcher_of_special_vectors() -> None:
    assert torch.equal(oracle.karcher(None, [ZERO, ZERO]), ZERO)
    close(oracle.karcher(None, [V, ZERO]), V.double().numpy() / 2, 1e-7)
    for tol in (0.0, 1e-12, 1e-5):
        close(oracle.karcher(None, [V, -3 * V], tol=tol), 2 * V.double().numpy(), 3e-7)
        close(oracle.karcher(None, [V, V, V], tol=tol), V.double().numpy(), 3e-7)
    ones = torch.eye(3)
    close(oracle.karcher(None, list(ones)), np.full(3, 1 / math.sqrt(3)), 1e-7)
    start = oracle.karcher(None, [V, ORTHOGONAL, -0.5 * ORTHOGONAL + V], max_iter=0)
    directions = [V / V.norm(), ORTHOGONAL / ORTHOGONAL.norm(), (V - 0.5 * ORTHOGONAL) / (V - 0.5 * ORTHOGONAL).norm()]
    mean = sum(directions)  # type: ignore[var-annotated]
    size = float(V.norm() + ORTHOGONAL.norm() + (V - 0.5 * ORTHOGONAL).norm()) / 3
    close(start, (mean / mean.norm() * size).double().numpy(), 1e-6)


def test_model_stock_of_special_vectors() -> None:
    assert torch.equal(oracle.model_stock(V, [V + ORTHOGONAL, V - ORTHOGONAL]), V)
    right_angle = [torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 2.0, 0, 0])]
    assert torch.equal(oracle.model_stock(ZERO, right_angle), ZERO)
    assert torch.equal(oracle.model_stock(V, [V, V]), V)
    thirds = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    assert torch.equal(oracle.model_stock(torch.zeros(2), thirds), torch.zeros(2))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)], ids=str)
def test_empty_tensors_stay_empty(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    for by_row in (False, True):
        assert oracle.model_stock(empty, [empty, empty], filter_wise=by_row).shape == shape
        assert oracle.nuslerp(None, [empty, empty], flatten=not by_row).shape == shape
    assert oracle.karcher(None, [empty, empty]).shape == shape
    assert oracle.multislerp(empty, [empty] * 3).shape == shape
    assert oracle.slerp(empty, [empty], t=0.5).shape == shape
