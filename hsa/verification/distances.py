"""Distances between stored and recomputed tensors, for methods whose rounding differs between machines."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from hsa.planning.file_layout import Computed, Segment
from hsa.system.dtypes import STORAGE, Array, size, widen


@dataclass
class _Sums:
    """The sums of squares of one tensor's differences and of its expected values, one entry for each part.

    `edges` holds the bytes of elements that lie in two parts, by element number, as (place, found, expected).
    """

    differences: list[float] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    edges: dict[int, list[tuple[int, bytes, bytes]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, difference: float, expected: float) -> None:
        self.differences.append(difference)
        self.expected.append(expected)

    def add_edge(self, code: str, low: int, found: Array, expected: Array) -> None:
        """Keep some bytes of an element whose other bytes lie in other parts. Add the element once it is complete."""
        number, place = divmod(low, size(code))
        parts = self.edges[number]
        parts.append((place, found.tobytes(), expected.tobytes()))
        if sum(len(part) for _, part, _ in parts) == size(code):
            parts.sort()
            one, two = b"".join(part[1] for part in parts), b"".join(part[2] for part in parts)
            self.add(*_squares(code, np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)))
            del self.edges[number]


class TensorDistances:
    """Collects the parts of tensors. Several threads may add parts, in any order."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sums] = defaultdict(_Sums)
        self._lock = threading.Lock()

    def add(self, segment: Segment, start: int, found: Array, expected: Array) -> None:
        """Add a part of a computed tensor, from byte offset `start` on: uint8, as found and as recomputed."""
        assert isinstance(segment.content, Computed)
        code = segment.content.task.out_code
        width, stop = size(code), start + len(found)
        first, last = -(-start // width) * width, stop // width * width
        sums = None
        if first < last:
            inside = slice(first - start, last - start)
            sums = _squares(code, found[inside], expected[inside])
        edges = ((start, first), (last, stop)) if first <= last else ((start, stop),)
        with self._lock:
            own = self._sums[id(segment)]
            if sums is not None:
                own.add(*sums)
            for low, high in edges:
                if low < high:
                    own.add_edge(code, low, *(side[low - start : high - start] for side in (found, expected)))

    def distance(self, segment: Segment) -> float:
        """The norm of the differences over the norm of the recomputed tensor.

        0 if nothing differs; inf if the recomputed tensor is all zeros or something is not finite.
        """
        sums = self._sums[id(segment)]
        apart, norm = math.fsum(sums.differences), math.fsum(sums.expected)
        if apart == 0.0:
            return 0.0
        return math.sqrt(apart / norm) if norm > 0.0 and math.isfinite(apart) else math.inf


@np.errstate(all="ignore")
def _squares(code: str, found: Array, expected: Array) -> tuple[float, float]:
    """The sums of the squares of differences and of expected values, in float64."""
    values = []
    for raw in (found, expected):
        stored = np.ascontiguousarray(raw).view(STORAGE[code])
        values.append(widen(code, stored, np.empty(stored.shape, np.float32)).astype(np.float64))
    apart = values[0] - values[1]
    return float(np.dot(apart, apart)), float(np.dot(values[1], values[1]))
