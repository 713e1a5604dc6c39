"""Resolves the models that a user names to the directories from which they are loaded.

`PRIMARY+PATCH.safetensors` becomes a checkpoint by `hsa.apply`, in a temporary directory, each time it is loaded. Only
one such checkpoint at a time takes disk space, however many patches there are.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from blake3 import blake3

from hsa.actions.apply import apply
from hsa.arguments import check_paths
from hsa.errors import RequestError, SourceError, shown
from hsa.evaluation.model_kinds import ModelKind, kind_of
from hsa.outputs.patch_reader import SUFFIX, is_patch
from hsa.sources import any_small_files
from hsa.sources.checkpoint import CONFIG, Checkpoint
from hsa.sources.hub.client import Hub
from hsa.sources.hub.needs import Needs
from hsa.sources.hub.repository import find_id
from hsa.sources.small_file_checks import GENERATION_CONFIG
from hsa.sources.source_folder import entry_names
from hsa.system.fsio import Tally
from hsa.system.types import PathLike

NORMALIZER = "normalizer.json"
TEMPORARY = "hsa-eval-"
"""The prefix of temporary directories with models."""

SLICE = 8 << 20
"""Bytes of a tensor that are hashed at a time."""

_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class NamedModel:
    """A model as given: a directory or hub id, and the patch to apply to it."""

    source: str
    patch: Path | None

    @property
    def given(self) -> str:
        return self.source if self.patch is None else f"{self.source}+{self.patch}"

    @property
    def folder(self) -> Path | None:
        """The model's directory; None for a hub id."""
        return None if find_id(self.source) else Path(self.source).expanduser()

    @property
    def place(self) -> tuple[str, str | None]:
        """The resolved location, which is equal for two spellings of one model."""
        source = self.source if find_id(self.source) else os.path.realpath(os.path.expanduser(self.source))
        return source, None if self.patch is None else os.path.realpath(self.patch)

    def short(self, parts: int) -> str:
        """The name in tables: the last `parts` parts of the path."""
        source = self.source if find_id(self.source) else os.path.abspath(os.path.expanduser(self.source))
        last = "/".join([part for part in source.split("/") if part][-parts:]) or "/"
        return last if self.patch is None else f"{last}+{self.patch.name.removesuffix(SUFFIX)}"


@dataclass(frozen=True)
class OpenModel:
    """A model that can be loaded: its name in tables, the user's text, its files, and a digest of all that it computes
    from.

    `digest` is the BLAKE3 of its tensors' names, types, shapes and bytes, and of its configs and tokenizer files, so
    two copies of one model have the same digest. `folder` has its small files, and also its weights if `write` is None.
    Otherwise `write` writes the checkpoint to a directory that does not exist yet.
    """

    name: str
    given: str
    folder: Path
    kind: ModelKind
    digest: str
    dtype: str
    write: Callable[[Path], object] | None = None

    def as_dict(self) -> dict[str, str]:
        return {"name": self.name, "architecture": self.kind.architecture, "digest": self.digest}

    @contextmanager
    def checkpoint(self) -> Iterator[Path]:
        """The directory to load the model from. It may no longer exist after the block.

        Example:
            >>> with model.checkpoint() as folder:  # doctest: +SKIP
            ...     recognizer = load_recognizer(folder, DecodingOptions())
        """
        if self.write is None:
            yield self.folder
            return
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as place:
            folder = Path(place) / "model"
            self.write(folder)
            yield folder


def parse_model(model: PathLike) -> NamedModel:
    """Parse a model argument. RequestError if it is empty or names only a patch.

    Example:
        >>> parse_model("m1+sweep/k0.6.safetensors").patch
        PosixPath('sweep/k0.6.safetensors')
    """
    check_paths(model=model)
    text = os.fspath(model)
    if not text:
        raise RequestError("a model is an empty path; give a directory, a hub id or PRIMARY+PATCH.safetensors")
    source, plus, patch = text.rpartition("+")
    if not plus or not patch.endswith(SUFFIX) or os.path.lexists(os.path.expanduser(text)):
        path = Path(text).expanduser()
        if path.is_file():
            what = f"is a patch; give PRIMARY+{text}" if is_patch(path) else "is a file; give a checkpoint directory"
            raise RequestError(f"{text} {what}")
        return NamedModel(text, None)
    if not source:
        raise RequestError(f"{shown(text)} names no primary; expected PRIMARY+PATCH{SUFFIX}")
    return NamedModel(source, Path(patch).expanduser())


