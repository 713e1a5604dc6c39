"""How a message names an option: as Python's argument, as the command line's option, or as a key of a YAML file.

A message is written once, with `option("overwrite", True)` where it names an option. In Python that reads
`overwrite=True`; inside `with spelled(command_line):`, in which `hsa` runs every command, it reads `--overwrite`.

The spelling belongs to the running context, so that a command in one thread does not change what another thread's
Python errors say. Threads that hsa starts itself take it over by `with_current_spelling`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

Spelling = Callable[[str, Any], str]
"""From an argument's name in Python, and a value or None, to the text that a message shows."""

LETTERS = {"lam": "lambda", "exclude": "except"}
"""Names that differ outside Python, where `lambda` and `except` are no keywords."""

REPEATED = {"models": "model", "model_ids": "model-id", "weights": "weight"}
"""Options that are given once for each entry of what is a list in Python."""

_OF_A_PLACE = re.compile(r"model[0-9]+_id")
"""The id of a model that goes by its place, which the command line takes in the order of the models."""

_A_PLACE = re.compile(r"model[0-9]+")
"""A model that goes by its place, which has no option of its own."""

NEGATED = {"digest": "--no-hash", "sync": "--no-sync", "energy": "--no-energy"}
"""Options that switch off what an argument switches on."""


IN_PYTHON = {"sources": "the sources", "debug": "the error's __cause__"}
"""What takes the place of an option that is no argument in Python."""


def python(name: str, value: Any = None) -> str:
    """`overwrite=True`, or the bare name without a value."""
    return IN_PYTHON.get(name, name) if value is None else f"{name}={value!r}"


def command_line(name: str, value: Any = None) -> str:
    """`--overwrite`, `--no-sync`, `--dtype float32`, or the bare option without a value."""
    if name in NEGATED:
        return NEGATED[name]
    if _OF_A_PLACE.fullmatch(name):
        name = "model_ids"
    if _A_PLACE.fullmatch(name):
        return name
    if value is False:
        return f"--no-{name.replace('_', '-')}"
    flag = f"--{REPEATED.get(name, LETTERS.get(name, name)).replace('_', '-')}"
    return flag if value is None or value is True else f"{flag} {value}"


def as_keys(names: Collection[str]) -> Spelling:
    """A spelling in which these names are keys of a YAML file (`dtype: float32`), and all others are as they were."""
    outer = _spelling.get()

    def spelling(name: str, value: Any = None) -> str:
        key = LETTERS.get(name, name)
        if key not in names:
            return outer(name, value)
        text = str(value).lower() if isinstance(value, bool) else value
        return key if value is None else f"{key}: {text}"

    return spelling


def keys_named(names: Mapping[str, str]) -> Spelling:
    """A spelling in which the arguments among `names` are keys of a file that calls them so; all others are as they
    were.

    Example:
        >>> with spelled(keys_named({"weights": "weight"})):
        ...     option("weights"), option("overwrite", True)
        ('weight', 'overwrite=True')
    """
    outer = _spelling.get()

    def spelling(name: str, value: Any = None) -> str:
        if name not in names:
            return outer(name, value)
        text = str(value).lower() if isinstance(value, bool) else value
        return names[name] if value is None else f"{names[name]}: {text}"

    return spelling


def renamed(names: Mapping[str, str], program: str) -> Spelling:
    """The spelling of another command line: `names` gives its options; those that it lacks are named as `program`'s."""

    def spelling(name: str, value: Any = None) -> str:
        if name not in names:
            return f"{program}'s {command_line(name, value)}"
        return names[name] if value is None or value is True else f"{names[name]} {value}"

    return spelling


_spelling: ContextVar[Spelling] = ContextVar("hsa option names", default=python)


def option(name: str, value: Any = None) -> str:
    """The text by which a message names an option, given its name (and value) as an argument in Python.

    Example:
        >>> option("max_shard_size")
        'max_shard_size'
        >>> with spelled(command_line):
        ...     option("max_shard_size"), option("dtype", "float32"), option("sync", False)
        ('--max-shard-size', '--dtype float32', '--no-sync')
    """
    return _spelling.get()(name, value)


@contextmanager
def spelled(spelling: Spelling) -> Iterator[None]:
    """Spell options this way in the messages that the block makes."""
    token = _spelling.set(spelling)
    try:
        yield
    finally:
        _spelling.reset(token)


def current_spelling() -> Spelling:
    """How this thread's messages spell options, for a process that is to spell them alike: as the command line does, or
    as Python."""
    return command_line if _spelling.get() is command_line else python


def with_current_spelling(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, for another thread: its messages spell options as this thread's messages do now."""
    spelling = _spelling.get()

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with spelled(spelling):
            return function(*args, **kwargs)

    return call
