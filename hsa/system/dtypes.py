"""Element types of safetensors files, and the conversions between them and float32 in numpy.

numpy has no bfloat16, so its bits are stored as uint16, and are widened and rounded in integer arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Arrays = tuple[Array | None, ...]
"""Arrays that belong together, None in place of a missing one."""

BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits per element of every element type that safetensors 0.8 knows."""

ARITHMETIC = ("F32", "F16", "BF16")
"""Element types that a merge computes with and writes."""

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NAMES = {code: name for name, code in CODES.items()}
STORAGE: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""The numpy type that holds an element's bits."""


_SIGN_AND_MAGNITUDE = np.int32(-0x70000001)
_REBIAS = np.float32(2.0**112)
_ROUNDS_TO_INFINITY = np.float32(65520.0)
_LEAST_NORMAL_HALF = np.float32(2.0**-14)
_HALF_PLACE_AND_BIAS = np.uint32((0x0FFF - (112 << 23)) & 0xFFFFFFFF)
_BITS_OF_ONE_HALF = np.uint32(0x3F000000)


def size(code: str) -> int:
    """Bytes of one element of an arithmetic element type."""
    return BITS[code] // 8


def widen(code: str, raw: Array, out: Float32) -> Float32:
    """Widen elements exactly to float32.

    `raw` holds the storage of `code`; `out` has its shape. Returns `out`, or `raw` itself where it is float32
    already.
    """
    if code == "F32":
        return raw
    if code == "F16":
        _widen_half(raw, out)
        return out
    bits = out.view(np.uint32)
    np.copyto(bits, raw)
    np.left_shift(bits, 16, out=bits)
    return out


def _widen_half(raw: Array, out: Float32) -> None:
    """Widen float16 to float32, several times faster than numpy's own conversion of one element at a time.

    Sign and magnitude move to their places in float32, whose exponent must then be 112 larger. Multiplying by 2**112 is
    exact for normal and subnormal numbers. A buffer with infinities or NaN goes through numpy.
    """
    if not all_finite("F16", raw):
        np.copyto(out, raw)
        return
    bits = out.view(np.int32)
    np.copyto(bits, raw.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_MAGNITUDE, out=bits)
    np.multiply(out, _REBIAS, out=out)


def narrow(code: str, values: Float32, out: Array, bits: npt.NDArray[np.uint32]) -> None:
    """Round float32 to `code` once, to nearest even, into `out` (storage of `code`).

    `values` is overwritten for float16 and bfloat16. Magnitudes beyond the range become infinities, which the caller
    must check for. A NaN stays a NaN, perhaps another one.
    """
    if code == "F32":
        np.copyto(out, values)
    elif code == "F16":
        _narrow_half(values, out, bits)
    else:
        float_bits = values.view(np.uint32)
        np.right_shift(float_bits, 16, out=bits)
        np.bitwise_and(bits, 1, out=bits)
        np.add(bits, 0x7FFF, out=bits)
        np.add(bits, float_bits, out=bits)
        if values.size and np.isnan(values.max()):
            nan = np.isnan(values)
            bits[nan] = float_bits[nan] | 0x400000
        np.right_shift(bits, 16, out=bits)
        np.copyto(out, bits, casting="unsafe")


def _narrow_half(values: Float32, out: Array, bits: npt.NDArray[np.uint32]) -> None:
    """Narrow float32 to float16, twice as fast as numpy's own conversion of one element at a time.

    Normal numbers are rounded in integer arithmetic on their bits: half of the last place is added, less one if that
    place is even. Adding 0.5 to a magnitude below 2**-14, the smallest normal one, rounds it to a multiple of 2**-24,
    the unit of float16 in that range. Numbers that round to infinity, infinities and NaN go through numpy.
    """
    if values.size and not (values.max() < _ROUNDS_TO_INFINITY and values.min() > -_ROUNDS_TO_INFINITY):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(out, values, casting="same_kind")
        return
    half, magnitude = out.view(np.uint16), values.view(np.uint32)
    np.right_shift(magnitude, 16, out=bits)
    np.bitwise_and(bits, 0x8000, out=bits)
    np.copyto(half, bits, casting="unsafe")
    np.abs(values, out=values)
    np.right_shift(magnitude, 13, out=bits)
    np.bitwise_and(bits, 1, out=bits)
    np.add(bits, magnitude, out=bits)
    np.add(bits, _HALF_PLACE_AND_BIAS, out=bits)
    np.right_shift(bits, 13, out=bits)
    subnormal = values < _LEAST_NORMAL_HALF
    np.add(values, np.float32(0.5), out=values)
    np.subtract(magnitude, _BITS_OF_ONE_HALF, out=magnitude)
    np.copyto(bits, magnitude, where=subnormal)
    np.bitwise_or(half, bits, out=half, casting="unsafe")


def largest_magnitude(code: str, raw: Array) -> float:
    """The largest absolute value of finite elements; `raw` holds the storage of an arithmetic element type."""
    if code == "F32":
        return float(max(raw.max(), -raw.min()))
    bits = np.asarray((raw.view(np.uint16) & 0x7FFF).max())  # magnitudes sort like their bits
    return float(widen(code, bits.view(STORAGE[code]), np.empty((), np.float32)))


def all_finite(code: str, raw: Array) -> bool:
    """Whether no element is NaN or infinite; `raw` holds the storage of an arithmetic element type."""
    if code == "F32":
        return bool(np.isfinite(raw).all())
    if not raw.size:
        return True
    # As bits, infinity and NaN are the largest positive numbers and, with the sign bit, the largest numbers of all.
    infinity = 0x7C00 if code == "F16" else 0x7F80
    return bool(raw.view(np.int16).max() < infinity and raw.view(np.uint16).max() < 0x8000 | infinity)


def first_not_finite(code: str, values: Array) -> int:
    """Return the index of the first element that is not finite; there must be one."""
    low, high = 0, values.size
    while high - low > 1:
        middle = (low + high) // 2
        if all_finite(code, values[low:middle]):
            low = middle
        else:
            high = middle
    return low
