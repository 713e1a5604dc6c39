"""The sources among the arguments of a call: their names, and the role of a method that each has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from hsa.arguments import check_values
from hsa.errors import RequestError
from hsa.methods.base import BASE, Contract
from hsa.methods.registry import method_named
from hsa.methods.settings import DEFAULT_METHOD
from hsa.option_names import option
from hsa.sources.roles import Role
from hsa.system.types import PathLike


def source_names() -> tuple[str, ...]:
    """The names of base and the models of the default method."""
    return (BASE, *(role.name for role in method_named(DEFAULT_METHOD).contract.named))


def several_names() -> frozenset[str]:
    """Those of `source_names` under which several models may be given."""
    return frozenset(role.name for role in method_named(DEFAULT_METHOD).contract.named if role.several)


def id_names() -> tuple[str, ...]:
    """The arguments that give an id to record for a source, by the roles of the default method."""
    return tuple(f"{name}_id" for name in source_names())


def missing_sources(contract: Contract, given: Collection[str]) -> list[str]:
    """The arguments for sources that a method needs but that were not given."""
    needed = [BASE] if contract.base == "required" else []
    if "models" not in given:
        named = [role.name for role in contract.named]
        needed += [*named, *(["models"] if len(named) < contract.least else [])]
    return [name for name in needed if name not in given]


def take_sources(contract: Contract, given: dict[str, Any]) -> tuple[dict[Role, Any], dict[Role, str | None]]:
    """Remove sources and ids from the arguments, and return them by role: base first, then the models in order."""
    if given.get(BASE, "") is None and contract.base != "required":
        del given[BASE]
    base = {BASE: given.pop(BASE)} if BASE in given else {}
    in_order = "models" in given
    named = [role.name for role in contract.named if role.name in given]
    models = _in_order(contract, named, given) if in_order else _by_name(contract, named, given)
    sources = {**base, **models}
    ids = {role: given.pop(f"{role}_id") for role in (*sources, *source_names()) if f"{role}_id" in given}
    for role in contract.named:
        if role.several and isinstance(ids.get(role.name), (list, tuple)):
            ids |= _ids_of_several(contract, role.name, len(models), ids[role.name])
    if "model_ids" in given:
        ids |= _ids_in_order(tuple(models), given.pop("model_ids"))
    return sources, ids


def as_several(name: str, source: Any) -> Sequence[Any]:
    """The sources that are given under one name. Raises RequestError for an empty list."""
    if not isinstance(source, (list, tuple)):
        return [source]
    if not source:
        raise RequestError(f"{option(name)} is an empty list; give a model, or several")
    return source


def _by_name(contract: Contract, names: Sequence[str], given: dict[str, Any]) -> dict[Role, Any]:
    """The models that are given under these names, by role; some names take several models."""
    several = {role.name for role in contract.named if role.several}
    models: dict[Role, Any] = {}
    for name in names:
        source = given.pop(name)
        sources = as_several(name, source) if name in several else [source]
        models |= zip(contract.roles_of(name, len(sources)), sources, strict=True)
    return models


def _ids_of_several(contract: Contract, name: str, models: int, ids: Sequence[Any]) -> dict[Role, str | None]:
    """The ids of the models that are given under one name, by role."""
    roles = contract.roles(models)[contract.roles(models).index(name) :] if name in contract.roles(models) else ()
    if len(ids) != len(roles):
        raise RequestError(
            f"{option(f'{name}_id')} must be as many as {name} models, got {len(ids)} for {len(roles)} models"
        )
    return dict(zip(roles, ids, strict=True))


def refuse_missing_base(method: str, missing: Sequence[str]) -> None:
    """Raise RequestError if only base is missing, which some methods need and others do not."""
    if list(missing) == [BASE]:
        raise RequestError(
            f"method {method} needs {option(BASE)}, the model that the others were trained from; give it"
        )


def _in_order(contract: Contract, named: Sequence[str], given: dict[str, Any]) -> dict[Role, PathLike]:
    """The models that are given in order, by role. `named` are those that are also given by name, which is an error."""
    if named:
        raise RequestError(
            f"{option('models')} and {option(named[0])} both say what is merged; give the models by "
            f"{option('models')} alone, or by their names"
        )
    models = given.pop("models")
    check_values(models=models)
    return dict(zip(contract.roles(len(models)), models, strict=True))


def _ids_in_order(roles: Sequence[Role], ids: Any) -> dict[Role, str | None]:
    check_values(model_ids=ids)
    if len(ids) != len(roles):
        raise RequestError(f"{option('model_ids')} must be as many as models, got {len(ids)} for {len(roles)} models")
    return dict(zip(roles, ids, strict=True))
