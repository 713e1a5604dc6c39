"""The settings of all methods together: for combined lists of options and keys, and for records of any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hsa.methods.registry import method_named, methods
from hsa.methods.settings import DEFAULT_METHOD, Declared, SettingInfo, declared


def all_settings(wanted: Callable[[SettingInfo], bool] = lambda about: True) -> Mapping[str, Declared]:
    """The settings of every method by their names in Python. If methods share a name, the default method's setting
    counts.

    If a setting is not `wanted`, another method's setting of the same name may take its place.
    """
    by_name: dict[str, Declared] = {}
    for method in (method_named(DEFAULT_METHOD), *methods().values()):
        for each in declared(method.Settings):
            if wanted(each.about):
                by_name.setdefault(each.name, each)
    return by_name


def summary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a record that say in one line how the merge was made.

    Example:
        >>> summary({"k": 0.6, "targets": "encoder-qkv", "backend": "cpu"})
        {'k': 0.6, 'targets': 'encoder-qkv'}
    """
    named = [each.key for each in all_settings().values() if each.about.axis or each.about.summary]
    return {key: parameters[key] for key in named if key in parameters}
