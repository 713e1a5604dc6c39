"""The roles of a merge's sources."""

from __future__ import annotations

from typing import Literal

from hsa.sources.tensor_places import Shard as Shard
from hsa.sources.tensor_places import TensorRef as TensorRef

Role = Literal["base", "primary", "secondary"]


ROLES: tuple[Role, ...] = ("base", "primary", "secondary")
