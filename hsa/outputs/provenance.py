"""`hsa_merge.json`: what an output was made from, how, which heads were merged, and digests of every file.

Nothing in it depends on when or where the merge ran: the same inputs give the same bytes. The card is rendered from
the same record, so that whoever holds a record can write both again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hsa.architectures.base import Architecture, TensorPlace
from hsa.architectures.registry import named
from hsa.errors import ProvenanceError, RequestError, shown
from hsa.methods.hsa import ROLES, HsaSettings
from hsa.methods.selection import MAX_SCORE, Selection
from hsa.option_names import as_keys, spelled
from hsa.sources.checkpoint import CheckpointKind
from hsa.sources.identity import Identity
from hsa.sources.roles import Role
from hsa.system import manifest
from hsa.system.manifest import BLANK_DIGEST, DIGEST, FORMAT, PROVENANCE, document_digest, render
from hsa.system.types import parse_size

SETTINGS = ("assets_from", "backend", "card", "max_shard_size")
"""What stands among a record's parameters besides those of the merge itself."""

FORMAT1_ARCHITECTURE = "whisper"
"""The family of every model whose record has format 1, which names none."""

HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class SourceFileRecord:
    """A weights file of a source: its size and the BLAKE3 digest of its header."""

    nbytes: int
    header: str


@dataclass(frozen=True)
class SourceRecord:
    """Who a source was: identity, form of its weights, files, and a digest over its target tensors."""

    identity: Identity
    kind: str
    files: Mapping[str, SourceFileRecord]
    targets: str

    def as_dict(self) -> dict[str, Any]:
        form = {} if self.kind == "safetensors" else {"format": self.kind}
        return {
            **form,
            "id": self.identity.id,
            "revision": self.identity.revision,
            "files": {name: {"bytes": f.nbytes, "header_blake3": f.header} for name, f in self.files.items()},
            "targets_blake3": self.targets,
        }


@dataclass(frozen=True)
class TargetRecord:
    """A merged tensor: shape, element type, heads, how many were to be merged, lambda_i in float64, the heads selected,
    every head's score (an L2 norm) and the margin of the cut (None where no head or every head is selected)."""

    name: str
    projection: TensorPlace
    shape: tuple[int, ...]
    code: str
    heads: int
    keep: int
    coefficient: float
    selected: tuple[int, ...]
    scores: tuple[float, ...]
    margin: float | None

    @classmethod
    def from_selection(
        cls,
        name: str,
        projection: TensorPlace,
        shape: tuple[int, ...],
        code: str,
        keep: int,
        coefficient: float,
        selection: Selection,
    ) -> TargetRecord:
        heads = len(selection.squared)
        return cls(
            name,
            projection,
            shape,
            code,
            heads,
            keep,
            coefficient,
            selection.selected,
            selection.scores,
            selection.margin,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "dtype": self.code,
            "heads": self.heads,
            "keep": self.keep,
            "lambda_i": self.coefficient,
            "selected": list(self.selected),
            "scores": list(self.scores),
            "margin": self.margin,
        }


@dataclass(frozen=True)
class Record:
    """All that the provenance says but the digests of the files. `parameters` are those of the merge
    (`HsaSettings.as_dict`) and what besides them shaped the output. `architecture` is the family of the models."""

    program: Mapping[str, str]
    libraries: Mapping[str, str]
    parameters: Mapping[str, Any]
    sources: Mapping[Role, SourceRecord]
    targets: tuple[TargetRecord, ...]
    architecture: Architecture

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "program": dict(self.program),
            "libraries": dict(self.libraries),
            "parameters": dict(self.parameters),
            "sources": {role: source.as_dict() for role, source in self.sources.items()},
            "targets": {target.name: target.as_dict() for target in self.targets},
        }

    def check_fits(self, names: Iterable[str], heads: int | None = None) -> None:
        """RequestError where the record, with files of these names, would be too large to be read again."""
        files = {name: {"blake3": BLANK_DIGEST} for name in names}
        total = sum(target.heads for target in self.targets) if heads is None else heads
        manifest.check_fits({**self.as_dict(), "files": files, DIGEST: BLANK_DIGEST}, total)

    def with_files(self, digests: Mapping[str, str | None]) -> bytes:
        """The file's bytes. `digests` maps every other file of the output to its BLAKE3 digest, None where left out."""
        files = {name: ({"blake3": digest} if digest else {}) for name, digest in sorted(digests.items())}
        document = {**self.as_dict(), "files": files}
        document[DIGEST] = document_digest(document)
        return render(document)


@dataclass(frozen=True)
class Provenance:
    """A provenance file that was read: its record, the digest of every other file (None where left out), its own."""

    record: Record
    files: Mapping[str, str | None]
    digest: str


def load(directory: Path) -> Provenance:
    """Read and check the provenance of an output.

    Raises ProvenanceError when there is none, when a byte of it is not what was written, or when it does not say what
    it must.
    """
    return loads(manifest.read_bytes(directory), str(directory / PROVENANCE))


