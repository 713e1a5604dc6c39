"""The identity of a merge's source, as stored in records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from hsa.errors import shown
from hsa.methods.json_fields import count, mapping, text
from hsa.sources.checkpoint import CheckpointKind
from hsa.sources.identity import Identity

HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class SourceFileRecord:
    """A weights file of a source: its size and the BLAKE3 digest of its header."""

    nbytes: int
    header: str


@dataclass(frozen=True)
class SourceRecord:
    """A source in a record: identity, form of its weights, files, and a digest over its target tensors."""

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


def parse_source(entry: Any) -> SourceRecord:
    """Parse the record of a source. Raises KeyError, TypeError or ValueError if an entry is missing or invalid."""
    entry = mapping(entry)
    revision, kind = entry["revision"], text(entry.get("format", "safetensors"))
    if kind not in get_args(CheckpointKind):
        raise ValueError(
            f"the format of a source is {shown(kind)}, expected one of {', '.join(get_args(CheckpointKind))}"
        )
    return SourceRecord(
        Identity(text(entry["id"]), None if revision is None else text(revision)),
        kind,
        {
            text(name): SourceFileRecord(count(mapping(file)["bytes"]), hex_digest(file["header_blake3"]))
            for name, file in mapping(entry["files"]).items()
        },
        hex_digest(entry["targets_blake3"]),
    )


def hex_digest(value: Any) -> str:
    """Return a BLAKE3 digest as text; ValueError for anything else."""
    if len(text(value)) != 64 or not set(value) <= HEX:
        raise ValueError(f"expected a digest of 64 hexadecimal digits, found {shown(value)}")
    return str(value)
