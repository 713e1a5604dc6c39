"""Weights that `torch.save` wrote, read like safetensors: where in the file each tensor's bytes lie.

Such a file is a zip archive: every storage an uncompressed record, and `data.pkl`, a pickle that says what they are.
The archive is checked record by record before the pickle is looked at. Then `torch.load` reads the pickle alone: with
`weights_only`, which calls nothing but constructors of tensors and plain containers, and for the device `meta`, where
a tensor has no data. The bytes themselves are read later, range by range, by whoever needs them.

Source: the notes on serialization semantics of torch's documentation; the zip format's application note.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hsa.dtypes import BITS
from hsa.errors import HeaderError, HsaError, SourceError, shown
from hsa.fsio import Source
from hsa.header import Entry, Header

REMEDY = "save the model as safetensors (save_pretrained does) and give that"
_AGAIN = "the file is damaged, copy it again"

MAX_PICKLE = 1 << 20
"""Bytes of an archive that are read at once: its directory, or the description of its tensors, which takes a hundred
times its size once it is loaded. Those of large-v3 have a sixth of it."""

_LOCAL_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = 30
"""Bytes of a zip record's own header before its name."""

_CODES = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float64": "F64",
}
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, EOFError, struct.error)
"""What the zip reader raises for an archive that is none."""


@dataclass(frozen=True)
class Archive:
    """A checked file: the bytes of its `data.pkl`, the objects that it describes (tensors on the device `meta`), and
    the size of every record of tensor data by its first byte."""

    raw: bytes
    content: Any
    records: Mapping[int, int]


def read_state_dict(source: Source) -> Header:
    """The tensors of an open file that holds a state dict and nothing else; offsets count from the file's first byte.

    Raises HeaderError for a damaged archive, SourceError for a pickle that is refused or no state dict.
    """
    archive = read_archive(source)
    return Header(archive.raw, entries(archive.content, archive, f"{source.label}: {source.path}"), {})


def read_archive(source: Source) -> Archive:
    """Check the archive of an open file and load its description; see `read_state_dict` for what it raises."""
    where = f"{source.label}: {source.path}"
    if source.size < len(_LOCAL_MAGIC) or source.read(len(_LOCAL_MAGIC)) != _LOCAL_MAGIC:
        raise HeaderError(
            f"{where} is no zip archive, which torch.save writes: a bare pickle, or no weights at all; refused "
            f"unread: {REMEDY}"
        )
    records = _records(source, where)
    described = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(described) != 1:
        raise HeaderError(f"{where}: expected one data.pkl in the archive, found {len(described)}; {REMEDY}")
    start, size = records[described[0]]
    if size > MAX_PICKLE:
        raise HeaderError(
            f"{where}: data.pkl has {size} bytes, at most {MAX_PICKLE} are allowed for the description of tensors; "
            f"{REMEDY}"
        )
    root = described[0].partition("/")[0]
    for name, (_, whole) in records.items():  # torch makes room for these before it asks for their bytes
        if whole > MAX_PICKLE and not name.startswith(f"{root}/data/"):
            raise HeaderError(
                f"{where}: record {name:.200} has {whole} bytes, at most {MAX_PICKLE} are allowed for what is no "
                f"tensor; {REMEDY}"
            )
    order = records.get(f"{root}/byteorder")
    if order is not None and source.read(min(order[1], 16), order[0]) != b"little":
        raise SourceError(f"{where}: expected the byte order 'little'; {REMEDY}")
    data = dict(place for name, place in records.items() if name.startswith(f"{root}/data/"))
    return Archive(source.read(size, start), _load(source, where), data)


def entries(tensors: Any, archive: Archive, where: str) -> tuple[Entry, ...]:
    """The tensors of a state dict of the archive, in the order of their first bytes in the file.

    Two tensors may share bytes, as tied weights do. Raises SourceError for what is no plain tensor, HeaderError for
    one that lies outside its record.
    """
    import torch

    if not isinstance(tensors, dict):
        raise SourceError(f"{where}: expected a state dict, found {type(tensors).__name__}; {REMEDY}")
    found = []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise SourceError(
                f"{where}: expected a state dict of plain tensors, found {type(tensor).__name__} under {shown(name)}; "
                f"{REMEDY}"
            )
        found.append(_entry(name, tensor, archive, f"{where}: tensor {name}"))
    return tuple(sorted(found, key=lambda entry: entry.start))