def loads(text: bytes, where: str) -> Provenance:
    """The provenance in the bytes of its file; see `load`."""
    document = manifest.parse(text, where)
    try:
        files = {_text(name): _file_digest(entry) for name, entry in _mapping(document["files"]).items()}
        return Provenance(parse_record(document), files, document[DIGEST])
    except (KeyError, TypeError, ValueError) as error:
        raise ProvenanceError(f"{where}: {_reason(error)}; it is no provenance that hsa wrote") from error


def parse_record(document: Mapping[str, Any]) -> Record:
    """The record in a document. Raises KeyError, TypeError or ValueError where it does not say what it must."""
    architecture = named(FORMAT1_ARCHITECTURE)
    entries = _mapping(document["targets"])
    targets = tuple(_target_record(_text(name), entry, architecture) for name, entry in entries.items())
    return Record(*parse_origin(document), targets, architecture)


Origin = tuple[dict[str, str], dict[str, str], dict[str, Any], dict[Role, SourceRecord]]


def parse_origin(document: Mapping[str, Any]) -> Origin:
    """Program, libraries, parameters and sources in a document; raises as `parse_record` does."""
    sources = _mapping(document["sources"])
    if set(sources) != set(ROLES):
        raise ValueError(f"sources are {shown(sorted(sources))}, expected {', '.join(ROLES)}")
    return (
        {_text(key): _text(value) for key, value in _mapping(document["program"]).items()},
        {_text(key): _text(value) for key, value in _mapping(document["libraries"]).items()},
        _parameters(document["parameters"]),
        {role: parse_source(sources[role]) for role in ROLES},
    )


def _parameters(entry: Any) -> dict[str, Any]:
    """The parameters of a record, which the card and a merge made again rely on."""
    parameters = _mapping(entry)
    try:
        HsaSettings.from_dict(parameters)
        if parameters.get("max_shard_size") is not None:
            with spelled(as_keys(parameters)):
                parse_size(parameters["max_shard_size"])
    except RequestError as error:
        raise ValueError(str(error)) from error
    for setting in SETTINGS:
        if setting not in parameters:
            raise KeyError(setting)
    for field, value in _mapping(parameters["card"]).items():
        _text(field), _text(value)
    return parameters


def parse_source(entry: Any) -> SourceRecord:
    """The record of a source; raises as `parse_record` does."""
    entry = _mapping(entry)
    revision, kind = entry["revision"], _text(entry.get("format", "safetensors"))
    if kind not in get_args(CheckpointKind):
        raise ValueError(
            f"the format of a source is {shown(kind)}, expected one of {', '.join(get_args(CheckpointKind))}"
        )
    return SourceRecord(
        Identity(_text(entry["id"]), None if revision is None else _text(revision)),
        kind,
        {
            _text(name): SourceFileRecord(_count(_mapping(file)["bytes"]), hex_digest(file["header_blake3"]))
            for name, file in _mapping(entry["files"]).items()
        },
        hex_digest(entry["targets_blake3"]),
    )


def _target_record(name: str, entry: Any, architecture: Architecture) -> TargetRecord:
    entry = _mapping(entry)
    projection = architecture.place(name)
    if projection is None:
        raise ValueError(f"{shown(name, 120)} is no attention projection")
    heads, scores = _count(entry["heads"]), tuple(map(_score, entry["scores"]))
    selected = tuple(map(_count, entry["selected"]))
    if len(scores) != heads or list(selected) != sorted(set(selected)) or any(head >= heads for head in selected):
        raise ValueError(f"{name}: {heads} heads, {len(scores)} scores and selected heads {shown(selected)} do not fit")
    margin = entry["margin"]
    return TargetRecord(
        name,
        projection,
        tuple(map(_count, entry["shape"])),
        _text(entry["dtype"]),
        heads,
        _count(entry["keep"]),
        _score(entry["lambda_i"]),
        selected,
        scores,
        None if margin is None else _number(margin),
    )


def changed_keys(document: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, or that one of two documents has alone."""
    absent = object()
    return [key for key in {**expected, **document} if document.get(key, absent) != expected.get(key, absent)]


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {shown(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {shown(value)}")
    return value


def hex_digest(value: Any) -> str:
    """A BLAKE3 digest as text; ValueError for anything else."""
    if len(_text(value)) != 64 or not set(value) <= HEX:
        raise ValueError(f"expected a digest of 64 hexadecimal digits, found {shown(value)}")
    return str(value)


def _file_digest(entry: Any) -> str | None:
    entry = _mapping(entry)
    return hex_digest(entry["blake3"]) if entry else None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"expected a whole number of at least 0, found {shown(value)}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"expected a finite number, found {shown(value)}")
    return float(value)


def _score(value: Any) -> float:
    """A score, or a lambda_i."""
    if not 0 <= _number(value) < MAX_SCORE:
        raise ValueError(f"expected a number of at least 0 and below {MAX_SCORE:g}, found {shown(value)}")
    return float(value)


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
