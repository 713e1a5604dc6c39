"""Values of settings that are more than one number: by layer, by a pattern of names, and for each model.

A *scheduled* value is one of

- a number, for all tensors;
- a mapping from tensor names, with or without the leading `model.`, to numbers. It must name every merged tensor;
- a list of numbers over the layers. The first number is for the first layer, the last for the last layer, and values
  between them are interpolated. Tensors outside of layers take the first number;
- a list of `{"filter": PART, "value": VALUE}`. The first entry whose part occurs in the tensor's name gives the value.
  A part with `*`, `?` or `[` is a shell pattern of the whole name. Besides or instead of the filter, an entry may name
  a stack of layers, `"stack": "encoder"`, and its first and last layer, `"layers": [4, 11]` (a last layer of None means
  all from the first on). Its values then run over these layers, and tensors before or after all layers belong to the
  first or the last. A bare value as the last entry is for all other tensors.

A value *for each model* is one scheduled value for all models, or a list with one scheduled value per model. Lists over
layers are then written inside such a list. The forms are those of mergekit's configuration files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from hsa.errors import RequestError, shown

Value = Any
"""A scheduled value."""


class Where(NamedTuple):
    """The place of a tensor: its canonical name; its depth in its stack of layers, from 0.0 to 1.0; its name in the
    output, in which filters are looked for too; its stack, layer and number of layers, None outside of layers; and,
    outside of layers, whether it comes after them."""

    name: str
    depth: float = 0.0
    stored: str = ""
    span: tuple[str, int, int] | None = None
    follows: bool = False


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_filter(entry: object) -> bool:
    """Whether an entry of a list is for certain tensors only."""
    return isinstance(entry, Mapping) and "value" in entry


def is_filtered(value: object) -> bool:
    """Whether a value is a list with filters."""
    return isinstance(value, Sequence) and is_list(value) and any(map(is_filter, value))


def is_per_model(value: object) -> bool:
    """Whether a value for each model is a list with one value per model, not one value for all."""
    return is_list(value) and not is_filtered(value)


def follows_layers(value: Value) -> bool:
    """Whether a scheduled value holds a list over layers.

    Example:
        >>> follows_layers(0.5), follows_layers((0.0, 1.0)), follows_layers(({"filter": "fc1", "value": (0, 1)}, 0.5))
        (False, True, True)
    """
    if is_filter(value):
        return follows_layers(value["value"])
    return any(map(follows_layers, value)) if is_filtered(value) else is_list(value)


def frozen(value: Value) -> Value:
    """The value with its lists turned into tuples, which cannot be changed."""
    if is_filter(value):
        return {key: frozen(each) for key, each in value.items()}
    return tuple(map(frozen, value)) if is_list(value) else value


def plain(value: Value) -> Any:
    """The value as JSON contains it: numbers as floats, mappings of tensors sorted by name."""
    if is_list(value):
        return [plain(each) for each in value]
    if is_filter(value):
        return {**_condition(value), "value": plain(value["value"])}
    if isinstance(value, Mapping):
        return {name: float(number) for name, number in sorted(value.items())}
    return float(value)


def _condition(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of an entry on its tensors, as JSON contains them."""
    found = {key: entry[key] for key in ("filter", "stack", "layers") if entry.get(key) is not None}
    return {key: list(each) if is_list(each) else each for key, each in found.items()}


def tensors_of(value: Value) -> Iterator[Mapping[str, float]]:
    """The mappings from tensor names that a value holds."""
    if is_list(value):
        for each in value:
            yield from tensors_of(each)
    elif is_filter(value):
        yield from tensors_of(value["value"])
    elif isinstance(value, Mapping):
        yield value


def check(name: str, value: Value, check_number: Callable[[str, Any], None]) -> None:
    """Raise RequestError unless it is a scheduled value. `check_number` checks one number, given its name for
    messages."""
    if is_filter(value):
        raise RequestError(f"{name} is one entry with a filter; give a list of them, [{shown(value)}]")
    if isinstance(value, Mapping):
        _check_tensors(name, value, check_number)
    elif not is_list(value):
        check_number(name, value)
    elif not value:
        raise RequestError(f"{name} is an empty list; give a number, or a number for each layer")
    elif is_filtered(value):
        for entry in value[:-1]:
            if not is_filter(entry):
                raise RequestError(
                    f"{name} has {shown(entry)} before its last entry; only the last may be a value for all other "
                    f"tensors"
                )
        for entry in value:
            if is_filter(entry):
                _check_filter(name, entry, check_number)
            else:
                check(name, entry, check_number)
    else:
        for number, entry in enumerate(value, 1):
            check_number(f"entry {number} of {name}", entry)


