"""A cache of what methods compute from sources that stay in memory, for later merges."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from hsa.system.dtypes import Arrays

LIMIT = 256 << 20
"""The most bytes of arrays in the cache. Once it is full, further values are computed at each merge, and nothing is
evicted: merges request the same values in the same order, so evicting the oldest would lose each value before it is
requested again."""


class KeptValues:
    """A thread-safe cache of arrays by what they were computed from, up to a number of bytes.

    Example:
        >>> kept = KeptValues()
        >>> kept.of("ones", lambda: (np.ones(2),))
        (array([1., 1.]),)
        >>> kept.of("ones", lambda: (np.zeros(2),))
        (array([1., 1.]),)
    """

    def __init__(self, limit: int | None = None) -> None:
        self.nbytes = 0
        self._limit = LIMIT if limit is None else limit
        self._values: dict[Hashable, Arrays] = {}
        self._lock = threading.Lock()

    def of(self, key: Hashable, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of a key, from the cache or newly made."""
        value = self._values.get(key)
        if value is not None:
            return value
        value = make()
        size = sum(array.nbytes for array in value if array is not None)
        with self._lock:
            if key not in self._values and self.nbytes + size <= self._limit:
                self.nbytes += size
                self._values[key] = value
        return value
