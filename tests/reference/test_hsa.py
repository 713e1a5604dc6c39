"""The oracle against arithmetic done by hand: Python floats and exact fractions, never the oracle itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from hsa import reference

FLOATING = (torch.float32, torch.float16, torch.bfloat16)

# Precision in bits (with the hidden one) and exponent of the smallest normal number.
FORMATS = {
    torch.float64: (53, -1022),
    torch.float32: (24, -126),
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
}


def unit(dtype: torch.dtype) -> Fraction:
    """Unit roundoff: the relative error of one rounding to nearest, above the subnormals."""
    return Fraction(1, 2 ** FORMATS[dtype][0])


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


def exact(tensor: Tensor) -> list[Fraction]:
    """The elements as exact fractions, row-major."""
    return [Fraction(value) for value in tensor.double().flatten().tolist()]


def raw(tensor: Tensor) -> Tensor:
    """The bit patterns: -0.0 differs from 0.0."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def f32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def head_of(position: int, shape: tuple[int, ...], heads: int, head_axis: int) -> int:
    """Head that owns the element at a row-major position."""
    index = np.unravel_index(position, shape)[head_axis]
    return int(index) // (shape[head_axis] // heads)


@dataclass(frozen=True)
class Triple:
    base: Tensor
    primary: Tensor
    secondary: Tensor
    heads: int
    head_axis: int

    def heads_of_elements(self) -> list[int]:
        shape = tuple(self.base.shape)
        return [head_of(p, shape, self.heads, self.head_axis) for p in range(self.base.numel())]


FLOATS = st.floats(-16, 16, width=32)
WHOLE = st.integers(-2, 2).map(float)


@st.composite
def triples(
    draw: st.DrawFn,
    elements: st.SearchStrategy[float] = FLOATS,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
) -> Triple:
    """Biases, weights with heads of rows, weights with heads of columns; each source with its own dtype."""
    heads, head_dim, other = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["bias", "rows", "columns"]))
    width = heads * head_dim
    shape = {"bias": (width,), "rows": (width, other), "columns": (other, width)}[kind]
    tensors = [
        torch.from_numpy(draw(arrays(np.float32, shape, elements=elements))).to(draw(st.sampled_from(dtypes)))
        for _ in range(3)
    ]
    return Triple(*tensors, heads=heads, head_axis=int(kind == "columns"))


SHARES = st.one_of(st.sampled_from([0.0, 1.0, 0.6, 60.0, 100.0]), st.floats(0, 1))
# Away from float32's underflow, where a coefficient has no relative error bound.
LAMBDAS = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(2**-10, 1))
ALPHAS = st.one_of(st.sampled_from([0.0, 0.2, 1.0]), st.floats(0, 4))
SCALES = st.one_of(st.just(1.0), st.floats(-2, 2))


def merge(triple: Triple, **options: Any) -> reference.MergedTensor:
    defaults: dict[str, Any] = {"k": 0.6, "lam": 0.5, "alpha": 0.2, "layer": 0, "layers": 1}
    return reference.merge_tensor(
        triple.base,
        triple.primary,
        triple.secondary,
        heads=triple.heads,
        head_axis=triple.head_axis,
        **(defaults | options),
    )


# --- keep count and layer coefficient ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "heads", "expected"),
    [
        (0, 6, 0),
        (0.0, 1, 0),
        (1, 6, 6),
        (1.0, 20, 20),
        (0.6, 6, 4),  # 3.6
        (0.6, 8, 5),  # 4.8
        (0.6, 20, 12),
        (0.125, 4, 1),  # 0.5 goes to 0, and at least one head is kept
        (0.25, 6, 2),  # 1.5 goes to 2
        (0.625, 4, 2),  # 2.5 goes to 2
        (0.4375, 8, 4),  # 3.5 goes to 4
        (1e-9, 20, 1),
        (60, 6, 4),
        (60.0, 20, 12),
        (62.5, 4, 2),
        (100, 6, 6),
        (1.5, 20, 1),  # 1.5 percent, not 150
        (2, 100, 2),
    ],
)
def test_keep_count(k: float, heads: int, expected: int) -> None:
    assert reference.keep_count(k, heads) == expected


