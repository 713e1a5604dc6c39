"""Open a checkpoint for reading: a local Hugging Face directory, its tensors and the places of their bytes."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from hsa.architectures.base import Architecture
from hsa.architectures.registry import architecture_of
from hsa.errors import HeaderError, MachineError, SourceError, shown
from hsa.sources.git_lfs import refuse_pointer
from hsa.sources.identity import Identity, identify, is_hub_id, is_snapshot
from hsa.sources.pickle_reader import REMEDY
from hsa.sources.roles import Role
from hsa.sources.safetensors import MAX_HEADER, Header, read_header
from hsa.sources.source_folder import describe_missing_weights, entry_names, notes_on_unread_weights
from hsa.sources.tensor_places import Shard, TensorRef, place_tensors
from hsa.sources.torch_pickle import read_state_dict
from hsa.system.descriptors import reason
from hsa.system.fsio import MACHINE_ERRNOS, SourceFile, Tally, exists
from hsa.system.ranges import Range
from hsa.system.strict_json import MAX_MARKS, count_marks, load_json

CheckpointKind = Literal["safetensors", "pickle", "openai", "adapter"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
MAX_TEXT = 16 << 20
"""The largest config, index or tokenizer file that is read, in bytes. All those of an output are in memory at once."""
MAX_TENSORS = 1 << 14
"""The most tensors of a checkpoint: ten times as many as in large-v3."""
MAX_STEPS = 1 << 19
"""The most instructions and records in a checkpoint's pickles: nine times large-v3's, and read in a second."""


@dataclass(frozen=True)
class Format:
    """How weights are stored: the names of a single weights file and of a shard index, and the suffix of both."""

    weights: str
    index: str
    suffix: str


SAFETENSORS = Format(WEIGHTS, INDEX, ".safetensors")
PICKLES = Format("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin")
WHOLE_WEIGHTS = (SAFETENSORS.weights, SAFETENSORS.index, PICKLES.weights, PICKLES.index)
"""Files that show that a whole model's weights are there. Any one is enough; the preferred ones come first."""


@dataclass(frozen=True)
class PartialWeights:
    """A weights file of which only some ranges were fetched: its path and those ranges."""

    path: Path
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; `tensors` maps canonical names (no `model.`) to places. Close it, or use `with`.

    It is immutable once open. A copy with other fields (`dataclasses.replace`) reads from the same files.

    A wrapper may store a tensor under a name that transformers would not find. Such a name is read without the
    wrapper's addition. `renamed` maps the canonical names of such tensors to their names in the file, and their
    TensorRef has the name to write.
    `architecture` is the model's family, according to its config.
    `path` is a directory, or OpenAI's file; `config_from` is the directory of its `config.json` if that is another one.
    `notes` are messages to the user on how it was read; `trained_on` is the base that an adapter's config names.
    """

    role: Role
    path: Path
    identity: Identity
    config: Mapping[str, Any]
    architecture: Architecture
    tally: Tally
    shards: tuple[Shard, ...] = ()
    tensors: Mapping[str, TensorRef] = field(default_factory=dict)
    index: bytes | None = None
    kind: CheckpointKind = "safetensors"
    config_from: Path | None = None
    notes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    trained_on: str | None = None

    @property
    def embedding(self) -> TensorRef | None:
        """The token embedding, if the model has one."""
        name = self.architecture.embedding_of(self.tensors)
        return None if name is None else self.tensors[name]

    @property
    def untied_output(self) -> TensorRef | None:
        """The output projection, if it is stored separately from the embedding."""
        tie = self.architecture.tie
        return None if tie is None else self.tensors.get(tie.output)

    def is_tied(self, name: str) -> bool:
        """Whether the tensor of this canonical name is both the embedding and the output projection."""
        tie = self.architecture.tie
        if tie is not None:
            return name in (tie.output, tie.embedding) and self.untied_output is None
        tied = self.config.get("tie_word_embeddings") is True
        return tied and name == self.architecture.embedding_of(self.tensors)

    def read_into(self, tensor: TensorRef, view: memoryview, start: int = 0) -> None:
        """Fill `view` with the tensor's bytes from byte `start` on."""
        self.shards[tensor.shard].source.read_into(view, tensor.offset + start)

    def check_unchanged(self) -> None:
        for shard in self.shards:
            shard.source.check_unchanged()

    def file_of(self, tensor: TensorRef) -> str:
        inside = bool(self.shards) and self.kind != "openai"
        path = self.path / self.shards[tensor.shard].name if inside else self.path
        return f"{self.role} {path}"

    def close(self) -> None:
        """Close the weights files. Idempotent. Copies that differ in other fields share the files."""
        for shard in self.shards:
            shard.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(
    role: Role,
    path: str | os.PathLike[str],
    tally: Tally,
    claimed: str | None = None,
    parts: Mapping[str, PartialWeights] | None = None,
    names: Collection[str] | None = None,
) -> Checkpoint:
    """Open a checkpoint directory: check its index, open its shards, check their headers. Reads no tensor data.

    `claimed` is the identity to record (`org/name` or `org/name@revision`). `parts` maps the names of partly fetched
    weights files to their places; reading a range that was not fetched raises SourceError. `names` are the source's
    file names, given if the directory holds only some of the files. Raises SourceError, HeaderError.
    """
    directory = _directory(role, path)
    parts = parts or {}
    weights = _weights_files(role, directory, tally, parts)
    config = read_config(role, directory, tally)
    architecture = architecture_of(config)
    architecture.counts(config, f"{role} {directory}")
    pickled = weights.suffix == PICKLES.suffix
    weights_format = PICKLES if pickled else SAFETENSORS
    identity = identify(directory, claimed)
    names = entry_names(directory) if names is None else names
    unread = notes_on_unread_weights(role, names, weights_format.weights, weights_format.index, ADAPTER_CONFIG)
    notes = tuple(unread)
    with ExitStack() as opened:
        shards = _open_shards(role, directory, weights, tally, parts, opened)
        index = directory / weights.index_name
        places = place_tensors(role, architecture, config, shards, index, weights.shard_of, shares_bytes=pickled)
        opened.pop_all()
    return Checkpoint(
        role,
        directory,
        identity,
        config,
        architecture,
        tally,
        shards=shards,
        tensors=places.tensors,
        index=None if pickled else weights.index,
        kind="pickle" if pickled else "safetensors",
        notes=(*notes, *places.notes),
        renamed=places.renamed,
    )


