"""Convert a mergekit file, and options that the file leaves open, into the arguments of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hsa.actions.mergekit_config.config_request import ConfigRequest, Model
from hsa.actions.mergekit_config.merge_methods import METHODS
from hsa.actions.mergekit_config.request import load, path_of
from hsa.errors import RequestError
from hsa.findings import Findings
from hsa.methods.registry import methods
from hsa.methods.settings import declared
from hsa.option_names import keys_named, option, spelled
from hsa.sources.roles import BASE
from hsa.system.types import PathLike


def read_arguments(path: PathLike, given: Mapping[str, Any]) -> tuple[ConfigRequest, dict[str, Any]]:
    """The request of a file, and the equivalent arguments of `hsa.merge`, together with those given beside the file.

    Raises what `load` does. Raises RequestError if the file names a method that this package lacks, or if an argument
    is given that the file determines.
    """
    config = load(path)
    _refuse_settled(config, given)
    base, notes = (None, []) if config.base is None else _opened(config.base)
    models: list[PathLike] = []
    for model in config.models:
        opened, found = _opened(model)
        models.append(opened)
        notes += found
    config = replace(config, findings=config.findings + Findings(tuple(notes)))
    sources = {"models": models} if base is None else {BASE: base, "models": models}
    return config, {
        "method": config.method,
        **sources,
        **config.settings,
        **_dtype(config),
        **_strictly(config),
        **given,
    }


def _opened(model: Model) -> tuple[PathLike, list[str]]:
    path, note = path_of(model)
    return path, [] if note is None else [note]


def _dtype(config: ConfigRequest) -> dict[str, Any]:
    return {} if config.dtype == "auto" else {"dtype": config.dtype}


def _strictly(config: ConfigRequest) -> dict[str, Any]:
    """The setting that makes tensors of different shapes an error, as they are in mergekit."""
    settings = declared(methods()[config.method].Settings)
    return {"on_mismatch": "error"} if any(each.name == "on_mismatch" for each in settings) else {}


def _refuse_settled(config: ConfigRequest, given: Mapping[str, Any]) -> None:
    if config.method not in methods():
        raise RequestError(
            f"{config.where}: merge_method {config.method} is not among the methods of this version, which are "
            f"{', '.join(methods())}; run mergekit itself on the file: hsa mergekit CONFIG.yml OUT"
        )
    names = {each.name for each in declared(methods()[config.method].Settings)}
    settled = {"dtype", *(each.python for each in METHODS[config.method].parameters)}
    named = {role.name for method in methods().values() for role in method.contract.named}
    sources = {BASE, "method", "models", *named}
    settings = {each.name for other in methods().values() for each in declared(other.Settings)}
    for name in given:
        if name in sources or (name in settings and (name in settled or name not in names)):
            raise RequestError(
                f"{option(name)} cannot be combined with {option('config')}, whose file says which models are merged, "
                f"how, and in which element type; change it there, or leave {option('config')} out"
            )


@contextmanager
def placed(config: ConfigRequest) -> Iterator[None]:
    """In messages, name settings as the file does, and say which line they are on."""
    names = {each.python: each.name for each in METHODS[config.method].parameters}
    try:
        with spelled(keys_named(names)):
            yield
    except RequestError as error:
        word = str(error).partition(" ")[0]  # the message begins with the setting that it is about
        python_name = next((python for python, name in names.items() if name == word), None)
        place = config.places.get(python_name or "", config.where)
        raise type(error)(f"{place}: {error}") from error
