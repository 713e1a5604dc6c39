"""The merge methods by name: those that modules of this package define, and those of plugins."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

from hsa.errors import RequestError, listed, shown
from hsa.methods.base import Method
from hsa.methods.settings import declared
from hsa.option_names import option
from hsa.system.plugins import VARIABLE, modules_of

# fmt: off
TAKEN = frozenset((
    "add_tag", "assets", "assets_from", "backend", "base", "batch", "card", "config", "debug", "device", "digest",
    "dry_run", "eval", "full", "hash", "help", "ids", "jobs", "json", "language", "limit", "max_shard_size",
    "method", "model", "model_id", "model_ids", "models", "name", "normalizer", "output", "overwrite", "patch",
    "progress", "quiet", "settings", "sources", "strict", "sync", "threads", "version",
))
# fmt: on
"""Names that no setting may have, because calls and commands have arguments of these names."""

AnyMethod = Method[Any, Any]


def methods() -> Mapping[str, AnyMethod]:
    """Every method by its name, in the order of names.

    Example:
        >>> "hsa" in methods()
        True
    """
    return _methods(modules_of("hsa.methods"))


def method_named(name: str) -> AnyMethod:
    """The method of that name. If there is none, raises RequestError, which lists the names."""
    known = methods()
    if not isinstance(name, str) or name not in known:
        raise RequestError(
            f"{option('method')} must be one of {', '.join(known)}, got {shown(name)}; a method in a file of its own "
            f"is known where {VARIABLE} names the file"
        )
    return known[name]


@cache
def _methods(modules: tuple[ModuleType, ...]) -> Mapping[str, AnyMethod]:
    by_name: dict[str, AnyMethod] = {}
    for module in modules:
        for each in _classes(module):
            _check_whole(each, module)
            if each.name in by_name:
                other = type(by_name[each.name]).__module__
                raise RequestError(
                    f"{module.__name__} defines the method {each.name}, and so does {other}; give one of them another "
                    f"name"
                )
            by_name[each.name] = each()
    return MappingProxyType(dict(sorted(by_name.items())))


def _check_whole(method: type[AnyMethod], module: ModuleType) -> None:
    """Raise RequestError if a method lacks a required attribute, so that its author learns this before any merge."""
    wrong = next(_lacking(method), None)
    if wrong:
        raise RequestError(f"{module.__file__}: the method {method.__name__} {wrong}")


def _lacking(method: type[AnyMethod]) -> Iterator[str]:
    missing = [name for name in ("name", "title", "Settings") if not hasattr(method, name)]
    if missing:
        yield f"has no {listed(missing)}; docs/contributing/add-a-method.md shows what a method says"
        return
    if isinstance(own := getattr(method.Settings, "method", ""), str) and own != method.name:
        yield f"is named {shown(method.name)}; say method = {shown(method.name)} in its Settings too"
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", method.name):
        yield f"is named {shown(method.name)}; use small letters, digits and underscores, for files are named after it"
    if type(method.version) is not int or method.version < 1:
        yield f"has the version {shown(method.version)}; expected a whole number from 1"
    taken = sorted(each.name for each in declared(method.Settings) if each.name in TAKEN)
    if taken:
        yield f"has the setting {shown(taken[0])}, which is an option of every run; give it another name"
    recording = ("as_dict", "from_dict", "longest")
    unsaid = [name for name in recording if getattr(method, name) is getattr(Method, name)]
    if 0 < len(unsaid) < len(recording):
        yield f"records its decisions in part; define {listed(unsaid)} too"


def _classes(module: ModuleType) -> Iterator[type[AnyMethod]]:
    """The methods that a module defines itself."""
    for each in vars(module).values():
        if not (inspect.isclass(each) and issubclass(each, Method)) or inspect.isabstract(each):
            continue
        if each.__module__ == module.__name__:
            yield each
