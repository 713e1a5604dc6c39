"""Read YAML strictly: plain values with their lines, no objects, and no aliases that expand to gigabytes.

The input is one document of mappings, lists and scalars. Refused, with the line: anchors and aliases (a few lines of
them can expand to gigabytes), tags, repeated keys, keys that are not text, dates, deep nesting, numbers of many digits,
and base-60 numbers (`12:30`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from hsa.errors import RequestError, is_text, shown

MAX_DEPTH = 16
"""The most levels of nested mappings and lists."""

MAX_VALUES = 20_000
"""The most keys, values and containers of a document: those of six hundred merges, which take half a second to read."""

MAX_NUMBER = 100
"""The most characters of a number. Python's time grows with their square, and beyond 4300 digits it raises
ValueError."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""A number in YAML 1.2 and to every reader, which this library's YAML 1.1 takes for text."""


@dataclass(frozen=True)
class Value:
    """A value and its line, counted from 1; in a mapping, the line of its key."""

    line: int
    content: str | int | float | bool | tuple[Value, ...] | Mapping[str, Value] | None

    def plain(self) -> Any:
        """The value without lines: dicts, lists and scalars."""
        if isinstance(self.content, Mapping):
            return {key: value.plain() for key, value in self.content.items()}
        if isinstance(self.content, tuple):
            return [value.plain() for value in self.content]
        return self.content


def parse(data: bytes, where: str) -> Value:
    """Parse the bytes of a file that messages call `where`; RequestError says what is wrong in which line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{where}:{line}: is not UTF-8 text; save it as UTF-8") from error
    try:
        _check_events(text, where)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise RequestError(f"{where}: is empty")
        return _value(node, where, _line(node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line_text = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise RequestError(
            f"{where}{line_text}: is not valid YAML: {problem}; see the line and the one above"
        ) from error


def _check_events(text: str, where: str) -> None:
    """Check the events before anything is built. Their parser keeps its own stack, so no input can make it recurse."""
    depth = documents = 0
    values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        values += isinstance(event, yaml.NodeEvent)
        if values > MAX_VALUES:
            raise RequestError(f"{where}:{line}: has more than {MAX_VALUES} keys and values; split it")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise RequestError(f"{where}:{line}: a second document begins; expected one")
        if isinstance(event, yaml.AliasEvent):
            raise RequestError(f"{where}:{line}: the alias *{event.anchor} is not allowed; write the value out")
        if getattr(event, "anchor", None):
            raise RequestError(f"{where}:{line}: the anchor &{event.anchor} is not allowed; write the values out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise RequestError(f"{where}:{line}: the tag {event.tag:.80} is not allowed; write a plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise RequestError(f"{where}:{line}: nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _value(node: Any, where: str, line: int) -> Value:
    if isinstance(node, yaml.MappingNode):
        return Value(line, dict(_pairs(node, where)))
    if isinstance(node, yaml.SequenceNode):
        return Value(line, tuple(_value(item, where, _line(item)) for item in node.value))
    if node.tag not in _PLAIN:
        kind = node.tag.rpartition(":")[2]
        raise RequestError(f"{where}:{_line(node)}: YAML takes {node.value:.80} for a {kind}; put it in quotes")
    exponent = node.style is None and _EXPONENT.fullmatch(node.value)
    if exponent or node.tag in _NUMBERS:
        _check_number(node.value, f"{where}:{_line(node)}")
    if exponent:
        return Value(line, float(node.value))
    if not is_text(node.value):
        raise RequestError(
            f"{where}:{_line(node)}: {shown(node.value)} holds half of a surrogate pair, which UTF-8 cannot write; "
            f"write the character itself"
        )
    try:
        return Value(line, yaml.constructor.SafeConstructor().construct_object(node))
    except ValueError as error:
        raise RequestError(f"{where}:{_line(node)}: {node.value:.80} is no number: {error}") from error


def _check_number(text: str, where: str) -> None:
    if len(text) > MAX_NUMBER:
        raise RequestError(
            f"{where}: {text:.20}... is a number of {len(text)} characters, at most {MAX_NUMBER} are read"
        )
    if ":" in text:
        raise RequestError(f"{where}: YAML takes {text} for a number to the base of 60; put it in quotes")


def _pairs(node: Any, where: str) -> Iterator[tuple[str, Value]]:
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = _line(key)
        name = _value(key, where, line).content
        if not isinstance(name, str):
            key_text = "a list or mapping" if isinstance(name, (tuple, Mapping)) else shown(name)
            raise RequestError(f"{where}:{line}: the key {key_text} is no text; put it in quotes if it is meant as one")
        if name in lines:
            raise RequestError(f"{where}:{line}: the key {shown(name)} stands in line {lines[name]} already")
        lines[name] = line
        yield name, _value(value, where, line)


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1
