"""Open OpenAI's own Whisper checkpoints: one `.pt` file of dimensions and tensors, under OpenAI's names.

They can have any role but the anchor's: such a file has no `config.json`, tokenizer or feature extractor, so the output
would be incomplete.
"""

from __future__ import annotations

import os
from pathlib import Path

from hsa.architectures.openai_whisper import from_openai, openai_config
from hsa.architectures.registry import architecture_of
from hsa.errors import RequestError, SourceError
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.identity import Identity, escaped_name, identify
from hsa.sources.pickle_names import class_name
from hsa.sources.roles import Role, is_anchor
from hsa.sources.safetensors import Header
from hsa.sources.tensor_places import Shard, TensorRef
from hsa.sources.torch_pickle import read_archive, tensor_entries
from hsa.system.descriptors import reason
from hsa.system.fsio import SourceFile, Tally

SUFFIX = ".pt"
WEIGHTS_KEY = "model_state_dict"
DIMS_KEY = "dims"


def is_openai_file(path: str | os.PathLike[str]) -> bool:
    """Whether a source is given as one of OpenAI's files: its name ends in .pt, and it is not a directory."""
    return os.fspath(path).endswith(SUFFIX) and not os.path.isdir(os.path.expanduser(path))


def open_openai_file(role: Role, path: str | os.PathLike[str], tally: Tally, claimed: str | None = None) -> Checkpoint:
    """Open one of OpenAI's files as a checkpoint with Hugging Face's names. Reads no tensor data.

    `claimed` is the identity to record. Raises RequestError for the anchor, SourceError, HeaderError.
    """
    if is_anchor(role):
        raise RequestError(
            f"{role}: {os.fspath(path)} is a file in OpenAI's format, which can be base or a further model: the output "
            f"takes its config.json and names from {role}; convert it to a Hugging Face checkpoint directory first"
        )
    try:
        file = Path(path).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        cause = reason(error) if isinstance(error, OSError) else str(error)
        raise SourceError(
            f"{role}: {os.fspath(path)} cannot be found ({cause}); looked for a checkpoint directory, or a file in "
            f"OpenAI's format ({SUFFIX})"
        ) from error
    source = SourceFile(file, role, tally)
    try:
        return _read(role, file, source, tally, identify(file, claimed))
    except BaseException:
        source.close()
        raise


def _read(role: Role, file: Path, source: SourceFile, tally: Tally, identity: Identity) -> Checkpoint:
    where = f"{role}: {file}"
    archive = read_archive(source)
    content = archive.content if isinstance(archive.content, dict) else {}
    dims, tensors = content.get(DIMS_KEY), content.get(WEIGHTS_KEY)
    if not isinstance(dims, dict) or not isinstance(tensors, dict):
        raise SourceError(
            f"{where} is no checkpoint in OpenAI's format: expected {DIMS_KEY} and {WEIGHTS_KEY} in it; give a "
            f"checkpoint directory, or a file as OpenAI publishes them"
        )
    dims_values = {
        name: value if isinstance(value, (int, float, str)) else class_name(value) for name, value in dims.items()
    }
    config = openai_config(dims_values, where)
    canonical_names = {
        name: canonical for name in tensors if isinstance(name, str) and (canonical := from_openai(name))
    }
    unplaced = [str(name) for name in tensors if name not in canonical_names]
    header = Header(archive.raw, tensor_entries({name: tensors[name] for name in canonical_names}, archive, where), {})
    refs: dict[str, TensorRef] = {}
    for entry in header.entries:
        canonical = canonical_names[entry.name]
        refs[canonical] = TensorRef(
            f"model.{canonical}", entry.code, entry.shape, 0, entry.start, entry.stop - entry.start
        )
    notes = (f"{len(unplaced)} tensors of {role} have no place in Whisper, such as {unplaced[0]}",) if unplaced else ()
    return Checkpoint(
        role,
        file,
        identity,
        config,
        architecture_of(config),
        tally,
        shards=(Shard(escaped_name(file.name), source, header, 0),),
        tensors=refs,
        kind="openai",
        notes=notes,
    )
