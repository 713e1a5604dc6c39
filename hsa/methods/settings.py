"""Settings of a method, each declared once: a field of a frozen dataclass, with its limits, its help and its uses.

The command line's options, Python's keywords, keys of recipes, axes of sweeps, ranges of searches, the table on the
card and the pages of the documentation are generated from these fields. No other module lists them.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast, get_type_hints

from hsa.arguments import check_flags
from hsa.errors import RequestError, shown
from hsa.methods import values
from hsa.methods.limits import in_ranges, layer_ranges, patterns, stack_name
from hsa.option_names import LETTERS, as_keys, option, spelled

if TYPE_CHECKING:
    from hsa.methods.tensors import TensorTask

OutputDtype = Literal["auto", "float32", "float16", "bfloat16"]
PerTensor = float | Mapping[str, float]
"""A number, or one for each target tensor by its name, with or without the leading `model.`."""

MAX_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127
"""The largest float32, because merges compute in float32."""

DEFAULT_METHOD = "hsa"
"""The method of a merge that names none."""

_METADATA = "hsa.setting"

_LIMIT: dict[str, Any] = {
    "structural": True,
    "silent": True,
    "group": "sources",
    "metavar": "PATTERN",
    "default_text": "",
    "repeated": True,
}
"""The common part of the settings that limit a merge to a part of the model."""

Group = Literal["common", "sources", "numerics", "output", "machine"]
"""The heading under which help shows an option."""


@dataclass(frozen=True)
class SettingInfo:
    """The description of a setting, besides its name and default.

    Args:
        help: one sentence for the command line, the reference and the card.
        python: the same for Python's reference, if the command line's option has the opposite meaning or other values.
        low, high: limits of a number, both included.
        whole: it is a whole number, or None for "not given".
        choices: it is one of these texts.
        per_tensor: it may also be a mapping from the names of target tensors to numbers.
        scheduled: it may also be a mapping, a list over layers, or a list with filters (`hsa.methods.values`).
        per_model: it is a scheduled value for each model, or one for all.
        entries: what each entry of a per-model list is for.
        repeated: the command line's option is given once for each entry of a list.
        form: a function that checks a value that is not a number, and returns it in its normal form. It also gets the
            value's name for messages.
        patchable: a patch, and so a sweep, can hold a merge with any value of it.
        structural: the plan of a merge depends on it (which tensors are merged, what is written). So candidates that
            share a plan have the same value.
        axis: a sweep may take several values of it.
        summary: the line that says how a merge was made includes it, as it includes every axis.
        search: the range that a search draws from; None if it is not searched.
        search_log: a search draws its logarithm evenly, so that small values are as likely as large ones.
        group: where help shows the option.
        metavar: what help calls the value.
        default_text: what help shows as the default, where that is not the default's own text.
        silent: records leave it out if it has its default.
        required: a merge must give it; its default None means that it is not given yet.
    """

    help: str
    python: str | None = None
    low: float | None = None
    high: float | None = None
    whole: bool = False
    choices: tuple[str, ...] = ()
    per_tensor: bool = False
    scheduled: bool = False
    per_model: bool = False
    entries: str = "model"
    repeated: bool = False
    form: Callable[[str, Any], Any] | None = None
    patchable: bool = True
    structural: bool = False
    axis: bool = False
    summary: bool = False
    search: tuple[float, float] | None = None
    search_log: bool = False
    group: Group = "common"
    metavar: str | None = None
    default_text: str | None = None
    silent: bool = False
    required: bool = False

    @property
    def varies(self) -> bool:
        """Whether its value may vary between tensors by more than a mapping from their names."""
        return self.scheduled or self.per_model


def setting(default: Any, help: str, *, kw_only: Any = dataclasses.MISSING, **about: Any) -> Any:
    """A field of a Settings class; `about` are the fields of `SettingInfo`.

    Example:
        >>> @dataclass(frozen=True)
        ... class ShareSettings(Settings):
        ...     share: float = setting(0.5, "Share of the first model, 0 to 1.", low=0.0, high=1.0, axis=True)
        >>> ShareSettings(share=0.25).as_dict()
        {'share': 0.25, 'dtype': 'auto'}
    """
    return field(default=default, kw_only=kw_only, metadata={_METADATA: SettingInfo(help, **about)})


@dataclass(frozen=True)
class Declared:
    """A setting with its name in Python, its type and its default."""

    name: str
    type: Any
    default: Any
    about: SettingInfo

    @property
    def key(self) -> str:
        """Its name in records, in recipes and on the command line, where `lambda` is allowed because it is no
        keyword."""
        return LETTERS.get(self.name, self.name)


def declared(owner: type[Any]) -> tuple[Declared, ...]:
    """The settings that a dataclass declares, in the order of its fields, with keyword-only settings last."""
    hashable: Any = owner
    return _declared(hashable)


@cache
def _declared(owner: Any) -> tuple[Declared, ...]:
    types = get_type_hints(owner)
    fields = [each for each in dataclasses.fields(owner) if _METADATA in each.metadata]
    ordered = sorted(fields, key=lambda each: bool(each.kw_only))
    return tuple(Declared(each.name, types[each.name], each.default, each.metadata[_METADATA]) for each in ordered)


S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """The settings of one merge, checked on creation. The class of a method adds its own fields.

    Raises RequestError where a value is out of range or not finite.
    """

    method: ClassVar[str]
    """The name of the method whose settings these are."""

    dtype: OutputDtype = setting(
        "auto",
        "Output: auto, float32, float16 or bfloat16.",
        choices=("auto", "float32", "float16", "bfloat16"),
        patchable=False,
        structural=True,
        group="numerics",
        metavar="DTYPE",
        kw_only=True,
    )

    only: tuple[str, ...] = setting(
        (), "Merge only tensors whose names match this pattern; repeat.", kw_only=True, form=patterns, **_LIMIT
    )
    exclude: tuple[str, ...] = setting(
        (), "Merge no tensor whose name matches this pattern; repeat.", kw_only=True, form=patterns, **_LIMIT
    )
    layers: str | None = setting(
        None,
        "Merge only these layers, such as 4-11 or 0,3.",
        kw_only=True,
        form=layer_ranges,
        **{**_LIMIT, "metavar": "LAYERS", "repeated": False},
    )
    stack: str | None = setting(
        None,
        "Merge only this stack of layers, such as encoder.",
        kw_only=True,
        form=stack_name,
        **{**_LIMIT, "metavar": "NAME", "repeated": False},
    )

    def __post_init__(self) -> None:
        for each in declared(type(self)):
            value = getattr(self, each.name)
            checked = check_value(each, value)
            if checked is not value:
                object.__setattr__(self, each.name, checked)

    def as_dict(self) -> dict[str, Any]:
        """The settings under their names in records and recipes."""
        values = ((each, getattr(self, each.name)) for each in declared(type(self)))
        return {
            each.key: _plain(each, value) for each, value in values if not (each.about.silent and value == each.default)
        }

    @classmethod
    def from_dict(cls: type[S], parameters: Mapping[str, Any]) -> S:
        """The settings whose `as_dict` gave these parameters. Other parameters are ignored.

        A missing parameter has its default, so that records of earlier versions of a method can be read. Raises
        RequestError if a value is out of range.
        """
        given = {each.name: parameters[each.key] for each in declared(cls) if each.key in parameters}
        with spelled(as_keys(parameters)):
            return cls(**given)

    def of(self, name: str, tensor: str | TensorTask) -> float:
        """The value of a setting for a target tensor. The tensor is a task, or a canonical name (without the leading
        `model.`), which suffices for settings that cannot be lists over layers. Raises RequestError if there is no
        value for it."""
        value: Any = getattr(self, name)
        if not isinstance(value, (Mapping, tuple)):
            return float(value)
        return values.at(option(name), value, _where(tensor))

    def each(self, name: str, task: TensorTask) -> tuple[float, ...]:
        """The value of a setting for every model of a task, in their order.

        Example:
            >>> from hsa.methods.linear import LinearSettings
            >>> LinearSettings(weights=[1, 0.5]).each("weights", task)  # doctest: +SKIP
            (1.0, 0.5)
        """
        value: Any = getattr(self, name)
        if not isinstance(value, (Mapping, tuple)):
            return (float(value),) * len(task.numbers)
        where = _where(task)
        if isinstance(value, Mapping) or values.is_filtered(value):
            return (values.at(option(name), value, where),) * len(task.numbers)
        if len(value) != task.models_given:
            raise RequestError(
                f"{option(name)} must have as many values as there are models, {task.models_given}, got {len(value)}"
            )
        return tuple(values.at(f"{option(name)} of model {n + 1}", value[n], where) for n in task.numbers)

    def per_tensor(self) -> Iterator[tuple[str, Mapping[str, float]]]:
        """The mappings from tensor names to numbers among the settings, by the setting's name."""
        for each in declared(type(self)):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                yield each.name, value
            elif each.about.varies and isinstance(value, tuple):
                yield from ((each.name, mapping) for mapping in values.tensors_of(value))

    def limits(self, name: str, layer: tuple[str, int] | None) -> bool:
        """Whether `only`, `exclude`, `layers` and `stack` allow a tensor to be merged. `layer` is its stack and its
        layer number, None outside of layers."""
        if self.only and not any(fnmatchcase(name, pattern) for pattern in self.only):
            return False
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return False
        if self.stack is not None and (layer is None or layer[0].split(".")[-1] != self.stack.split(".")[-1]):
            return False
        return self.layers is None or (layer is not None and in_ranges(layer[1], self.layers))

    @property
    def limited(self) -> bool:
        """Whether only a part of the model is merged."""
        return bool(self.only or self.exclude or self.layers is not None or self.stack is not None)

    def check_models(self, count: int) -> None:
        """Raise RequestError if the settings do not fit this number of models, as far as that is known without their
        tensors."""

    def structure(self) -> tuple[Any, ...]:
        """The values that a plan depends on; settings with equal structure share a plan."""
        return tuple(getattr(self, each.name) for each in declared(type(self)) if each.about.structural)

    @property
    def complete(self) -> bool:
        """Whether every setting that a merge needs is given."""
        return not any(self._lacking())

    def require(self) -> None:
        """Raise RequestError if a setting that a merge needs is not given."""
        for each in self._lacking():
            raise RequestError(f"method {self.method} needs {option(each.name)}; give it: {each.about.help}")

    def _lacking(self) -> Iterator[Declared]:
        return (each for each in declared(type(self)) if each.about.required and getattr(self, each.name) is None)

    def serves(self, other: Settings) -> bool:
        """Whether a plan for these settings is also valid for others."""
        return type(other) is type(self) and other.structure() == self.structure()

    def for_all_candidates(self: S) -> S:
        """Settings for the plan of a `Merger`, which is valid for every candidate with the same structural settings."""
        return self


