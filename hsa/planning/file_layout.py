"""The layout of an output's weights files, byte for byte, and how tensors are distributed over them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from hsa.errors import RequestError
from hsa.methods.tensors import TensorTask
from hsa.option_names import option
from hsa.sources.checkpoint import INDEX, MAX_TENSORS, WEIGHTS, Checkpoint
from hsa.sources.safetensors import MAX_HEADER, TensorEntry, serialize
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import BITS, size
from hsa.system.strict_json import MAX_MARKS, count_marks

SLICE_ELEMENTS = 1 << 18
"""The number of elements of a streamed tensor that are in memory at a time."""

MAX_WHOLE = 24 << 20
"""The most bytes of a tensor, in all sources and in its result, that one thread computes at once. Larger tensors are
cut into slices that threads share."""

SHARD_BYTES = 5 * 10**9
"""The most tensor bytes of a file if no source has safetensors files whose layout could be kept."""


@dataclass(frozen=True)
class Bytes:
    """Bytes that the plan already contains: a header."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def reads(self) -> Iterator[tuple[str, int]]:
        return iter(())


@dataclass(frozen=True)
class Copy:
    """The bytes of one tensor of a source, unchanged."""

    role: str
    tensor: TensorRef

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def reads(self) -> Iterator[tuple[str, int]]:
        yield self.role, self.tensor.nbytes


@dataclass(frozen=True)
class Computed:
    """`count` elements of a task's result, from element `first`: the whole tensor, or a slice of a streamed one."""

    task: TensorTask
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * size(self.task.out_code)

    @property
    def whole(self) -> bool:
        """Whether this is a tensor that is in memory as a whole, like every target that fits."""
        return is_whole(self.task)

    def reads(self) -> Iterator[tuple[str, int]]:
        for role, ref in self.task.sources.items():
            yield role, self.count * size(ref.code)


Content = Bytes | Copy | Computed


def is_whole(task: TensorTask) -> bool:
    """Whether one thread computes a tensor at once: always for heads and matrices, and for small tensors if listed."""
    if task.layout in ("heads", "whole"):
        return task.passes > 0 or task.listed
    return task.listed and whole_bytes(task) <= MAX_WHOLE


def whole_bytes(task: TensorTask) -> int:
    """Bytes of a tensor in all sources and of its result."""
    nbytes: int = sum(ref.nbytes for ref in task.sources.values())
    return nbytes + math.prod(task.shape) * size(task.out_code)


