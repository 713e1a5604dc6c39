"""Patch files: the merged rows of one merge, and what it takes to make the merge's output from them and primary.

A patch is a safetensors file. Each target stands in it under primary's own name for it, as the rows (for `out_proj` the
columns) of its selected heads alone:

    weights   [heads selected, head_dim, d_in]       q, k and v
              [d_out, heads selected, head_dim]      out_proj
    biases    [heads selected, head_dim]
    hsa.selected   uint8 [heads of all targets]      1 where a head is selected
    hsa.scores     float64 [heads of all targets]    squared saliency scores

Metadata `hsa_patch` holds a JSON document: the merge's provenance record without scores and selection, the small files
that the merge writes with their digests, a digest over all tensors, and last a digest of the document itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from hsa.architectures.base import Architecture, TensorPlace
from hsa.architectures.registry import named
from hsa.errors import HeaderError, PatchError, ProvenanceError, RequestError, shown
from hsa.methods.base import Method
from hsa.methods.selection import MAX_SCORE, selection_of
from hsa.methods.settings import Settings
from hsa.option_names import option
from hsa.outputs.distances import Distances
from hsa.outputs.provenance import (
    FORMAT1_ARCHITECTURE,
    Record,
    SourceRecord,
    TargetRecord,
    changed_keys,
    hex_digest,
    parse_origin,
)
from hsa.sources.checkpoint import CONFIG
from hsa.sources.roles import Role
from hsa.sources.safetensors import MAX_HEADER, Header, TensorEntry, serialize
from hsa.sources.small_files import SMALL_FILES
from hsa.system.dtypes import ARITHMETIC, BITS
from hsa.system.fsio import ALIGNMENT
from hsa.system.manifest import BLANK_DIGEST, DIGEST, LONGEST_NUMBER, check_digest, document_digest
from hsa.system.strict_json import MAX_MARKS, count_marks, load_json

KEY = "hsa_patch"
FORMAT = 1
SCORES, SELECTED = "hsa.scores", "hsa.selected"


class OtherPatchFormat(PatchError):
    """A patch of another version of the format: none of this version's to judge."""


@dataclass(frozen=True)
class PatchTarget:
    """A target of a patch: primary's tensor, how many heads it has and were to be merged, and lambda_i."""

    name: str
    projection: TensorPlace
    shape: tuple[int, ...]
    code: str
    heads: int
    keep: int
    coefficient: float

    @property
    def head_dim(self) -> int:
        return self.shape[self.projection.head_axis] // self.heads

    def rows_shape(self, count: int) -> tuple[int, ...]:
        """Shape of the rows of `count` heads."""
        if self.projection.head_axis == 1:
            return (self.shape[0], count, self.head_dim)
        return (count, self.head_dim, *self.shape[1:])

    def rows_bytes(self, count: int) -> int:
        return math.prod(self.rows_shape(count)) * BITS[self.code] // 8


MAX_TARGETS, MAX_HEADS = 4096, 1 << 17
"""Targets of a patch, and heads of all of them: several times what large-v3 has. A file of holes may promise more."""

LONGEST = Distances(LONGEST_NUMBER, LONGEST_NUMBER)
"""Stands for distances that are not known yet."""


@dataclass(frozen=True)
class PatchContents:
    """What a patch's document says: everything but scores, selection and rows.

    `targets` are in the order of the merge's provenance; `files` maps the small files that the merge writes to their
    digests; `distances` are by stack, and of `all`; `tensors` is the digest over all tensors of the patch.
    """

    program: Mapping[str, str]
    libraries: Mapping[str, str]
    parameters: Mapping[str, Any]
    sources: Mapping[Role, SourceRecord]
    targets: tuple[PatchTarget, ...]
    files: Mapping[str, str]
    architecture: Architecture
    tensors: str = BLANK_DIGEST
    distances: Mapping[str, Distances] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        document = {
            "format": FORMAT,
            "program": dict(self.program),
            "libraries": dict(self.libraries),
            "parameters": dict(self.parameters),
            "sources": {role: source.as_dict() for role, source in self.sources.items()},
            "targets": {t.name: [t.heads, t.keep, t.coefficient] for t in self.targets},
            "files": dict(self.files),
            "distances": {stack: [d.from_primary, d.from_secondary] for stack, d in self.distances.items()},
            "tensors_blake3": self.tensors,
        }
        document[DIGEST] = document_digest(document)
        return document

    def in_file_order(self) -> tuple[PatchTarget, ...]:
        """Weights before biases and wide elements before narrow ones: so the weights of every Whisper size begin at
        multiples of a page, and can be written past the page cache."""
        return tuple(sorted(self.targets, key=lambda t: (-BITS[t.code], len(t.shape) == 1)))

    def record(self, selected: Sequence[tuple[int, ...]], squared: Sequence[tuple[float, ...]]) -> Record:
        """The record of the merge, with the selection and the squared scores of each target."""
        targets = tuple(
            TargetRecord.from_selection(
                t.name, t.projection, t.shape, t.code, t.keep, t.coefficient, selection_of(scores, heads)
            )
            for t, heads, scores in zip(self.targets, selected, squared, strict=True)
        )
        return Record(self.program, self.libraries, self.parameters, self.sources, targets, self.architecture)


