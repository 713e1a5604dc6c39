"""The settings that limit a merge to a part of the model: patterns of names, ranges of layers, and a stack."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hsa.errors import RequestError, shown

_RANGES = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")

MOST_PATTERNS = 100
"""The most patterns that one setting may have. Each is matched against every tensor's name."""


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """Shell patterns of canonical tensor names. A single pattern may be given as a text. Raises RequestError for
    others.

    Example:
        >>> patterns("only", "encoder.*")
        ('encoder.*',)
    """
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, Sequence) or not all(isinstance(each, str) and each for each in entries):
        raise RequestError(
            f"{name} must be a pattern of tensor names such as 'encoder.*', or several, got {shown(value)}"
        )
    if len(entries) > MOST_PATTERNS:
        raise RequestError(f"{name} has {len(entries)} patterns, at most {MOST_PATTERNS} are taken")
    return tuple(each.removeprefix("model.") for each in entries)


def layer_ranges(name: str, value: Any) -> str | None:
    """Numbers and ranges of layers, counted from 0, both ends included: `4-11`, `0,3`. Raises RequestError for others.

    Example:
        >>> layer_ranges("layers", " 4-11")
        '4-11'
    """
    if value is None:
        return None
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    text = text.replace(" ", "") if isinstance(text, str) else text
    if not isinstance(text, str) or not _RANGES.fullmatch(text):
        raise RequestError(f"{name} must be layers such as '4-11' or '0,3', counted from 0, got {shown(value)}")
    for first, last in _ends(text):
        if first > last:
            raise RequestError(f"{name} {shown(value)} has the range {first}-{last}, which ends before it begins")
    return text


def stack_name(name: str, value: Any) -> str | None:
    """The name of a stack of layers, such as `encoder`. Raises RequestError for anything but a text."""
    if value is not None and not (isinstance(value, str) and value):
        raise RequestError(f"{name} must be the name of a stack of layers such as 'encoder', got {shown(value)}")
    text: str | None = value
    return text


def in_ranges(layer: int, text: str) -> bool:
    """Whether a layer is in ranges that `layer_ranges` gave.

    Example:
        >>> in_ranges(7, "0,4-11")
        True
    """
    return any(first <= layer <= last for first, last in _ends(text))


def _ends(text: str) -> list[tuple[int, int]]:
    parts = [part.partition("-") for part in text.split(",")]
    return [(int(first), int(last or first)) for first, _, last in parts]
