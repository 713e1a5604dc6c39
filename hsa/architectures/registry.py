"""The known families of models: one for each file of this package, and those of plugin files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from hsa.architectures.base import Architecture, not_of_families
from hsa.architectures.generic import GENERIC
from hsa.errors import RequestError, SourceError, listed, shown
from hsa.system.plugins import modules_of

DEFAULT = "whisper"
"""The family used if nothing specifies one: for state dicts without a config, or a release that has no model yet."""

NEEDED = ("name", "title", "tags", "model_types", "all_stacks", "blocks", "first_target", "width")
"""Attributes that every family must define."""


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
    """Raise RequestError if a family lacks a required attribute, so that its author learns this before any merge."""
    missing = [name for name in NEEDED if not hasattr(family, name)]
    if missing:
        raise RequestError(
            f"{module.__file__}: the family {type(family).__name__} has no {listed(missing)}; "
            f"docs/contributing/add-an-architecture.md shows what a family says"
        )


def _check_new(family: Architecture, families: Mapping[str, Architecture]) -> None:
    for other in families.values():
        if other.name == family.name or other.model_types & family.model_types:
            raise RequestError(
                f"two families of models are named {shown(family.name)} or have one model_type of "
                f"{', '.join(sorted(family.model_types))}; give the one of the plugin another name and model_type"
            )


def named(name: str) -> Architecture:
    """The family of this name, which must exist."""
    return architectures()[name]


def default() -> Architecture:
    """The family used if nothing specifies one."""
    return named(DEFAULT)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family of the model that a `config.json` describes, by its `model_type`; `generic` if no family has that
    type.

    Example:
        >>> architecture_of({"model_type": "llama"}).name
        'generic'
    """
    return next((family for family in architectures().values() if family.is_family_of(config)), GENERIC)


def architecture_of_names(names: Iterable[str]) -> Architecture:
    """The family of a model of which only the tensor names are known: the default if it knows one of them, else
    `generic`.

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
    """The error for a `config.json` of no family whose heads are known; `where` names the source."""
    return not_of_families(config, where, with_heads())
