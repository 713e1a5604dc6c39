"""Read and write the header of a safetensors file. The whole header is checked before any tensor is read.

Format: 8 bytes of little-endian header length, that many bytes of JSON, then the data without holes.
Source: the format description of the safetensors library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Any

from hsa.errors import HeaderError, shown
from hsa.sources.git_lfs import refuse_pointer
from hsa.system.digests import digest_of
from hsa.system.dtypes import BITS
from hsa.system.fsio import SourceFile
from hsa.system.strict_json import MAX_JSON, load_json

MAX_HEADER = MAX_JSON
"""The largest header in bytes."""

METADATA = "__metadata__"
"""The one name in a header that is not a tensor's."""

MAX_RANK = 64
"""The most dimensions of a tensor; numpy's own limit."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: element type, shape, and its byte range within the data."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A file's header. `raw` is its length and JSON as stored in the file; data begins after it. If the file is a
    pickle instead, `steps` counts the instructions and archive records that were read."""

    raw: bytes
    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    steps: int = 0

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of `raw`."""
        return digest_of(self.raw)


def read_header(source: SourceFile) -> Header:
    """Read and check the header of an open file; HeaderError names file, tensor, expected and found."""
    where = f"{source.label}: {source.path}"
    if source.size < 8:
        raise HeaderError(f"{where} is no safetensors file: {source.size} bytes, expected at least 8; copy it again")
    head = source.read(8)
    refuse_pointer(head, where)
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:
        raise HeaderError(
            f"{where}: header of {length} bytes, at most {MAX_HEADER} are allowed; not a safetensors file?"
        )
    if 8 + length > source.size:
        raise HeaderError(
            f"{where} is truncated: its header ends at byte {8 + length}, the file at {source.size}; copy it again"
        )
    raw = length.to_bytes(8, "little") + source.read(length, 8)
    entries, metadata = parse(raw[8:], source.size - 8 - length, where)
    return Header(raw, entries, metadata)


def parse(text: bytes, data_size: int, where: str) -> tuple[tuple[TensorEntry, ...], Mapping[str, str]]:
    """Parse a header's JSON into entries in order of offset, and metadata; HeaderError if it is malformed."""
    document = load_json(text, where, "header")
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{where}: {METADATA} must map names to strings")
    entries = sorted((_entry(name, value, where) for name, value in document.items()), key=lambda e: (e.start, e.stop))
    position = 0
    for entry in entries:
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise HeaderError(
                f"{where}: tensor {entry.name} starts at data byte {entry.start}, expected {position}: it {problem}"
            )
        position = entry.stop
    if position != data_size:
        raise HeaderError(
            f"{where}: tensors end at data byte {position}, the file holds {data_size} data bytes; copy it again"
        )
    return tuple(entries), metadata


def serialize(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Serialize a header, length included, padded with spaces so that the data is 8-byte aligned."""
    document: dict[str, Any] = {METADATA: dict(metadata)}
    for entry in entries:
        document[entry.name] = {
            "dtype": entry.code,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(name: str, value: Any, where: str) -> TensorEntry:
    label = f"{where}: tensor {name:.200}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{label}: expected exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in BITS:
        raise HeaderError(f"{label}: unknown dtype {shown(code)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(size) for size in shape):
        raise HeaderError(f"{label}: shape must be a list of whole numbers of at least 0, found {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise HeaderError(f"{label}: data_offsets must be two whole numbers of at least 0, found {shown(offsets)}")
    start, stop = offsets
    if stop < start:
        raise HeaderError(f"{label}: data_offsets [{start}, {stop}] end before they start")
    bits = math.prod(shape) * BITS[code]
    if any(elements * BITS[code] >= 1 << 64 for elements in accumulate(shape, mul)):
        raise HeaderError(f"{label}: shape {shown(shape)} of {code} is larger than any file")
    if bits != (stop - start) * 8:
        raise HeaderError(
            f"{label}: shape {shape} of {code} takes {bits // 8} bytes, data_offsets [{start}, {stop}] hold "
            f"{stop - start}"
        )
    return TensorEntry(name, code, tuple(shape), start, stop)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
