"""Bootstrap intervals of error rates, and of their differences, over utterances or over speakers.

Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from hsa.errors import RequestError, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Integers = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
"""How many times a group of utterances is drawn anew."""

BLOCK = 1 << 20
"""Units that are drawn at once, over some of the resamples."""


def check_confidence(confidence: float) -> None:
    """RequestError unless a confidence lies between 0 and 1.

    Example:
        >>> check_confidence(0.95)
    """
    is_number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not is_number or not 0 < confidence < 1:
        raise RequestError(f"confidence must be above 0 and below 1, such as 0.95, got {shown(confidence)}")


def resampled_sums(columns: Integers, key: str, seed: int) -> Integers:
    """Sums of each column over resamples of the rows, drawn with replacement: int64 [RESAMPLES, columns].

    `columns` is int64 [units, columns]. The draws depend on the number of units, `key` and `seed` alone: two models
    that were scored on the same units, in the same order, get the same draws, so that their differences pair.
    Uses numpy's Generator(PCG64).

    Example:
        >>> import numpy as np
        >>> resampled_sums(np.array([[1, 2], [1, 2]]), "all", 0)[0].tolist()
        [2, 4]
    """
    import numpy as np

    units, width = columns.shape
    entropy = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), "little")
    generator = np.random.Generator(np.random.PCG64([seed, entropy]))
    step = max(1, BLOCK // units)
    sums = np.empty((RESAMPLES, width), dtype=np.int64)
    for first in range(0, RESAMPLES, step):
        last = min(first + step, RESAMPLES)
        drawn = generator.integers(0, units, size=(last - first, units), dtype=np.uint32)
        for column in range(width):
            sums[first:last, column] = columns[:, column][drawn].sum(axis=1)
    return sums


def percentile_interval(values: Floats, confidence: float) -> tuple[float, float]:
    """The middle part of the values that holds `confidence` of them, with linear interpolation between values.

    Example:
        >>> import numpy as np
        >>> percentile_interval(np.arange(101.0), 0.9)
        (5.0, 95.0)
    """
    import numpy as np

    tail = (1 - confidence) / 2
    low, high = (float(end) for end in np.quantile(values, [tail, 1 - tail]))
    assert math.isfinite(low) and math.isfinite(high)
    return low, high
