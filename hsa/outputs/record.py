"""The record of a merge: who its sources were, how it was made, and what was decided for each tensor.

The provenance of an output, the header of a patch, and the card are all written from a record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hsa.architectures.base import Architecture
from hsa.methods.base import Method
from hsa.methods.copied import decision_dict
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorRecord
from hsa.outputs import format1
from hsa.outputs.source_record import SourceRecord
from hsa.system import manifest
from hsa.system.manifest import BLANK_DIGEST, DIGEST, FORMAT, document_digest, render

SETTINGS = ("assets_from", "backend", "card", "max_shard_size")
"""The parameters of a record that are not settings of the method."""

OPTIONAL_SETTINGS = ("config_from",)
"""Further such parameters that a record may have."""


@dataclass(frozen=True)
class Record:
    """The content of the provenance, except the digests of the files.

    `parameters` are the method's settings (`Settings.as_dict`) and the other settings that shaped the output. `version`
    is the version of the method that wrote the record, and `format` the version of the record's format. `architecture`
    is the family of the models. `anchor` and `base` are roles.
    """

    program: Mapping[str, str]
    libraries: Mapping[str, str]
    method: Method[Any, Any]
    version: int
    architecture: Architecture
    parameters: Mapping[str, Any]
    sources: Mapping[str, SourceRecord]
    anchor: str
    base: str | None
    targets: tuple[TensorRecord, ...]
    format: int = FORMAT

    @property
    def models(self) -> int:
        """The number of merged models, not counting base."""
        return len(self.sources) - (self.base is not None)

    @property
    def settings(self) -> Settings:
        """The method's settings. Raises RequestError if the parameters are invalid."""
        settings: Settings = self.method.Settings.from_dict(self.parameters)
        return settings

    def as_dict(self) -> dict[str, Any]:
        """The record as a JSON document."""
        document = {
            "format": self.format,
            "program": dict(self.program),
            "libraries": dict(self.libraries),
            "method": {"name": self.method.name, "version": self.version},
            "architecture": self.architecture.name,
            "parameters": dict(self.parameters),
            "sources": {role: source.as_dict() for role, source in self.sources.items()},
            "anchor": self.anchor,
            "base": self.base,
            "targets": {target.name: self._target(target) for target in self.targets},
        }
        return format1.document_of(document) if self.format == 1 else document

    def _target(self, target: TensorRecord) -> dict[str, Any]:
        return {
            "shape": list(target.shape),
            "dtype": target.code,
            "groups": target.partition.groups,
            "axis": target.partition.axis,
            "decision": decision_dict(self.method, target.decision),
        }

    def with_targets(self, targets: Iterable[TensorRecord]) -> Record:
        """The same record with other targets."""
        return replace(self, targets=tuple(targets))

    def check_fits(self, names: Iterable[str], groups: int | None = None) -> None:
        """Raise RequestError if the record, with files of these names, would be too large to be read again."""
        files = {name: {"blake3": BLANK_DIGEST} for name in names}
        total = sum(target.partition.groups for target in self.targets) if groups is None else groups
        manifest.check_fits({**self.as_dict(), "files": files, DIGEST: BLANK_DIGEST}, total)

    def with_files(self, digests: Mapping[str, str | None]) -> bytes:
        """The file's bytes. `digests` maps every other file of the output to its BLAKE3 digest, None where left out."""
        files = {name: ({"blake3": digest} if digest else {}) for name, digest in sorted(digests.items())}
        document = {**self.as_dict(), "files": files}
        document[DIGEST] = document_digest(document)
        return render(document)
