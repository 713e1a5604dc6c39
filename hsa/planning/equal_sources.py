"""Finds the sources that hold equal values in a target tensor, up to the rounding of a narrower element type."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from hsa.methods.base import Method
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.system.dtypes import STORAGE, Array, narrow, widen

PIECE = 1 << 14
"""The number of elements that are compared at a time. Different models differ in the first of these pieces."""


def equal_pairs(task: TensorTask, raw: Mapping[str, Array]) -> frozenset[tuple[str, str]]:
    """The pairs of sources whose tensors hold the same values. `raw` holds the tensors' bytes, uint8, by role.

    A float32 tensor and one in float16 or bfloat16 count as equal if the float32 values round to the others.
    """
    alike = _same_bytes(task, raw)
    classes = list(dict.fromkeys(alike.values()))
    equal = {
        frozenset((one, two))
        for one, two in combinations(classes, 2)
        if task.sources[one].code != task.sources[two].code
        and _equal(task.sources[one].code, raw[one], task.sources[two].code, raw[two])
    }
    return frozenset(
        (one, two)
        for one, two in combinations(raw, 2)
        if alike[one] == alike[two] or frozenset((alike[one], alike[two])) in equal
    )


def _same_bytes(task: TensorTask, raw: Mapping[str, Array]) -> dict[str, str]:
    """For each source, the first one with the same bytes in the same element type. So eight equal sources take seven
    comparisons, not one for each pair."""
    first: dict[str, str] = {}
    for role in raw:
        code = task.sources[role].code
        others = (other for other in dict.fromkeys(first.values()) if task.sources[other].code == code)
        first[role] = next((other for other in others if _equal(code, raw[role], code, raw[other])), role)
    return first


def may_be_copied(task: TensorTask, method: Method[Any, Any], settings: Settings) -> bool:
    """Whether a tensor is copied if it is equal in all sources. To find out, the sources must be compared."""
    one_code = len({ref.code for ref in task.sources.values()}) == 1
    return task.merged and task.listed and task.layout != "heads" and one_code and method.copies_equal(settings)


def all_equal(task: TensorTask, pairs: frozenset[tuple[str, str]]) -> bool:
    """Whether these pairs of equal sources are all possible pairs."""
    roles = len(task.sources)
    return len(pairs) == roles * (roles - 1) // 2


def _equal(first: str, one: Array, second: str, two: Array) -> bool:
    if second == "F32" and first != "F32":
        first, one, second, two = second, two, first, one
    a, b = one.view(STORAGE[first]), two.view(STORAGE[second])
    pieces = (slice(start, start + PIECE) for start in range(0, a.size, PIECE))
    return all(_equal_piece(first, a[piece], second, b[piece]) for piece in pieces)


def _equal_piece(first: str, first_values: Array, second: str, second_values: Array) -> bool:
    """Whether two pieces have equal values. If only one of them is float32, it is the first."""
    if first == second:
        return bool(np.array_equal(first_values.view(np.uint8), second_values.view(np.uint8)))
    if first == "F32":
        rounded = np.empty(first_values.shape, STORAGE[second])
        narrow(second, first_values.copy(), rounded, np.empty(first_values.shape, np.uint32))
        return bool(np.array_equal(rounded.view(np.uint8), second_values.view(np.uint8)))
    a = widen(first, first_values, np.empty(first_values.shape, np.float32))
    b = widen(second, second_values, np.empty(second_values.shape, np.float32))
    return bool(np.array_equal(a, b))
