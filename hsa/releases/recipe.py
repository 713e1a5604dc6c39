"""A release recipe: YAML that lists the merges of a tree. It is checked as a whole before any source is opened.

    title: ...                        # of the tree's index; may be left out
    defaults: {k: 0.6, card: {...}}   # any key of a merge, except its name
    merges:
      - name: ...                     # the tree's directory <group>/<name>
        group: ...
        base, primary, ...: ...       # directories, or hub ids; the last may be a list of them
        models: [...]                 # instead of primary and the others; the first is the anchor
        method: ...                   # hsa by default
        k, lambda, dtype, ...         # as on the command line of `hsa merge`, with underscores
        card: {role: ...}             # fields of the model card

A merge's own keys override the defaults, card fields one by one; `null` removes a default. A relative path is relative
to the recipe's own directory, never to the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hsa.actions.keywords import Call
from hsa.actions.request import Request, request_of
from hsa.actions.run_options import OutputOptions
from hsa.actions.source_arguments import missing_sources, several_names, source_names
from hsa.errors import RequestError, shown
from hsa.methods.base import BASE
from hsa.methods.registry import method_named
from hsa.methods.settings import DEFAULT_METHOD, declared
from hsa.option_names import LETTERS, as_keys, spelled
from hsa.outputs.card import FIELDS
from hsa.outputs.release_index import INDEX, README
from hsa.sources.hub.repository import parse_id
from hsa.system.fsio import SourceFile, Tally
from hsa.system.strict_yaml import Value, parse
from hsa.system.types import PathLike

MAX_BYTES = 256 << 10
"""The size of the largest recipe, which is enough for several hundred merges."""

MERGE_OF_A_RECIPE = Call("merge", options=frozenset(each.name for each in declared(OutputOptions)))
"""The arguments of a merge in a recipe: all except the output and the options of the run."""

_COMPONENT = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


@dataclass(frozen=True)
class RecipeEntry:
    """One merge of a recipe, and the line where it begins. `task` is the merge with `path` as its output."""

    group: str
    name: str
    line: int
    task: Request

    @property
    def path(self) -> str:
        """The path in the tree."""
        return f"{self.group}/{self.name}"

    @property
    def card(self) -> Mapping[str, str]:
        return self.task.card or {}

    def request(self, tree: Path, **how: Any) -> Request:
        """The merge into a tree; `how` are fields of a request that do not shape the output (threads, overwrite)."""
        return replace(self.task, output=tree / self.group / self.name, **how)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `where` is its name in messages."""

    where: str
    title: str | None
    entries: tuple[RecipeEntry, ...]


def keys() -> tuple[str, ...]:
    """The keys of a merge in a recipe that correspond to options of `hsa merge`."""
    return tuple(LETTERS.get(name, name) for name in MERGE_OF_A_RECIPE.names() if name != "output")


def shared_keys() -> tuple[str, ...]:
    """The keys that defaults may contain."""
    return ("group", *keys())


def load(path: PathLike) -> Recipe:
    """Read and check a recipe, without opening any source. Raises RequestError or SourceError with the faulty line."""
    where = Path(path)
    source = SourceFile(where, "recipe", Tally())
    try:
        if source.size > MAX_BYTES:
            raise RequestError(f"recipe {where} has {source.size} bytes, at most {MAX_BYTES} are read; split it")
        data = source.read(source.size)
    finally:
        source.close()
    return loads(data, str(where), Path(os.path.abspath(where)).parent)


