"""The command `hsa methods`: every method, or all that one declares."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from hsa.architectures.registry import with_heads
from hsa.cli import options, printing
from hsa.errors import listed, one_line
from hsa.methods import registry
from hsa.methods.descriptions import describe, models_text
from hsa.option_names import command_line

WIDTH = 80
"""Columns of what is printed."""

INDENT = "  "

PER_LAYER = "by tensor, layer or pattern in Python and YAML"
"""Values that no option of the command line has room for."""


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A method, to explain; else all are listed.")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """List the merge methods, or explain one: formula, sources, settings with their ranges, and commands."""
    if name is not None:
        described = describe(registry.method_named(name))
        printing.result(described if as_json else "\n".join(_explanation(described)), quiet=False)
        return
    if as_json:
        printing.result({"methods": [describe(each) for each in registry.methods().values()]}, quiet=False)
        return
    rows = [
        (each.name, one_line(each.title), each.contract.base, models_text(each.contract))
        for each in registry.methods().values()
    ]
    printing.result("\n".join(_table(("method", "title", "base", "models"), rows)), quiet=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table of at most `WIDTH` columns, whose second column takes further lines where it is long."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    gap = INDENT + INDENT[:1]
    widths[1] = min(widths[1], WIDTH - sum(widths) + widths[1] - len(gap) * (len(head) - 1))
    for row in (head, *rows):
        first, *more = textwrap.wrap(row[1], widths[1], break_on_hyphens=False) or [""]
        cells = [row[0], first, *row[2:]]
        yield gap.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for line in more:
            yield f"{' ' * widths[0]}{gap}{line}".rstrip()


def _explanation(described: Mapping[str, Any]) -> Iterator[str]:
    contract, uses = described["contract"], described["commands"]
    families = listed((family.title for family in with_heads()), "or")
    yield from _wrapped(f"{described['name']}: ", described["title"], indent=INDENT)
    yield ""
    facts = [
        ("formula", f"{described['formula']}{' (by the defaults)' if described['formula_of_defaults'] else ''}"),
        ("base", contract["base"]),
        ("models", _models(contract)),
        ("heads", f"needs a {families}" if described["needs_heads"] else ""),
        ("source", described["source"]),
        ("version", str(described["version"])),
    ]
    yield from _facts(facts)
    own = [each for each in described["settings"] if not each["of_every_method"]]
    every = [each for each in described["settings"] if each["of_every_method"]]
    for title, settings in (("Settings", own), ("Settings of every method", every)):
        if settings:
            yield from ("", f"{title}:")
            for each in settings:
                yield from _setting(each)
    yield from ("", "Commands:")
    yield from _facts(
        [
            ("hsa merge", "a whole checkpoint"),
            ("hsa merge --patch", "yes" if uses["patch"] else f"no: {uses['why_no_patch']}"),
            ("hsa sweep", "patches, or checkpoints with --full" if uses["patch"] else "checkpoints, with --full"),
            ("hsa.Merger", "yes" if uses["merger"] else "no: it works on whole tensors"),
            (
                "hsa inspect",
                "heads and their scores" if uses["shows_heads"] else "task vectors, conflicts, and what is decided",
            ),
        ]
    )


def _models(contract: Mapping[str, Any]) -> str:
    named = ", ".join(role["role"] for role in contract["named"])
    return f"{contract['models']} ({named})" if named else str(contract["models"])


def _facts(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Lines of a name and a text; what has no text is left out."""
    rows = [(name, text) for name, text in rows if text]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield from _wrapped(f"{INDENT}{name.ljust(width)}{INDENT}", text)


def _setting(each: Mapping[str, Any]) -> Iterator[str]:
    yield f"{INDENT}{command_line(each['argument'])}"
    about = ["required"] if each["required"] else []
    about += [f"default {each['default_text']}"] if each["default_text"] else []
    about += [each["range"]] if each["range"] else []
    about += [f"searched {each['search'][0]:g} to {each['search'][1]:g}"] if each["search"] else []
    about += ["repeat it to give each model its own"] if each["per_model"] else []
    about += [PER_LAYER] if each["per_layer"] else ["by tensor in Python"] if each["per_tensor"] else []
    about += ["hsa sweep takes several"] if each["sweep"] else []
    yield from _wrapped(INDENT * 3, each["help"])
    if about:
        yield from _wrapped(INDENT * 3, f"({'; '.join(about)})")


def _wrapped(start: str, text: str, indent: str | None = None) -> list[str]:
    """A text after `start`, in lines of at most `WIDTH` columns that break no word."""
    after = " " * len(start) if indent is None else indent
    return textwrap.wrap(
        one_line(text),
        WIDTH,
        initial_indent=start,
        subsequent_indent=after,
        break_long_words=False,
        break_on_hyphens=False,
    )
