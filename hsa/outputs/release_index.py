"""The files that identify a release tree, and the facts in its index about an output."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hsa.outputs.provenance import Provenance

README, INDEX = "README.md", "index.json"
"""The files of a tree's index. No group may have one of these names."""

KIND, FORMAT = "hsa-release", 1


_START = f'{{\n "kind": "{KIND}",'.encode()


def is_release(directory: Path) -> bool:
    """Whether a directory contains the index of a release."""
    place = directory / INDEX
    with suppress(OSError):
        return place.is_file() and not place.is_symlink() and is_index(place)
    return False


def is_index(path: Path) -> bool:
    """Whether a file is an index, by its first bytes. The whole is not read: a tree may have any number of entries."""
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def entry_facts(provenance: Provenance) -> dict[str, Any]:
    """The index facts about a complete entry, from its provenance."""
    record = provenance.record
    extent = record.method.recorded_summary(record.targets)
    return {
        "parameters": dict(record.parameters),
        "sources": {role: source.as_dict() for role, source in record.sources.items()},
        "target_tensors": len(record.targets),
        **extent.counts(),
        "provenance": provenance.digest,
    }
