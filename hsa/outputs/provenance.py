"""`hsa_merge.json`: what an output was made from, how, which heads were merged, and digests of every file.

Nothing in it depends on when or where the merge ran: the same inputs give the same bytes. The card is rendered from
the same record, so that whoever holds a record can write both again.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from hsa._version import __version__
from hsa.architectures.base import Projection
from hsa.architectures.whisper import canonical, parse
from hsa.errors import ProvenanceError, RequestError, shown
from hsa.methods.config import MergeConfig
from hsa.methods.selection import MAX_SCORE, Selection
from hsa.option_names import as_keys, spelled
from hsa.planning.outcome import TargetOutcome
from hsa.planning.plan import MergePlan
from hsa.sources.checkpoint import Checkpoint, Kind
from hsa.sources.identity import Identity
from hsa.sources.roles import ROLES, Role
from hsa.sources.source_set import Sources
from hsa.system import manifest
from hsa.system.digests import digest_of
from hsa.system.manifest import BLANK_DIGEST, DIGEST, FORMAT, PROVENANCE, document_digest, render
from hsa.system.types import parse_size

SETTINGS = ("assets_from", "backend", "card", "max_shard_size")
"""What stands among a record's parameters besides those of the merge itself."""

PROGRAM = {"name": "hsa-merge", "version": __version__}
HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class SourceFile:
    """A weights file of a source: its size and the BLAKE3 digest of its header."""

    nbytes: int
    header: str


@dataclass(frozen=True)
class SourceRecord:
    """Who a source was: identity, form of its weights, files, and a digest over its target tensors."""

    identity: Identity
    kind: str
    files: Mapping[str, SourceFile]
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
    projection: Projection
    shape: tuple[int, ...]
    code: str
    heads: int
    keep: int
    coefficient: float
    selected: tuple[int, ...]
    scores: tuple[float, ...]
    margin: float | None

    @classmethod
    def of(cls, outcome: TargetOutcome) -> TargetRecord:
        target = outcome.target
        return cls.selecting(
            target.output_name,
            target.projection,
            target.shape,
            target.out_code,
            target.keep,
            target.coefficient,
            outcome.merged.selection,
        )

    @classmethod
    def selecting(
        cls,
        name: str,
        projection: Projection,
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
    (`MergeConfig.as_dict`) and what besides them shaped the output."""

    program: Mapping[str, str]
    libraries: Mapping[str, str]
    parameters: Mapping[str, Any]
    sources: Mapping[Role, SourceRecord]
    targets: tuple[TargetRecord, ...]

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


def record(plan: MergePlan, sources: Sources, outcomes: Sequence[TargetOutcome], settings: Mapping[str, Any]) -> Record:
    """The record of a finished merge; `settings` is what besides its own parameters shaped the output."""
    return Record(
        dict(PROGRAM),
        libraries(numerics=plan.config.numerics),
        {**plan.config.as_dict(), **settings},
        {source.role: source_record(source, target_digest(source.role, outcomes)) for source in sources},
        tuple(map(TargetRecord.of, outcomes)),
    )


def check_fits(plan: MergePlan, sources: Sources, settings: Mapping[str, Any], small: Iterable[str]) -> None:
    """RequestError where the provenance of a planned merge could be too large to be read again.

    `small` are the names of the files that may lie beside the weights.
    """
    longest = manifest.LONGEST_NUMBER
    heads = sum(target.heads for target in plan.targets)
    most = tuple(
        TargetRecord(
            target.output_name,
            target.projection,
            target.shape,
            target.out_code,
            target.heads,
            target.keep,
            longest,
            tuple(range(target.heads)),
            (longest,) * target.heads,
            longest,
        )
        for target in (plan.targets if heads <= manifest.MAX_PROVENANCE_MARKS else ())
    )
    records = {
        source.role: SourceRecord(
            source.identity,
            source.kind,
            {shard.name: SourceFile(shard.source.size, BLANK_DIGEST) for shard in source.shards},
            BLANK_DIGEST,
        )
        for source in sources
    }
    numerics = libraries(numerics=plan.config.numerics)
    expected = Record(dict(PROGRAM), numerics, {**plan.config.as_dict(), **settings}, records, most)
    expected.check_fits([*small, *(file.name for file in plan.files)], heads)


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
    targets = tuple(_target_record(_text(name), entry) for name, entry in _mapping(document["targets"]).items())
    return Record(*parse_origin(document), targets)


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
    found = _mapping(entry)
    try:
        MergeConfig.from_dict(found)
        if found.get("max_shard_size") is not None:
            with spelled(as_keys(found)):
                parse_size(found["max_shard_size"])
    except RequestError as error:
        raise ValueError(str(error)) from error
    for setting in SETTINGS:
        if setting not in found:
            raise KeyError(setting)
    for field, value in _mapping(found["card"]).items():
        _text(field), _text(value)
    return found


def parse_source(entry: Any) -> SourceRecord:
    """The record of a source; raises as `parse_record` does."""
    entry = _mapping(entry)
    revision, kind = entry["revision"], _text(entry.get("format", "safetensors"))
    if kind not in get_args(Kind):
        raise ValueError(f"the format of a source is {shown(kind)}, expected one of {', '.join(get_args(Kind))}")
    return SourceRecord(
        Identity(_text(entry["id"]), None if revision is None else _text(revision)),
        kind,
        {
            _text(name): SourceFile(_count(_mapping(file)["bytes"]), hex_digest(file["header_blake3"]))
            for name, file in _mapping(entry["files"]).items()
        },
        hex_digest(entry["targets_blake3"]),
    )


def _target_record(name: str, entry: Any) -> TargetRecord:
    entry = _mapping(entry)
    projection = parse(canonical(name))
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


def target_digest(role: Role, outcomes: Sequence[TargetOutcome]) -> str:
    """BLAKE3 over the target tensors of one source: name, element type, shape and digest of each, by name.

    Independent of how the source is split into shards.
    """
    lines = []
    for outcome in outcomes:
        ref = outcome.target.ref(role)
        lines.append((outcome.target.projection.name, ref.code, ref.shape, outcome.digests[role]))
    return tensors_digest(lines)


def tensors_digest(tensors: Sequence[tuple[str, str, Sequence[int], str]]) -> str:
    """BLAKE3 over tensors given by name, element type, shape and the digest of their bytes, in the order of names."""
    lines = [
        json.dumps([name, code, list(shape), digest], separators=(",", ":")) for name, code, shape, digest in tensors
    ]
    return digest_of("\n".join(sorted(lines)).encode("ascii"))


def source_record(source: Checkpoint, targets: str) -> SourceRecord:
    """The record of an open source, with the digest over its target tensors."""
    files = {s.name: SourceFile(s.source.size, digest_of(s.header.raw)) for s in source.shards}
    return SourceRecord(source.identity, source.kind, files, targets)


def libraries(*, numerics: str = "exact") -> dict[str, str]:
    """Versions of what the bytes of an output depend on."""
    names = ["numpy", "blake3", "huggingface_hub"]
    if numerics == "reference":
        names.append("torch")
    return {"python": platform.python_version(), **{name: version(name) for name in sorted(names)}}


def changed_keys(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, or that one of two documents has alone."""
    absent = object()
    return [key for key in {**expected, **found} if found.get(key, absent) != expected.get(key, absent)]


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
