"""Markdown for model cards: tables, lists, and texts from users and files as plain words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bullets(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of labels with their texts, which are Markdown already."""
    return "\n".join(f"- {label}: {text}" for label, text in pairs)


def escape(text: str) -> str:
    """Text from users and files as plain words in Markdown: no markup, no HTML, one line."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$-])", r"\\\1", flat)


def code(text: str) -> str:
    """Text from users and files for a code span, also inside a table."""
    return "".join(c if c.isprintable() and c not in "`|" else "?" for c in text)


def fence(text: str) -> str:
    """Text from users for a fenced block, made safe so that it cannot end the block."""
    return "".join(c for c in text if c.isprintable() or c == "\n").replace("```", "'''").strip()
