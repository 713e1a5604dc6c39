"""The families of models that there are: one for each file of this package, and those of plugin files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from hsa.architectures.base import Architecture, not_of_families
from hsa.architectures.generic import GENERIC
from hsa.errors import RequestError, SourceError, listed, shown
from hsa.system.plugins import modules_of

DEFAULT = "whisper"
"""The family where nothing says which: of state dicts without a config, of a release without a model yet."""

NEEDED = ("name", "title", "tags", "model_types", "all_stacks", "blocks", "first_target", "width")
"""What every family says of itself."""


def architectures() -> Mapping[str, Architecture]:
    """Every family by its name. Raises RequestError where two share a name or a model_type."""
    families: dict[str, Architecture] = {}
    for module in modules_of("hsa.architectures"):
        for value in vars(module).values():
            if isinstance(value, Architecture):
                _check_whole(value, module)
                if families.get(value.name) is value:
                    continue
                _check_new(value, families)
                families[value.name] = value
    return families


def _check_whole(family: Architecture, module: ModuleType) -> None:
    """RequestError where a family lacks what hsa needs of it, so that its author learns so before any merge."""
    missing = [name for name in NEEDED if not hasattr(family, name)]
    if missing:
        raise RequestError(
            f"{module.__file__}: the family {type(family).__name__} has no {listed(missing)}; "
            f"docs/add-an-architecture.md shows what a family says"
        )


def _check_new(family: Architecture, families: Mapping[str, Architecture]) -> None:
    for other in families.values():
        if other.name == family.name or other.model_types & family.model_types:
            raise RequestError(
                f"two families of models are named {shown(family.name)} or have one model_type of "
                f"{', '.join(sorted(family.model_types))}; give the one of the plugin another name and model_type"
            )


def named(name: str) -> Architecture:
    """The family of this name, which must be there."""
    return architectures()[name]


def default() -> Architecture:
    """The family that is taken where nothing says which."""
    return named(DEFAULT)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family of the model that a `config.json` describes, by its `model_type`; `generic` where that is of none.

    Example:
        >>> architecture_of({"model_type": "llama"}).name
        'generic'
    """
    return next((family for family in architectures().values() if family.is_family_of(config)), GENERIC)


def architecture_of_names(names: Iterable[str]) -> Architecture:
    """The family of a model of which nothing but its tensor names is known: the default where it knows one of them.

    Example:
        >>> architecture_of_names(["model.encoder.conv1.weight"]).name
        'whisper'
    """
    family = default()
    known = any(family.knows(family.canonical(stored)) for stored in family.plain_names(names).values())
    return family if known else GENERIC


def with_heads() -> list[Architecture]:
    """The families whose attention heads are known."""
    return [family for family in architectures().values() if family.has_heads]


def not_with_heads(config: Mapping[str, Any], where: str) -> SourceError:
    """The error for a `config.json` that is of no family whose heads are known; `where` names the source."""
    return not_of_families(config, where, with_heads())
