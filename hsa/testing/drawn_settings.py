"""Settings of a merge method, drawn at random from what it declares: every choice, the ends of ranges, and between."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from hsa.methods.model_method import ModelSettings
from hsa.methods.registry import AnyMethod
from hsa.methods.settings import Declared, declared

Drawn = dict[str, Any]

FILTER = "fc"
"""The part of a name by which a drawn list with filters tells tensors apart."""

LARGE = 1000.0
"""Ends of ranges beyond this, such as float32's, are not drawn: sums would overflow."""

_COMMON = frozenset(each.name for each in declared(ModelSettings))


def draw_settings(
    method: AnyMethod, models: int, draw: random.Random, choices: Mapping[str, Sequence[Any]] | None = None
) -> Drawn:
    """Settings by name for a merge of so many models; about every third keeps its default.

    `choices` are values to draw a setting from in place of its declared range.

    Example:
        >>> draw_settings(method_named("ties"), 2, random.Random(3))  # doctest: +SKIP
        {'density': [0.7, 0.0], 'lam': [{'filter': 'fc', 'value': 0.6}, 2.0], 'rescale': 'l1'}
    """
    drawn: Drawn = {}
    for each in declared(method.Settings):
        if choices and each.name in choices:
            drawn[each.name] = draw.choice(choices[each.name])
        elif each.name not in _COMMON and (each.about.required or draw.random() < 0.65):
            drawn[each.name] = _value(each, models, draw)
    return drawn


def resolved(method: AnyMethod, drawn: Drawn, name: str, models: int) -> Drawn:
    """The drawn settings for one tensor: a number each, or one for each model where the setting is given by model."""
    found: Drawn = {}
    for each in declared(method.Settings):
        if each.name in drawn:
            value = drawn[each.name]
            if each.about.per_model:
                by_model = value if _is_by_model(value) else [value] * _entries(each, models)
                found[each.name] = [_at(entry, name) for entry in by_model]
            else:
                found[each.name] = _at(value, name)
    return found


def _entries(each: Declared, models: int) -> int:
    """The length of a list with a value for each model, or for each but the first."""
    return models if each.about.entries == "model" else models - 1


def _value(each: Declared, models: int, draw: random.Random) -> Any:
    about = each.about
    if about.choices:
        return draw.choice(about.choices)
    if isinstance(each.default, bool):
        return draw.random() < 0.5
    if about.whole:
        low = int(about.low or 0)
        return draw.choice([low, draw.randint(low, min(int(about.high or 1 << 40), 1 << 40))])
    if about.per_model and draw.random() < 0.6:
        return [_scheduled(each, draw) for _ in range(_entries(each, models))]
    return _scheduled(each, draw)


def _scheduled(each: Declared, draw: random.Random) -> Any:
    if each.about.varies and draw.random() < 0.25:
        return [{"filter": FILTER, "value": _number(each, draw)}, _number(each, draw)]
    return _number(each, draw)


def _number(each: Declared, draw: random.Random) -> float:
    about = each.about
    low, high = about.low or 0.0, LARGE if about.high is None else about.high
    ends = [end for end in (low, high) if abs(end) < LARGE]
    if each.default is not None:
        ends.append(float(each.default))
    if draw.random() < 0.35:
        return draw.choice(ends)
    if about.search:
        return round(draw.uniform(*about.search), 3)
    if high < LARGE:
        return round(draw.uniform(low, high), 3)
    return max(float(low), float(10.0 ** draw.uniform(-6, 0)))


def _is_by_model(value: Any) -> bool:
    return isinstance(value, list) and not _is_filtered(value)


def _is_filtered(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], Mapping)


def _at(value: Any, name: str) -> Any:
    """A value with a filter for the tensor of that name."""
    if not _is_filtered(value):
        return value
    return value[0]["value"] if FILTER in name else value[1]
