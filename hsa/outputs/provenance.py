"""`hsa_merge.json`: the sources of an output, how it was made, the decisions, and digests of every file.

Nothing in it depends on when or where the merge ran: the same inputs give the same bytes. The card is rendered from the
same record, so both files can be written again from a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.architectures.base import Architecture, Partition
from hsa.architectures.registry import architectures, named
from hsa.errors import ProvenanceError, RequestError, shown
from hsa.methods.base import Method
from hsa.methods.copied import decision_from
from hsa.methods.json_fields import count, mapping, text
from hsa.methods.registry import methods
from hsa.methods.settings import Settings, declared
from hsa.methods.tensors import TensorRecord
from hsa.option_names import as_keys, spelled
from hsa.outputs import format1
from hsa.outputs.record import SETTINGS, Record
from hsa.outputs.source_record import hex_digest, parse_source
from hsa.system import manifest
from hsa.system.manifest import DIGEST, PROVENANCE
from hsa.system.plugins import VARIABLE
from hsa.system.types import parse_size


@dataclass(frozen=True)
class Provenance:
    """A provenance file that was read: its record, the digest of every other file (None where left out), and its own
    digest."""

    record: Record
    files: Mapping[str, str | None]
    digest: str


def load(directory: Path) -> Provenance:
    """Read and check the provenance of an output.

    Raises ProvenanceError if it is missing, if any byte of it was changed, or if an entry is missing or invalid.
    """
    return loads(manifest.read_bytes(directory), str(directory / PROVENANCE))


def loads(data: bytes, where: str) -> Provenance:
    """The provenance in the bytes of its file; see `load`."""
    document = manifest.parse(data, where)
    try:
        files = {text(name): _file_digest(entry) for name, entry in mapping(document["files"]).items()}
        return Provenance(parse_record(document), files, document[DIGEST])
    except (KeyError, TypeError, ValueError) as error:
        raise ProvenanceError(f"{where}: {_reason(error)}; it is no provenance that hsa wrote") from error


def parse_record(document: Mapping[str, Any]) -> Record:
    """Parse the record in a document. Raises KeyError, TypeError or ValueError if an entry is missing or invalid."""
    format_, parameters = document["format"], mapping(document["parameters"])
    method, version = _method(document)
    settings = _settings(method, version, parameters)
    architecture, anchor, base = _origin(document)
    targets = tuple(
        format1.parse_target(text(name), entry, settings)
        if format_ == 1
        else _target(text(name), entry, method, settings, architecture)
        for name, entry in mapping(document["targets"]).items()
    )
    return Record(
        {text(key): text(value) for key, value in mapping(document["program"]).items()},
        {text(key): text(value) for key, value in mapping(document["libraries"]).items()},
        method,
        version,
        architecture,
        parameters,
        {role: parse_source(entry) for role, entry in _sources(document, method, base).items()},
        anchor,
        base,
        targets,
        format_,
    )


_OF_PLUGINS = f" (one of a plugin needs the plugin's file in {VARIABLE})"


def _method(document: Mapping[str, Any]) -> tuple[Method[Any, Any], int]:
    if document["format"] == 1:
        return methods()[format1.method_of(mapping(document["parameters"]))], format1.VERSION
    entry = mapping(document["method"])
    name, version = text(entry["name"]), count(entry["version"])
    if name not in methods():
        raise ValueError(f"its method is {shown(name)}, which is none of {', '.join(methods())}{_OF_PLUGINS}")
    if not 1 <= version <= methods()[name].version:
        raise ValueError(
            f"it was made by version {version} of method {name}, and this hsa has version {methods()[name].version}"
        )
    return methods()[name], version


def _origin(document: Mapping[str, Any]) -> tuple[Architecture, str, str | None]:
    """The family of the models, and the roles of the anchor and base."""
    if document["format"] == 1:
        return named(format1.ARCHITECTURE), format1.ANCHOR, format1.roles()[0]
    base = None if document["base"] is None else text(document["base"])
    return _architecture(document["architecture"]), text(document["anchor"]), base


def _architecture(value: Any) -> Architecture:
    name = text(value)
    if name not in architectures():
        raise ValueError(
            f"its architecture is {shown(name)}, which is none of {', '.join(architectures())}{_OF_PLUGINS}"
        )
    return named(name)


def _sources(document: Mapping[str, Any], method: Method[Any, Any], base: str | None) -> dict[str, Any]:
    """The sources of a document, in the order of the method's roles."""
    sources = mapping(document["sources"])
    count_ = len(sources) - (base is not None)
    try:
        method.contract.check(method.name, base=base is not None, models=count_)
    except RequestError as error:
        raise ValueError(f"sources are {shown(sorted(sources))}, and {error}") from error
    expected = (*((base,) if base is not None else ()), *method.contract.roles(count_))
    if set(sources) != set(expected):
        raise ValueError(f"sources are {shown(sorted(sources))}, expected {', '.join(expected)}")
    return {role: sources[role] for role in expected}


def _settings(method: Method[Any, Any], version: int, parameters: Mapping[str, Any]) -> Settings:
    """Parse and validate the settings of a record, on which the card and a repeated merge rely.

    An earlier version of a method may have had fewer settings. The missing ones get their defaults.
    """
    recorded = (each.key for each in declared(method.Settings) if not each.about.silent)
    expected = tuple(recorded) if version == method.version else ()
    missing = [key for key in (*expected, *SETTINGS) if key not in parameters]
    if missing:
        raise KeyError(missing[0])
    try:
        settings: Settings = method.Settings.from_dict(parameters)
        settings.require()
        if parameters["max_shard_size"] is not None:
            with spelled(as_keys(parameters)):
                parse_size(parameters["max_shard_size"])
    except RequestError as error:
        raise ValueError(str(error)) from error
    if settings.method != method.name:
        raise ValueError(f"its parameters are those of method {settings.method}, and its method is {method.name}")
    for field, value in mapping(parameters["card"]).items():
        text(field), text(value)
    return settings


def _target(
    name: str, entry: Any, method: Method[Any, Any], settings: Settings, architecture: Architecture
) -> TensorRecord:
    try:
        return _sound_target(name, mapping(entry), method, settings, architecture)
    except KeyError as error:
        raise ValueError(f"{name}: {error} is missing") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _sound_target(
    name: str, entry: Mapping[str, Any], method: Method[Any, Any], settings: Settings, architecture: Architecture
) -> TensorRecord:
    groups, axis = count(entry["groups"]), count(entry["axis"])
    shape = tuple(map(count, entry["shape"]))
    if groups < 1 or axis > 1 or (groups > 1 and (axis >= len(shape) or shape[axis] % groups)):
        raise ValueError(f"shape {shown(list(shape))} has no {groups} groups along axis {axis}")
    decision = decision_from(method, mapping(entry["decision"]), groups, settings)
    place = architecture.place(name)
    canonical = architecture.canonical(name)
    return TensorRecord(name, canonical, place, shape, text(entry["dtype"]), Partition(axis, groups), decision)


def changed_keys(document: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The keys that differ in value, or that only one of the two documents has."""
    absent = object()
    return [key for key in {**expected, **document} if document.get(key, absent) != expected.get(key, absent)]


def _file_digest(entry: Any) -> str | None:
    entry = mapping(entry)
    return hex_digest(entry["blake3"]) if entry else None


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
