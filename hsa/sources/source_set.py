"""The open sources of a merge, by role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from hsa.architectures.base import Architecture
from hsa.errors import MismatchError, SourceError
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.identity import Identity
from hsa.sources.roles import BASE, Role, RolePair
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import ARITHMETIC


@dataclass(frozen=True)
class Sources:
    """The open checkpoints of a merge: base, where there is one, then the models in the order given.

    `anchor` is the role of the model that gives the output its tensor names, config, small files, shards and dtypes.
    `base` is the role of the pretrained model, None for a merge without one.
    """

    by_role: Mapping[Role, Checkpoint]
    anchor: Role
    base: Role | None

    def __post_init__(self) -> None:
        kind = self.architecture.kind(self.anchor_checkpoint.config)
        for source in self:
            other = source.architecture.kind(source.config)
            if source.architecture is not self.architecture or other != kind:
                raise MismatchError(
                    f"{self.anchor} {self.anchor_checkpoint.path} is {kind}, and {source.role} {source.path} {other}; "
                    f"they must be fine-tunes of one model"
                )

    @classmethod
    def of_checkpoints(cls, checkpoints: Iterable[Checkpoint]) -> Sources:
        """The sources of these checkpoints, in their order; the anchor is the first model."""
        by_role = {checkpoint.role: checkpoint for checkpoint in checkpoints}
        anchor = next(role for role in by_role if role != BASE)
        return cls(by_role, anchor, BASE if BASE in by_role else None)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.by_role.values())

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(self.by_role)

    @property
    def models(self) -> tuple[Role, ...]:
        """The roles of the merged models: all but base."""
        return tuple(role for role in self.by_role if role != self.base)

    @property
    def pairs(self) -> tuple[RolePair, ...]:
        """All pairs of two different roles."""
        return tuple(combinations(self.by_role, 2))

    def of(self, role: Role) -> Checkpoint:
        return self.by_role[role]

    @property
    def anchor_checkpoint(self) -> Checkpoint:
        return self.by_role[self.anchor]

    @property
    def base_checkpoint(self) -> Checkpoint:
        """The open base. Raises LookupError for a merge without a base."""
        if self.base is None:
            raise LookupError("the merge has no base")
        return self.by_role[self.base]

    def with_identities(self, identities: Mapping[Role, Identity]) -> Sources:
        """Return the same sources, with these identities in place of their own."""
        changed = {role: replace(self.by_role[role], identity=identity) for role, identity in identities.items()}
        return replace(self, by_role={**self.by_role, **changed})

    @property
    def architecture(self) -> Architecture:
        """The family of all these models."""
        return self.anchor_checkpoint.architecture

    def check_unchanged(self) -> None:
        for source in self:
            source.check_unchanged()

    def base_of(self, name: str, anchor: TensorRef, needed_by: str) -> TensorRef:
        """Return base's tensor, which the arithmetic needs; MismatchError if it is missing or has another shape."""
        base = self.base_checkpoint.tensors.get(name)
        if base is None:
            raise MismatchError(f"tensor {anchor.name} is missing from {self.base}, and {needed_by} needs it")
        if base.shape != anchor.shape:
            raise MismatchError(
                f"tensor {anchor.name}: the shape differs: {self.base} {list(base.shape)}, {self.anchor} "
                f"{list(anchor.shape)}, and {needed_by} needs both"
            )
        if base.code not in ARITHMETIC:
            raise SourceError(
                f"{self.base_checkpoint.file_of(base)}: tensor {base.name} has dtype {base.code}, and {needed_by} "
                f"needs one of {', '.join(ARITHMETIC)}"
            )
        return base
