"""Read weights that `torch.save` wrote as safetensors are read: by the place of each tensor's bytes in the file.

Such a file is a zip archive. Every storage is an uncompressed record, and the pickle `data.pkl` describes the tensors.
The archive is checked record by record before the pickle is read. The pickle is never unpickled: `pickle_reader` reads
its description. The tensors' bytes are read later, range by range, where they are needed.

Source: the notes on serialization semantics of torch's documentation; the zip format's application note.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hsa.errors import HeaderError, SourceError, shown
from hsa.sources.git_lfs import refuse_pointer
from hsa.sources.pickle_names import PickledTensor, class_name
from hsa.sources.pickle_reader import REMEDY, read
from hsa.sources.safetensors import Header, TensorEntry
from hsa.system.dtypes import BITS
from hsa.system.fsio import SourceFile

_AGAIN = "the file is damaged, copy it again"

MAX_PICKLE = 1 << 20
"""The most bytes of an archive that are read at once: its directory, or the description of its tensors. The latter
takes up to a hundred times its size in memory. Those of large-v3 have a sixth of the limit."""

_LOCAL_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = 30
"""Bytes of a zip record's own header, up to its name."""

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
_BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, EOFError, struct.error)
"""Raised by the zip reader for an invalid archive."""


@dataclass(frozen=True)
class Archive:
    """A checked file: the bytes of its `data.pkl` and the values that it describes (see `pickle_reader`). `records`
    has the offset and size of each record of tensor data by key; `steps` counts the instructions and records read."""

    raw: bytes
    content: Any
    records: Mapping[str, tuple[int, int]]
    steps: int


def read_state_dict(source: SourceFile) -> Header:
    """Return the tensors of an open file that holds a state dict and nothing else. Offsets count from the file's start.

    Raises HeaderError for a damaged archive, SourceError for a pickle that is refused or is not a state dict.
    """
    archive = read_archive(source)
    tensors = tensor_entries(archive.content, archive, f"{source.label}: {source.path}")
    return Header(archive.raw, tensors, {}, archive.steps)


def read_archive(source: SourceFile) -> Archive:
    """Check the archive of an open file and read its description; raises what `read_state_dict` raises."""
    where = f"{source.label}: {source.path}"
    head = source.read(min(source.size, 8))
    refuse_pointer(head, where)
    if not head.startswith(_LOCAL_MAGIC):
        raise HeaderError(
            f"{where} is no zip archive, which torch.save writes: a bare pickle, or no weights at all; refused "
            f"unread: {REMEDY}"
        )
    records = _records(source, where)
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise HeaderError(f"{where}: expected one data.pkl in the archive, found {len(pickles)}; {REMEDY}")
    start, size = records[pickles[0]]
    if size > MAX_PICKLE:
        raise HeaderError(
            f"{where}: data.pkl has {size} bytes, at most {MAX_PICKLE} are allowed for the description of tensors; "
            f"{REMEDY}"
        )
    root = pickles[0].partition("/")[0]
    byte_order = records.get(f"{root}/byteorder")
    if byte_order is not None and source.read(min(byte_order[1], 16), byte_order[0]) != b"little":
        raise SourceError(f"{where}: expected the byte order 'little'; {REMEDY}")
    raw, prefix = source.read(size, start), f"{root}/data/"
    places = {name.removeprefix(prefix): place for name, place in records.items() if name.startswith(prefix)}
    content, instructions = read(raw, where)
    return Archive(raw, content, places, instructions + len(records))


def tensor_entries(tensors: Any, archive: Archive, where: str) -> tuple[TensorEntry, ...]:
    """Return the tensors of a state dict of the archive, in order of offset.

    Two tensors may share bytes, as tied weights do. Raises SourceError for a value that is not a plain tensor,
    HeaderError for a tensor that lies outside its record.
    """
    if not isinstance(tensors, dict):
        raise SourceError(f"{where}: expected a state dict, found {class_name(tensors)}; {REMEDY}")
    unsorted = []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, PickledTensor):
            raise SourceError(
                f"{where}: expected a state dict of plain tensors, found {class_name(tensor)} under {shown(name)}; "
                f"{REMEDY}"
            )
        unsorted.append(_entry(name, tensor, archive, f"{where}: tensor {name}"))
    return tuple(sorted(unsorted, key=lambda entry: entry.start))


