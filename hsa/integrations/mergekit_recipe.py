"""Read a YAML file for mergekit, and check everything about merge method `hsa` in it before mergekit starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.actions.mergekit_config.roles import assign
from hsa.errors import HsaError, MachineError, RequestError, shown
from hsa.integrations.mergekit_method import DEFAULTS, METHOD, Merging, config_of
from hsa.methods.base import BASE
from hsa.methods.hsa import PRIMARY, HsaSettings
from hsa.methods.settings import check_number, declared
from hsa.sources.roles import Role


@dataclass(frozen=True)
class MergekitRecipe:
    """A YAML file: its text, its mapping, and its models (mergekit's references), base first."""

    text: str
    document: Mapping[str, Any]
    models: tuple[Any, ...]
    roles: Mapping[Role, Any]

    @property
    def is_hsa(self) -> bool:
        return bool(self.document.get("merge_method") == METHOD)

    @property
    def casts(self) -> bool:
        return bool(self.document.get("dtype") or self.document.get("out_dtype"))


@contextmanager
def plainly() -> Iterator[None]:
    """Turn mergekit's errors into this package's, which the command line shows on one line."""
    try:
        yield
    except (HsaError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if hasattr(error, "format_message"):  # an error of click
            raise RequestError(f"mergekit: {error.format_message()}") from error
        text = " ".join(str(error).split())
        kind = MachineError if "IoError" in text else RequestError  # safetensors' own name for a failed write
        raise kind(f"mergekit stopped: {type(error).__name__}: {text}") from error


def read(path: Path, merging: Merging) -> MergekitRecipe:
    """Read the YAML file, and check everything about this package's method in it.

    mergekit itself ignores unknown keys, and would write half an output before it found other errors.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"mergekit's configuration {path} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"mergekit's configuration {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise RequestError(f"mergekit's configuration {path} is no mapping; it must say merge_method and models")
    if document.get("merge_method") != METHOD:
        return MergekitRecipe(text, document, tuple(_mentioned(document)), {})
    roles = _check(document)
    for role, model in roles.items():
        merging.config(role, model)
    return MergekitRecipe(text, document, tuple(roles.values()), roles)


def _reference(value: Any) -> Any:
    from mergekit.common import ModelReference

    with plainly():
        return ModelReference.model_validate(value)


def _mentioned(document: Any) -> Iterator[Any]:
    """Every model of a document: base first, then in the order of the document."""
    if isinstance(document, dict):
        for key in ("base_model", "model"):
            if isinstance(document.get(key), (str, dict)):
                yield _reference(document[key])
        for key in ("models", "slices", "modules", "sources"):
            yield from _mentioned(document.get(key))
        for value in document.values():
            if isinstance(value, dict) and {"models", "slices"} & value.keys():
                yield from _mentioned(value)
    elif isinstance(document, list):
        for entry in document:
            yield from _mentioned(entry)


def _check(document: Mapping[str, Any]) -> dict[Role, Any]:
    """The models by role. Raises RequestError for anything that is not valid in a merge with `hsa`."""
    for key in ("slices", "modules"):
        if document.get(key) is not None:
            raise RequestError(f"merge_method {METHOD} merges whole models: list them under models, not under {key}")
    if not document.get("base_model"):
        raise RequestError(f"merge_method {METHOD} needs base_model, the pretrained model that both were tuned from")
    entries = document.get("models")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "model" in entry for entry in entries):
        raise RequestError(
            f"merge_method {METHOD} needs models: a list with primary and secondary, each as model: NAME"
        )
    _check_parameters(document.get("parameters"))
    base = _reference(document["base_model"])
    others, weights = [], {}
    for entry in entries:
        model, role = _reference(entry["model"]), _parameters_of(entry).get("role")
        if model != base:
            others.append((model, role))
            weights[model] = _weights(entry)
        elif role not in (None, "base"):
            raise RequestError(f"{model} is base_model and cannot have the role {shown(role)} too")
    roles = assign(others)
    if weights[roles[PRIMARY]]:
        raise RequestError(f"{roles[PRIMARY]} is primary, which lambda weighs; weight belongs to secondaries")
    secondaries = [weights[model] or [1.0] for role, model in roles.items() if role != PRIMARY]
    if all(len(each) == 1 for each in secondaries):
        config_of({}, [each[0] for each in secondaries])
    return {BASE: base, **roles}


def _weights(entry: Mapping[str, Any]) -> list[float]:
    """Every weight that a model may have. Raises RequestError for invalid weights."""
    about = next(each.about for each in declared(HsaSettings) if each.name == "weights")
    values = [_number(value) for value in _values(_parameters_of(entry).get("weight", []))]
    for value in values:
        check_number("weight", value, about.low or 0.0, about.high or 0.0)
    return values


def _parameters_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters: Any = entry.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"the parameters of {entry['model']} must be a mapping such as {{role: primary}}")
    for name in parameters:
        if name in DEFAULTS:
            raise RequestError(f"{name} stands under {entry['model']}; it belongs to the parameters of the whole merge")
        if name not in ("role", "weight"):
            raise RequestError(
                f"{entry['model']} has a parameter {shown(name)}; merge_method {METHOD} knows role and weight there"
            )
    return parameters


def _check_parameters(parameters: Any) -> None:
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters must be a mapping, got {shown(parameters)}")
    for name, setting in parameters.items():
        if name == "weight":
            raise RequestError("weight belongs under each secondary: parameters: {weight: 0.5}")
        if name == "role":
            raise RequestError("role belongs under each model: parameters: {role: primary} or {role: secondary}")
        if name not in DEFAULTS:
            raise RequestError(f"merge_method {METHOD} has no parameter {shown(name)}; it has {', '.join(DEFAULTS)}")
        for value in _values(setting):
            config_of({name: _number(value) if name != "targets" else value})


def _values(setting: Any) -> Iterator[Any]:
    """Every value that a setting may take, since mergekit has gradients and filters."""
    if isinstance(setting, list):
        for part in setting:
            yield from _values(part)
    elif isinstance(setting, dict):
        yield from _values(setting.get("value"))
    else:
        yield setting


def _number(value: Any) -> Any:
    """The value as a number if it is one: YAML parses 1e-1 as text, but mergekit as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
