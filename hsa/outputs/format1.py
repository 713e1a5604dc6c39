"""Records of format 1, which hsa 0.1.0 wrote for HSA merges of Whisper models only.

They are read, verified and applied. They are no longer written, except to compare one with a record that is being
verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hsa.architectures.base import Partition
from hsa.architectures.registry import named
from hsa.errors import shown
from hsa.methods.base import BASE
from hsa.methods.json_fields import count, mapping, text
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorRecord

ARCHITECTURE = "whisper"
"""The architecture family of every model."""

ANCHOR, VERSION = "primary", 1
"""The anchor's role, and the version of the method."""


def method_of(parameters: Mapping[str, Any]) -> str:
    """The method of a merge. Reference numerics are now a method of their own."""
    return "hsa_script" if parameters.get("numerics") == "reference" else "hsa"


def document_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the JSON document of a record from format 2 to format 1."""
    targets = {}
    for name, entry in document["targets"].items():
        targets[name] = {
            "shape": entry["shape"],
            "dtype": entry["dtype"],
            "heads": entry["groups"],
            **entry["decision"],
        }
    kept = {key: document[key] for key in ("program", "libraries", "parameters", "sources")}
    return {"format": 1, **kept, "targets": targets}


def roles() -> tuple[str, ...]:
    """The roles of the sources."""
    return (BASE, *method_named("hsa").contract.roles(2))


def parse_target(name: str, entry: Any, settings: Settings) -> TensorRecord:
    """Parse a merged tensor. Raises KeyError, TypeError or ValueError if an entry is missing or invalid."""
    entry, family = mapping(entry), named(ARCHITECTURE)
    place = family.place(name)
    if place is None:
        raise ValueError(f"{shown(name, 120)} is no attention projection")
    heads = count(entry["heads"])
    decision = _decision(name, entry, heads, settings)
    shape = tuple(map(count, entry["shape"]))
    return TensorRecord(
        name, place.name, place, shape, text(entry["dtype"]), Partition(place.head_axis, heads), decision
    )


def _decision(name: str, entry: Mapping[str, Any], heads: int, settings: Settings) -> Any:
    try:
        return method_named(settings.method).from_dict(entry, heads, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
