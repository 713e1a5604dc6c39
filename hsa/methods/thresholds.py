"""The exact k-th largest magnitude of a tensor that is read block by block, found by counting bit patterns.

Magnitudes of float32 are in the order of their bits. A first pass counts the upper 16 bits of each. The counts give the
bin, out of 32,768, that contains the k-th largest magnitude, and its rank in that bin. A second pass counts the lower
16 bits of the elements in that bin. Counts of blocks may be added in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

HALF = 1 << 16
"""The number of patterns of 16 bits."""


@dataclass(frozen=True)
class Counts:
    """The number of elements in each bin that is not empty: `bins` in ascending order, and their `counts`."""

    bins: Array
    counts: Array

    @classmethod
    def of(cls, counts: Array) -> Counts:
        """From the counts of all bins from 0 on."""
        import numpy as np

        bins = np.flatnonzero(counts)
        return cls(bins.astype(np.uint16), counts[bins].astype(np.uint32 if counts.sum() < 1 << 32 else np.int64))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def at_least(self, bin: int) -> int:
        """The number of elements in a bin and in those above it."""
        import numpy as np

        return int(self.counts[np.searchsorted(self.bins, bin) :].sum())


@dataclass(frozen=True)
class Place:
    """The place of the k-th largest element: its bin, its `rank` among the largest in that bin, from 1, and the number
    of elements `above` that bin."""

    bin: int
    rank: int
    above: int


def upper_counts(magnitudes: Float32, room: Array) -> Counts:
    """The number of magnitudes for each pattern of their upper 16 bits.

    Args:
        magnitudes: contiguous, of any shape; +0 and above, no NaN.
        room: 64 bits for each element, which are overwritten.
    """
    import numpy as np

    upper = room.reshape(-1).view(np.int64)
    np.copyto(upper, magnitudes.reshape(-1).view(np.uint16)[1::2])
    return Counts.of(np.bincount(upper))


def lower_counts(magnitudes: Float32, upper: int, room: Array) -> Counts:
    """The number of magnitudes for each pattern of their lower 16 bits, among those whose upper 16 bits are `upper`;
    see `upper_counts`."""
    import numpy as np

    bits = magnitudes.reshape(-1).view(np.uint32)
    lower = room.reshape(-1).view(np.uint32)[: bits.size]
    inside = room.reshape(-1).view(np.bool_)[4 * bits.size :][: bits.size]
    np.subtract(bits, np.uint32(upper * HALF), out=lower)  # those of smaller magnitudes wrap around
    np.less(lower, np.uint32(HALF), out=inside)
    return Counts.of(np.bincount(lower[inside]))


def merged(parts: Iterable[Counts]) -> Counts:
    """The counts of several blocks together."""
    import numpy as np

    counts = np.zeros(HALF, np.int64)
    for part in parts:
        counts[part.bins] += part.counts
    return Counts.of(counts)


def locate(counts: Counts, rank: int) -> Place:
    """The place of the `rank`-th largest element; ranks go from 1 to the number of elements.

    Example:
        >>> import numpy as np
        >>> locate(Counts(np.array([10, 12]), np.array([5, 2])), 3)
        Place(bin=10, rank=1, above=2)
    """
    import numpy as np

    at_least = np.cumsum(counts.counts[::-1], dtype=np.int64)  # from the largest bin on: in it and above
    back = int(np.searchsorted(at_least, rank))
    above = int(at_least[back - 1]) if back else 0
    return Place(int(counts.bins[len(counts.bins) - 1 - back]), rank - above, above)


def value_of(upper: int, lower: int) -> float:
    """The magnitude with these bits.

    Example:
        >>> value_of(0x3F80, 0)
        1.0
    """
    import numpy as np

    return float(np.array([upper * HALF + lower], np.uint32).view(np.float32)[0])