@pytest.mark.parametrize(
    ("lam", "alpha", "layer", "layers", "expected"),
    [
        (0.25, 1, 0, 2, 0.5),  # exponent 1 * 1/2
        (0.25, 1, 1, 2, 0.25),  # exponent 1 * 2/2
        (0.0625, 2, 0, 4, 0.25),  # exponent 2 * 1/4
        (0.0625, 2, 2, 4, 0.015625),  # exponent 2 * 3/4
        (0, 0, 3, 4, 1.0),  # 0 ** 0
        (0.0, 0.0, 0, 1, 1.0),
        (0, 0.2, 0, 32, 0.0),
        (1, 0.2, 5, 6, 1.0),
        (0.3, 0, 5, 6, 1.0),
    ],
)
def test_layer_coefficient(lam: float, alpha: float, layer: int, layers: int, expected: float) -> None:
    coefficient = reference.layer_coefficient(lam, alpha, layer, layers)
    assert type(coefficient) is float
    assert coefficient == expected


def test_layer_coefficient_of_the_defaults_is_a_fifth_root() -> None:
    coefficient = Fraction(reference.layer_coefficient(0.5, 0.2, 31, 32))
    # Relative errors: the float 0.2 is 1.1e-17 too large, which lowers the power by 0.7e-17; pow rounds to
    # within one place, 2 units of roundoff at most. The fifth power takes five times the sum, below 5 * 3.
    assert abs(coefficient**5 - Fraction(1, 2)) <= 5 * 3 * unit(torch.float64) / 2


# --- scores, selection, margin ----------------------------------------------------------------------------


def test_scores_of_a_weight_by_hand() -> None:
    base = f32([1, 1], [1, 1], [0, 0], [0, 0])
    primary = f32([2, 1], [0, 1], [0, 3], [0, 0])
    secondary = f32([1, 3], [3, 1], [0, -1], [0, 0])
    # proxy: [1+0, 0+2], [1+2, 0+0] | [0, 3+1], [0, 0]
    squared = reference.head_scores(base, primary, secondary, heads=2)
    assert squared.dtype == torch.float64
    assert squared.tolist() == [1 + 4 + 9, 16]


def test_scores_of_a_bias_by_hand() -> None:
    squared = reference.head_scores(f32(0, 0, 1, 1, 0, 0), f32(1, 0, 1, 2, 0, -2), f32(-1, 0, 1, 1, 0, 3), heads=3)
    assert squared.tolist() == [4, 1, 25]


def test_scores_of_column_heads_by_hand() -> None:
    base, secondary = torch.zeros(2, 4), f32([0, 0, 0, 1], [0, 0, 0, 0])
    primary = f32([1, 2, 0, 3], [0, -1, 5, 0])
    # proxy columns: head 0 has 1, 2, 0, 1; head 1 has 0, 3+1, 5, 0
    squared = reference.head_scores(base, primary, secondary, heads=2, head_axis=1)
    assert squared.tolist() == [1 + 4 + 0 + 1, 16 + 25]
    # The same numbers with heads of rows: 1, 2, 0, 4 and 0, 1, 5, 0.
    assert reference.head_scores(base, primary, secondary, heads=2).tolist() == [21, 26]


def test_proxy_is_formed_in_the_precision_asked_for() -> None:
    base, primary = f32(2**-30), f32(1)
    # 1 - 2**-30 needs 30 bits: float32 rounds it to 1.
    assert reference.head_scores(base, primary, base, heads=1).item() == 1.0
    # Its square needs 60 bits: float64 rounds 1 - 2**-29 + 2**-60 to 1 - 2**-29.
    wide = reference.head_scores(base, primary, base, heads=1, dtype=torch.float64).item()
    assert wide == 1 - 2**-29


def test_squares_are_formed_and_summed_in_float64() -> None:
    zeros = torch.zeros(2)
    squared = reference.head_scores(zeros, f32(1 + 2**-12, 2**-20), zeros, heads=1).item()
    # (1 + 2**-12) ** 2 has 25 bits, one more than float32 holds; 2**-40 is lost in a float32 sum.
    assert squared == 1 + 2**-11 + 2**-24 + 2**-40