class _Window(io.RawIOBase):
    """An open source as the file object that zipfile and torch expect; refuses to read too much in one go."""

    def __init__(self, source: Source) -> None:
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
        left = max(0, self._source.size - self._position)
        count = left if size < 0 else min(size, left)
        if count > MAX_PICKLE:
            raise HeaderError(
                f"{self._source.label}: {self._source.path}: a part of {count} bytes of the archive is to be read at "
                f"once, at most {MAX_PICKLE} are allowed; {REMEDY}"
            )
        found = self._source.read(count, self._position)
        self._position += count
        return found

    def readinto(self, buffer: Any, /) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _records(source: Source, where: str) -> dict[str, tuple[int, int]]:
    """First byte and size of every record by name: each stored as it is, within the file, and apart from the others."""
    try:
        with zipfile.ZipFile(_Window(source)) as archive:
            listed = archive.infolist()
    except _BAD_ZIP as error:
        raise HeaderError(
            f"{where} is truncated or damaged: no directory of its records ({error}); copy it again"
        ) from error
    found: dict[str, tuple[int, int]] = {}
    for record in listed:
        label = f"{where}: record {record.filename}"
        encrypted = record.flag_bits & 1
        if record.compress_type != zipfile.ZIP_STORED or encrypted or record.compress_size != record.file_size:
            raise HeaderError(f"{label} is compressed or encrypted, expected it stored as torch.save does; {REMEDY}")
        if record.filename in found:
            raise HeaderError(f"{label} stands twice in the archive; {REMEDY}")
        place, header = record.header_offset, b""
        if 0 <= place <= source.size - _LOCAL_HEADER:
            header = source.read(_LOCAL_HEADER, place)
        if not header.startswith(_LOCAL_MAGIC):
            raise HeaderError(f"{label} should begin at byte {place} and does not; {_AGAIN}")
        name, extra = struct.unpack("<HH", header[26:])
        start = place + _LOCAL_HEADER + name + extra
        if start + record.file_size > source.size:
            raise HeaderError(
                f"{label} ends at byte {start + record.file_size}, the file at {source.size}: it is truncated, copy "
                f"it again"
            )
        found[record.filename] = (start, record.file_size)
    end, before = 0, ""
    for name, (start, size) in sorted(found.items(), key=lambda item: item[1]):
        if start < end:
            raise HeaderError(f"{where}: record {name} overlaps record {before}; {_AGAIN}")
        end, before = start + size, name
    return found


def _load(source: Source, where: str) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(_Window(source), map_location="meta", weights_only=True)  # type: ignore[arg-type]
    except HsaError:
        raise
    except pickle.UnpicklingError as error:
        named = _GLOBAL.search(str(error))
        reason = f"it names {named[1].rstrip('.')}" if named else "its pickle is malformed"
        raise SourceError(
            f"{where} holds more than tensors and plain containers ({reason}), so that loading it could run code; "
            f"refused: {REMEDY}"
        ) from error
    except Exception as error:  # what a malformed pickle provokes is anything at all
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise SourceError(f"{where} cannot be loaded as weights ({reason}); copy it again, or {REMEDY}") from error


def _entry(name: str, tensor: Any, archive: Archive, label: str) -> Entry:
    import torch

    code = _CODES.get(str(tensor.dtype))
    if code is None:
        raise SourceError(f"{label} has dtype {tensor.dtype}, expected one of {', '.join(_CODES)}; {REMEDY}")
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        raise SourceError(f"{label} is sparse, or a transposed or strided view, expected it contiguous; {REMEDY}")
    shape = tuple(tensor.shape)
    width = BITS[code] // 8
    nbytes = math.prod(shape) * width
    if nbytes == 0:
        return Entry(name, code, shape, 0, 0)
    record = tensor.untyped_storage()._checkpoint_offset
    if record is None:
        raise SourceError(f"{label} has no data in the file; {REMEDY}")
    claimed, held = tensor.untyped_storage().nbytes(), archive.records.get(record)
    if held is None:  # torch works out where records lie, which holds for archives that it wrote itself
        raise HeaderError(f"{label} is to begin at byte {record}, where no record does; {REMEDY}")
    start = record + tensor.storage_offset() * width
    if claimed != held or start + nbytes > record + held:
        raise HeaderError(
            f"{label}: shape {list(shape)} of {code} takes {nbytes} bytes from byte {start} on, and {claimed} bytes "
            f"are said to be in the record at {record}, which holds {held}; {_AGAIN}"
        )
    return Entry(name, code, shape, start, start + nbytes)
