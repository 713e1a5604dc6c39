"""The outcome of merging a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hsa.methods.geometry import Geometry
from hsa.methods.selection import Selection
from hsa.planning.equal_sources import SourcePair
from hsa.planning.target import Target
from hsa.sources.roles import Role


@dataclass(frozen=True)
class Merged:
    """What came of a target: its heads, the byte ranges that now differ from primary, whether any task vector element
    is nonzero (False for every tensor means that a fine-tune equals base), and how large the task vectors are."""

    selection: Selection
    changed: tuple[tuple[int, int], ...]
    primary_moved: bool
    secondary_moved: bool
    geometry: Geometry


@dataclass(frozen=True)
class TargetOutcome:
    """A merged target, the BLAKE3 digest of its bytes in each source, and which sources hold the same values in it."""

    target: Target
    merged: Merged
    digests: Mapping[Role, str]
    equal: frozenset[SourcePair]

    @property
    def heads(self) -> int:
        return self.target.heads

    @property
    def selected(self) -> tuple[int, ...]:
        return self.merged.selection.selected