def _open_shards(
    role: Role,
    directory: Path,
    weights: _WeightsFiles,
    tally: Tally,
    parts: Mapping[str, PartialWeights],
    opened: ExitStack,
) -> tuple[Shard, ...]:
    """Open a directory's weights files until the stack ends. HeaderError if their headers are too large together."""
    shards: list[Shard] = []
    totals = [0, 0, 0, 0]
    for name in weights.names:
        shard = open_shard(role, directory, name, tally, parts.get(name))
        opened.callback(shard.source.close)
        _check_size(f"{role}: {directory}", shard.header, totals, pickled=weights.suffix == PICKLES.suffix)
        shards.append(shard)
    return tuple(shards)


def _check_size(where: str, header: Header, totals: list[int], *, pickled: bool) -> None:
    """Apply the limits of one header to all shards together; HeaderError beyond them. Adds this shard's bytes, marks,
    tensors and steps to `totals`."""
    totals[0] += len(header.raw) - 8
    totals[1] += 0 if pickled else count_marks(header.raw[8:])
    totals[2] += len(header.entries)
    totals[3] += header.steps
    size, mark_count, tensors, steps = totals
    if steps > MAX_STEPS:
        raise HeaderError(
            f"{where} has pickles with {steps} instructions and records, at most {MAX_STEPS} are read; {REMEDY}"
        )
    if size > MAX_HEADER or mark_count > MAX_MARKS or tensors > MAX_TENSORS:
        raise HeaderError(
            f"{where} has headers of {size} bytes, {mark_count} brackets, braces and "
            f"commas, for {tensors} tensors; at most {MAX_HEADER}, {MAX_MARKS} and {MAX_TENSORS} are read"
        )


def open_shard(role: Role, directory: Path, name: str, tally: Tally, part: PartialWeights | None = None) -> Shard:
    """Open one weights file of a directory and check its header. Its name decides: a pickle, else safetensors.

    `part` gives the file's place and its ranges if it was fetched in part.
    """
    if part is None:
        resolve_inside(role, directory, name)
        source = SourceFile(
            directory / name, role, tally
        )  # opened by its own name, even where the hub's cache links to a digest
    else:
        source = SourceFile(part.path, role, tally, part.ranges)
    try:
        if name.endswith(PICKLES.suffix):
            return Shard(name, source, read_state_dict(source), 0)
        header = read_header(source)
        return Shard(name, source, header, len(header.raw))
    except BaseException:
        source.close()
        raise


