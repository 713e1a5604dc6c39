"""The oracle against arithmetic done by hand: Python floats and exact fractions, never the oracle itself."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from exact_arithmetic import FLOATING, SHARES, WHOLE, Triple, exact, merge, raw, triples, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsa import reference


def f32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


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
