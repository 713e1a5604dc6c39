"""Choose primary and the secondaries among the models of a file with `merge_method: hsa`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hsa.errors import RequestError, listed, shown
from hsa.methods.hsa import PRIMARY, SECONDARY, Hsa
from hsa.sources.roles import Role

M = TypeVar("M")


def assign(others: Sequence[tuple[M, object]]) -> dict[Role, M]:
    """Choose which of the models besides base is primary, and which are secondaries.

    Args:
        others: in the YAML's order, each model with the role that its parameters name, or None. Primary is the model
            with that role, otherwise the first without a role; all others are secondaries in their order.

    Raises RequestError.

    Example:
        >>> assign([("a", None), ("b", "primary"), ("c", None)])
        {'primary': 'b', 'secondary': 'a', 'model3': 'c'}
    """
    contract = Hsa.contract
    if not contract.least <= len(others) <= contract.most:
        raise RequestError(
            f"merge_method {Hsa.name} merges {contract.least} to {contract.most} models besides base_model, primary "
            f"and secondaries, got {len(others)}"
        )
    for model, role in others:
        if role not in (None, PRIMARY, SECONDARY):
            raise RequestError(f"the role of {model} is {shown(role)}, expected primary or secondary")
    named = [number for number, (_, role) in enumerate(others) if role == PRIMARY]
    without = [number for number, (_, role) in enumerate(others) if role is None]
    if len(named) > 1 or not (named or without):
        models = listed([str(others[number][0]) for number in named] or [str(model) for model, _ in others])
        both = "both" if len(named or others) == 2 else "all"
        rest = "the other secondary" if len(others) == 2 else "the others secondaries"
        role = PRIMARY if named else SECONDARY
        raise RequestError(f"{models} {both} have the role {role}; one must be primary, {rest}")
    primary = (named or without)[0]
    ordered = [others[primary][0], *(model for number, (model, _) in enumerate(others) if number != primary)]
    return dict(zip(contract.roles(len(ordered)), ordered, strict=True))
