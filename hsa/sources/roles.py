"""The roles of a merge's sources, which also name them in messages, options and records."""

from __future__ import annotations

Role = str
"""`base`, or the name of a model that is merged."""

RolePair = tuple[Role, Role]

BASE: Role = "base"
"""The pretrained model that the merged models were trained from."""

ANCHOR: Role = "primary"
"""The anchor for methods that name their models. The output takes its tensor names, config, small files, shards and
dtypes from it."""

FIRST_MODEL: Role = "model1"
"""The anchor for other methods, which number their models."""


def is_anchor(role: Role) -> bool:
    """Whether the output takes names and config from the model of this role."""
    return role in (ANCHOR, FIRST_MODEL)
