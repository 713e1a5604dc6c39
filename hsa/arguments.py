"""Check the types of arguments of Python calls: paths, flags, lists, and callbacks.

Settings of a merge are checked by `methods.settings`, threads by `threads`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hsa.errors import RequestError, shown
from hsa.option_names import option


def check_paths(**paths: Any) -> None:
    """Raise RequestError unless each path is a string, or a path-like object that gives one.

    Example:
        >>> check_paths(base="whisper-small", output=Path("merged"))
    """
    for name, path in paths.items():
        if not isinstance(path, str) and not (isinstance(path, os.PathLike) and isinstance(os.fspath(path), str)):
            raise RequestError(f"{option(name)} must be a path or a text, got {shown(path)}")


def check_flags(**flags: Any) -> None:
    """Raise RequestError unless each flag is True or False; a string such as "False" would count as true."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise RequestError(f"{option(name)} must be True or False, got {shown(flag)}")


def check_functions(**functions: Any) -> None:
    """Raise RequestError unless each function is callable or None."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise RequestError(f"{option(name)} must be a function, got {shown(function)}")


def check_values(**values: Any) -> None:
    """Raise RequestError unless each is a list of values. A single value is refused, and so is a string, which would be
    read as a list of characters."""
    for name, value in values.items():
        if isinstance(value, (str, bytes, Mapping)) or not (hasattr(value, "__len__") and hasattr(value, "__iter__")):
            raise RequestError(f"{option(name)} must be a list of values, got {shown(value)}")
