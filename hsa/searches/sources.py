"""The models that a search merges: base and fine-tunes, with the same names for every method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.actions.source_arguments import as_several, source_names
from hsa.arguments import check_paths, check_values
from hsa.errors import RequestError, listed, shown
from hsa.evaluation.models import names_of, parse_model
from hsa.methods.base import BASE
from hsa.methods.registry import method_named
from hsa.option_names import option
from hsa.system.types import PathLike

AVERAGE = "linear"
"""The method of plain averages and soups."""

GivenSources = Mapping[str, Any] | Sequence[PathLike]
"""`{"base": B, "primary": M1, "secondary": M2}`, `{"base": B, "models": [M1, ...]}`, or a list of models."""


@dataclass(frozen=True)
class SearchSources:
    """Base, if there is one, and the fine-tunes in their order, with the names that tables show."""

    base: str | None
    models: tuple[str, ...]
    base_name: str
    names: tuple[str, ...]

    def arguments(self, method: str) -> dict[str, Any]:
        """The sources as the keywords of a merge by this method, with base if the method takes one.

        Example:
            >>> SearchSources("b", ("m1", "m2"), "b", ("m1", "m2")).arguments("linear")
            {'models': ['m1', 'm2']}
        """
        takes_base = method_named(method).contract.base != "none" and self.base is not None
        return {**({BASE: self.base} if takes_base else {}), "models": list(self.models)}

    def check(self, method: str) -> None:
        """Raise RequestError if a method does not take this number of models, or needs a base."""
        method_named(method).contract.check(method, base="base" in self.arguments(method), models=len(self.models))

    def name_of(self, number: int) -> str:
        """The name of a source by its number, -1 for base."""
        return self.base_name if number < 0 else self.names[number]

    @property
    def numbers(self) -> range:
        """The numbers of all sources: -1 for base, then those of the models."""
        return range(0 if self.base is None else -1, len(self.models))

    def path(self, number: int) -> str:
        path = self.base if number < 0 else self.models[number]
        assert path is not None
        return path


def sources_of(given: GivenSources) -> SearchSources:
    """Parse a caller's sources. RequestError for anything else, and for fewer than one model."""
    if isinstance(given, (str, bytes, os.PathLike)):
        raise RequestError(
            f"the sources are {shown(given)}; expected a list of models, or a mapping of roles to models"
        )
    named = dict(given) if isinstance(given, Mapping) else {"models": given}
    base: Any = named.pop(BASE, None)
    models = _models(named)
    check_paths(**({} if base is None else {BASE: base}))
    check_paths(**{f"model{number}": path for number, path in enumerate(models, 1)})
    paths = [*([] if base is None else [os.fspath(base)]), *map(os.fspath, models)]
    names = names_of([parse_model(path) for path in paths])
    first = len(paths) - len(models)
    return SearchSources(
        paths[0] if first else None, tuple(paths[first:]), names[0] if first else "", tuple(names[first:])
    )


def _models(named: dict[str, Any]) -> list[Any]:
    roles = [name for name in source_names() if name != BASE]
    by_role = [name for name in roles if named.get(name) is not None]
    models = named.pop("models", None)
    if models is not None and by_role:
        raise RequestError(
            f"{option('models')} and {option(by_role[0])} both say what is merged; give the models by "
            f"{option('models')} alone, or by their names"
        )
    if models is None:
        if by_role != roles[: len(by_role)]:
            raise RequestError(f"{option(roles[0])} is not given; give {listed(map(option, roles))}")
        models = [path for name in by_role for path in as_several(name, named[name])]
    unknown = sorted(named.keys() - set(roles))
    if unknown:
        raise RequestError(f"there is no source {shown(unknown[0])}; give base, {listed(roles)}, or base and models")
    check_values(models=models)
    if not models:
        raise RequestError(f"there is nothing to merge; give models by {option('models')}")
    return list(models)
