"""The files over a release tree by which it is known, and what its index says of an output."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hsa.outputs.provenance import Provenance

README, INDEX = "README.md", "index.json"
"""The files of a tree's index, which no group may be named after."""

KIND, FORMAT = "hsa-release", 1


_START = f'{{\n "kind": "{KIND}",'.encode()


def is_release(directory: Path) -> bool:
    """Whether a directory holds the index of a release."""
    place = directory / INDEX
    with suppress(OSError):
        return place.is_file() and not place.is_symlink() and is_index(place)
    return False


def is_index(path: Path) -> bool:
    """By its first bytes: it has no limit, for a tree may have any number of entries."""
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def entry_facts(provenance: Provenance) -> dict[str, Any]:
    """What the index says of an entry that is complete, by its provenance."""
    record = provenance.record
    extent = record.method.recorded_summary(record.targets)
    return {
        "parameters": dict(record.parameters),
        "sources": {role: source.as_dict() for role, source in record.sources.items()},
        "target_tensors": len(record.targets),
        **extent.counts(),
        "provenance": provenance.digest,
    }
