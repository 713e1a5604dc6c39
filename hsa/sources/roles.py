"""The roles of a merge's sources."""

from __future__ import annotations

from typing import Literal

Role = Literal["base", "primary", "secondary"]


ROLES: tuple[Role, ...] = ("base", "primary", "secondary")