def resolve_inside(role: str, directory: Path, name: str) -> Path:
    """Return the real path of a source's file; SourceError if a link leads out of the directory.

    In the hub's cache, a snapshot's files are links into the repository's own `blobs`. These may in turn be links into
    the `blobs` that all its repositories share. Both are allowed.
    """
    allowed = [directory]
    if is_snapshot(directory):
        allowed += [directory.parents[1] / "blobs", directory.parents[2] / "blobs"]
    try:
        real = (directory / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{role}: {directory / name} cannot be opened: {_reason(error)}") from error
    if not any(real.is_relative_to(root) for root in allowed):
        raise SourceError(
            f"{role}: {directory / name} is a link that leads out of the directory, to {real}; refused: copy the "
            f"file into the directory or give the directory that holds it"
        )
    return real


def read_whole(role: str, directory: Path, name: str, tally: Tally, limit: int = MAX_TEXT) -> bytes:
    """Read a small file of a source whole; SourceError if it cannot be read or is larger than `limit` bytes."""
    source = SourceFile(resolve_inside(role, directory, name), role, tally)
    try:
        if source.size > limit:
            raise SourceError(f"{role}: {directory / name} has {source.size} bytes, at most {limit} are read")
        text = source.read(source.size)
        source.check_unchanged()
        refuse_pointer(text, f"{role}: {directory / name}")
        return text
    finally:
        source.close()


def _directory(role: str, path: str | os.PathLike[str]) -> Path:
    source = Path(path)
    expected = f"a directory with {CONFIG} and {WEIGHTS} or {INDEX}"
    if not os.fspath(path):
        raise SourceError(f"{role}: no directory is given (an empty path); looked for {expected}")
    try:
        source = source.expanduser()
        directory = source.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(
            f"{role}: {source} cannot be found ({_reason(error)}); looked for {expected}{_suggestion(source)}"
        ) from error
    if not directory.is_dir():
        raise SourceError(f"{role}: {source} is not a directory; looked for {expected}")
    return directory


def _suggestion(path: Path) -> str:
    """Suggest what a path that does not exist may mean: a directory with a similar name beside it, or a hub id."""
    text = ""
    with suppress(OSError, ValueError):
        siblings = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
        matches = get_close_matches(path.name, siblings, n=1)
        text = f"; did you mean {path.parent / matches[0]}?" if matches else ""
    if is_hub_id(str(path)):
        text += f"; a model on the Hub is {path}@main"
    return text


def _exists(path: Path) -> bool:
    try:
        return exists(path)
    except OSError as error:
        kind = MachineError if error.errno in MACHINE_ERRNOS else SourceError
        raise kind(f"cannot look for {path}: {reason(error)}; give a directory that can be read") from error


@dataclass(frozen=True)
class _WeightsFiles:
    """The weights files of a directory and its index; `index` and `shard_of` are None if there is no index."""

    names: tuple[str, ...]
    suffix: str
    index_name: str
    index: bytes | None = None
    shard_of: Mapping[str, str] | None = None


def _weights_files(role: str, directory: Path, tally: Tally, parts: Mapping[str, PartialWeights]) -> _WeightsFiles:
    """Find the weights files; safetensors are preferred. Refuses bad names before any file is opened."""
    for weights_format in (SAFETENSORS, PICKLES):
        if weights_format.weights in parts or _exists(directory / weights_format.weights):
            return _WeightsFiles((weights_format.weights,), weights_format.suffix, weights_format.index)
        if _exists(directory / weights_format.index):
            index = read_whole(role, directory, weights_format.index, tally)
            shard_of = weight_map(index, f"{role}: {directory / weights_format.index}")
            names = tuple(sorted(set(shard_of.values())))
            _check_shards(role, directory, names, weights_format, parts)
            return _WeightsFiles(names, weights_format.suffix, weights_format.index, index, shard_of)
    raise SourceError(f"{role}: {describe_missing_weights(directory, (*WHOLE_WEIGHTS, ADAPTER_CONFIG))}")


def read_config(role: str, directory: Path, tally: Tally) -> Mapping[str, Any]:
    """Read the `config.json` of a checkpoint directory. Raises SourceError, HeaderError."""
    if not _exists(directory / CONFIG):
        raise SourceError(f"{role}: {directory} has no {CONFIG}, which says what model it is")
    return load_json(read_whole(role, directory, CONFIG, tally), f"{role}: {directory / CONFIG}", "config")


def weight_map(text: bytes, where: str) -> Mapping[str, str]:
    """Map each tensor to its shard, from an index's text; HeaderError if it is malformed."""
    shard_of = load_json(text, where, "index").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise HeaderError(f"{where}: expected a weight_map from tensor names to file names")
    return shard_of


def is_shard_name(name: str, suffix: str = SAFETENSORS.suffix) -> bool:
    """Whether an index may name this shard: a file with that suffix in the same directory."""
    in_directory = name == Path(name).name and name not in ("", ".", "..") and "\0" not in name
    return in_directory and name.endswith(suffix)


def _check_shards(
    role: str, directory: Path, names: tuple[str, ...], form: Format, parts: Mapping[str, PartialWeights]
) -> None:
    """Refuse every bad shard name before any file is opened."""
    for name in names:
        if not is_shard_name(name, form.suffix):
            raise SourceError(
                f"{role}: {directory / form.index} names the shard {shown(name)}; expected the plain name of a "
                f"{form.suffix} file in the same directory"
            )
        if name not in parts and not _exists(directory / name):
            raise SourceError(
                f"{role}: {directory / form.index} names the shard {name}, which is missing; download it again"
            )
    for name in names:
        if name not in parts:
            resolve_inside(role, directory, name)


def _reason(error: BaseException) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)