def test_float16_differences_are_squared_without_underflow() -> None:
    zeros = torch.zeros(2, dtype=torch.float16)
    primary = torch.full((2,), 2**-14, dtype=torch.float16)
    assert reference.head_scores(zeros, primary, zeros, heads=1).item() == 2 * 2**-28


def test_heads_that_do_not_divide_the_axis_are_refused() -> None:
    tensor = torch.ones(4, 3)
    with pytest.raises(RuntimeError):
        reference.head_scores(tensor, tensor, tensor, heads=3)


@pytest.mark.parametrize(
    ("squared", "k", "expected"),
    [
        ([1, 9, 4, 16], 0.5, [1, 3]),
        ([1, 9, 4, 16], 0.25, [3]),
        ([1, 9, 4, 16], 0, []),
        ([1, 9, 4, 16], 1, [0, 1, 2, 3]),
        ([1, 9, 4, 16], 75, [1, 2, 3]),
        ([4, 9, 4, 1, 4], 0.4, [0, 1, 2, 4]),  # keep 2; three heads tie for the second place
        ([9, 9, 1], 0.1, [0, 1]),  # keep 1; two heads tie for the first
        ([5, 5, 5, 5], 0.25, [0, 1, 2, 3]),
        ([0, 0, 0], 0.6, [0, 1, 2]),
        ([0, 0, 0], 0, []),
        ([2], 0.1, [0]),
    ],
)
def test_select_heads(squared: list[float], k: float, expected: list[int]) -> None:
    selected = reference.select_heads(torch.tensor(squared, dtype=torch.float64), k)
    assert selected.dtype == torch.bool
    assert selected.shape == (len(squared),)
    assert selected.nonzero().flatten().tolist() == expected


def test_selection_separates_scores_that_differ_in_the_last_bit() -> None:
    next_one = math.nextafter(1.0, 2.0)
    squared = torch.tensor([1.0, next_one, 1.0], dtype=torch.float64)
    assert reference.select_heads(squared, 0.1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("squared", "k", "expected"),
    [
        ([9, 4, 4, 1], 0.25, (9 - 4) / 9),
        ([9, 4, 4, 1], 0.5, (4 - 1) / 4),  # the tie is kept whole, so the first dropped is 1
        ([1, 0, 0], 0.3, 1.0),
        ([1, 8, 2], 0.3, (8 - 2) / 8),
        ([9, 4, 4, 1], 0, None),
        ([9, 4, 4, 1], 1, None),
        ([9, 4, 4], 0.6, None),  # the tie reaches to the end
        ([3, 3], 0.5, None),
        ([7], 0.6, None),
    ],
)
def test_margin(squared: list[float], k: float, expected: float | None) -> None:
    assert reference.margin(torch.tensor(squared, dtype=torch.float64), k) == expected


@given(triple=triples(WHOLE, (torch.float32,)), k=SHARES, dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None)
def test_scores_and_selection_of_whole_numbers(triple: Triple, k: float, dtype: torch.dtype) -> None:
    """Small integers: every sum is exact, ties are frequent."""
    scores = [0] * triple.heads
    elements = zip(*(t.flatten().tolist() for t in (triple.base, triple.primary, triple.secondary)), strict=True)
    for (base, primary, secondary), head in zip(elements, triple.heads_of_elements(), strict=True):
        scores[head] += int(abs(primary - base) + abs(secondary - base)) ** 2
    share = k / 100 if k > 1 else k
    keep = 0 if k == 0 else max(1, round(share * triple.heads))
    # A head is in when fewer than `keep` heads beat it: ranks, where the oracle has a threshold.
    selected = tuple(h for h, mine in enumerate(scores) if sum(other > mine for other in scores) < keep)

    result = merge(triple, k=k, dtype=dtype)
    assert result.squared_scores.tolist() == scores
    assert result.selected == selected


# --- merged values by hand --------------------------------------------------------------------------------


def test_merge_of_a_weight_by_hand() -> None:
    base = torch.ones(4, 2)
    primary = f32([3, 1], [1, 1], [1, 2], [1, 1])
    secondary = f32([9, 1], [5, 1], [1, 1], [1, 1])
    # Squared scores: (2 + 8)**2 + 4**2 = 116 and 1. k * H = 1. lambda_i = 0.25 ** (1 * 2/2) = 0.25.
    # Row 0: 1 + (0.25 * 2 + 0.75 * 8) = 7.5; row 1: 1 + 0.75 * 4 = 4.
    result = reference.merge_tensor(base, primary, secondary, k=0.5, lam=0.25, alpha=1, layer=1, layers=2, heads=2)
    assert result.selected == (0,)
    assert result.squared_scores.tolist() == [116, 1]
    assert result.value.tolist() == [[7.5, 1], [4, 1], [1, 2], [1, 1]]
    assert result.value.dtype == torch.float32


