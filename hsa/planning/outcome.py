"""The outcome of merging a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hsa.methods.geometry import Geometry
from hsa.methods.selection import Selection
from hsa.planning.target import Target
from hsa.sources.roles import Role, RolePair


@dataclass(frozen=True)
class MergedTarget:
    """The result of merging a target: its heads, the byte ranges that now differ from primary, whether any element of
    each task vector is nonzero, and how large the task vectors are.

    A fine-tune equals base where its task vector is zero in every tensor."""

    selection: Selection
    changed: tuple[tuple[int, int], ...]
    primary_differs: bool
    secondary_differs: bool
    geometry: Geometry


@dataclass(frozen=True)
class TargetOutcome:
    """A merged target, the BLAKE3 digest of its bytes in each source, and which sources hold the same values in it."""

    target: Target
    merged: MergedTarget
    digests: Mapping[Role, str]
    equal: frozenset[RolePair]

    @property
    def heads(self) -> int:
        return self.target.heads

    @property
    def selected(self) -> tuple[int, ...]:
        return self.merged.selection.selected