def loads(data: bytes, where: str, folder: Path) -> Recipe:
    """The recipe in the bytes of a file; relative paths are relative to `folder`. See `load`."""
    document = _mapping(parse(data, where), where, "the recipe")
    _check_keys(document, ("title", "defaults", "merges"), where, "the recipe")
    defaults = _mapping(document["defaults"], where, "defaults") if "defaults" in document else {}
    _check_keys(defaults, shared_keys(), where, "defaults")
    merges = document.get("merges")
    if merges is None or not isinstance(merges.content, tuple) or not merges.content:
        raise RequestError(f"{where}: merges must be a list with at least one merge")
    title = document.get("title")
    entries = tuple(_entry(value, defaults, where, folder) for value in merges.content)
    _check_places(entries, where)
    return Recipe(where, None if title is None else _text(title, where, "title"), entries)


def _entry(value: Value, defaults: Mapping[str, Value], where: str, folder: Path) -> RecipeEntry:
    own = _mapping(value, where, "a merge")
    label = f"merge {_shown(own['name'])}" if "name" in own else "the merge"
    _check_keys(own, ("name", *shared_keys()), where, label)
    values = _values(defaults, own)
    names = {}
    for key in ("name", "group"):
        if key not in values:
            raise RequestError(f"{where}:{value.line}: {label} has no {key}")
        names[key] = _component(values[key], where, key)
    with _placed(values, value.line, where, label):
        contract = method_named(values["method"].plain() if "method" in values else DEFAULT_METHOD).contract
    for key in missing_sources(contract, values):
        raise RequestError(f"{where}:{value.line}: {label} has no {key}; name a directory or a hub id")
    keywords = _keywords(values, where, label, folder)
    card_fields = {"release_group": names["group"], **_card(defaults, own, where)}
    keywords["card"] = {name: card_fields[name] for name in FIELDS if name in card_fields}  # in provenance order
    with _placed(values, value.line, where, label):
        task = request_of(MERGE_OF_A_RECIPE, (), {**keywords, "output": Path(names["group"], names["name"])})
    return RecipeEntry(names["group"], names["name"], value.line, task)


def _values(defaults: Mapping[str, Value], own: Mapping[str, Value]) -> dict[str, Value]:
    """The effective values of a merge, without its card. Models given by name and models given as a list replace each
    other."""
    named = {name for name in source_names() if name != BASE}
    replaced = named if "models" in own else {"models"} if named & own.keys() else set()
    kept = {key: each for key, each in defaults.items() if key not in replaced}
    return {key: each for key, each in {**kept, **own}.items() if key != "card" and each.content is not None}


def _keywords(values: Mapping[str, Value], where: str, label: str, folder: Path) -> dict[str, Any]:
    """The arguments of the merge, as `hsa.merge` takes them."""
    names = {LETTERS.get(name, name): name for name in MERGE_OF_A_RECIPE.names()}
    keywords = {names[key]: each.plain() for key, each in values.items() if key in names}
    for name in (*source_names(), "models"):
        if name not in values:
            continue
        several, content = name == "models" or name in several_names(), values[name].content
        if several and isinstance(content, tuple):
            what = "model" if name == "models" else name
            keywords[name] = [
                _source(each, where, f"{what} {number} of {label}", folder) for number, each in enumerate(content, 1)
            ]
        elif name != "models":
            keywords[name] = _source(values[name], where, f"{name} of {label}", folder)
    return keywords


@contextmanager
def _placed(values: Mapping[str, Value], line: int, where: str, label: str) -> Iterator[None]:
    """Add the line to a RequestError raised inside, and let its message name arguments by the recipe's keys."""
    try:
        with spelled(as_keys(keys())):
            yield
    except RequestError as error:
        parameter = str(error).partition(" ")[0]  # the message begins with the parameter's name
        line = values[parameter].line if parameter in values else line
        raise RequestError(f"{where}:{line}: {label}: {error}") from error


def _card(defaults: Mapping[str, Value], own: Mapping[str, Value], where: str) -> dict[str, str]:
    fields: dict[str, Value] = {}
    for mapping in (defaults, own):
        if "card" in mapping and mapping["card"].content is not None:
            card = _mapping(mapping["card"], where, "card")
            _check_keys(card, FIELDS, where, "card")
            fields |= card
    return {name: _text(each, where, f"card field {name}") for name, each in fields.items() if each.content is not None}