class _SourceStream(io.RawIOBase):
    """An open source as the file object that zipfile expects; it refuses to read too much at once."""

    def __init__(self, source: SourceFile) -> None:
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if position < 0:
            raise OSError(f"byte {position} lies before the file")
        self._position = position
        return position

    def read(self, size: int = -1, /) -> bytes:
        remaining = max(0, self._source.size - self._position)
        count = remaining if size < 0 else min(size, remaining)
        if count > MAX_PICKLE:
            raise HeaderError(
                f"{self._source.label}: {self._source.path}: a part of {count} bytes of the archive is to be read at "
                f"once, at most {MAX_PICKLE} are allowed; {REMEDY}"
            )
        data = self._source.read(count, self._position)
        self._position += count
        return data


def _records(source: SourceFile, where: str) -> dict[str, tuple[int, int]]:
    """Return offset and size of every record by name. Records must be uncompressed, within the file, and disjoint."""
    try:
        with zipfile.ZipFile(_SourceStream(source)) as archive:
            infos = archive.infolist()
    except _BAD_ZIP as error:
        raise HeaderError(
            f"{where} is truncated or damaged: no directory of its records ({error}); copy it again"
        ) from error
    records: dict[str, tuple[int, int]] = {}
    for info in infos:
        label = f"{where}: record {info.filename}"
        encrypted = info.flag_bits & 1
        if info.compress_type != zipfile.ZIP_STORED or encrypted or info.compress_size != info.file_size:
            raise HeaderError(f"{label} is compressed or encrypted, expected it stored as torch.save does; {REMEDY}")
        if info.filename in records:
            raise HeaderError(f"{label} stands twice in the archive; {REMEDY}")
        position, header = info.header_offset, b""
        if 0 <= position <= source.size - _LOCAL_HEADER:
            header = source.read(_LOCAL_HEADER, position)
        if not header.startswith(_LOCAL_MAGIC):
            raise HeaderError(f"{label} should begin at byte {position} and does not; {_AGAIN}")
        name, extra = struct.unpack("<HH", header[26:])
        start = position + _LOCAL_HEADER + name + extra
        if start + info.file_size > source.size:
            raise HeaderError(
                f"{label} ends at byte {start + info.file_size}, the file at {source.size}: it is truncated, copy "
                f"it again"
            )
        records[info.filename] = (start, info.file_size)
    end, previous = 0, ""
    for name, (start, size) in sorted(records.items(), key=lambda item: item[1]):
        if start < end:
            raise HeaderError(f"{where}: record {name} overlaps record {previous}; {_AGAIN}")
        end, previous = start + size, name
    return records


def _entry(name: str, tensor: PickledTensor, archive: Archive, label: str) -> TensorEntry:
    code = _CODES.get(tensor.dtype)
    if code is None:
        supported = ", ".join(f"torch.{dtype}" for dtype in _CODES)
        raise SourceError(f"{label} has dtype torch.{tensor.dtype}, expected one of {supported}; {REMEDY}")
    if not tensor.is_contiguous:
        raise SourceError(f"{label} is a transposed or strided view, expected it contiguous; {REMEDY}")
    width = BITS[code] // 8
    nbytes = math.prod(tensor.shape) * width
    if nbytes == 0:
        return TensorEntry(name, code, tensor.shape, 0, 0)
    if tensor.storage is None:
        raise SourceError(f"{label} has no data in the file; {REMEDY}")
    key = tensor.storage.key
    if key not in archive.records:
        raise HeaderError(f"{label} is to be in the record data/{key:.200}, which the archive lacks; {_AGAIN}")
    record_start, record_size = archive.records[key]
    claimed = tensor.storage.count * (1 if tensor.storage.dtype == "uint8" else width)
    start = record_start + tensor.offset * width
    if claimed != record_size or start + nbytes > record_start + record_size:
        raise HeaderError(
            f"{label}: shape {list(tensor.shape)} of {code} takes {nbytes} bytes from byte {start} on, and {claimed} "
            f"bytes are said to be in the record at {record_start}, which holds {record_size}; {_AGAIN}"
        )
    return TensorEntry(name, code, tensor.shape, start, start + nbytes)
