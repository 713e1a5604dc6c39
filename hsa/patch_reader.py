"""A patch to read: checked before any of its rows is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hsa import fsio, patch_format
from hsa.errors import PatchError
from hsa.header import Header, read_header
from hsa.patch_format import Contents
from hsa.provenance import Record, tensors_digest
from hsa.request import PathLike
from hsa.target import select

READ_BYTES = 4 << 20
"""Bytes of a tensor that are digested at a time."""


@dataclass(frozen=True)
class Patch:
    """An open patch: its contents, the places of its tensors, and what was selected."""

    source: fsio.Source
    header: Header
    contents: Contents
    selected: tuple[tuple[int, ...], ...]
    squared: tuple[tuple[float, ...], ...]

    @property
    def record(self) -> Record:
        return self.contents.record(self.selected, self.squared)

    @property
    def rows(self) -> frozenset[str]:
        """Names of the tensors that hold merged rows."""
        return frozenset(target.name for target in self.contents.targets)

    def start(self, name: str) -> int:
        """The byte of the file where a tensor begins."""
        return len(self.header.raw) + next(entry.start for entry in self.header.entries if entry.name == name)

    def check_tensors(self, rows: Mapping[str, str]) -> None:
        """PatchError unless the digests of the rows, by tensor, and of what else it holds are those of its document."""
        digests = dict(rows)
        for entry in self.header.entries:
            if entry.name not in digests:
                digests[entry.name] = self.digest(entry.name)
        found = tensors_digest([(e.name, e.code, e.shape, digests[e.name]) for e in self.header.entries])
        if found != self.contents.tensors:
            raise PatchError(
                f"{self.source.path}: its rows give the digest {found}, its document says {self.contents.tensors}; it "
                f"is damaged, make it again"
            )

    def digest(self, name: str) -> str:
        """BLAKE3 of the bytes of a tensor, read now."""
        entry = next(entry for entry in self.header.entries if entry.name == name)
        return digest_range(self.source, self.start(name), entry.stop - entry.start)


def open_patch(path: PathLike, tally: fsio.Tally, stack: ExitStack) -> Patch:
    """Open a patch, and check all of it but its rows. Raises PatchError, SourceError, HeaderError."""
    place = Path(path).expanduser()
    source = fsio.Source(place, "patch", tally)
    stack.callback(source.close)
    header = read_header(source)
    where = f"patch {place}"
    contents = patch_format.read(header, where)
    at = {entry.name: (len(header.raw) + entry.start, entry.stop - entry.start) for entry in header.entries}
    scores, flags = (source.read(at[n][1], at[n][0]) for n in (patch_format.SCORES, patch_format.SELECTED))
    selected, squared = patch_format.unpack(contents, scores, flags, where)
    counts = {entry.name: patch_format.count_of(contents, entry) for entry in header.entries}
    for target, heads, values in zip(contents.targets, selected, squared, strict=True):
        if select(values, target.keep).selected != heads or counts[target.name] != len(heads):
            raise PatchError(f"{where}: the heads selected in {target.name} do not follow from its scores")
    return Patch(source, header, contents, tuple(selected), tuple(squared))


def digest_range(source: fsio.Source, start: int, count: int) -> str:
    """BLAKE3 of a range of a file, read in pieces."""
    from blake3 import blake3

    hasher, buffer = blake3(), bytearray(min(count, READ_BYTES))
    for first in range(0, count, READ_BYTES):
        view = memoryview(buffer)[: min(READ_BYTES, count - first)]
        source.read_into(view, start + first)
        hasher.update(view)
    return hasher.hexdigest()