def check_value(each: Declared, value: Any) -> Any:
    """The value in its normal form, if the setting may have it. Raises RequestError for others."""
    about, name = each.about, option(each.name)
    if about.form is not None:
        return about.form(name, value)
    if about.choices:
        check_choice(name, value, about.choices)
    elif isinstance(each.default, bool):
        check_flags(**{each.name: value})
    elif about.whole:
        _check_whole(name, value, about)
    elif value is None and each.default is None:
        return None
    elif about.varies:
        return _checked_schedule(name, value, about)
    elif about.per_tensor and isinstance(value, Mapping):
        values.check(name, value, lambda what, number: _check_within(what, number, about))
    elif about.low is not None:
        _check_within(name, value, about)
    return value


def _check_within(name: str, value: Any, about: SettingInfo) -> None:
    check_number(name, value, about.low or 0.0, math.inf if about.high is None else about.high)


def _checked_schedule(name: str, value: Any, about: SettingInfo) -> Any:
    """A scheduled value, or one for each model, with its lists turned into tuples."""

    def within(what: str, number: Any) -> None:
        _check_within(what, number, about)

    value = values.frozen(value)
    if about.per_model and values.is_list(value) and not values.is_filtered(value):
        if not value:
            raise RequestError(f"{name} is an empty list; give a number, or one for each model")
        for number, entry in enumerate(value, 1):
            values.check(f"{name} of {about.entries} {number}", entry, within)
    else:
        values.check(name, value, within)
    return value


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise RequestError unless a value is a number within the limits, both included. `name` is its name in the
    message."""
    limits = (
        f"in [{low:g}, {high:g}]" if high < MAX_FLOAT32 else "finite" if low < 0 else f"finite and at least {low:g}"
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} must be a number {limits}, got {shown(value)}")
    value = cast(float, value)
    if not -sys.float_info.max <= value <= sys.float_info.max or not low <= value <= high:
        beyond = "; float32 ends at 3.4e38" if high == MAX_FLOAT32 else ""
        raise RequestError(f"{name} must be {limits}, got {shown(value)}{beyond}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise RequestError unless a value is one of these texts."""
    if not isinstance(value, str) or value not in allowed:
        raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def _check_whole(name: str, value: Any, about: SettingInfo) -> None:
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    low, high = int(about.low or 0), int(about.high or sys.maxsize)
    if not (whole and low <= value <= high):
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")


def _where(tensor: str | TensorTask) -> values.Where:
    if isinstance(tensor, str):
        return values.Where(tensor)
    return values.Where(tensor.name, tensor.depth, tensor.output_name, tensor.span, tensor.follows_layers)


def _plain(each: Declared, value: Any) -> Any:
    """A value as records contain it: numbers as floats, mappings sorted by name, lists for tuples."""
    if each.about.form is not None:
        return list(value) if isinstance(value, tuple) else value
    if isinstance(value, (Mapping, tuple)):
        return values.plain(value)
    if each.about.choices or each.about.whole or value is None:
        return value
    return value if isinstance(value, (bool, str)) else float(value)
