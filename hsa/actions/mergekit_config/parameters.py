"""The values of mergekit's parameters, and how the values of several scopes are combined.

A value is a scalar, a list of scalars over the layers, or a list of `{filter, value}`. In the last form, the first
entry whose filter is part of the tensor's name applies. mergekit looks up a parameter of a model in the model's own
parameters, then in those of its slice, of its module and of the whole file. mergekit's default applies if none of them
has a value for the tensor. The result is one value in the forms that settings take here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.actions.mergekit_config.merge_methods import Kind
from hsa.actions.mergekit_config.nodes import Node, given

Scalar = float | int | bool | str

_FLAGS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
"""Strings that mergekit accepts as flags, in lower case."""

_PATTERN = frozenset("*?[")


@dataclass(frozen=True)
class Case:
    """A value for the tensors whose names contain `filter`, or for all tensors if that is None.

    `values` is one scalar or, if the case `varies`, one or more scalars over the layers.
    """

    filter: str | None
    values: tuple[Scalar, ...]
    varies: bool

    @property
    def is_constant(self) -> bool:
        return all(value == self.values[0] for value in self.values)

    @property
    def plain(self) -> Any:
        """The value in the form of a setting: a number if all its values are equal, else a list over the layers."""
        return self.values[0] if self.is_constant else self.values


@dataclass(frozen=True)
class ScopedParameter:
    """A parameter as one scope sets it."""

    node: Node
    cases: tuple[Case, ...]
    warnings: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether it has a value for every tensor."""
        return bool(self.cases) and self.cases[-1].filter is None


def read_parameter(node: Node, kind: Kind) -> ScopedParameter:
    """Read a parameter's value of that kind. Raises RequestError if mergekit would not accept it."""
    content = node.value.content
    if isinstance(content, Mapping):
        entries = [node]
    elif isinstance(content, tuple):
        entries = list(node.items("values"))
        if not any(isinstance(each.value.content, Mapping) for each in entries):
            cases = (_over_layers(None, node, entries, kind),) if entries else ()
            return ScopedParameter(node, cases)
    else:
        return ScopedParameter(node, (Case(None, (_scalar(node, kind),), False),))
    return _filtered(node, entries, kind)


def check_form(node: Node) -> None:
    """Raise RequestError unless a value is one that some parameter could have."""
    read_parameter(node, "any")


def _filtered(node: Node, entries: Sequence[Node], kind: Kind) -> ScopedParameter:
    cases: list[Case] = []
    warnings: list[str] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry.value.content, Mapping):
            if number < len(entries):
                raise entry.error("has no filter; only the last entry may be a value for all other tensors")
            warnings.append(
                f"{entry.place} is taken for all other tensors; mergekit itself wants it as value: {entry.shown()}"
            )
            cases.append(Case(None, (_scalar(entry, kind),), False))
            break
        case, found = _case(entry, kind)
        warnings += found
        if case is None or (cases and cases[-1].filter is None):
            continue
        cases.append(case)
    return ScopedParameter(node, tuple(cases), tuple(warnings))


def _case(entry: Node, kind: Kind) -> tuple[Case | None, list[str]]:
    """Read an entry with a filter, and its warnings. A filter that is part of no name gives None and a warning."""
    keys = entry.mapping()
    if given(keys, "value") is None:
        raise entry.error("has no value; expected filter and value")
    unknown = [
        f"{each.place} is ignored, as mergekit ignores it"
        for key, each in keys.items()
        if key not in ("filter", "value")
    ]
    part = given(keys, "filter")
    if part is not None and not isinstance(part.value.content, str):
        raise part.error(f"must be a part of tensor names, got {part.shown()}; put it in quotes")
    text = None if part is None else str(part.value.content)
    value = keys["value"]
    content = value.value.content
    if isinstance(content, tuple):
        inner = list(value.items("numbers"))
        if not inner:
            raise value.error("is an empty list; give a value, or a value for each layer")
        case = _over_layers(text or None, value, inner, kind)
    else:
        case = Case(text or None, (_scalar(value, kind),), False)
    if text == "*":
        case = Case(None, case.values, case.varies)
    elif part is not None and _PATTERN & set(text or ""):
        unknown.append(
            f"{part.place} {part.shown()} is part of no tensor's name: mergekit looks for the filter as it stands, and "
            f"'*' alone means all"
        )
        return None, unknown
    return case, unknown


