"""Durations in command-line notation: 90s, 30m, 2h, or 1h30m."""

from __future__ import annotations

import re

from hsa.errors import RequestError, shown
from hsa.option_names import option

_DURATION = re.compile(r"(?:(?P<h>\d{1,4})h)?(?:(?P<m>\d{1,6})m)?(?:(?P<s>\d{1,8})s)?")


def seconds_of(duration: str | float) -> float:
    """The seconds of a duration; a number is in seconds. RequestError for anything else, and for an empty text.

    Example:
        >>> seconds_of("1h30m")
        5400.0
    """
    if isinstance(duration, (int, float)) and not isinstance(duration, bool) and duration > 0:
        return float(duration)
    found = _DURATION.fullmatch(duration.strip()) if isinstance(duration, str) else None
    parts = {unit: int(value) for unit, value in found.groupdict().items() if value} if found else {}
    seconds = float(parts.get("h", 0) * 3600 + parts.get("m", 0) * 60 + parts.get("s", 0))
    if seconds <= 0:
        raise RequestError(f"{option('time')} must be a duration such as 90s, 30m or 2h, got {shown(duration)}")
    return seconds