def tensor_entries(contents: PatchContents, counts: Mapping[str, int]) -> tuple[TensorEntry, ...]:
    """The tensors of a patch in the order of the file; `counts` gives the number of heads selected by target."""
    total = sum(target.heads for target in contents.targets)
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        (target.name, target.code, target.rows_shape(counts[target.name])) for target in contents.in_file_order()
    ]
    tensors += [(SCORES, "U8", (total, 8)), (SELECTED, "U8", (total,))]
    sizes = [math.prod(shape) * BITS[code] // 8 for _, code, shape in tensors]
    stops = list(accumulate(sizes))
    return tuple(
        TensorEntry(name, code, shape, stop - nbytes, stop)
        for (name, code, shape), nbytes, stop in zip(tensors, sizes, stops, strict=True)
    )


def header_size(contents: PatchContents) -> int:
    """Bytes to leave for the header before it is known which heads are selected: a multiple of a page.

    Raises RequestError where the patch would be larger than `parse_contents` accepts.
    """
    heads = sum(target.heads for target in contents.targets)
    if len(contents.targets) > MAX_TARGETS or heads > MAX_HEADS:
        raise RequestError(
            f"the patch would hold {len(contents.targets)} targets with {heads} heads, and at most {MAX_TARGETS} and "
            f"{MAX_HEADS} are read again; write a whole checkpoint"
        )
    every = {target.name: target.heads for target in contents.targets}
    stacks = dict.fromkeys((*contents.architecture.all_stacks, "all"), LONGEST)
    longest = _serialize_header(replace(contents, distances=stacks), tensor_entries(contents, every))
    size = -(-len(longest) // ALIGNMENT) * ALIGNMENT
    if size - 8 > MAX_HEADER or count_marks(longest[8:]) > MAX_MARKS:
        raise RequestError(
            f"the patch's header would have {size} bytes with {count_marks(longest[8:])} brackets, braces and commas, "
            f"and at most {MAX_HEADER} and {MAX_MARKS} are read again; write a whole checkpoint"
        )
    return size


def render_header(contents: PatchContents, counts: Mapping[str, int], size: int) -> bytes:
    """The header, padded to `size` bytes."""
    raw = _serialize_header(contents, tensor_entries(contents, counts))
    assert len(raw) <= size
    text = raw[8:] + b" " * (size - len(raw))
    return len(text).to_bytes(8, "little") + text


def _serialize_header(contents: PatchContents, entries: Sequence[TensorEntry]) -> bytes:
    text = json.dumps(contents.document(), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return serialize(entries, {"format": "pt", KEY: text})


def with_digests(
    contents: PatchContents, targets: Mapping[Role, str], tensors: str, distances: Mapping[str, Distances]
) -> PatchContents:
    """The contents with what only finished rows give: digests of each source's targets and of the patch's tensors,
    distances."""
    sources = {role: replace(source, targets=targets[role]) for role, source in contents.sources.items()}
    return replace(contents, sources=sources, tensors=tensors, distances=distances)


def parse_contents(header: Header, where: str) -> PatchContents:
    """What the document in a patch's checked header says, held to the tensors beside it.

    Raises PatchError where the file is no patch, of another version, or damaged.
    """
    text = header.metadata.get(KEY)
    if text is None:
        raise PatchError(f"{where} is no patch: its header has no {KEY}; expected a file that hsa wrote as a patch")
    try:
        document = load_json(text.encode("utf-8"), where, KEY)
        if document.get("format") != FORMAT:
            raise OtherPatchFormat(
                f"{where}: format is {shown(document.get('format'), 40)}, this version reads {FORMAT}"
            )
        check_digest(document, where)
    except (HeaderError, ProvenanceError, UnicodeEncodeError) as error:
        raise PatchError(f"{where}: {error}") from error
    if len(header.entries) > MAX_TARGETS + 2:
        raise PatchError(f"{where}: it holds {len(header.entries)} tensors, at most {MAX_TARGETS} targets are read")
    try:
        contents = _contents(document, {entry.name: entry for entry in header.entries})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise PatchError(f"{where}: {reason}; it is no patch that hsa wrote") from error
    altered = [key for key in changed_keys(document, contents.document()) if key != DIGEST]
    if altered:
        raise PatchError(f"{where}: {shown(altered[0])} is not written as hsa writes it; it is no patch that hsa wrote")
    counts = selected_counts(contents, header.entries)
    if header.entries != tensor_entries(contents, counts):
        raise PatchError(
            f"{where}: its tensors are not those that its document promises; it is no patch that hsa wrote"
        )
    return contents


def _contents(document: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> PatchContents:
    program, libraries, parameters, sources = parse_origin(document)
    targets, files = document["targets"], document["files"]
    if not isinstance(targets, dict) or not targets or not isinstance(files, dict):
        raise TypeError("targets and files must be objects, and targets not empty")
    for name, digest in files.items():
        if name not in SMALL_FILES:
            raise ValueError(f"files has {shown(name)}, which no merge writes; expected {', '.join(SMALL_FILES)}")
        hex_digest(digest)
    if CONFIG not in files:
        raise ValueError(f"files has no {CONFIG}, which every merge writes")
    architecture = named(FORMAT1_ARCHITECTURE)
    placed = tuple(_target(name, entry, entries.get(name), architecture) for name, entry in targets.items())
    heads = sum(target.heads for target in placed)
    if heads > MAX_HEADS:
        raise ValueError(f"its targets have {heads} heads, at most {MAX_HEADS} are read")
    tensors = document["tensors_blake3"]
    if not isinstance(tensors, str):
        raise TypeError("tensors_blake3 must be a text")
    return PatchContents(
        program,
        libraries,
        parameters,
        sources,
        placed,
        files,
        architecture,
        tensors,
        {stack: _distances(entry) for stack, entry in document["distances"].items()},
    )


def _distances(entry: Any) -> Distances:
    one, two = entry
    if not all(value is None or (isinstance(value, float) and 0 <= value < math.inf) for value in (one, two)):
        raise ValueError(f"distances are {shown(entry)}, expected two finite numbers of at least 0, or null")
    return Distances(one, two)


def _target(name: str, entry: Any, rows: TensorEntry | None, architecture: Architecture) -> PatchTarget:
    projection = architecture.place(name)
    if projection is None or rows is None:
        raise ValueError(f"{shown(name, 120)} is no attention projection with rows in the file")
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError(f"{name}: expected heads, heads to keep and lambda_i, found {shown(entry)}")
    heads, keep, coefficient = entry
    for number in (heads, keep):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{name}: {shown(number, 40)} is no number of heads")
    if not 1 <= heads <= 1 << 20 or not 0 <= keep <= heads:
        raise ValueError(f"{name}: {shown(keep, 40)} of {shown(heads, 40)} heads")
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not 0 <= coefficient <= 1:
        raise ValueError(f"{name}: lambda_i is {shown(coefficient, 40)}")
    if rows.code not in ARITHMETIC:
        raise ValueError(f"{name}: its dtype is {shown(rows.code)}, expected one of {', '.join(ARITHMETIC)}")
    rank = 3 if projection.part == "weight" else 2
    if len(rows.shape) != rank:
        raise ValueError(f"{name}: its rows have shape {list(rows.shape)}")
    if projection.head_axis == 1:
        shape: tuple[int, ...] = (rows.shape[0], heads * rows.shape[2])
    else:
        shape = (heads * rows.shape[1], *rows.shape[2:])
    return PatchTarget(name, projection, shape, rows.code, heads, keep, float(coefficient))


def selected_counts(contents: PatchContents, entries: Sequence[TensorEntry]) -> dict[str, int]:
    """How many heads the rows of each target are of, by the tensors of the file; 0 where the file lacks a target."""
    by_name = {entry.name: entry for entry in entries}
    return {
        target.name: by_name[target.name].shape[target.projection.head_axis] if target.name in by_name else 0
        for target in contents.targets
    }


def pack_scores(squared: Sequence[Sequence[float]]) -> bytes:
    """`hsa.scores`: little-endian float64, eight bytes each, for no element type would be aligned after odd rows."""
    return np.array([score for scores in squared for score in scores], dtype="<f8").tobytes()


def pack_selected(selected: Sequence[Sequence[int]], heads: Sequence[int]) -> bytes:
    """`hsa.selected`: a byte for every head."""
    return b"".join(
        bytes(head in merged for head in range(count)) for merged, count in zip(map(set, selected), heads, strict=True)
    )


def unpack_selection(
    contents: PatchContents, scores: bytes, flags: bytes, where: str
) -> tuple[list[tuple[int, ...]], list[tuple[float, ...]]]:
    """Selected heads and squared scores of each target, in the order of the targets; PatchError where not sound."""
    selected: list[tuple[int, ...]] = []
    squared: list[tuple[float, ...]] = []
    values = np.frombuffer(scores, dtype="<f8").tolist()
    if not all(value >= 0 and math.sqrt(value) < MAX_SCORE for value in values) or not set(flags) <= {0, 1}:
        raise PatchError(
            f"{where}: {SCORES} must hold numbers of at least 0 whose roots are below {MAX_SCORE:g}, and {SELECTED} 0 "
            f"and 1; make the patch again"
        )
    first = 0
    for target in contents.targets:
        span = slice(first, first + target.heads)
        selected.append(tuple(head for head, flag in enumerate(flags[span]) if flag))
        squared.append(tuple(values[span]))
        first += target.heads
    return selected, squared


def source_names(contents: PatchContents) -> str:
    """Who the sources were, for messages."""
    return ", ".join(source.identity.named(role) for role, source in contents.sources.items())


def patch_obstacles(method: Method[Any, Any], settings: Settings, anchor_kind: str) -> Iterator[str]:
    """Why more than touched groups differ from the anchor, so that a patch cannot hold the merge; nothing where it
    can."""
    yield from method.patch_obstacles(settings)
    if settings.dtype != "auto":
        yield f"{option('dtype')} casts every tensor"
    if anchor_kind != "safetensors":
        yield "primary has no safetensors files, which a patch is applied to"
