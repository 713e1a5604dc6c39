"""Types that many modules share, and sizes given as text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from decimal import Decimal

from hsa.errors import RequestError, shown
from hsa.option_names import option

PathLike = str | os.PathLike[str]

Progress = Callable[[int, int], None]
"""Called now and then with the bytes done and the total bytes."""

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


SIZE_DIGITS = 40
"""The most characters of a size: more than any disk needs, few enough to compute with at once."""


_SIZE = re.compile(rf"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>{'|'.join(_UNITS)})")


def parse_size(size: str | int) -> int:
    """Return the bytes of a size such as 5GB (10**9), 500MiB (2**20) or 1000000; RequestError otherwise."""
    match = _SIZE.fullmatch(size.strip().upper()) if isinstance(size, str) and len(size) <= SIZE_DIGITS else None
    value = int(Decimal(match["number"]) * _UNITS[match["unit"]]) if match else 0
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    if not 1 <= value < 1 << 63:
        raise RequestError(
            f"{option('max_shard_size')} must be a size such as 5GB or 500MiB, below 2^63 bytes, got {shown(size)}"
        )
    return value
