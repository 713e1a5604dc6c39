"""Opens and reads a patch: its header, document and decisions are checked before any of its rows is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hsa.errors import HsaError, PatchError
from hsa.methods.tensors import TensorRecord
from hsa.outputs import patch_format
from hsa.outputs.patch_format import PatchContents, rows_shape
from hsa.outputs.record import Record
from hsa.outputs.recording import tensors_digest
from hsa.sources.safetensors import Header, TensorEntry, read_header
from hsa.system import fsio
from hsa.system.dtypes import STORAGE, all_finite, first_not_finite
from hsa.system.fsio import SourceFile
from hsa.system.types import PathLike

READ_BYTES = 4 << 20
"""Bytes of a tensor that are hashed at a time."""


@dataclass(frozen=True)
class Patch:
    """An open patch: its contents, and the offsets of its tensors."""

    source: fsio.SourceFile
    header: Header
    contents: PatchContents

    @property
    def record(self) -> Record:
        return self.contents.record

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors of the file by name."""
        return {entry.name: entry for entry in self.header.entries}

    def start(self, name: str) -> int:
        """The byte offset of a tensor in the file."""
        return len(self.header.raw) + self.entries[name].start

    def check_tensors(self, rows: Mapping[str, str]) -> None:
        """Raise PatchError unless the digests of all tensors match the document. `rows` gives the digests that are
        known already, by tensor."""
        digests = dict(rows)
        for entry in self.header.entries:
            if entry.name not in digests:
                digests[entry.name] = digest_range(self.source, self.start(entry.name), entry.stop - entry.start)
        digest = tensors_digest([(e.name, e.code, e.shape, digests[e.name]) for e in self.header.entries])
        if digest != self.contents.tensors:
            raise PatchError(
                f"{self.source.path}: its rows give the digest {digest}, its document says {self.contents.tensors}; it "
                f"is damaged, make it again"
            )

    def check_rows(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Read every row once. Raises PatchError if one contains NaN or Inf, or if digests differ from the document's.

        `progress` is called with the number of bytes read since the last call. Raises MachineError, SourceChanged.
        """
        digests = {}
        for target in self.contents.targets:
            entry = self.entries[target.name]
            digests[target.name] = digest_range(
                self.source,
                self.start(target.name),
                entry.stop - entry.start,
                lambda view, start, target=target: self._check_finite(target, view, start),  # type: ignore[misc]
            )
            progress(entry.stop - entry.start)
        self.check_tensors(digests)

    def _check_finite(self, target: TensorRecord, view: memoryview, start: int) -> None:
        groups = self.contents.touched(target)
        values = np.frombuffer(view, dtype=STORAGE[target.code])
        if not all_finite(target.code, values):
            element = start // values.itemsize + first_not_finite(target.code, values)
            shape = rows_shape(target, len(groups))
            place = int(np.unravel_index(element, shape)[target.partition.axis])
            raise not_finite_rows(self.source, target.name, groups[place])


def open_patch(path: PathLike, tally: fsio.Tally, stack: ExitStack) -> Patch:
    """Open a patch, and check its header and its decisions. Raises PatchError, SourceError, HeaderError."""
    place = Path(os.path.expanduser(os.fspath(path)))  # unlike Path.expanduser, this does not raise for an unknown user
    source = fsio.SourceFile(place, "patch", tally)
    stack.callback(source.close)
    header = read_header(source)
    where = f"patch {place}"
    origin = len(header.raw)
    contents = patch_format.parse_contents(
        header, where, lambda entry: source.read(entry.stop - entry.start, origin + entry.start)
    )
    return Patch(source, header, contents)


def digest_range(
    source: fsio.SourceFile, start: int, count: int, look: Callable[[memoryview, int], None] | None = None
) -> str:
    """BLAKE3 of a range of a file, read in pieces; `look` is called with each piece and its offset in the range."""
    from blake3 import blake3

    hasher, buffer = blake3(), bytearray(min(count, READ_BYTES))
    for first in range(0, count, READ_BYTES):
        view = memoryview(buffer)[: min(READ_BYTES, count - first)]
        source.read_into(view, start + first)
        hasher.update(view)
        if look is not None:
            look(view, first)
    return hasher.hexdigest()


def not_finite_rows(patch: SourceFile, name: str, head: int) -> PatchError:
    """The error for a patch in which the rows of a head are not all finite."""
    return PatchError(
        f"patch {patch.path}: its rows of {name}, head {head} hold NaN or Inf, which no merge writes; make the patch "
        f"again"
    )


SUFFIX = ".safetensors"


def is_patch(path: Path) -> bool:
    """Whether a file's header identifies it as a patch, whatever else may be wrong with it."""
    with suppress(HsaError):
        source = fsio.SourceFile(path, "patch", fsio.Tally())
        try:
            return patch_format.KEY in read_header(source).metadata
        finally:
            source.close()
    return False
