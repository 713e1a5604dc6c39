"""Conversions between element types: every bit pattern, every rounding boundary, against torch."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hsa.system.dtypes import ARITHMETIC, BITS, CODES, NAMES, STORAGE, all_finite, narrow, size, widen

pytestmark = pytest.mark.filterwarnings("error")

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HALVES = ("F16", "BF16")
LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38}
PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def widened(code: str, patterns: NDArray[np.uint16]) -> NDArray[np.float32]:
    out = np.full(patterns.shape, np.nan, np.float32)
    result = widen(code, patterns.view(STORAGE[code]), out)
    assert result is out
    return out


def narrowed(code: str, values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bit patterns that `narrow` makes of a copy of the values."""
    out = np.full(values.shape, 0x5555, np.uint16)
    narrow(code, values.copy(), out.view(STORAGE[code]), np.full(values.shape, 0xDEAD, np.uint32))
    return out


def by_torch(code: str, values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """torch's own rounding of the same values."""
    rounded = torch.from_numpy(values.copy()).to(TORCH[code])
    return rounded.view(torch.int16).numpy().view(np.uint16)


def is_nan(code: str, patterns: NDArray[np.uint16]) -> NDArray[np.bool_]:
    infinity = 0x7C00 if code == "F16" else 0x7F80
    return (patterns & 0x7FFF) > infinity


def assert_same_bits(code: str, values: NDArray[np.float32]) -> None:
    """narrow equals torch bit for bit, NaN (which stays NaN) apart."""
    ours, theirs = narrowed(code, values), by_torch(code, values)
    nan = np.isnan(values)
    assert (is_nan(code, ours) == nan).all()
    different = np.flatnonzero((ours != theirs) & ~nan)
    assert different.size == 0, [(float(values[i]).hex(), hex(ours[i]), hex(theirs[i])) for i in different[:5]]


def boundaries(code: str) -> NDArray[np.float32]:
    """Every finite value of the type, and between each and the next: the tie, and its float32 neighbours.

    Beyond the largest finite value, `next` is the power of two that rounds to infinity.
    """
    positive = widened(code, np.arange(0, 0x7C00 if code == "F16" else 0x7F80, dtype=np.uint16))
    low = positive.astype(np.float64)
    high = np.append(low[1:], 2 * low[-1] - low[-2])
    ties = ((low + high) / 2).astype(np.float32)
    assert (ties.astype(np.float64) == (low + high) / 2).all()
    below, above = np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))
    values = np.concatenate([positive, below, ties, above])
    return np.concatenate([values, -values])


def test_the_tables_agree() -> None:
    assert set(CODES.values()) == set(NAMES) == set(STORAGE) == set(ARITHMETIC)
    assert all(CODES[name] == code for code, name in NAMES.items())
    for code in ARITHMETIC:
        assert size(code) == STORAGE[code].itemsize == TORCH[code].itemsize == BITS[code] // 8
        assert getattr(torch, NAMES[code]) == TORCH[code]
        assert STORAGE[code].byteorder in ("<", "=" if sys.byteorder == "little" else "<")


@pytest.mark.parametrize("code", HALVES)
def test_widening_is_exact_for_every_bit_pattern(code: str) -> None:
    ours = widened(code, PATTERNS)
    theirs = torch.from_numpy(PATTERNS.view(np.int16).copy()).view(TORCH[code]).float().numpy()
    nan = is_nan(code, PATTERNS)
    assert (np.isnan(ours) == nan).all()
    assert (ours.view(np.uint32) == theirs.view(np.uint32))[~nan].all()
    assert (np.signbit(ours) == (PATTERNS >= 0x8000)).all()


def test_float32_is_not_copied_when_widened() -> None:
    values = np.array([1.0, np.nan], np.float32)
    assert widen("F32", values, np.zeros(2, np.float32)) is values


@pytest.mark.parametrize("code", HALVES)
def test_what_was_widened_narrows_back_to_the_same_bits(code: str) -> None:
    nan = is_nan(code, PATTERNS)
    back = narrowed(code, widened(code, PATTERNS))
    assert (back == PATTERNS)[~nan].all()
    assert is_nan(code, back)[nan].all()


@pytest.mark.parametrize("code", HALVES)
def test_every_rounding_boundary(code: str) -> None:
    """Ties go to the even neighbour, a step beside a tie to the nearer one; subnormals and overflow included."""
    values = boundaries(code)
    assert_same_bits(code, values)
    quarter = len(values) // 8
    ours = narrowed(code, values)[: 4 * quarter].reshape(4, quarter).astype(int)
    numbers = np.arange(quarter)
    assert (ours[0] == numbers).all()
    assert (ours[1] == numbers).all()
    assert (ours[2] == numbers + numbers % 2).all()
    assert (ours[3] == numbers + 1).all()


