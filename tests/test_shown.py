"""How values are shown in messages: in bounded length, time and memory, and nowhere by `repr` itself."""

from __future__ import annotations

import ast
import resource
from collections import OrderedDict
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from peak_memory import with_peak

from hsa.errors import shown

ROOT = Path(__file__).resolve().parents[1]

ALLOWED = {
    "hsa/__init__.py": (2, "the module's name, and that of an attribute which source code asks it for"),
    "hsa/errors.py": (4, "`shown` itself, which cuts a value before it asks for its repr"),
    "hsa/option_names.py": (1, "a value that a message's own source code proposes, such as True"),
    "hsa/testing/whisper_checkpoints.py": (
        2,
        "arguments of developers; it imports nothing that it tests",
    ),
    "hsa/testing/whisper_config.py": (1, "the same"),
    "hsa/outputs/grid_point.py": (1, "a float, written with all its digits for decimal arithmetic"),
    "hsa/searches/best.py": (1, "the arguments of the call of Python that repeats a merge"),
    "hsa/views/csv_file.py": (1, "a float, written with all its digits for a table"),
}
"""Files that may call `repr` or write `!r`: how often, and of what."""


class Explosive:
    def __repr__(self) -> str:
        raise AssertionError("asked for its repr")

    def __str__(self) -> str:
        raise AssertionError("asked for its text")


def shared(kind: Callable[[list[Any]], Any], levels: int = 60) -> Any:
    """A container that holds another twice, and so on down: 2**levels items for whoever walks them."""
    value = kind([])
    for level in range(levels):
        value = kind([value, value] if kind is not frozenset else [value, level])
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


HOSTILE: dict[str, Callable[[], Any]] = {
    "shared tuples": lambda: shared(tuple),
    "shared lists": lambda: shared(list),
    "shared sets": lambda: shared(frozenset),
    "shared dicts": lambda: shared(lambda items: dict(enumerate(items))),
    "a list that holds itself": endless,
    "many items": lambda: list(range(10**6)),
    "many keys": lambda: dict.fromkeys(range(10**6)),
    "keys that compare slowly": lambda: {shared(tuple, 24), ()},
    "a number": lambda: 10**50_000,
    "a negative number": lambda: -(10**50_000),
    "numbers": lambda: [10**50_000] * 9,
    "a decimal": lambda: Decimal("1" * 50_000),
    "a fraction": lambda: Fraction(10**50_000 + 1, 10**50_000),
    "a text": lambda: "x" * 10**7,
    "a wide text": lambda: "\U0001f600" * 10**6,
    "half characters": lambda: "\ud800" * 10**6,
    "bytes": lambda: b"\xff" * 10**7,
    "a bytearray": lambda: bytearray(10**7),
    "a path": lambda: Path("x" * 10**6),
    "an object": Explosive,
    "objects": lambda: {Explosive(): [Explosive()]},
    "a tensor": lambda: torch.zeros(1000, 1000),
    "an array": lambda: np.zeros((1000, 1000)),
    "a class with a long name": lambda: type("x" * 10**6, (), {}),
    "an object of a class with a long name": lambda: type("x" * 10**6, (), {})(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_value_is_shown_in_bounded_length_time_and_memory(name: str) -> None:
    value = HOSTILE[name]()
    str(value) if isinstance(value, Path) else None  # a path keeps its text once it was asked for it
    before = resource.getrusage(resource.RUSAGE_SELF)
    text = shown(value)
    after = resource.getrusage(resource.RUSAGE_SELF)
    bound = 200_000
    _, peak = with_peak(lambda: shown(value), bound)
    assert 0 < len(text) <= 80
    assert peak < bound
    assert after.ru_utime - before.ru_utime < 0.5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"k": [1, 2.5, None, True]}, "{'k': [1, 2.5, None, True]}"),
        ((1,), "(1,)"),
        ((), "()"),
        ({1}, "{1}"),
        ([1, 2, 3, 4, 5, 6, 7], "[1, 2, 3, 4, 5, 6, ...]"),
        ([[[[1]]]], "[[[[...]]]]"),
        ("it's", '"it\'s"'),
        (b"x", "b'x'"),
        (OrderedDict(a=1), "{'a': 1}"),
        (MappingProxyType({"a": 1}), "{'a': 1}"),
        (np.float32(0.5), "0.5"),
        (np.float64(0.1), "0.1"),
        (np.int64(3), "3"),
        (np.bool_(True), "True"),
        (np.str_("x"), "'x'"),
        (PurePosixPath("a/b"), "'a/b'"),
        (Decimal("0.10"), "0.10"),
        (Fraction(1, 3), "1/3"),
        (float, "<class float>"),
        (torch.float16, "torch.float16"),
        (torch.device("cuda", 1), "cuda:1"),
        (torch.Size([2, 3]), "(2, 3)"),
        (float("nan"), "nan"),
        (object(), "<object>"),
    ],
)
def test_a_plain_value_is_shown_as_people_write_it(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_huge_number_is_shown_by_its_size() -> None:
    assert shown(10**5000) == "<a whole number of 16610 bits>"


def test_a_long_text_is_cut_and_says_so() -> None:
    assert shown("x" * 100, 20) == "'" + "x" * 16 + "..."


def test_no_message_shows_a_value_by_its_whole_repr() -> None:
    """A repr is built whole before a format such as `:.80` cuts it: messages show values by `hsa.errors.shown`."""
    files = sorted((ROOT / "hsa").rglob("*.py"))
    found = {str(file.relative_to(ROOT)): list(_reprs(ast.parse(file.read_text(encoding="utf-8")))) for file in files}
    offending = {name: lines for name, lines in found.items() if len(lines) > ALLOWED.get(name, (0, ""))[0]}
    assert not offending, "use hsa.errors.shown(value) in these lines"
    fewer = {name: len(found[name]) for name, (count, _) in ALLOWED.items() if len(found[name]) < count}
    assert not fewer, "these files need fewer exceptions than they have"


def _reprs(tree: ast.AST) -> Iterator[int]:
    """Lines in which a value is shown by its repr or ascii: `!r`, `!a`, `%r`, and the functions themselves."""
    for node in ast.walk(tree):
        converted = isinstance(node, ast.FormattedValue) and node.conversion in (ord("r"), ord("a"))
        called = isinstance(node, ast.Name) and node.id in ("repr", "ascii")
        template = isinstance(node, ast.Constant) and isinstance(node.value, str) and ("%r" in node.value)
        if converted or called or template:
            assert isinstance(node, ast.expr)
            yield node.lineno