def _over_layers(part: str | None, node: Node, entries: Sequence[Node], kind: Kind) -> Case:
    values = tuple(_scalar(each, kind) for each in entries)
    return Case(part, values, len(values) > 1)


def _scalar(node: Node, kind: Kind) -> Scalar:
    content = node.value.content
    if kind == "number":
        return _number(node)
    if kind == "whole":
        number = _number(node)
        if not number.is_integer():
            raise node.error(f"must be a whole number, got {node.shown()}")
        return int(number)
    if kind == "text":
        return node.text("a text")
    if kind == "any":
        if content is None or isinstance(content, (tuple, Mapping)):
            raise node.error(f"must be a number, a flag or a text, got {node.shown()}")
        return content
    if isinstance(content, str) and content.lower() in _FLAGS:
        return _FLAGS[content.lower()]
    if isinstance(content, bool) or (isinstance(content, (int, float)) and content in (0, 1)):
        return bool(content)
    raise node.error(f"must be true or false, got {node.shown()}")


def _number(node: Node) -> float:
    content = node.value.content
    number = math.nan
    if isinstance(content, (int, float, str)) and not isinstance(content, bool):
        try:
            number = float(content)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise node.error(f"must be a finite number, got {node.shown()}")
    return number


# --- scopes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The tensors that a slice of a module covers.

    `stack` is their stack; None for all stacks. `layers` is their range of layers, both ends included; None for all
    layers. The last part has no end, because tensors after the layers belong to it.
    """

    stack: str | None = None
    layers: tuple[int, int | None] | None = None

    @property
    def condition(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.stack is not None:
            found["stack"] = self.stack
        if self.layers is not None:
            found["layers"] = self.layers
        return found


def chain(settings: Iterable[ScopedParameter], default: Scalar | None) -> Iterator[Case]:
    """The cases of one parameter in the order in which they are tried: those of the narrowest scope first, and the
    default last. Nothing follows a case for all tensors."""
    for setting in settings:
        yield from setting.cases
        if setting.is_complete:
            return
    if default is not None:
        yield Case(None, (default,), False)


def combined(parts: Sequence[tuple[Part, Sequence[Case]]]) -> Any:
    """The value of a setting: a number, a list over the layers, or a list of filters with a value for all others last.

    `parts` are the cases of each part of the model, in the order in which they are tried.
    """
    conditioned = [(part.condition, case) for part, cases in parts for case in cases]
    in_place = all(part.layers is None for part, _ in parts) or all(case.is_constant for _, case in conditioned)
    if in_place and len({tuple(cases) for _, cases in parts}) == 1:
        conditioned = [({}, case) for case in parts[0][1]]
    constants = {case.plain for _, case in conditioned if case.is_constant}
    complete = all(cases and cases[-1].filter is None for _, cases in parts)
    if complete and len(constants) == 1 and all(case.is_constant for _, case in conditioned):
        return next(iter(constants))
    entries = [_entry(condition, case) for condition, case in conditioned]
    if len(entries) == 1 and not isinstance(entries[0], dict):
        return entries[0]
    return tuple(entries)


def _entry(condition: Mapping[str, Any], case: Case) -> Any:
    """A case as an entry of a setting's list; a bare value where it is for all tensors."""
    named = {**condition, **({} if case.filter is None else {"filter": case.filter})}
    return {**named, "value": case.plain} if named else case.plain