@pytest.mark.parametrize("code", HALVES)
def test_every_high_half_of_a_float32(code: str) -> None:
    high = PATTERNS.astype(np.uint32) << 16
    for low in (0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        assert_same_bits(code, (high | low).view(np.float32))


@pytest.mark.parametrize("code", HALVES)
def test_random_float32_bits(code: str) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    assert_same_bits(code, bits.view(np.float32))


def test_float16_of_values_in_range_alone() -> None:
    """Nothing here sends a whole array through numpy's conversion, as one infinity or NaN among the values does."""
    bits = np.random.default_rng(1).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    high = np.concatenate([(PATTERNS.astype(np.uint32) << 16) | low for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0xFFFF)])
    for values in (boundaries("F16"), bits.view(np.float32), high.view(np.float32)):
        within = values[np.abs(values) < 65520]
        assert len(within) > len(values) // 3
        assert_same_bits("F16", within)
        assert_same_bits("F16", -within)
    below = np.nextafter(np.float32(65520), np.float32(0), dtype=np.float32)
    assert narrowed("F16", np.array([below, -below], np.float32)).tolist() == [0x7BFF, 0xFBFF]
    assert narrowed("F16", np.array([65520, 1], np.float32)).tolist() == [0x7C00, 0x3C00]


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=20), code=st.sampled_from(HALVES))
def test_any_float32(values: list[float], code: str) -> None:
    assert_same_bits(code, np.array(values, np.float32))


@pytest.mark.parametrize("code", HALVES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overflow_becomes_infinity_and_is_noticed(code: str, sign: float) -> None:
    largest = np.float32(sign * LARGEST[code])
    beyond = np.float32(sign * 3.4028234663852886e38)
    for value, finite in ((largest, True), (beyond, False), (np.float32(sign * np.inf), False)):
        bits = narrowed(code, np.array([value], np.float32))
        assert all_finite(code, bits.view(STORAGE[code])) is finite
        assert (widened(code, bits) == (value if finite else sign * np.inf)).all()


@pytest.mark.parametrize("code", HALVES)
def test_zeros_keep_their_sign_and_nan_its(code: str) -> None:
    values = np.array([0.0, -0.0, 1e-45, -1e-45, np.nan], np.float32)
    assert narrowed(code, values)[:4].tolist() == [0x0000, 0x8000, 0x0000, 0x8000]
    # the payload of these lies in the low half alone: cutting it off would leave infinity
    thin = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    bits = narrowed(code, thin)
    assert is_nan(code, bits).all()
    assert (bits >> 15).tolist() == [0, 1, 0, 1]


def test_float32_is_written_bit_for_bit() -> None:
    bits = np.array([0x00000000, 0x80000000, 0x7FC01234, 0x00000001, 0x7F7FFFFF], np.uint32)
    out = np.zeros(5, np.float32)
    narrow("F32", bits.view(np.float32), out, np.zeros(5, np.uint32))
    assert (out.view(np.uint32) == bits).all()


def test_strided_storage_is_written_in_place() -> None:
    """The heads of an output projection are columns: neither rows nor storage are contiguous."""
    for code in HALVES:
        whole = np.full((4, 6), 0x1111, np.uint16)
        values = np.arange(8, dtype=np.float32).reshape(4, 2) + np.float32(0.001)
        expected = by_torch(code, values.reshape(-1)).reshape(4, 2)
        narrow(code, values.copy(), whole.view(STORAGE[code])[:, 2:4], np.zeros((4, 2), np.uint32))
        assert (whole[:, 2:4] == expected).all()
        assert (whole[:, [0, 1, 4, 5]] == 0x1111).all()


@pytest.mark.parametrize("code", HALVES)
def test_finite_is_judged_right_for_every_bit_pattern(code: str) -> None:
    expected = torch.isfinite(torch.from_numpy(PATTERNS.view(np.int16).copy()).view(TORCH[code])).numpy()
    found = [all_finite(code, PATTERNS[i : i + 1].view(STORAGE[code])) for i in range(1 << 16)]
    assert (np.array(found) == expected).all()
    assert all_finite(code, PATTERNS[expected].view(STORAGE[code]))
    assert not all_finite(code, PATTERNS.view(STORAGE[code]))
    assert all_finite(code, PATTERNS[:0].view(STORAGE[code]))


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF])
def test_one_damaged_float32_among_many_is_noticed(bits: int) -> None:
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    assert all_finite("F32", values)
    values.view(np.uint32)[777] = bits
    assert not all_finite("F32", values)