def _check_filter(name: str, entry: Mapping[Any, Any], check_number: Callable[[str, Any], None]) -> None:
    unknown = sorted(map(str, entry.keys() - {"filter", "stack", "layers", "value"}))
    if unknown:
        raise RequestError(
            f"{name} has an entry with the key {shown(unknown[0])}; expected filter, a part of tensor names, and value"
        )
    for key in ("filter", "stack"):
        if not (entry.get(key) is None or isinstance(entry[key], str)):
            raise RequestError(f"{name} has an entry with the {key} {shown(entry[key])}; expected a text")
    layers = entry.get("layers")
    if layers is not None and not _is_span(layers):
        raise RequestError(f"{name} has an entry with the layers {shown(layers)}; expected the first and the last")
    part = entry.get("filter")
    check(name if part is None else f"{name} of {shown(part)}", entry["value"], check_number)


def _is_span(layers: Any) -> bool:
    if not is_list(layers) or len(layers) != 2:
        return False
    first, last = layers
    return type(first) is int and first >= 0 and (last is None or (type(last) is int and last >= first))


def _check_tensors(name: str, values: Mapping[Any, Any], check_number: Callable[[str, Any], None]) -> None:
    for tensor, number in values.items():
        if not isinstance(tensor, str):
            raise RequestError(f"{name} per tensor must be given by tensor names, got the key {shown(tensor)}")
        check_number(f"{name} of {shown(tensor)}", number)
        if tensor.startswith("model.") and tensor.removeprefix("model.") in values:
            raise RequestError(
                f"{name} is given for {shown(tensor)} and for {shown(tensor.removeprefix('model.'))}, which are one "
                f"tensor; give one of them"
            )


def at(name: str, value: Value, where: Where) -> float:
    """The number of a scheduled value for one tensor. `name` is the setting's name in messages. Raises RequestError if
    there is no number for it.

    Example:
        >>> at("density", (0.0, 1.0), Where("encoder.layers.1.fc1.weight", 0.25))
        0.25
        >>> at("t", ({"filter": "fc1", "value": 0.4}, 0.6), Where("encoder.layers.1.fc1.weight", 0.25))
        0.4
    """
    if not is_list(value) and not isinstance(value, Mapping):
        return float(value)
    if isinstance(value, Mapping):
        return _of_tensor(name, value, where.name)
    if not is_filtered(value):
        return _of_depth(value, where.depth)
    for entry in value:
        if not is_filter(entry):
            return at(name, entry, where)
        if is_for(entry, where):
            return at(name, entry["value"], _inside(entry.get("layers"), where))
    raise RequestError(
        f"{name} has no value for tensor {where.name}: none of its filters is part of the name; add a value for all "
        f"others as its last entry"
    )


def is_for(entry: Mapping[str, Any], where: Where) -> bool:
    """Whether an entry of a list applies to a tensor."""
    part, stack, layers = (entry.get(key) for key in ("filter", "stack", "layers"))
    if part is not None and not any(matches(part, name) for name in (where.name, where.stored)):
        return False
    if stack is not None and not _is_in(stack, where):
        return False
    return layers is None or _is_among(layers, where)


def matches(part: str, name: str) -> bool:
    """Whether a filter matches a tensor name."""
    return fnmatchcase(name, part) if any(letter in part for letter in "*?[") else part in name


def _is_in(stack: str, where: Where) -> bool:
    """Whether a tensor belongs to a stack, even outside of its layers."""
    return f".{where.name}".find(f".{stack}.") >= 0 if where.span is None else where.span[0].split(".")[-1] == stack


def _is_among(layers: Sequence[int | None], where: Where) -> bool:
    first, last = layers[0] or 0, layers[1]
    if where.span is None:
        return last is None if where.follows else first == 0
    return first <= where.span[1] and (last is None or where.span[1] <= last)


def _inside(layers: Sequence[int | None] | None, where: Where) -> Where:
    """The tensor with its depth among these layers."""
    if layers is None or where.span is None:
        return where
    _, layer, count = where.span
    first, last = layers[0] or 0, count - 1 if layers[1] is None else layers[1]
    return where._replace(depth=(layer - first) / (last - first) if last > first else 1.0)


def _of_tensor(name: str, values: Mapping[str, float], tensor: str) -> float:
    for key in (tensor, f"model.{tensor}"):
        if key in values:
            return float(values[key])
    raise RequestError(f"{name} is given per tensor but has no value for target tensor {tensor}")


def _of_depth(values: Sequence[float], depth: float) -> float:
    position = depth * (len(values) - 1)
    before = min(int(position), len(values) - 1)
    after = min(before + 1, len(values) - 1)
    share = position - before
    return (1.0 - share) * values[before] + share * values[after]
