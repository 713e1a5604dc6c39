"""Bootstrap intervals of error rates, and of their differences, over utterances or over speakers.

Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hsa.errors import RequestError, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Integers = npt.NDArray[np.int64]
    Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
"""The number of resamples of a group's units."""

FEWEST_RESAMPLES = 1000

MAX_DRAWS = 1_000_000_000
"""Maximum draws of all resamples of a group together; they take about 20 s. Groups of more than 100,000 units get fewer
resamples, but never fewer than FEWEST_RESAMPLES. Their intervals are narrow anyway."""

BLOCK = 1 << 20
"""Draws in memory at once: 24 MB."""


def check_confidence(confidence: float) -> None:
    """Raise RequestError unless a confidence lies between 0 and 1.

    Example:
        >>> check_confidence(0.95)
    """
    is_number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not is_number or not 0 < confidence < 1:
        raise RequestError(f"confidence must be above 0 and below 1, such as 0.95, got {shown(confidence)}")


def check_seed(seed: int) -> None:
    """Raise RequestError unless a seed of resamples is a whole number of at least 0.

    Example:
        >>> check_seed(0)
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise RequestError(f"seed must be a whole number of at least 0, got {shown(seed)}")


def number_of_resamples(units: int) -> int:
    """The number of resamples for a group of this many units.

    Example:
        >>> number_of_resamples(60), number_of_resamples(500_000)
        (10000, 2000)
    """
    return max(FEWEST_RESAMPLES, min(RESAMPLES, MAX_DRAWS // units))


def resampled_sums(units: Integers, seed: int) -> Floats:
    """Sums of each column over resamples of the rows, drawn with replacement.

    `units` is int64 [units, columns]. The result is float64 [resamples, columns] and contains whole numbers. The draws
    are those of numpy's Generator(PCG64(seed)).integers. They depend only on `seed` and the number of units, so columns
    of two models on the same units are resampled together.

    Example:
        >>> import numpy as np
        >>> resampled_sums(np.array([[1, 2], [1, 2]]), 0)[0].tolist()
        [2.0, 4.0]
    """
    import numpy as np

    count, resamples = len(units), number_of_resamples(len(units))
    generator = np.random.Generator(np.random.PCG64(seed))
    values = units.astype(np.float64)  # sums below 2^53 are exact
    step = max(1, BLOCK // count)
    sums = np.empty((resamples, units.shape[1]))
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        drawn = generator.integers(0, count, size=(size, count))
        drawn += np.arange(size)[:, np.newaxis] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        sums[first : first + size] = times.astype(np.float64) @ values
    return sums


def percentile_interval(values: Floats, confidence: float) -> tuple[float, float]:
    """The central part of the values that contains the share `confidence` of them, interpolated linearly.

    Example:
        >>> import numpy as np
        >>> percentile_interval(np.arange(101.0), 0.9)
        (5.0, 95.0)
    """
    import numpy as np

    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
