"""Open what a user names as a source: a directory, OpenAI's file, or an adapter on base."""

from __future__ import annotations

import os

from hsa.sources.checkpoint import Checkpoint, open_checkpoint
from hsa.sources.lora import is_adapter, open_adapter
from hsa.sources.openai_file import is_openai_file, open_openai_file
from hsa.sources.roles import Role
from hsa.sources.tied_tensors import without_tied_copy
from hsa.system.fsio import Tally


def open_source(
    role: Role,
    path: str | os.PathLike[str],
    tally: Tally,
    claimed: str | None = None,
    base: Checkpoint | None = None,
) -> Checkpoint:
    """Open a source. An adapter needs `base`, which must be open. Reads no tensor data except what may be tied.

    `claimed` is the identity to record (`org/name` or `org/name@revision`). Raises RequestError, SourceError or a
    subclass: see `open_checkpoint`, `open_openai_file`, `open_adapter`.
    """
    if os.fspath(path) and is_openai_file(path):
        return open_openai_file(role, path, tally, claimed)
    if os.fspath(path) and is_adapter(path):
        return open_adapter(role, path, tally, base, claimed)
    return without_tied_copy(open_checkpoint(role, path, tally, claimed))