def test_merge_with_a_scale_by_hand() -> None:
    result = reference.merge_tensor(
        f32(1, 1),
        f32(3, 2),
        f32(9, 1),
        k=0.5,
        lam=0.25,
        alpha=1,
        layer=1,
        layers=2,
        heads=2,
        attention_scale=0.5,
    )
    assert result.selected == (0,)
    # Selected: 1 + 0.5 * 6.5; the other: 1 + 0.5 * 1.
    assert result.value.tolist() == [4.25, 1.5]


def test_merge_of_column_heads_by_hand() -> None:
    result = reference.merge_tensor(
        torch.zeros(2, 4),
        f32([1, 0, 4, 0], [0, 0, 0, 4]),
        f32([0, 1, 8, 0], [0, 0, 0, 0]),
        k=0.5,
        lam=0.25,
        alpha=1,
        layer=0,
        layers=2,
        heads=2,
        head_axis=1,
    )
    # Head 1 owns columns 2 and 3; lambda_i = 0.25 ** (1/2) = 0.5: 0.5 * 4 + 0.5 * 8, and 0.5 * 4.
    assert result.selected == (1,)
    assert result.value.tolist() == [[1, 0, 6, 0], [0, 0, 0, 2]]


def test_merge_of_a_decoder_tensor_by_hand() -> None:
    """Layer, layers and heads are the decoder's own: layer 2 of 4 with 3 heads."""
    result = reference.merge_tensor(
        torch.zeros(3),
        f32(16, 1, 0),
        f32(-16, 0, 2),
        k=0.6,  # 1.8 goes to 2
        lam=0.0625,
        alpha=1,
        layer=2,
        layers=4,
        heads=3,
    )
    # lambda_i = (1/16) ** (3/4) = 1/8. Scores 32, 1, 2.
    assert result.selected == (0, 2)
    assert result.value.tolist() == [16 / 8 - 16 * 7 / 8, 1, 2 * 7 / 8]


def test_sources_of_mixed_dtypes_by_hand() -> None:
    base = torch.tensor([1.0], dtype=torch.float16)
    primary = torch.tensor([1.5], dtype=torch.bfloat16)
    secondary = torch.tensor([1 + 2**-20], dtype=torch.float32)
    options = {"k": 1, "lam": 0.25, "alpha": 1, "layer": 0, "layers": 2, "heads": 1}
    # 1 + (0.5 * 0.5 + 0.5 * 2**-20), which only float32 output shows in full.
    narrow = reference.merge_tensor(base, primary, secondary, **options).value
    assert (narrow.dtype, narrow.item()) == (torch.bfloat16, 1.25)
    wide = reference.merge_tensor(base, primary, secondary, out_dtype=torch.float32, **options).value
    assert (wide.dtype, wide.item()) == (torch.float32, 1.25 + 2**-21)


def test_coefficients_are_rounded_to_float32_each() -> None:
    result = reference.merge_tensor(f32(0, 0), f32(1, 0), f32(0, 1), k=1, lam=0.9, alpha=1, layer=0, layers=1, heads=1)
    # 0.9 * 2**24 = 15099494.4 and 0.1 * 2**27 = 13421772.8, rounded to whole numbers. The second comes from
    # 1 - 0.9 in float64: one less the rounded first would be 13421776 / 2**27.
    assert exact(result.value) == [Fraction(15099494, 2**24), Fraction(13421773, 2**27)]


def test_the_scale_is_rounded_to_float32() -> None:
    # float32(0.1) is 13421773 / 2**27, and 13 times that 10905190.56 / 2**23; 13 * 0.1 is 10905190.4 / 2**23.
    expected = [Fraction(10905191, 2**23)]
    zero, primary = f32(0), f32(13)
    assert exact(reference.merge_other(zero, primary, scale=0.1)) == expected
    result = reference.merge_tensor(
        zero, zero, primary, k=1, lam=0, alpha=1, layer=0, layers=1, heads=1, attention_scale=0.1
    )
    assert exact(result.value) == expected


