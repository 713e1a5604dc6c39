"""Patch files: the touched rows of one merge, and all that is needed to make its output from them and the anchor.

A patch is a safetensors file. Each target is stored under the anchor's own name for it. Only the rows of its touched
groups are stored, or the columns where heads are groups of columns:

    matrices   [groups touched, group_size, d_in]       groups of rows, such as the heads of q, k and v
               [d_out, groups touched, group_size]      groups of columns, such as the heads of out_proj
    vectors    [groups touched, group_size]

The metadata entry `hsa_patch` is a JSON document. It contains the merge's record with all decisions, the small files
that the merge writes with their digests, and the distances of the merged targets from the models. A digest over all
tensors follows, and last a digest of the document itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from hsa.errors import HeaderError, PatchError, ProvenanceError, RequestError, shown
from hsa.methods.base import Method
from hsa.methods.json_fields import mapping, text
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorRecord
from hsa.option_names import as_keys, option, spelled
from hsa.outputs import format1_patches
from hsa.outputs.provenance import changed_keys, parse_record
from hsa.outputs.record import Record
from hsa.outputs.source_record import hex_digest
from hsa.sources.checkpoint import CONFIG
from hsa.sources.safetensors import MAX_HEADER, Header, TensorEntry, serialize
from hsa.sources.small_files import SMALL_FILES
from hsa.system.dtypes import ARITHMETIC, BITS
from hsa.system.fsio import ALIGNMENT
from hsa.system.manifest import BLANK_DIGEST, DIGEST, FORMATS, LONGEST_NUMBER, check_digest, document_digest
from hsa.system.strict_json import MAX_MARKS, count_marks, load_json

KEY = "hsa_patch"

MAX_TARGETS, MAX_GROUPS = 4096, 1 << 17
"""Maximum targets of a patch, and maximum groups of all of them: several times those of large-v3. A sparse file may
declare more."""

Distances = Mapping[str, Mapping[str, float | None]]
"""The distances of merged targets from the models, by stack (and for `all`) and role: |merged - model| / |model|. None
where this ratio is undefined."""


class OtherPatchFormat(PatchError):
    """A patch in another version of the format, which this version cannot check."""


@dataclass(frozen=True)
class PatchContents:
    """The contents of a patch's document.

    `files` maps the small files that the merge writes to their digests; `tensors` is the digest over all tensors of the
    patch.
    """

    record: Record
    files: Mapping[str, str]
    tensors: str = BLANK_DIGEST
    distances: Distances = field(default_factory=dict)

    @property
    def targets(self) -> tuple[TensorRecord, ...]:
        return self.record.targets

    def document(self) -> dict[str, Any]:
        document = {
            **(format1_patches.record_document(self.record) if self.record.format == 1 else self.record.as_dict()),
            "files": dict(self.files),
            "distances": {
                stack: list(by_role.values()) if self.record.format == 1 else dict(by_role)
                for stack, by_role in self.distances.items()
            },
            "tensors_blake3": self.tensors,
        }
        document[DIGEST] = document_digest(document)
        return document

    def touched(self, target: TensorRecord) -> tuple[int, ...]:
        """The groups of a target whose rows are in the patch."""
        untouched = self.record.method.untouched(target.partition.groups, target.decision)
        return tuple(group for group in range(target.partition.groups) if group not in untouched)

    def in_file_order(self) -> tuple[TensorRecord, ...]:
        """The targets in file order: matrices before vectors, and wide elements before narrow ones. The matrices of
        every Whisper size then begin at multiples of a page and can be written without the page cache."""
        return tuple(sorted(self.targets, key=lambda t: (-BITS[t.code], len(t.shape) == 1)))


def rows_shape(target: TensorRecord, count: int) -> tuple[int, ...]:
    """The shape of the rows of `count` groups."""
    if target.partition.axis == 1:
        return (target.shape[0], count, target.group_size)
    return (count, target.group_size, *target.shape[1:])


def rows_bytes(target: TensorRecord, count: int) -> int:
    """The number of bytes in the rows of `count` groups."""
    return math.prod(rows_shape(target, count)) * BITS[target.code] // 8


def tensor_entries(contents: PatchContents, counts: Mapping[str, int]) -> tuple[TensorEntry, ...]:
    """The tensors of a patch in file order; `counts` gives the number of touched groups by target."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        (target.name, target.code, rows_shape(target, counts[target.name])) for target in contents.in_file_order()
    ]
    if contents.record.format == 1:
        tensors += format1_patches.extra_tensors(contents.targets)
    sizes = [math.prod(shape) * BITS[code] // 8 for _, code, shape in tensors]
    stops = list(accumulate(sizes))
    return tuple(
        TensorEntry(name, code, shape, stop - nbytes, stop)
        for (name, code, shape), nbytes, stop in zip(tensors, sizes, stops, strict=True)
    )


def header_size(contents: PatchContents) -> int:
    """The number of bytes to reserve for the header before the decisions are known: a multiple of a page.

    The decisions in `contents` are the longest possible. Raises RequestError if the patch would be larger than
    `parse_contents` accepts.
    """
    groups = sum(target.partition.groups for target in contents.targets)
    if len(contents.targets) > MAX_TARGETS or groups > MAX_GROUPS:
        raise RequestError(
            f"the patch would hold {len(contents.targets)} targets with {groups} heads, and at most {MAX_TARGETS} and "
            f"{MAX_GROUPS} are read again; write a whole checkpoint"
        )
    every = {target.name: target.partition.groups for target in contents.targets}
    roles = [role for role in contents.record.sources if role != contents.record.base]
    stacks = (*contents.record.architecture.all_stacks, "all")
    longest_distances = {stack: dict.fromkeys(roles, LONGEST_NUMBER) for stack in stacks}
    longest = _serialize_header(replace(contents, distances=longest_distances), tensor_entries(contents, every))
    size = -(-len(longest) // ALIGNMENT) * ALIGNMENT
    if size - 8 > MAX_HEADER or count_marks(longest[8:]) > MAX_MARKS:
        raise RequestError(
            f"the patch's header would have {size} bytes with {count_marks(longest[8:])} brackets, braces and commas, "
            f"and at most {MAX_HEADER} and {MAX_MARKS} are read again; write a whole checkpoint"
        )
    return size


def render_header(contents: PatchContents, size: int) -> bytes:
    """The header, padded to `size` bytes."""
    counts = {target.name: len(contents.touched(target)) for target in contents.targets}
    raw = _serialize_header(contents, tensor_entries(contents, counts))
    assert len(raw) <= size
    padded = raw[8:] + b" " * (size - len(raw))
    return len(padded).to_bytes(8, "little") + padded


def _serialize_header(contents: PatchContents, entries: Sequence[TensorEntry]) -> bytes:
    return serialize(entries, {"format": "pt", KEY: _text(contents.document())})


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse_contents(header: Header, where: str, read: format1_patches.Read) -> PatchContents:
    """Parse the document in a patch's checked header and check it against the tensors of the file.

    `read` returns the bytes of a tensor of the file. Raises PatchError if the file is not a patch, has another version,
    or is damaged.
    """
    document = _document(header, where)
    if len(header.entries) > MAX_TARGETS + 2:
        raise PatchError(f"{where}: it holds {len(header.entries)} tensors, at most {MAX_TARGETS} targets are read")
    entries = {entry.name: entry for entry in header.entries}
    try:
        if document["format"] == 1:
            record = format1_patches.parse_record(document, entries, read)
        else:
            record = parse_record(document)
        contents = _contents(document, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise PatchError(f"{where}: {reason}; it is no patch that hsa wrote") from error
    altered = [key for key in changed_keys(document, contents.document()) if key != DIGEST]
    if altered:
        inner = [document[altered[0]], contents.document().get(altered[0])]
        within = (
            changed_keys(*inner) if altered[0] in document and all(isinstance(each, dict) for each in inner) else []
        )
        what = ": ".join(map(shown, (altered[0], *within[:1])))
        raise PatchError(f"{where}: {what} is not written as hsa writes it; it is no patch that hsa wrote")
    counts = {target.name: len(contents.touched(target)) for target in contents.targets}
    for target in contents.targets:
        entry = entries.get(target.name)
        if entry is not None and entry.shape != rows_shape(target, counts[target.name]):
            with spelled(as_keys(record.parameters)):
                obstacles = list(record.method.patch_obstacles(record.settings))
            if obstacles:
                raise PatchError(f"{where}: its parameters are those of no patch: {obstacles[0]}")
            raise PatchError(
                f"{where}: the rows of {target.name} have shape {list(entry.shape)}, and its decision gives "
                f"{list(rows_shape(target, counts[target.name]))}"
            )
    if header.entries != tensor_entries(contents, counts):
        raise PatchError(
            f"{where}: its tensors are not those that its document promises; it is no patch that hsa wrote"
        )
    return contents


def _document(header: Header, where: str) -> dict[str, Any]:
    """Parse the document of a patch and check its digest. Raises PatchError."""
    written = header.metadata.get(KEY)
    if written is None:
        raise PatchError(f"{where} is no patch: its header has no {KEY}; expected a file that hsa wrote as a patch")
    try:
        document = load_json(written.encode("utf-8"), where, KEY)
        version = document.get("format")
        if type(version) is not int or version not in FORMATS:
            raise OtherPatchFormat(
                f"{where}: format is {shown(version, 40)}, this version reads {' and '.join(map(str, FORMATS))}"
            )
        check_digest(document, where)
        if _text(document) != written:
            raise ProvenanceError("its document is not written as hsa writes it; it is no patch that hsa wrote")
    except (HeaderError, ProvenanceError, UnicodeEncodeError) as error:
        raise PatchError(f"{where}: {error}") from error
    return document


def _contents(document: Mapping[str, Any], record: Record) -> PatchContents:
    if not record.targets:
        raise ValueError("it has no targets")
    for name, digest in mapping(document["files"]).items():
        if name not in SMALL_FILES:
            raise ValueError(f"files has {shown(name)}, which no merge writes; expected {', '.join(SMALL_FILES)}")
        hex_digest(digest)
    if CONFIG not in document["files"]:
        raise ValueError(f"files has no {CONFIG}, which every merge writes")
    groups = sum(target.partition.groups for target in record.targets)
    if groups > MAX_GROUPS:
        raise ValueError(f"its targets have {groups} heads, at most {MAX_GROUPS} are read")
    for target in record.targets:
        if target.code not in ARITHMETIC:
            raise ValueError(
                f"{target.name}: its dtype is {shown(target.code)}, expected one of {', '.join(ARITHMETIC)}"
            )
    models = [role for role in record.sources if role != record.base]
    distances = {stack: _distances(entry, models) for stack, entry in mapping(document["distances"]).items()}
    return PatchContents(record, document["files"], text(document["tensors_blake3"]), distances)


def _distances(entry: Any, models: Sequence[str]) -> dict[str, float | None]:
    """The distances of one stack. In format 1 they are listed in the order of the models, without their roles."""
    by_role = dict(zip(models, entry, strict=True)) if isinstance(entry, list) else mapping(entry)
    sound = all(value is None or (isinstance(value, float) and 0 <= value < math.inf) for value in by_role.values())
    if list(by_role) != list(models) or not sound:
        raise ValueError(
            f"distances are {shown(entry)}, expected finite numbers of at least 0, or null, for {', '.join(models)}"
        )
    return by_role


def source_names(record: Record) -> str:
    """The identities of the sources, for messages."""
    return ", ".join(source.identity.named(role) for role, source in record.sources.items())


def patch_obstacles(method: Method[Any, Any], settings: Settings, anchor: str, anchor_kind: str) -> Iterator[str]:
    """The reasons why more than the touched groups differ from the anchor, so that a patch cannot represent the merge.
    Empty if it can."""
    yield from method.patch_obstacles(settings)
    if settings.dtype != "auto":
        yield f"{option('dtype')} casts every tensor"
    if anchor_kind != "safetensors":
        yield f"{anchor} has no safetensors files, which a patch is applied to"
