"""The roles of a merge's sources: what each is to the merge, and how messages, options and records name it."""

from __future__ import annotations

Role = str
"""`base`, or the name of a model that is merged."""

RolePair = tuple[Role, Role]

BASE: Role = "base"
"""The pretrained model that the merged models were trained from."""

ANCHOR: Role = "primary"
"""The anchor of methods that name their models: its tensor names, config, small files, shards and dtypes are the
output's."""

FIRST_MODEL: Role = "model1"
"""The anchor of other methods, which number their models."""


def is_anchor(role: Role) -> bool:
    """Whether the output takes names and config from the model of this role."""
    return role in (ANCHOR, FIRST_MODEL)