def test_float64_gives_the_unrounded_value() -> None:
    base = torch.tensor([1.0, 1.0], dtype=torch.float16)
    primary = torch.tensor([1.5, 1.25], dtype=torch.float16)
    secondary = torch.tensor([1 + 2**-10, 1.0], dtype=torch.float16)
    result = reference.merge_tensor(
        base,
        primary,
        secondary,
        k=0.5,
        lam=0.7,
        alpha=1,
        layer=0,
        layers=1,
        heads=2,
        out_dtype=torch.float16,
        dtype=torch.float64,
    )
    assert result.value.dtype == torch.float64
    assert result.value.tolist() == [1 + (0.7 * 0.5 + (1 - 0.7) * 2**-10), 1.25]


def test_selection_in_float64_sees_what_float32_loses() -> None:
    base, primary = f32(2**-30, 0), f32(1, 1)
    # Scores in float64: (1 - 2**-30)**2 and 1. In float32 the heads tie and both are selected.
    options = {"k": 0.5, "lam": 0.5, "alpha": 1, "layer": 0, "layers": 1, "heads": 2}
    assert reference.merge_tensor(base, primary, base, **options).selected == (0, 1)
    assert reference.merge_tensor(base, primary, base, dtype=torch.float64, **options).selected == (1,)


# --- what is not merged -----------------------------------------------------------------------------------


# B + (M1 - B) is 0 for the first, and +0.0 for the second: neither is primary.
ROUNDED_AWAY = ([2.0**15, 0.0, 1.0], [2.0**-14, -0.0, 3.0])


@pytest.mark.parametrize("dtype", FLOATING)
def test_other_tensors_at_scale_1_are_the_primary_bytes(dtype: torch.dtype) -> None:
    base, primary = (torch.tensor(values, dtype=dtype) for values in ROUNDED_AWAY)
    value = reference.merge_other(base, primary, scale=1.0)
    assert value.dtype == dtype
    assert torch.equal(raw(value), raw(primary))


@pytest.mark.parametrize("dtype", FLOATING)
def test_unselected_heads_at_scale_1_are_the_primary_bytes(dtype: torch.dtype) -> None:
    base, primary = (torch.tensor([*values, 0.0], dtype=dtype) for values in ROUNDED_AWAY)
    secondary = torch.tensor([2.0**15, 0.0, 1.0, 1.5 * 2.0**15], dtype=dtype)
    # Scores 2**15, 0, 2 and 1.5 * 2**15; k * H = 1.
    result = reference.merge_tensor(base, primary, secondary, k=0.25, lam=0.5, alpha=1, layer=0, layers=1, heads=4)
    assert result.selected == (3,)
    assert torch.equal(raw(result.value)[:3], raw(primary)[:3])
    assert result.value[3].item() == 0.75 * 2.0**15


def test_other_tensors_by_hand() -> None:
    # 1 + 0.5 * 2; 4 + 0.5 * -4; -1 + 0.5 * 2
    value = reference.merge_other(f32([1], [4], [-1]), f32([3], [0], [1]), scale=0.5)
    assert value.tolist() == [[2], [2], [0]]
    assert reference.merge_other(f32(1), f32(3), scale=0.0).tolist() == [1]
    assert reference.merge_other(f32(1), f32(3), scale=-1).tolist() == [-1]


def test_other_tensors_are_cast() -> None:
    primary = f32(1 + 2**-8, 1 + 3 * 2**-8, -0.0)
    # bfloat16 has 7 fraction bits: both are halfway, and go to the even neighbour.
    value = reference.merge_other(torch.zeros(3), primary, scale=1, out_dtype=torch.bfloat16)
    assert value.dtype == torch.bfloat16
    assert value.tolist() == [1.0, 1 + 2**-6, 0.0]
    assert math.copysign(1, value[2].item()) == -1
    wide = reference.merge_other(torch.zeros(3), primary, scale=1, dtype=torch.float64)
    assert (wide.dtype, wide.tolist()) == (torch.float64, primary.tolist())


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
