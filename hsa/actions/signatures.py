"""Signatures and documentation of calls, generated from the declarations of their arguments."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from hsa.actions.keywords import (
    CONFIG_FILE,
    Call,
    axes,
    positional_names,
)
from hsa.actions.source_arguments import id_names, several_names, source_names
from hsa.methods.base import BASE
from hsa.methods.registry import method_named
from hsa.methods.settings import DEFAULT_METHOD, Declared
from hsa.system.types import PathLike

BASE_HELP = "Pretrained model: a directory, org/name@revision, or OpenAI's .pt."
MODELS_HELP = "The models to merge, in their order; the first is the anchor."
IDS_HELP = "Hub ids to record instead of the names of directories or the ids fetched."

WIDTH = 120
"""Columns of a docstring."""

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def declared_keywords(call: Call) -> Callable[[F], F]:
    """Give a function with `**keywords` the signature and the documentation of a call.

    The function's own keywords come last. The documentation goes where the docstring says `{sources}`, `{settings}` or
    `{options}`.
    """

    def decorate(function: F) -> F:
        own = inspect.signature(function).parameters.values()
        named = [each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY]
        others = [each for each in own if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        signature = inspect.Signature([*others, *parameters(call), *named])
        function.__signature__ = signature  # type: ignore[attr-defined]
        function.__doc__ = _filled(function.__doc__ or "", call)
        return function

    return decorate


def documented(call: Call) -> Callable[[type[T]], type[T]]:
    """Give a class the documentation of the call whose arguments it takes, as `declared_keywords` does."""

    def decorate(owner: type[T]) -> type[T]:
        owner.__doc__ = _filled(owner.__doc__ or "", call)
        return owner

    return decorate


def _filled(doc: str, call: Call) -> str:
    for name, lines in _documentation(call).items():
        doc = doc.replace(f"        {{{name}}}\n", "".join(lines))
    return doc


def parameters(call: Call) -> Iterator[inspect.Parameter]:
    """The parameters of a call, except those that its function declares itself."""
    if call.sources == "positional":
        yield from (_by_position(name, None, _kind_of_source(name)) for name in positional_names(call))
        yield _keyword("method", DEFAULT_METHOD, str)
    if call.config:
        yield _keyword(CONFIG_FILE, None, PathLike | None)
    if call.sources == "named":
        yield from (_keyword(name, None, _kind_of_source(name)) for name in source_names())
    if call.method:
        yield _keyword("method", None, str | None)
    if call.sources != "none":
        yield _keyword("models", None, Sequence[PathLike] | None)
    positional = axes(call, method_named(DEFAULT_METHOD).Settings) if call.settings == "candidates" else ()
    for each in call.declared_settings():
        kind: Any = each.type
        if call.sources == "named":  # the object that it works on has its own values
            yield _keyword(each.name, None, kind | None)
        elif each.name in positional:
            yield _by_position(each.name, each.default, kind)
        elif call.grid and each.about.axis:
            yield _keyword(each.name, (each.default,), Sequence[kind])
        else:
            yield _keyword(each.name, each.default, kind)
    for each in call.declared_options():
        yield _keyword(each.name, each.default, each.type)
    if call.ids and call.sources != "none":
        for name in id_names():
            kind = str | Sequence[str | None] if name.removesuffix("_id") in several_names() else str
            yield _keyword(name, None, kind | None)
        yield _keyword("model_ids", None, Sequence[str | None] | None)


def _kind_of_source(name: str) -> Any:
    return PathLike | Sequence[PathLike] | None if name in several_names() else PathLike | None


def _by_position(name: str, default: Any, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)


def _keyword(name: str, default: Any, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _documentation(call: Call) -> dict[str, list[str]]:
    """The entries of a docstring for sources, settings and options."""
    contract = method_named(DEFAULT_METHOD).contract
    named = ((role.name, f"{role.help}{' Or a list of several.' * role.several}") for role in contract.named)
    sources = [(BASE, BASE_HELP), *named, ("models", MODELS_HELP)]
    ids = [(", ".join((*id_names(), "model_ids")), IDS_HELP)] if call.ids and call.sources != "none" else []
    settings = [(each.name, _setting_text(call, each)) for each in call.declared_settings()]
    options = [(each.name, with_roles(each.about.python or each.about.help)) for each in call.declared_options()]
    return {
        "sources": [_entry(*each) for each in sources],
        "settings": [_entry(*each) for each in settings],
        "options": [_entry(*each) for each in (*options, *ids)],
    }


def _setting_text(call: Call, each: Declared) -> str:
    text = with_roles(each.about.python or each.about.help)
    if call.grid and each.about.axis:
        return f"{text} A list of values."
    return f"{text} Or a mapping from every target tensor's name to its own value." if each.about.per_tensor else text


def with_roles(text: str) -> str:
    """A help text with the roles of the default method's sources in place of `{roles}`."""
    base, *models = source_names()
    return text.replace("{roles}", f"{', '.join(models)} or {base}")


def _entry(name: str, text: str) -> str:
    first = text[:1].lower() if text[1:2].islower() or text[1:2] == " " else text[:1]
    indent = " " * 8
    lines = textwrap.wrap(f"{name}: {first}{text[1:]}", WIDTH, initial_indent=indent, subsequent_indent=indent + "    ")
    return "\n".join(lines) + "\n"
