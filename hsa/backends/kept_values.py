"""What methods have computed from sources that stay in memory, kept for the merges that follow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from hsa.system.dtypes import Arrays

LIMIT = 256 << 20
"""Bytes of arrays that are kept. What comes when they are full is computed at each merge: merges ask for the same
values in the same order, so that to drop the oldest would be to keep none that is asked for again."""


class KeptValues:
    """Arrays by what they were computed from, up to a number of bytes. Several threads may use it.

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
        """The arrays of a key: those that are kept, else new ones."""
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
