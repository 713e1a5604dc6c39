"""The open sources of a merge, by role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hsa.errors import MismatchError, SourceError
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.roles import Role
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import ARITHMETIC


@dataclass(frozen=True)
class Sources:
    """The three open checkpoints of a merge."""

    base: Checkpoint
    primary: Checkpoint
    secondary: Checkpoint

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter((self.base, self.primary, self.secondary))

    @property
    def by_role(self) -> dict[Role, Checkpoint]:
        return {"base": self.base, "primary": self.primary, "secondary": self.secondary}

    def of(self, role: Role) -> Checkpoint:
        return self.by_role[role]

    def check_unchanged(self) -> None:
        for source in self:
            source.check_unchanged()

    def base_of(self, name: str, primary: TensorRef, needed_by: str) -> TensorRef:
        """Base's tensor where the arithmetic needs it; MismatchError when it is missing or has another shape."""
        base = self.base.tensors.get(name)
        if base is None:
            raise MismatchError(f"tensor {primary.name} is missing from base, and {needed_by} needs it")
        if base.shape != primary.shape:
            raise MismatchError(
                f"tensor {primary.name}: the shape differs: base {list(base.shape)}, primary {list(primary.shape)}, "
                f"and {needed_by} needs both"
            )
        if base.code not in ARITHMETIC:
            raise SourceError(
                f"{self.base.file_of(base)}: tensor {base.name} has dtype {base.code}, and {needed_by} needs one of "
                f"{', '.join(ARITHMETIC)}"
            )
        return base
