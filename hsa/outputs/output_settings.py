"""Checks the settings that shape an output besides the parameters of the merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hsa.errors import RequestError, shown
from hsa.option_names import option
from hsa.outputs.card import check_fields
from hsa.sources.roles import Role
from hsa.system.types import parse_size


def check_settings(
    roles: Iterable[Role],
    assets_from: Role,
    max_shard_size: str | int | None,
    card: Mapping[str, str] | None,
    config_from: Role | None = None,
) -> None:
    """Raise RequestError unless the settings that shape an output, besides the merge's own parameters, are valid.

    `roles` are those of the merge's sources. `assets_from` must be one of them, and so must `config_from` where it is
    given.
    """
    known = tuple(roles)
    if not isinstance(assets_from, str) or assets_from not in known:
        raise RequestError(f"{option('assets_from')} must be one of {', '.join(known)}, got {shown(assets_from)}")
    if config_from is not None and (not isinstance(config_from, str) or config_from not in known):
        raise RequestError(f"config_from must be one of {', '.join(known)}, got {shown(config_from)}")
    if card is not None and not isinstance(card, Mapping):
        raise RequestError(f"{option('card')} must be a mapping from field to text, got {shown(card)}")
    check_fields(card or {})
    if max_shard_size is not None:
        parse_size(max_shard_size)
