"""The merge methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hsa.errors import RequestError, shown
from hsa.methods.base import Contract, Method, ModelRole
from hsa.methods.hsa import HsaSettings
from hsa.option_names import option

HSA = Method(
    name="hsa",
    title="Headwise Selective Attention (HSA) merge",
    contract=Contract(
        base="required",
        least=2,
        most=2,
        named=(
            ModelRole("primary", "Anchor fine-tune: kept wherever nothing is merged."),
            ModelRole("secondary", "Fine-tune blended into the selected heads."),
        ),
    ),
    Settings=HsaSettings,
)

_METHODS: Mapping[str, Method] = MappingProxyType({HSA.name: HSA})


def methods() -> Mapping[str, Method]:
    """Every method by its name.

    Example:
        >>> "hsa" in methods()
        True
    """
    return _METHODS


def method_named(name: str) -> Method:
    """The method of that name; RequestError, which lists the names, where there is none."""
    known = methods()
    if not isinstance(name, str) or name not in known:
        raise RequestError(f"{option('method')} must be one of {', '.join(known)}, got {shown(name)}")
    return known[name]