def names_of(models: Sequence[NamedModel]) -> list[str]:
    """Short unique names: the last one to three parts of each path, or else the text given."""
    for parts in (1, 2, 3):
        names = [model.short(parts) for model in models]
        if len(set(names)) == len(names):
            return names
    return [model.given for model in models]


@dataclass(frozen=True)
class OpenWeights:
    """A checkpoint that transformers can load: its directory, the digest for OpenModel, and its dtypes."""

    folder: Path
    digest: str
    dtype: str


def open_model(model: NamedModel, name: str, hub: Hub, stack: ExitStack) -> OpenModel:
    """Fetch or create the files from which a model is loaded; `stack` removes the created ones.

    Raises SourceError if it cannot transcribe, and the errors of `hsa.apply` and of opening a source.
    """
    source: PathLike = model.source if find_id(model.source) else Path(model.source).expanduser()
    if model.patch is not None:
        write = partial(_apply, os.fspath(source), model.patch)
        return open_written_model(write, name, model.given, hub, stack)
    return _open(source, name, model.given, hub)


def open_written_model(write: Callable[[Path], object], name: str, given: str, hub: Hub, stack: ExitStack) -> OpenModel:
    """Open a model whose checkpoint `write` writes: once now, and again each time it is loaded.

    `given` is the text that a user would write for it. Its small files are kept until `stack` removes them. Raises
    SourceError if it cannot transcribe, and the errors of `write`.

    Example:
        >>> write = lambda folder: hsa.apply("m1", "patch.safetensors", output=folder)  # doctest: +SKIP
        >>> open_written_model(write, "merged", "m1+patch.safetensors", Hub(), stack).kind.head  # doctest: +SKIP
        'seq2seq'
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY))) / "model"
    write(folder)
    model = _open(folder, name, given, hub)
    for weights in folder.glob(f"*{SUFFIX}"):
        weights.unlink()
    return replace(model, write=write)


def _apply(primary: str, patch: Path, folder: Path) -> None:
    apply(primary, patch, output=folder, digest=False, sync=False)


def _open(source: PathLike, name: str, given: str, hub: Hub) -> OpenModel:
    if not find_id(source) and Path(source).is_dir():
        kind_of(Path(source))  # a model that cannot transcribe fails before its weights are read
    weights = open_weights(source, given, hub)
    return OpenModel(name, given, weights.folder, kind_of(weights.folder), weights.digest, weights.dtype)


def open_weights(source: PathLike, given: str, hub: Hub) -> OpenWeights:
    """Fetch the checkpoint of a model of any kind, a directory or hub id, and read it once.

    `given` is the text that a user wrote for it. Raises SourceError if transformers could not load it, and the errors
    of opening a source.
    """
    tally = Tally()
    if hub.is_adapter("model", source):
        raise SourceError(f"{given} is an adapter, which is no model by itself; merge it with its base first")
    with hub.open("model", source, tally, Needs("whole", None, assets=True)) as checkpoint:
        if checkpoint.kind not in ("safetensors", "pickle"):
            raise SourceError(
                f"{given} is {checkpoint.kind} weights, which transformers does not load as a model; merge it first, "
                f"or give a checkpoint directory"
            )
        codes = sorted({tensor.code for tensor in checkpoint.tensors.values()})
        digest = _digest(checkpoint)
        return OpenWeights(checkpoint.path, digest, "+".join(codes))


def _digest(checkpoint: Checkpoint) -> str:
    """BLAKE3 of everything that determines a checkpoint's transcripts."""
    digest = blake3()
    for name, data in sorted(small_files(checkpoint.path, checkpoint.config).items()):
        digest.update(f"{name}\n{len(data)}\n".encode())
        digest.update(data)
    buffer = memoryview(bytearray(SLICE))
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.code} {list(tensor.shape)}\n".encode())
        for start in range(0, tensor.nbytes, SLICE):
            part = buffer[: min(SLICE, tensor.nbytes - start)]
            checkpoint.read_into(tensor, part, start)
            digest.update(part)
    return digest.hexdigest()


def small_files(folder: Path, config: Mapping[str, object]) -> dict[str, bytes]:
    """The configs, tokenizer and feature extractor files of a directory, by name."""

    def names() -> Iterator[str]:
        yield from (CONFIG, GENERATION_CONFIG)
        for name in any_small_files.wanted(entry_names(folder), config):
            if not any_small_files.is_licence(name):
                yield name

    return {name: (folder / name).read_bytes() for name in dict.fromkeys(names()) if (folder / name).is_file()}
