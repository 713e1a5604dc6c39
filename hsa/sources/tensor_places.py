"""Map the entries of a checkpoint's weights files to tensors: the canonical name and place of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.architectures.base import Architecture, TensorInfo, Tie
from hsa.errors import HeaderError, MismatchError, is_text, shown
from hsa.sources.safetensors import METADATA, Header
from hsa.system.fsio import SourceFile

FETCH_AGAIN = "save the checkpoint again, or fetch all its files again"


@dataclass(frozen=True)
class TensorRef(TensorInfo):
    """One tensor of a checkpoint: its name to write, element type, shape, and absolute place in a shard."""

    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One weights file: its plain name, the open file, the checked header, and the byte that offsets count from.

    For a file that torch.save wrote, the header is the description of its tensors.
    """

    name: str
    source: SourceFile
    header: Header
    origin: int


@dataclass(frozen=True)
class Places:
    """The tensors by canonical name, the stored names of renamed tensors, and notes for the user."""

    tensors: Mapping[str, TensorRef]
    renamed: Mapping[str, str]
    notes: tuple[str, ...]


def place_tensors(
    role: str,
    architecture: Architecture,
    config: Mapping[str, Any],
    shards: Sequence[Shard],
    index: Path,
    shard_of: Mapping[str, str] | None,
    *,
    shares_bytes: bool,
) -> Places:
    """Locate the tensors of a checkpoint whose shards are open.

    `index` is the path of its index. `shard_of` is the content of the index, None if there is no index. With
    `shares_bytes`, for files of torch.save, two names may refer to the same bytes.

    Names are read as `Architecture.plain_names` reads them. The embedding may be stored only under the name of the
    output projection to which config.json ties it. As in transformers, such a tensor is the embedding.

    Raises MismatchError if an index and the shards disagree, or if two entries are one tensor of the model. Raises
    HeaderError for a name that no safetensors file can hold.
    """
    stored: dict[str, str] = {}
    tensors: dict[str, TensorRef] = {}
    names = architecture.plain_names(entry.name for shard in shards for entry in shard.header.entries)
    for number, shard in enumerate(shards):
        where = f"{role}: {shard.source.path}"
        for entry in shard.header.entries:
            if shard_of is not None and shard_of.get(entry.name) != shard.name:
                place = shard_of.get(entry.name)
                raise MismatchError(
                    f"{where} holds tensor {entry.name}, which {index.name} "
                    f"{'does not list' if place is None else f'places in {place}'}; index and shards do not belong "
                    f"together: {FETCH_AGAIN}"
                )
            _check_name(names[entry.name], where)
            name = architecture.canonical(names[entry.name])
            if name in tensors:
                raise MismatchError(
                    f"{where}: tensors {stored[name]} and {entry.name} are one tensor of {architecture.title}, {name}, "
                    f"and a checkpoint holds each once; remove one of them"
                )
            stored[name] = entry.name
            tensors[name] = TensorRef(
                names[entry.name],
                entry.code,
                entry.shape,
                number,
                shard.origin + entry.start,
                entry.stop - entry.start,
            )
    renamed = {name: stored_name for name, stored_name in stored.items() if stored_name != tensors[name].name}
    notes = [*_note_renamed(role, tensors, renamed)]
    tie = architecture.tie if architecture.is_tied(config) else None
    held = {*stored.values()}
    absent = {name: shard for name, shard in (shard_of or {}).items() if name not in held}
    tied = () if tie is None or {tie.output, tie.embedding}.isdisjoint(tensors) else (tie.output, tie.embedding)
    notes += _check_absent(role, index, absent, {name for name in absent if architecture.canonical(name) in tied})
    if tie is not None:
        notes += _tie(role, tie, tensors, shares_bytes=shares_bytes)
    if shares_bytes and not architecture.lists_tensors:
        notes += _leave_out_aliases(role, tensors)
    return Places(tensors, renamed, tuple(notes))


def _check_name(name: str, where: str) -> None:
    """Raise HeaderError for a tensor name that no safetensors file can hold."""
    if name == METADATA or not is_text(name):
        raise HeaderError(
            f"{where}: a tensor is named {shown(name)}, which no safetensors file can hold: expected a text in Unicode "
            f"other than {METADATA}; rename it"
        )


def _note_renamed(role: str, tensors: Mapping[str, TensorRef], renamed: Mapping[str, str]) -> Iterator[str]:
    if renamed:
        name, stored = next(iter(renamed.items()))
        yield (
            f"{len(renamed)} tensor names of {role} are read without what a wrapper added, such as {stored:.300} as "
            f"{tensors[name].name}"
        )


def _check_absent(role: str, index: Path, absent: Mapping[str, str], tied: set[str]) -> Iterator[str]:
    """Refuse an index that lists tensors that no shard holds, `absent` by name. A tensor is allowed to be absent if
    config.json ties it to a stored one, as those in `tied`."""
    for name, shard in absent.items():
        if name not in tied:
            raise MismatchError(
                f"{role}: {index} places tensor {name} in {shard}, which does not hold it, nor does another shard; "
                f"{FETCH_AGAIN}"
            )
        yield (
            f"{role}'s {index.name} lists {name:.300}, which no shard holds; config.json ties it to the embedding, and "
            f"transformers does without it"
        )


def _tie(role: str, tie: Tie, tensors: dict[str, TensorRef], *, shares_bytes: bool) -> Iterator[str]:
    """Keep only one name of an embedding that is tied to the output projection, as transformers does when it saves."""
    output, embedding = tensors.get(tie.output), tensors.get(tie.embedding)
    if output is not None and embedding is None:
        tensors[tie.embedding] = tensors.pop(tie.output)
        yield (
            f"{role} stores its embedding as {output.name} alone, to which its config.json ties it, as transformers "
            f"allows"
        )
    elif output is not None and embedding is not None and shares_bytes and _same_bytes(output, embedding):
        del tensors[tie.output]
        yield f"{role}'s {output.name} is {embedding.name} under another name in its file, and left out"


def _leave_out_aliases(role: str, tensors: dict[str, TensorRef]) -> Iterator[str]:
    """Keep only one name of tensors that are the same in a file of torch.save, as transformers does when it saves."""
    names: dict[tuple[int, int, tuple[int, ...], str], str] = {}
    for name, ref in [*tensors.items()]:
        first = names.setdefault((ref.shard, ref.offset, ref.shape, ref.code), name)
        if first != name and ref.nbytes:
            yield f"{role}'s {ref.name} is {tensors[first].name} under another name in its file, and left out"
            del tensors[name]


def _same_bytes(first: TensorRef, second: TensorRef) -> bool:
    return (first.shard, first.offset, first.shape, first.code) == (
        second.shard,
        second.offset,
        second.shape,
        second.code,
    )