def _source(value: Value, where: str, what: str, folder: Path) -> PathLike:
    """A path relative to the recipe's directory, or a hub id. A path that exists takes precedence."""
    text = _text(value, where, what)
    try:
        path = folder / Path(text).expanduser()
        exists = os.path.lexists(path)
    except (RuntimeError, ValueError) as error:
        raise RequestError(f"{where}:{value.line}: {what}: {shown(text, 120)} is no path: {error}") from error
    if exists or parse_id(text) is None:
        return path
    if os.path.lexists(text):
        raise RequestError(
            f"{where}:{value.line}: {what}: {text} is a hub id, for {folder} holds no such path, and also a path in "
            f"the working directory; start from elsewhere, or write ./ and the path from the recipe's directory"
        )
    return text


def _component(value: Value, where: str, what: str) -> str:
    text = _text(value, where, what)
    if not _COMPONENT.fullmatch(text) or "--" in text or ".." in text:
        raise RequestError(
            f"{where}:{value.line}: {what} {shown(text, 120)} must be a name that the Hub would take: at most 96 "
            f"letters, digits, '.', '_' and '-', with none of '.' and '-' at an end, and neither '--' nor '..'"
        )
    if what == "group" and text.lower() in (README.lower(), INDEX.lower()):
        raise RequestError(
            f"{where}:{value.line}: group {shown(text)} is the name of a file of the index; choose another"
        )
    return text


def _check_places(entries: Iterable[RecipeEntry], where: str) -> None:
    """Raise RequestError if two merges have the same path, or paths that differ only in case, which are the same on
    some filesystems."""
    groups: dict[str, RecipeEntry] = {}
    entries_by_path: dict[str, RecipeEntry] = {}
    for entry in entries:
        first = groups.setdefault(entry.group.lower(), entry)
        if first.group != entry.group:
            raise RequestError(
                f"{where}:{entry.line}: group {shown(entry.group)} differs from {shown(first.group)} (line "
                f"{first.line}) in capital letters alone, which some filesystems do not tell apart; choose one"
            )
        other = entries_by_path.setdefault(entry.path.lower(), entry)
        if other is not entry:
            raise RequestError(
                f"{where}:{entry.line}: {entry.path} would stand where {other.path} of line {other.line} does; give "
                f"one another name"
            )


def _mapping(value: Value, where: str, what: str) -> Mapping[str, Value]:
    if not isinstance(value.content, Mapping):
        raise RequestError(f"{where}:{value.line}: {what} must be a mapping of keys to values, got {_shown(value)}")
    return value.content


def _text(value: Value, where: str, what: str) -> str:
    if not isinstance(value.content, str) or not value.content.strip():
        hint = "; put it in quotes" if isinstance(value.content, (bool, int, float)) else ""
        raise RequestError(
            f"{where}:{value.line}: {what} must be a text that says something, got {_shown(value)}{hint}"
        )
    return value.content


def _shown(value: Value) -> str:
    if isinstance(value.content, Mapping):
        return "a mapping"
    return "a list" if isinstance(value.content, tuple) else shown(value.content)


def _check_keys(mapping: Mapping[str, Value], allowed: Iterable[str], where: str, what: str) -> None:
    for key, value in mapping.items():
        if key not in allowed:
            raise RequestError(f"{where}:{value.line}: {what} has the unknown key {shown(key)}; {_hint(key, allowed)}")


def _hint(key: str, allowed: Iterable[str]) -> str:
    names = list(allowed)
    if key in FIELDS and "card" in names:
        return f"it is a field of the model card: write card: {{{key}: ...}}"
    if key == "name":
        return "each merge has a name of its own"
    option_name = key.lower().replace("-", "_")
    close = [name for name in names if name[:3] == option_name[:3]] or get_close_matches(option_name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
