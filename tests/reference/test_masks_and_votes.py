"""The oracles of masks and votes against loops over Python's numbers, which share nothing with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hsa.reference import masks_and_votes as oracle
from hsa.reference import philox
from hsa.reference.sums import total

NAME = "encoder.layers.0.fc1.weight"
RANDOM = {"dare_linear", "dare_ties", "della_linear", "della"}
VOTING = {"ties", "dare_ties", "breadcrumbs_ties", "della"}
MASKING = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della_linear", "della")


def tensors(count: int, *shape: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and models in float32, with elements that did not change and some that changed alike."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32)
    models = []
    for _ in range(count):
        change = rng.standard_normal(shape).astype(np.float32) * np.float32(0.01)
        models.append(torch.from_numpy(base + change * (rng.random(shape) < 0.8)))
    if count > 1:
        models[1].view(-1)[:5] = models[0].view(-1)[:5]
    return torch.from_numpy(base), models


def call(method: str, base: Tensor, models: Sequence[Tensor], **options: Any) -> Tensor:
    extra = {"name": NAME} if method in RANDOM else {}
    result: Tensor = getattr(oracle, method)(base, models, **extra, **options)
    return result


# --- the same by loops over Python's floats --------------------------------------------------------------------------


def deltas_of(base: Tensor, models: Sequence[Tensor]) -> list[list[float]]:
    """The task vectors in float64, which holds the difference of two float32 near each other exactly."""
    return [(model.double() - base.double()).flatten().tolist() for model in models]


def kept_of(method: str, d: list[float], shape: Sequence[int], number: int, options: dict[str, Any]) -> list[bool]:
    density, n = options.get("density", 1.0), len(d)
    if density >= 1:
        return [True] * n
    magnitudes = [abs(x) for x in d]
    descending = sorted(magnitudes, reverse=True)
    count = int(density * n)
    if method == "ties":
        return [count > 0 and x >= descending[count - 1] for x in magnitudes]
    if method.startswith("breadcrumbs"):
        top = min(int(options.get("gamma", 0.01) * n), n - count)
        kept = set(descending[top : top + count])
        return [x in kept for x in magnitudes]
    words = philox.words(0, n, philox.key_of(options.get("seed", 0), number, NAME)).tolist()
    if method.startswith("dare"):
        return [word < int(density * 2**32) for word in words]
    epsilon = options.get("epsilon", 0.15)
    index = np.arange(n).reshape(shape if len(shape) > 1 else (1, n))
    limits = [0] * n
    for row in np.moveaxis(index, 1, -1).reshape(-1, index.shape[1]):
        ordered = sorted(row, key=lambda i: (magnitudes[i], i))
        for rank, i in enumerate(ordered):
            relative = rank / (len(row) - 1) if len(row) > 1 else 0.5
            limits[i] = int((density - epsilon + 2 * epsilon * relative) * 2**32)
    return [word < limit for word, limit in zip(words, limits, strict=True)]


def naive(method: str, base: Tensor, models: Sequence[Tensor], **options: Any) -> list[float]:
    defaults = {"ties": (True, False), "della": (True, True), "dare_linear": (False, True), "dare_ties": (False, True)}
    normal, scaled = defaults.get(method, (False, method == "della_linear"))
    normalize, rescale = options.get("normalize", normal), options.get("rescale", scaled)
    weights, lam = options.get("weights") or [1.0] * len(models), options.get("lam", 1.0)
    rows = []
    for number, d in enumerate(deltas_of(base, models)):
        kept = kept_of(method, d, base.shape, number, options)
        row = [x if keep else 0.0 for x, keep in zip(d, kept, strict=True)]
        before, after = math.fsum(map(abs, d)), math.fsum(map(abs, row))
        density = options.get("density", 1.0)
        if rescale == "density" and 0 < density < 1:
            row = [x / density for x in row]
        elif rescale is True and density < 1 and min(before, after) >= 1e-7:
            row = [x * before / after for x in row]
        rows.append([weights[number] * x for x in row])
    result = []
    for b, *column in zip(base.double().flatten().tolist(), *rows, strict=True):
        agreeing = list(range(len(column)))
        if method in VOTING:
            positive = sum(column) >= 0
            agreeing = [i for i, x in enumerate(column) if (x > 0 if positive else x < 0)]
        divisor = sum(weights[i] for i in agreeing) if normalize else 1.0
        divisor = 1.0 if abs(divisor) < 1e-8 else divisor
        result.append(b + lam * sum(column[i] for i in agreeing) / divisor)
    return result


CASES: list[dict[str, Any]] = [
    {},
    {"density": 0.5},
    {"density": 0.5, "weights": [0.5, -0.25, 2.0], "lam": 0.7},
    {"density": 0.3, "normalize": True},
    {"density": 0.3, "normalize": False},
    {"density": 0.6, "rescale": True},
    {"density": 0.6, "rescale": False},
    {"density": 0.6, "rescale": "density", "weights": [1.0, 1.0, -1.0], "normalize": True},
    {"density": 0.45, "lam": -0.5},
    {"density": 0.45, "lam": 0.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", MASKING)
@pytest.mark.parametrize("shape", [(23, 7), (41,), (4, 5, 3)], ids=str)
def test_masks_and_votes_are_those_of_loops(method: str, case: dict[str, Any], shape: tuple[int, ...]) -> None:
    base, models = tensors(3, *shape)
    expected = torch.tensor(naive(method, base, models, **case), dtype=torch.float64).reshape(shape)
    wide = call(method, base, models, dtype=torch.float64, **case)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, expected, rtol=1e-12, atol=1e-12)
    found = call(method, base, models, **case)
    assert found.dtype == torch.float32
    # The elements are below 5, the task vectors below 0.05: each of up to 12 roundings costs less than 2**-23 * 5.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=12 * 5 * 2.0**-24)


@pytest.mark.parametrize("method", MASKING)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_models(method: str, count: int) -> None:
    base, models = tensors(count, 9, 5)
    expected = torch.tensor(naive(method, base, models, density=0.5), dtype=torch.float64).reshape(9, 5)
    torch.testing.assert_close(call(method, base, models, density=0.5, dtype=torch.float64), expected)


# --- by hand ---------------------------------------------------------------------------------------------------------


def f32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_ties_by_hand() -> None:
    base = f32(0, 0, 0, 0)
    one, two, three = f32(4, -3, 1, 2), f32(-1, -5, 2, 0.5), f32(-2, 6, 0.25, 3)
    # The two largest of each: (4, -3, 0, 0), (0, -5, 2, 0), (0, 6, 0, 3); elected: + - + +
    found = oracle.ties(base, [one, two, three], density=0.5)
    assert found.tolist() == [4, (-3 - 5) / 2, 2, 3]
    summed = oracle.ties(base, [one, two, three], density=0.5, normalize=False, weights=[1, 1, 2], lam=0.5)
    assert summed.tolist() == [2, 6, 1, 3]  # the second column: -3 - 5 + 12 > 0


def test_ties_at_the_cut_are_all_kept() -> None:
    base, model = f32(0, 0, 0, 0, 0), f32(2, -2, 1, 2, -1)
    assert oracle.ties(base, [model], density=0.2).tolist() == [2, -2, 0, 2, 0]
    assert oracle.ties(base, [model], density=0.8).tolist() == [2, -2, 1, 2, -1]


def test_breadcrumbs_by_hand() -> None:
    base, model = torch.zeros(10), f32(1, -2, 3, -4, 5, -6, 7, -8, 9, -10)
    found = oracle.breadcrumbs(base, [model], density=0.5, gamma=0.2)
    assert found.tolist() == [0, 0, 0, -4, 5, -6, 7, -8, 0, 0]
    # int(gamma * n) = 9 is more than may be dropped: the five largest are, and no small one.
    assert oracle.breadcrumbs(base, [model], density=0.5, gamma=0.9).tolist() == [1, -2, 3, -4, 5, 0, 0, 0, 0, 0]
    # int(gamma * n) = 0: nothing large is dropped.
    assert oracle.breadcrumbs(base, [model], density=0.5, gamma=0.05).tolist() == [0, 0, 0, 0, 0, -6, 7, -8, 9, -10]


def test_breadcrumbs_keep_what_ties_with_the_first_and_the_last_kept() -> None:
    base, model = torch.zeros(6), f32(9, 7, 7, 3, -3, 1)
    # Of the magnitudes 9 7 7 3 3 1 the largest two are dropped, the next two, 7 and 3, kept: so are all of 7 and 3.
    assert oracle.breadcrumbs(base, [model], density=0.34, gamma=0.34).tolist() == [0, 7, 7, 3, -3, 0]


@pytest.mark.parametrize("method", MASKING)
def test_where_no_element_is_kept_base_stays(method: str) -> None:
    base, models = tensors(2, 3, 3)
    density = 0.0 if method.startswith("dare") else 0.1  # int(0.1 * 9) = 0
    options = {"epsilon": 0.05, "density": 2.0**-30 + 0.05} if method.startswith("della") else {"density": density}
    assert call(method, base, models, **options).equal(base + 0.0)


@pytest.mark.parametrize("method", [*MASKING, "sce", "ram"])
def test_equal_models_and_empty_tensors(method: str) -> None:
    base, _ = tensors(1, 4, 3)
    assert call(method, base, [base, base]).equal(base)
    empty = torch.zeros(0, 3)
    assert call(method, empty, [empty, empty]).shape == (0, 3)
    options: dict[str, Any] = {"select_topk": 0.5} if method == "sce" else {} if method == "ram" else {"density": 0.5}
    assert call(method, empty, [empty, empty], **options).shape == (0, 3)
    assert call(method, base, [base, base], **options).equal(base)


@pytest.mark.parametrize("method", sorted(VOTING))
def test_a_zero_agrees_with_no_sign(method: str) -> None:
    base, one, two = f32(1, 1, 1), f32(1, 3, 1), f32(1, 1, -2)
    assert call(method, base, [one, two], normalize=True).tolist() == [1, 3, -2]


@pytest.mark.parametrize("method", sorted(VOTING))
def test_where_votes_cancel_plus_is_elected(method: str) -> None:
    base, one, two = f32(0, 0), f32(2, -2), f32(-2, 2)
    assert call(method, base, [one, two]).tolist() == [2, 2]


def test_weights_that_cancel_divide_by_nothing() -> None:
    base, one, two = f32(0.5), f32(1.5), f32(-1.5)
    # Both agree: 1 * 1 and -1 * -2 are positive, their weights add up to 0.
    assert oracle.ties(base, [one, two], weights=[1, -1]).item() == 0.5 + 1 + 2
    three = [f32(1.5), f32(2.5), f32(-2.5)]
    found = oracle.ties(base, three, weights=[0.1, 0.2, -0.3], dtype=torch.float64).item()
    assert found == pytest.approx(0.5 + 0.1 + 0.4 + 0.9)  # 0.1 + 0.2 - 0.3 is 0 up to rounding
    summed = oracle.dare_linear(base, [one, two], name=NAME, weights=[1, -1], normalize=True)
    assert summed.item() == 0.5 + 1 + 2
    large = oracle.ties(base, [one, two], weights=[2.0**30, 2.0**30], normalize=False)
    assert large.item() == -(2.0**31)


def test_dropped_elements_are_plus_zero() -> None:
    base, model = f32(-0.0, -0.0), f32(-0.5, 1)
    found = oracle.breadcrumbs(base, [model], density=0.5, gamma=0.0, weights=[-1])
    assert found.tolist() == [0, -1] and not found.signbit()[0]


def test_densities_weights_and_gammas_may_differ_by_model() -> None:
    base, models = tensors(2, 6, 5)
    both = oracle.ties(base, models, density=[0.5, 1.0], weights=[1.0, 0.0], normalize=False)
    alone = oracle.ties(base, models[:1], density=0.5, normalize=False)
    assert both.equal(alone)
    outer = oracle.breadcrumbs(base, models, density=0.5, gamma=[0.2, 0.3], weights=[0.0, 1.0])
    assert outer.equal(oracle.breadcrumbs(base, models[1:], density=0.5, gamma=0.3))
    ranked = oracle.della_linear(base, models, name=NAME, density=0.5, epsilon=[0.1, 0.2], weights=[0.0, 1.0])
    assert ranked.equal(oracle.della_linear(base, models[1:], name=NAME, numbers=[1], density=0.5, epsilon=0.2))


def test_masks_hang_on_seed_number_and_name() -> None:
    base, models = tensors(1, 30, 30)
    results = [
        oracle.dare_linear(base, models, name=name, numbers=[number], seed=seed, density=0.5)
        for name, number, seed in [("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1)]
    ]
    for i, one in enumerate(results):
        assert not any(one.equal(other) for other in results[i + 1 :])


def test_rescaling_keeps_the_sum_of_magnitudes() -> None:
    base, models = torch.zeros(50, 40), tensors(1, 50, 40)[1]
    kept = oracle.dare_linear(base, models, name=NAME, density=0.4, dtype=torch.float64)
    assert total(kept.abs()) == pytest.approx(total(models[0].double().abs()))
    raw = oracle.dare_linear(base, models, name=NAME, density=0.4, rescale=False, dtype=torch.float64)
    scaled = oracle.dare_linear(base, models, name=NAME, density=0.4, rescale="density", dtype=torch.float64)
    torch.testing.assert_close(scaled, raw / 0.4)


def test_tiny_task_vectors_are_not_rescaled() -> None:
    base = torch.zeros(64)
    model = torch.full((64,), 1e-9)  # their sum is 6.4e-8
    found = oracle.dare_linear(base, [model], name=NAME, density=0.5)
    assert set(found.tolist()) == {0.0, model[0].item()}


# --- sce, ram, nearswap ----------------------------------------------------------------------------------------------


def test_sce_by_hand() -> None:
    base = f32(0, 0, 0, 0)
    one, two = f32(3, 1, 0, 2), f32(1, -3, 0, 2)
    # Mean squares (9 + 1 + 4) / 4 and (1 + 9 + 4) / 4: equal shares. Signs elected: + - + +
    assert oracle.sce(base, [one, two]).tolist() == [2, -3, 0, 2]
    # Variances 1 4 0 0: two are not zero, the largest of them is kept; shares (1 / 10, 9 / 10)
    found = oracle.sce(base, [one, two], select_topk=0.5)
    assert found.tolist() == [0, pytest.approx(-3), 0, 0]
    assert oracle.sce(base, [one, two], select_topk=0.4).equal(base)
    assert oracle.sce(base, [one, two], select_topk=0.0).equal(base)


def test_sce_weights_by_mean_squares() -> None:
    base, one, two = f32(0, 0), f32(1, 2), f32(3, 4)
    shares = 5 / 30, 25 / 30
    found = oracle.sce(base, [one, two], dtype=torch.float64)
    assert found.tolist() == pytest.approx([shares[0] + 3 * shares[1], 2 * shares[0] + 4 * shares[1]])
    tiny = oracle.sce(base, [one * 1e-4, two * 1e-4], dtype=torch.float64)  # 15e-8 in sum: equal weights
    assert tiny.tolist() == pytest.approx([2e-4, 3e-4])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("topk", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_sce_is_that_of_loops(count: int, topk: float) -> None:
    base, models = tensors(count, 11, 6)
    columns = list(zip(*deltas_of(base, models), strict=True))
    if topk < 1:
        variances = [float(np.float32(np.var(column))) for column in columns]
        ordered = sorted(variances, reverse=True)
        k = int(topk * sum(v > 0 for v in variances))
        columns = [
            column if k and v >= ordered[k - 1] else (0.0,) * count
            for column, v in zip(columns, variances, strict=True)
        ]
    squares = [sum(x * x for x in row) / len(columns) for row in zip(*columns, strict=True)]
    shares = [s / sum(squares) if sum(squares) >= 1e-6 else 1 / count for s in squares]
    expected = []
    for b, column in zip(base.double().flatten().tolist(), columns, strict=True):
        agreeing = [i for i, x in enumerate(column) if (x > 0 if sum(column) >= 0 else x < 0)]
        part = sum(shares[i] * column[i] for i in agreeing) / max(sum(shares[i] for i in agreeing), 1e-6)
        expected.append(b + part)
    found = oracle.sce(base, models, select_topk=topk, dtype=torch.float64)
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-12, atol=1e-12)
    narrow = oracle.sce(base, models, select_topk=topk)
    np.testing.assert_allclose(narrow.flatten().numpy(), expected, rtol=0, atol=12 * 5 * 2.0**-24)


def test_ram_by_hand() -> None:
    base, quarter = f32(0, 0, 0, 0), 0.25
    one, two, three = f32(1, 2, quarter, 0), f32(0, 4, 0, 0), f32(0.1, 0.5, 0, -quarter)
    found = oracle.ram(base, [one, two, three], epsilon=quarter)  # an element that moved by epsilon has not moved
    assert found.tolist() == [1, pytest.approx((2 + 4 + 0.5) / 3), 0, 0]


def test_nearswap_by_hand() -> None:
    base, model = f32(0, 0, 0, 1, 1), f32(0.5, 2, -4, 1, 1 + 2.0**-20)
    found = oracle.nearswap(base, [model], t=1.0)
    # t / |difference|: 2, 0.5, 0.25, beyond 1, beyond 1
    assert found.tolist() == [0.5, 1, -1, 1, 1 + 2.0**-20]
    assert oracle.nearswap(base, [model], t=0.0).equal(base)


@pytest.mark.parametrize("t", [0.0, 1e-7, 1e-6, 0.003, 10.0])
def test_nearswap_is_that_of_loops(t: float) -> None:
    base, models = tensors(1, 9, 7)
    expected = []
    for b, m in zip(base.double().flatten().tolist(), models[0].double().flatten().tolist(), strict=True):
        w = min(max(t / max(abs(b - m), 1e-6), 0.0), 1.0)
        expected.append(w * m + (1 - w) * b)
    found = oracle.nearswap(base, models, t=t, dtype=torch.float64)
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-14)


# --- element types, sums ---------------------------------------------------------------------------------------------

ALL: list[tuple[str, dict[str, Any]]] = [(method, {"density": 0.5}) for method in MASKING]
ALL += [("sce", {"select_topk": 0.5}), ("ram", {}), ("nearswap", {"t": 0.003})]


@pytest.mark.parametrize(("method", "options"), ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sources_are_widened_and_the_result_rounded_once(
    method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    base, models = tensors(1 if method == "nearswap" else 3, 8, 9)
    models = [models[0].to(dtype), *models[1:]]
    found = call(method, base.half(), models, **options)
    wide = call(method, base.half().float(), [model.float() for model in models], **options)
    assert found.dtype == dtype
    assert found.equal(wide.to(dtype))
    assert call(method, base.half(), models, out_dtype=torch.bfloat16, **options).equal(wide.to(torch.bfloat16))


@pytest.mark.parametrize("n", [0, 1, 2, 1023, 1024, 1025, 3000])
def test_totals_are_sums_in_lanes_and_blocks(n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n) * 10.0 ** np.random.default_rng(n + 1).integers(-9, 9, n)

    def tree(block: list[float]) -> float:
        half = len(block) // 2
        return block[0] if not half else tree([x + y for x, y in zip(block[:half], block[half:], strict=True)])

    expected = 0.0
    for first in range(0, n, 1024):
        block = values[first : first + 1024].tolist()
        block += [0.0] * (1024 - len(block))
        lanes = block[:64]
        for number in range(64, 1024, 64):
            lanes = [lane + value for lane, value in zip(lanes, block[number : number + 64], strict=True)]
        expected += tree(lanes)
    assert total(torch.from_numpy(values)) == expected
