"""Checks what shapes an output besides the parameters of the merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from hsa.errors import RequestError, shown
from hsa.option_names import option
from hsa.outputs.card import check_fields
from hsa.sources.roles import Role
from hsa.system.types import parse_size


def check_settings(assets_from: str, max_shard_size: str | int | None, card: Mapping[str, str] | None) -> None:
    """RequestError unless what shapes an output besides the merge's own parameters is what a merge can be told."""
    if not isinstance(assets_from, str) or assets_from not in get_args(Role):
        roles = ", ".join(get_args(Role))
        raise RequestError(f"{option('assets_from')} must be one of {roles}, got {shown(assets_from)}")
    if card is not None and not isinstance(card, Mapping):
        raise RequestError(f"{option('card')} must be a mapping from field to text, got {shown(card)}")
    check_fields(card or {})
    if max_shard_size is not None:
        parse_size(max_shard_size)
