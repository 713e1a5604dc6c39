"""How a message names an option: as Python's argument, as the command line's option, or as a key of a YAML file.

A message is written once, with `option("overwrite", True)` where it names an option. In Python that reads
`overwrite=True`. Inside `with spelled(command_line):`, which wraps every `hsa` command, it reads `--overwrite`.

The spelling is a context variable, so a command in one thread does not change what Python errors in another thread say.
Threads that hsa starts itself inherit it through `with_current_spelling`.
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
"""Maps an argument's name in Python, and its value or None, to the text that a message shows."""

LETTERS = {"lam": "lambda", "exclude": "except"}
"""Names that differ outside Python, where `lambda` and `except` are not keywords."""

REPEATED = {"models": "model", "model_ids": "model-id", "weights": "weight"}
"""Options that are repeated on the command line, once for each entry of a list in Python."""

_OF_A_PLACE = re.compile(r"model[0-9]+_id")
"""The id of a model that is named by its position; the command line takes such ids in the order of the models."""

_A_PLACE = re.compile(r"model[0-9]+")
"""A model that is named by its position, and has no option of its own."""

NEGATED = {"digest": "--no-hash", "sync": "--no-sync", "energy": "--no-energy"}
"""Options that switch off what an argument switches on."""


IN_PYTHON = {"sources": "the sources", "debug": "the error's __cause__"}
"""Replacements for options that have no argument in Python."""


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
    """A spelling with these names as keys of a YAML file (`dtype: float32`); all others keep the current spelling."""
    outer = _spelling.get()

    def spelling(name: str, value: Any = None) -> str:
        key = LETTERS.get(name, name)
        if key not in names:
            return outer(name, value)
        text = str(value).lower() if isinstance(value, bool) else value
        return key if value is None else f"{key}: {text}"

    return spelling


def keys_named(names: Mapping[str, str]) -> Spelling:
    """A spelling with the arguments in `names` as the keys of a file; all others keep the current spelling.

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
    """The spelling of another command line: `names` maps arguments to its options; all others are shown as
    `program`'s."""

    def spelling(name: str, value: Any = None) -> str:
        if name not in names:
            return f"{program}'s {command_line(name, value)}"
        return names[name] if value is None or value is True else f"{names[name]} {value}"

    return spelling


_spelling: ContextVar[Spelling] = ContextVar("hsa option names", default=python)


def option(name: str, value: Any = None) -> str:
    """How a message names an option, given its name (and value) as an argument in Python.

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
    """Spell options this way in messages that are made inside the block."""
    token = _spelling.set(spelling)
    try:
        yield
    finally:
        _spelling.reset(token)


def current_spelling() -> Spelling:
    """The spelling of this thread's messages, `command_line` or `python`, for another process that has to use it."""
    return command_line if _spelling.get() is command_line else python


def with_current_spelling(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Wrap a function for another thread, so that its messages spell options as this thread's messages do now."""
    spelling = _spelling.get()

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with spelled(spelling):
            return function(*args, **kwargs)

    return call
