"""The decision to copy: a tensor that is equal in all sources keeps the anchor's values, whatever the method is.

Code that handles decisions calls these functions instead of the method, which never sees this decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class _Copied:
    """The decision to copy, a singleton."""

    def __repr__(self) -> str:
        return "COPIED"

    def __reduce__(self) -> str:
        return "COPIED"


COPIED = _Copied()

_ENTRY = {"copied": True}


def decision_dict(method: Any, decision: Any) -> dict[str, Any]:
    """The decision as the provenance records it."""
    recorded: dict[str, Any] = dict(_ENTRY) if decision is COPIED else method.as_dict(decision)
    return recorded


def decision_from(method: Any, entry: Mapping[str, Any], groups: int, settings: Any) -> Any:
    """The decision that the provenance records. Raises the same errors as `Method.from_dict`."""
    return COPIED if entry == _ENTRY else method.from_dict(entry, groups, settings)


def untouched_groups(method: Any, groups: int, decision: Any) -> frozenset[int]:
    """The groups of a tensor that keep the anchor's values. `groups` is the number of its groups."""
    untouched: frozenset[int] = frozenset(range(groups)) if decision is COPIED else method.untouched(groups, decision)
    return untouched
