"""The oracle rounds where the contract says, stays within the error bound, and has the properties of the method."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from exact_arithmetic import FLOATING, FLOATS, FORMATS, SHARES, WHOLE, Triple, exact, merge, raw, triples, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsa import reference


def underflow(dtype: torch.dtype) -> Fraction:
    """Half the smallest subnormal: the absolute error of one rounding among the subnormals."""
    bits, smallest = FORMATS[dtype]
    return Fraction(2) ** (smallest - bits)


def rounded(number: Fraction | float, dtype: torch.dtype) -> Fraction:
    """`number` rounded to the format, nearest even, subnormals included; no overflow."""
    number = Fraction(number)
    if number == 0:
        return number
    bits, smallest = FORMATS[dtype]
    exponent = math.floor(math.log2(abs(number)))
    exponent -= abs(number) < Fraction(2) ** exponent
    exponent += abs(number) >= Fraction(2) ** (exponent + 1)
    spacing = Fraction(2) ** (max(exponent, smallest) - bits + 1)
    return round(number / spacing) * spacing


# Away from float32's underflow, where a coefficient has no relative error bound.
LAMBDAS = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(2**-10, 1))
ALPHAS = st.one_of(st.sampled_from([0.0, 0.2, 1.0]), st.floats(0, 4))
SCALES = st.one_of(st.just(1.0), st.floats(-2, 2))


# --- every rounding, step by step -------------------------------------------------------------------------


@given(
    triple=triples(),
    k=SHARES,
    lam=LAMBDAS,
    alpha=ALPHAS,
    layer=st.integers(0, 3),
    scale=SCALES,
    out_dtype=st.sampled_from([None, *FLOATING]),
)
@settings(deadline=None, max_examples=200)
def test_float32_merge_rounds_where_the_contract_says(
    triple: Triple,
    k: float,
    lam: float,
    alpha: float,
    layer: int,
    scale: float,
    out_dtype: torch.dtype | None,
) -> None:
    """Fractions, rounded after each operation in the order written, give the very same numbers."""

    def step(number: Fraction | float) -> Fraction:
        return rounded(number, torch.float32)

    result = merge(triple, k=k, lam=lam, alpha=alpha, layer=layer, layers=4, attention_scale=scale, out_dtype=out_dtype)
    final = out_dtype or triple.primary.dtype
    lambda_i = float(lam) ** (alpha * ((layer + 1) / 4))
    c1, c2, s = step(lambda_i), step(1.0 - lambda_i), step(scale)

    expected = []
    sources = zip(exact(triple.base), exact(triple.primary), exact(triple.secondary), strict=True)
    for (base, primary, secondary), head in zip(sources, triple.heads_of_elements(), strict=True):
        tv1, tv2 = step(primary - base), step(secondary - base)
        if head in result.selected:
            value = step(base + step(s * step(step(c1 * tv1) + step(c2 * tv2))))
        elif scale == 1:
            value = primary
        else:
            value = step(base + step(s * tv1))
        expected.append(rounded(value, final))
    assert result.value.dtype == final
    assert result.value.shape == triple.primary.shape
    assert exact(result.value) == expected


# --- distance from the exact value ------------------------------------------------------------------------


def gamma(roundings: int, u: Fraction) -> Fraction:
    """Bound on ``|product of n factors (1 + delta) - 1|`` with ``|delta| <= u`` (Higham, Lemma 3.1)."""
    return roundings * u / (1 - roundings * u)


def error_bound(base: Any, tv1: Any, tv2: Any, c1: Any, c2: Any, scale: Any, dtype: torch.dtype) -> Any:
    """Bound on the error of ``B + scale * (c1 * tv1 + c2 * tv2)`` in `dtype`; fractions or float64 tensors.

    Each operation multiplies its result by ``1 + delta``, ``|delta| <= u``. A term ``c * tv`` carries: the
    task vector 1, the coefficient 2 (``1 - lambda_i`` in float64, then the rounding to `dtype`), the product
    1, the sum 1, and with a scale that scale's own rounding 1 and its product 1. So the displacement is off
    by at most ``E = gamma_n * |scale| * (|c1 * tv1| + |c2 * tv2|)`` with n = 5 or 7. A product among the
    subnormals is off by ``eta`` instead (sums are exact there): two in the blend, scaled, and one for the
    scale; twice that covers their later factors ``1 + delta``. The last sum rounds ``value + E`` once.
    """
    u, eta = unit(dtype), underflow(dtype)
    n = 5 if scale == 1 else 7
    size = abs(scale) * (abs(c1 * tv1) + abs(c2 * tv2))
    displacement = scalar(gamma(n, u), size) * size + scalar(2 * eta * (2 * abs(Fraction(scale)) + 1), size)
    value = base + scale * (c1 * tv1 + c2 * tv2)
    return displacement + scalar(u, size) * (abs(value) + displacement)


def scalar(constant: Fraction, like: object) -> Fraction | float:
    return constant if isinstance(like, Fraction) else float(constant)


def cast_bound(error: Fraction, value: Fraction, final: torch.dtype, dtype: torch.dtype) -> Fraction:
    """`error` before the cast to `final`, and what that cast adds; nothing where it does not round."""
    if FORMATS[final][0] >= FORMATS[dtype][0]:
        return error
    return error + unit(final) * (abs(value) + error) + underflow(final)


@given(
    triple=triples(),
    k=SHARES,
    lam=LAMBDAS,
    alpha=ALPHAS,
    layer=st.integers(0, 3),
    scale=SCALES,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=200)
def test_merge_is_within_the_error_bound_of_the_exact_value(
    triple: Triple, k: float, lam: float, alpha: float, layer: int, scale: float, dtype: torch.dtype
) -> None:
    """Both precisions against the formula in exact fractions, from the float64 ``lambda_i``."""
    result = merge(triple, k=k, lam=lam, alpha=alpha, layer=layer, layers=4, attention_scale=scale, dtype=dtype)
    lambda_i = Fraction(float(lam) ** (alpha * ((layer + 1) / 4)))
    s = Fraction(scale)
    sources = zip(exact(triple.base), exact(triple.primary), exact(triple.secondary), exact(result.value), strict=True)
    for (base, primary, secondary, got), head in zip(sources, triple.heads_of_elements(), strict=True):
        c1 = lambda_i if head in result.selected else Fraction(1)
        tv1, tv2 = primary - base, secondary - base
        value = base + s * (c1 * tv1 + (1 - c1) * tv2)
        error = error_bound(base, tv1, tv2, c1, 1 - c1, s, dtype)
        assert abs(got - value) <= cast_bound(error, value, result.value.dtype, dtype)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATING)
def test_float32_is_within_the_error_bound_of_float64_at_real_sizes(dtype: torch.dtype, scale: float) -> None:
    """Deltas a hundred times smaller than the weights, as fine-tuning leaves them; heads clearly apart."""
    generator = torch.Generator().manual_seed(7)

    def normal(deviation: float) -> Tensor:
        return torch.randn(5 * 64, 320, generator=generator) * deviation

    by_head = torch.tensor([1.0, 1.5, 0.8, 1.2, 2.0]).repeat_interleave(64)[:, None]
    base = normal(0.05)
    primary, secondary = base + by_head * normal(5e-4), base + by_head * normal(5e-4)
    triple = Triple(base.to(dtype), primary.to(dtype), secondary.to(dtype), heads=5, head_axis=0)
    options = {"k": 0.6, "lam": 0.3, "alpha": 0.7, "layer": 2, "layers": 6, "attention_scale": scale}
    narrow = merge(triple, out_dtype=torch.float32, **options)
    wide = merge(triple, dtype=torch.float64, **options)
    assert narrow.selected == wide.selected == (1, 3, 4)

    wide_base = triple.base.double()
    tv1, tv2 = triple.primary.double() - wide_base, triple.secondary.double() - wide_base
    selected = torch.tensor([False, True, False, True, True]).repeat_interleave(64)[:, None]
    c1 = torch.where(selected, 0.3 ** (0.7 * (3 / 6)), 1.0).double()
    bound = error_bound(wide_base, tv1, tv2, c1, 1 - c1, scale, torch.float32)
    # The float64 result is off by its own bound, 2**-29 of this one.
    truth_error = error_bound(wide_base, tv1, tv2, c1, 1 - c1, scale, torch.float64)
    error = (narrow.value.double() - wide.value).abs()
    assert (error <= bound + truth_error).all()
    # No loose tolerance: of 100,000 elements some come within a factor of two of it.
    assert (error / bound).max() > 0.5


def test_float32_scores_are_within_the_error_bound_of_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    base, primary, secondary = (torch.randn(4 * 64, 256, generator=generator) for _ in range(3))
    narrow = reference.head_scores(base, primary, secondary, heads=4)
    wide = reference.head_scores(base, primary, secondary, heads=4, dtype=torch.float64)
    # A proxy element carries the rounding of its task vector and of the sum, so its square four of them; all
    # terms are positive, so their sum has the same relative bound. Float64's own part: n terms, n roundings.
    bound = float(gamma(4, unit(torch.float32))) + float(gamma(2 * 64 * 256, unit(torch.float64)))
    assert ((narrow - wide).abs() <= bound * wide).all()
    assert bound < 1e-6


# --- properties of the method -----------------------------------------------------------------------------


def assert_close_to_source(result: reference.MergedTensor, triple: Triple, source: Tensor, roundings: int) -> None:
    """``B + tv`` in float32, where ``tv = source - B`` carries `roundings`, is `source` up to this bound.

    The sum rounds ``source + E`` once, ``E = gamma * |tv|``; products in the subnormals add ``eta`` each.
    """
    u, eta = unit(torch.float32), underflow(torch.float32)
    for base, wanted, got in zip(exact(triple.base), exact(source), exact(result.value), strict=True):
        displacement = gamma(roundings, u) * abs(wanted - base) + 4 * eta
        error = displacement + u * (abs(wanted) + displacement)
        assert abs(got - wanted) <= cast_bound(error, wanted, result.value.dtype, torch.float32)


@given(triple=triples(), lam=LAMBDAS, alpha=ALPHAS, k=SHARES)
@settings(deadline=None)
def test_equal_fine_tunes_return_the_primary(triple: Triple, lam: float, alpha: float, k: float) -> None:
    twins = Triple(triple.base, triple.primary, triple.primary.clone(), triple.heads, triple.head_axis)
    result = merge(twins, lam=lam, alpha=alpha, k=k)
    # As in `error_bound`: c1 * tv and c2 * tv have one sign, c1 + c2 is 1, so 5 roundings of tv.
    assert_close_to_source(result, twins, twins.primary, roundings=5)


@given(triple=triples(), lam=LAMBDAS, alpha=ALPHAS)
@settings(deadline=None)
def test_k_0_returns_the_primary_bytes(triple: Triple, lam: float, alpha: float) -> None:
    result = merge(triple, lam=lam, alpha=alpha, k=0)
    assert result.selected == ()
    assert torch.equal(raw(result.value), raw(triple.primary))


@given(
    triple=triples(),
    k=SHARES,
    ones=st.one_of(st.tuples(st.just(1.0), ALPHAS), st.tuples(st.one_of(LAMBDAS, st.just(0.0)), st.just(0.0))),
)
@settings(deadline=None)
def test_lambda_1_or_alpha_0_returns_the_primary(triple: Triple, k: float, ones: tuple[float, float]) -> None:
    lam, alpha = ones
    result = merge(triple, k=k, lam=lam, alpha=alpha)
    # c1 = 1 and c2 = 0 exactly: only the subtraction rounds.
    assert_close_to_source(result, triple, triple.primary, roundings=1)


@given(triple=triples(), alpha=st.floats(2**-10, 4))
@settings(deadline=None)
def test_k_1_and_lambda_0_return_the_secondary(triple: Triple, alpha: float) -> None:
    result = merge(triple, k=1, lam=0, alpha=alpha)
    assert result.selected == tuple(range(triple.heads))
    assert_close_to_source(result, triple, triple.secondary, roundings=1)


@given(data=st.data(), elements=st.sampled_from([FLOATS, WHOLE]), k=SHARES, scale=SCALES)
@settings(deadline=None)
def test_permuting_the_heads_permutes_the_result(
    data: st.DataObject, elements: st.SearchStrategy[float], k: float, scale: float
) -> None:
    triple = data.draw(triples(elements))
    order = data.draw(st.permutations(range(triple.heads)))
    head_dim = triple.base.shape[triple.head_axis] // triple.heads
    index = torch.tensor([head * head_dim + offset for head in order for offset in range(head_dim)])

    def permuted(tensor: Tensor) -> Tensor:
        return tensor.index_select(triple.head_axis, index)

    shuffled = Triple(
        permuted(triple.base),
        permuted(triple.primary),
        permuted(triple.secondary),
        triple.heads,
        triple.head_axis,
    )
    before, after = merge(triple, k=k, attention_scale=scale), merge(shuffled, k=k, attention_scale=scale)
    assert torch.equal(after.squared_scores, before.squared_scores[torch.tensor(order)])
    assert {order[head] for head in after.selected} == set(before.selected)
    assert torch.equal(raw(after.value), raw(permuted(before.value)))


@given(triple=triples(), k=SHARES, scale=SCALES)
@settings(deadline=None)
def test_sources_are_left_alone(triple: Triple, k: float, scale: float) -> None:
    sources = (triple.base, triple.primary, triple.secondary)
    before = [raw(source).clone() for source in sources]
    merge(triple, k=k, attention_scale=scale)
    reference.merge_other(triple.base, triple.primary, scale=scale)
    assert all(torch.equal(raw(source), kept) for source, kept in zip(sources, before, strict=True))
