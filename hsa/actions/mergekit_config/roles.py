"""Which models of a file with `merge_method: hsa` are primary and secondary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hsa.errors import RequestError, shown
from hsa.sources.roles import Role

M = TypeVar("M")


def assign(others: Sequence[tuple[M, object]]) -> dict[Role, M]:
    """Which of the models besides base is primary and which secondary.

    Args:
        others: in the YAML's order, each model with the role that its parameters name, or None. A single name settles
            both; without any, the first is primary.

    Raises RequestError.
    """
    if len(others) != 2:
        raise RequestError(
            f"merge_method hsa merges two models besides base_model, primary and secondary, got {len(others)}"
        )
    for model, role in others:
        if role not in (None, "primary", "secondary"):
            raise RequestError(f"the role of {model} is {shown(role)}, expected primary or secondary")
    (first, one), (second, two) = others
    if one is not None and one == two:
        raise RequestError(f"{first} and {second} both have the role {one}; one must be primary, the other secondary")
    swapped = one == "secondary" or two == "primary"
    return {"primary": second, "secondary": first} if swapped else {"primary": first, "secondary": second}
