"""The search space: the numbers of each method's settings, their ranges, and the settings that a user fixes.

The methods' settings declare the ranges. `NAME=LOW:HIGH` gives another range, `NAME=VALUE` fixes a setting, and
`NAME=A,B,C` lets the search choose. NAME is `ties.density`, or `density` for every method that has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hsa.errors import RequestError, listed, shown
from hsa.methods.hsa import SECONDARY
from hsa.methods.registry import method_named
from hsa.methods.settings import Declared, check_value, declared
from hsa.option_names import LETTERS, option

DIGITS = 4
"""Significant digits of a drawn number, so that the command that repeats a merge is readable."""

BY_LAYER = ("lam", "alpha")
"""The settings that have separate values for each range of layers, as in SA Merge."""

Layers = tuple[int, int]
"""The first and the last layer of a range, both inclusive."""

Values = float | str | bool | int


@dataclass(frozen=True)
class Axis:
    """A number, or a choice, that a search draws.

    `name` is its name in the study. It is a value of `setting`, either for the model with this number or only for these
    layers.
    """

    name: str
    setting: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Values, ...] = ()
    model: int | None = None
    layers: Layers | None = None

    def rounded(self, value: Any) -> Any:
        """Round a drawn number to few digits, within the range."""
        if self.choices:
            return value
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def grid(self, count: int) -> list[Any]:
        """`count` values from the lowest to the highest, or all choices."""
        if self.choices:
            return list(self.choices)
        if count == 1:
            return [self.rounded(math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2)]
        shares = [number / (count - 1) for number in range(count)]
        if self.log:
            return [self.rounded(self.low * (self.high / self.low) ** share) for share in shares]
        return [self.rounded(self.low + (self.high - self.low) * share) for share in shares]


@dataclass(frozen=True)
class MethodSpace:
    """The drawn values of one method, and its fixed settings.

    `layer_of` gives the layer of each target of a method whose settings are given per tensor; `layers` counts them.
    """

    method: str
    axes: tuple[Axis, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    layer_of: Mapping[str, int] = field(default_factory=dict)
    layers: int = 0

    @property
    def planned(self) -> dict[str, Any]:
        """The fixed settings with which a Merger is created."""
        return {name: value for name, value in self.fixed.items() if is_planned(_declared(self.method)[name])}

    def settings(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The Python keywords of a merge, from the drawn values by axis name."""
        found: dict[str, Any] = dict(self.fixed)
        for axis in self.axes:
            value = axis.rounded(drawn[axis.name])
            if axis.model is not None:
                found.setdefault(axis.setting, []).append(value)
            elif axis.layers is not None:
                found.setdefault(axis.setting, []).append({"layers": list(axis.layers), "value": value})
            else:
                found[axis.setting] = value
        by_layer = {axis.setting for axis in self.axes if axis.layers is not None}
        return {name: self._by_layer(name, value) if name in by_layer else value for name, value in found.items()}

    def defaults(self) -> dict[str, float | str] | None:
        """The method's own defaults as axis values by name; None if one is outside its range."""
        drawn: dict[str, Any] = {}
        for axis in self.axes:
            each = _declared(self.method)[axis.setting]
            value = each.default
            if axis.choices:
                inside = value in axis.choices
            else:
                inside = isinstance(value, (int, float)) and axis.low <= value <= axis.high
            if not inside:
                return None
            drawn[axis.name] = value
        return drawn

    def _by_layer(self, name: str, entries: Sequence[Mapping[str, Any]]) -> Any:
        """The values of layer ranges in the form of the setting: by tensor names, or by layers."""
        if not _declared(self.method)[name].about.scheduled:
            return {
                tensor: next(each["value"] for each in entries if each["layers"][0] <= layer <= each["layers"][1])
                for tensor, layer in self.layer_of.items()
            }
        last = entries[-1]
        return [*entries[:-1], {**last, "layers": [last["layers"][0], None]}]


def is_planned(each: Declared) -> bool:
    """Whether all candidates of a Merger share the setting."""
    return each.about.structural or not each.about.patchable


def space_of(method: str, models: int, given: Mapping[str, Sequence[str]]) -> MethodSpace:
    """The space of a method for this number of models. `given` are the texts of `--space` by the setting's name.

    Raises RequestError for values that the setting cannot have.
    """
    known = _declared(method)
    axes: list[Axis] = []
    fixed: dict[str, Any] = {}
    for each in known.values():
        texts = given.get(each.name)
        if texts is not None:
            drawn, value = _read(method, each, texts[-1])
            if drawn is None:
                fixed[each.name] = value
            else:
                axes += _for_models(drawn, each, models)
        elif each.about.search is not None:
            low, high = each.about.search
            axis = Axis(f"{method}.{each.key}", each.name, low, high, each.about.search_log)
            axes += _for_models(axis, each, models)
        elif each.about.required:
            raise RequestError(
                f"method {method} needs {each.key}, which has no range; give it a range or a value, such as "
                f"{option('space', f'{method}.{each.key}=LOW:HIGH')}"
            )
    return MethodSpace(method, tuple(axes), fixed)


def check_layered(space: MethodSpace) -> None:
    """Raise RequestError if a method draws nothing that could have a value for each range of layers."""
    if not any(axis.setting in BY_LAYER for axis in space.axes):
        raise RequestError(
            f"{option('by_layer')} gives each range of layers a lambda and alpha of its own, but the search draws "
            f"neither for method {space.method}"
        )