def pieces_of(task: TensorTask) -> tuple[Computed, ...]:
    """The pieces of a computed tensor: one, or slices that stream through memory."""
    total = math.prod(task.shape)
    if is_whole(task):
        return (Computed(task, 0, total),)
    count = max(1, SLICE_ELEMENTS // task.step) * task.step
    return tuple(Computed(task, first, min(count, total - first)) for first in range(0, total, count))


@dataclass(frozen=True)
class TensorContent:
    """One tensor of the output: name as stored, element type, shape, and its pieces in order."""

    name: str
    code: str
    shape: tuple[int, ...]
    pieces: tuple[Content, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Segment:
    """A piece at its place in a file."""

    offset: int
    content: Content

    @property
    def stop(self) -> int:
        return self.offset + self.content.nbytes


@dataclass(frozen=True)
class OutputFile:
    """A weights file: its segments, in order and without holes.

    `clone_of` is the number of the anchor's shard that has its bytes at the same places, so that the file may start as
    a clone of it; None if the layout differs.
    """

    name: str
    size: int
    segments: tuple[Segment, ...]
    clone_of: int | None


def pack(
    owner: Checkpoint,
    contents: Mapping[str, TensorContent],
    max_shard_size: int | None,
    base: Checkpoint | None = None,
) -> tuple[tuple[OutputFile, ...], bytes | None]:
    """Spread tensors over files: `owner`'s own shard layout, or shards of at most `max_shard_size` bytes.

    An owner without safetensors files of its own takes `base`'s layout, or shards of at most SHARD_BYTES. Returns the
    files and the index, which is None for a single file. `contents` is keyed by canonical name. Raises RequestError if
    the headers or the index would exceed the limits for reading a checkpoint.
    """
    files, index = _spread(owner, contents, max_shard_size, base)
    _check_readable(files, index, len(contents))
    return files, index


def _spread(
    owner: Checkpoint, contents: Mapping[str, TensorContent], max_shard_size: int | None, base: Checkpoint | None
) -> tuple[tuple[OutputFile, ...], bytes | None]:
    if max_shard_size is None and owner.kind == "safetensors":
        return _own_layout(owner, contents)
    if max_shard_size is None and base is not None and base.kind == "safetensors":
        return _borrowed_layout(base, owner, contents)
    max_shard_size = max_shard_size or SHARD_BYTES
    groups: list[list[TensorContent]] = [[]]
    filled = 0
    for content in contents.values():
        if groups[-1] and filled + content.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(content)
        filled += content.nbytes
    if len(groups) == 1:
        return (_file(WEIGHTS, groups[0], owner, None),), None
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    files = tuple(_file(name, group, owner, None) for name, group in zip(names, groups, strict=True))
    return files, _index(dict(zip(names, groups, strict=True)))


def _check_readable(files: Sequence[OutputFile], index: bytes | None, tensors: int) -> None:
    headers = [file.segments[0].content for file in files]
    texts = [header.data[8:] for header in headers if isinstance(header, Bytes)]
    for what, nbytes, brackets in (
        ("headers", sum(map(len, texts)), sum(map(count_marks, texts))),
        (INDEX, len(index or b""), count_marks(index or b"")),
    ):
        if nbytes > MAX_HEADER or brackets > MAX_MARKS or tensors > MAX_TENSORS:
            raise RequestError(
                f"the output's {what} would have {nbytes} bytes with {brackets} brackets, braces and commas for "
                f"{tensors} tensors in {len(files)} files, and at most {MAX_HEADER}, {MAX_MARKS} and {MAX_TENSORS} are "
                f"read again; choose larger weights files ({option('max_shard_size')}), or a primary with fewer tensors"
            )


def _own_layout(
    owner: Checkpoint, contents: Mapping[str, TensorContent]
) -> tuple[tuple[OutputFile, ...], bytes | None]:
    places = {name: ref.shard for name, ref in owner.tensors.items()}
    groups = {
        shard.name: [content for name, content in contents.items() if places[name] == number]
        for number, shard in enumerate(owner.shards)
    }
    files = tuple(_file(shard.name, groups[shard.name], owner, number) for number, shard in enumerate(owner.shards))
    if owner.index is None:
        return files, None
    document = json.loads(owner.index)
    unchanged = all(
        (ref := owner.tensors.get(name)) is not None and ref.nbytes == content.nbytes
        for name, content in contents.items()
    ) and {content.name for content in contents.values()} == {*document["weight_map"]}
    loadable = isinstance(document.get("metadata"), dict)  # transformers does not load an index without it
    return files, owner.index if unchanged and loadable else _index(groups)


def _borrowed_layout(
    base: Checkpoint, owner: Checkpoint, contents: Mapping[str, TensorContent]
) -> tuple[tuple[OutputFile, ...], bytes | None]:
    """Put each tensor into the file where `base` has it, and tensors that `base` lacks into its last file."""
    last = len(base.shards) - 1
    places = {name: base.tensors[name].shard if name in base.tensors else last for name in contents}
    groups = {
        shard.name: [content for name, content in contents.items() if places[name] == number]
        for number, shard in enumerate(base.shards)
    }
    nonempty = {name: group for name, group in groups.items() if group}
    files = tuple(_file(name, group, owner, None) for name, group in nonempty.items())
    return files, None if base.index is None else _index(nonempty)


def _file(name: str, contents: list[TensorContent], owner: Checkpoint, shard: int | None) -> OutputFile:
    metadata = {"format": "pt"}
    raw, clone_of = None, None
    if shard is not None:
        header = owner.shards[shard].header
        metadata = {**header.metadata, **metadata}
        if _entries(contents) == header.entries and header.metadata.get("format") == "pt":
            raw, clone_of = header.raw, shard
    if raw is None:  # wider elements first, as the safetensors library does, so that each tensor is aligned
        contents = sorted(contents, key=lambda content: -BITS[content.code])
        raw = serialize(_entries(contents), metadata)
    segments, offset = [Segment(0, Bytes(raw))], len(raw)
    for content in contents:
        for piece in content.pieces:
            if piece.nbytes:
                segments.append(Segment(offset, piece))
                offset += piece.nbytes
    computed = [segment.content for segment in segments if isinstance(segment.content, Computed)]
    if any(content.task.anchor != owner.role for content in computed):  # none of the owner's bytes remain
        clone_of = None
    return OutputFile(name, offset, tuple(segments), clone_of)


def _entries(contents: list[TensorContent]) -> tuple[TensorEntry, ...]:
    """The entries of the tensors, laid out one after another."""
    stops = tuple(accumulate(content.nbytes for content in contents))
    return tuple(
        TensorEntry(content.name, content.code, content.shape, stop - content.nbytes, stop)
        for content, stop in zip(contents, stops, strict=True)
    )


def _index(groups: Mapping[str, list[TensorContent]]) -> bytes:
    weight_map = {content.name: name for name, contents in groups.items() for content in contents}
    total = sum(content.nbytes for contents in groups.values() for content in contents)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