def with_layers(space: MethodSpace, ranges: Sequence[Layers], layer_of: Mapping[str, int]) -> MethodSpace:
    """The space with a value for each range of layers, for the settings that have these in SA Merge.

    Raises RequestError if the ranges leave out a layer.
    """
    layers = 1 + max(layer_of.values(), default=-1)
    if not ranges or ranges[-1][1] < layers - 1:
        raise RequestError(
            f"the ranges of {option('by_layer')} must reach layer {layers - 1}, the last of method {space.method}"
        )
    axes: list[Axis] = []
    for axis in space.axes:
        if axis.setting in BY_LAYER and axis.model is None:
            axes += [replace(axis, name=f"{axis.name}[{first}-{last}]", layers=(first, last)) for first, last in ranges]
        else:
            axes.append(axis)
    return replace(space, axes=tuple(axes), layer_of=dict(layer_of), layers=layers)


def parse_layers(text: str) -> tuple[Layers, ...]:
    """Parse consecutive ranges of layers, `0-3,4-7`. RequestError for others.

    Example:
        >>> parse_layers("0-3,4-7")
        ((0, 3), (4, 7))
    """
    expected = "ranges of layers that follow one another from 0 on, such as 0-3,4-7"
    found: list[Layers] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or len(first) > 5 or len(last) > 5:
            raise RequestError(f"{option('by_layer')} must be {expected}, got {shown(text)}")
        ends = int(first), int(last or first)
        if ends[0] != (found[-1][1] + 1 if found else 0) or ends[0] > ends[1]:
            raise RequestError(f"{option('by_layer')} must be {expected}, got {shown(text)}")
        found.append(ends)
    return tuple(found)


def parse_space(texts: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Parse `--space`, by method and the setting's name in Python. RequestError if no setting has that name."""
    found: dict[str, dict[str, list[str]]] = {method: {} for method in methods}
    for text in texts:
        name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
        if not equals or not name or not value:
            raise RequestError(f"{option('space')} takes NAME=LOW:HIGH, NAME=VALUE or NAME=A,B, got {shown(text)}")
        method, dot, key = name.strip().rpartition(".")
        if dot and method not in methods:
            raise RequestError(
                f"{option('space')} names method {shown(method)}, and the search is over {listed(methods)}"
            )
        having = [each for each in ([method] if dot else methods) if _python(key) in _declared(each)]
        if not having:
            names = ", ".join(each.key for each in _declared(method or methods[0]).values())
            raise RequestError(f"method {method or listed(methods)} has no setting {shown(key)}; it has {names}")
        for each in having:
            found[each].setdefault(_python(key), []).append(value.strip())
    return found


def _python(key: str) -> str:
    names = {letters: name for name, letters in LETTERS.items()}
    plain = key.strip().replace("-", "_")
    return "weights" if plain == "weight" else names.get(plain, plain)


def _declared(method: str) -> dict[str, Declared]:
    return {each.name: each for each in declared(method_named(method).Settings)}


def _for_models(axis: Axis, each: Declared, models: int) -> list[Axis]:
    """The axis, or one for each model if the setting has a value for each."""
    if not each.about.per_model or each.name != "weights":
        return [axis]
    count = models - 1 if each.about.entries == SECONDARY else models
    if each.about.entries == SECONDARY and count == 1:
        return []  # a single secondary has the whole share
    return [replace(axis, name=f"{axis.name.rstrip('s')}{number + 1}", model=number) for number in range(count)]


def _read(method: str, each: Declared, text: str) -> tuple[Axis | None, Any]:
    """An axis, or the fixed value."""
    name = f"{method}.{each.key}"
    low, colon, high = text.partition(":")
    if colon:
        ends = _number(name, low), _number(name, high)
        _refuse_planned(name, each, text)
        if not ends[0] < ends[1]:
            raise RequestError(f"{name}={text} is no range: the first number must be below the second")
        for end in ends:
            check_value(each, end)
        if each.about.search_log and ends[0] <= 0:
            raise RequestError(f"{name}={text} is drawn on a logarithmic scale, so it must begin above 0")
        return Axis(name, each.name, *ends, log=each.about.search_log), None
    values = [_value(name, each, part.strip()) for part in text.split(",")]
    if len(values) == 1:
        return None, values[0]
    _refuse_planned(name, each, text)
    return Axis(name, each.name, choices=tuple(values)), None


def _refuse_planned(name: str, each: Declared, text: str) -> None:
    if is_planned(each):
        raise RequestError(f"{name}={text}: {each.key} is the same for all candidates of a method; give one value")


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{name} must be a number, or LOW:HIGH with two of them, got {shown(text)}")
    return value


def _value(name: str, each: Declared, text: str) -> Any:
    """Parse a value of a setting. RequestError if it cannot have this value."""
    value: Any = text
    if isinstance(each.default, bool):
        switches = {"on": True, "true": True, "off": False, "false": False}
        value = switches.get(text.lower(), text)
    elif each.about.whole:
        value = int(text) if text.isdecimal() else text
    elif not each.about.choices and each.about.form is None:
        value = _number(name, text)
    checked = check_value(each, value)
    return list(checked) if isinstance(checked, tuple) else checked
