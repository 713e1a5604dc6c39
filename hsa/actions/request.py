"""The arguments of a merge, validated, and its sources opened."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from hsa.actions.keywords import CONFIG_FILE, MERGE, Call, split
from hsa.actions.mergekit_config.config_request import ConfigRequest
from hsa.actions.run_options import RunOptions
from hsa.arguments import check_paths
from hsa.errors import RequestError, shown
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.option_names import option
from hsa.outputs.output_settings import check_settings
from hsa.planning.heads import require_heads
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.hub.client import Hub
from hsa.sources.hub.needs import Needs
from hsa.sources.hub.repository import REVISION, find_id
from hsa.sources.identity import Identity, is_hub_id, name_with_parent
from hsa.sources.roles import BASE, Role
from hsa.sources.source_set import Sources
from hsa.system.fsio import Tally
from hsa.system.types import PathLike, parse_size


@dataclass(frozen=True)
class Request(RunOptions):
    """All arguments of a merge; see `merge` for the meaning of each field.

    Example:
        >>> Request.of("whisper-small", "m1", "m2", "merged", lam=0.3).settings.lam
        0.3
    """

    sources: Mapping[Role, PathLike]
    """By role, in the order that records and messages keep."""
    output: PathLike
    settings: Settings
    """An instance of the class that the method declares."""
    ids: Mapping[Role, str | None] | None = None
    config_from: Role | None = None
    """The model whose `config.json` and `generation_config.json` the output gets; None for the method's choice."""
    config: ConfigRequest | None = None
    """The mergekit file that describes the merge, if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen: Role | None = self.assets_from
        if chosen is None:
            object.__setattr__(self, "assets_from", self.anchor)
        check_settings(self.sources, self.assets_from, self.max_shard_size, self.card, self.config_from)
        check_paths(output=self.output, **self.sources)
        self.settings.check_models(self.models)
        check_ids(self.ids or {})
        self.settings.require()

    @classmethod
    def of(cls, *positional: Any, **keywords: Any) -> Request:
        """The request that `hsa.merge` makes of the same arguments. Raises TypeError and RequestError as it does."""
        return request_of(MERGE, positional, keywords)

    @property
    def anchor(self) -> Role:
        """The role of the first model, whose names, config and small files are the output's."""
        return next(role for role in self.sources if role != BASE)

    @property
    def models(self) -> int:
        """How many models are merged, base not counted."""
        return len(self.sources) - (BASE in self.sources)

    @property
    def shard_bytes(self) -> int | None:
        return None if self.max_shard_size is None else parse_size(self.max_shard_size)

    def output_settings(self, backend: str) -> dict[str, Any]:
        """The options that shape the output besides the merge's own parameters, for its provenance."""
        config_from = {} if self.config_from is None else {"config_from": self.config_from}
        return {
            "assets_from": self.assets_from,
            "backend": backend,
            "card": dict(self.card or {}),
            **config_from,
            "max_shard_size": self.shard_bytes,
        }


def request_of(call: Call, positional: Sequence[Any], keywords: Mapping[str, Any]) -> Request:
    """The request that the arguments of a call describe; a single positional argument may be a request itself."""
    if positional and isinstance(positional[0], Request):
        if len(positional) > 1 or keywords:
            raise TypeError(f"{call.name}() takes a request alone, or what it holds as arguments")
        return positional[0]
    if keywords.get(CONFIG_FILE) is not None and call.config:
        return _request_of_file(call, positional, keywords)
    arguments = split(call, positional, keywords)
    settings = method_named(arguments.method).Settings(**arguments.settings)
    return Request(arguments.sources, arguments.output, settings, arguments.ids, **arguments.options)


def _request_of_file(call: Call, positional: Sequence[Any], keywords: Mapping[str, Any]) -> Request:
    """The request that a mergekit file describes, together with the arguments that the file leaves open."""
    from hsa.actions.mergekit_config.arguments import placed, read_arguments

    if positional:
        raise RequestError(f"{option(CONFIG_FILE)} says which models are merged; give {option('output')} by its name")
    given = {name: value for name, value in keywords.items() if name != CONFIG_FILE}
    check_paths(config=keywords[CONFIG_FILE])
    config, arguments = read_arguments(keywords[CONFIG_FILE], given)
    with placed(config):
        parts = split(call, (), arguments)
        settings = method_named(parts.method).Settings(**parts.settings)
    options = dict(parts.options)
    if "assets_from" not in given:
        options["assets_from"] = config.role_of(config.tokenizer_from)
    config_from = config.role_of(config.config_from)
    return Request(
        parts.sources,
        parts.output,
        settings,
        parts.ids,
        config_from if config_from != next(role for role in parts.sources if role != BASE) else None,
        config,
        **options,
    )


def _is_claim(claimed: object) -> bool:
    """Whether a value is a hub id, with or without a revision."""
    if not isinstance(claimed, str):
        return False
    name, at, revision = claimed.partition("@")
    return is_hub_id(name) and (not at or REVISION.fullmatch(revision) is not None)


def check_ids(ids: Mapping[Role, str | None]) -> None:
    """Raise RequestError unless the ids to record are hub ids, with or without a revision, or None."""
    for role, claimed in ids.items():
        if claimed is not None and not _is_claim(claimed):
            form = "a hub id such as org/name or org/name@revision"
            raise RequestError(f"{option(f'{role}_id')} must be {form}, got {shown(claimed)}")


def open_sources(
    request: Request,
    tally: Tally,
    hub: Hub,
    stack: ExitStack,
    *,
    headers_only: bool,
    rows_only: bool = False,
    assets: Collection[Role] = (),
) -> Sources:
    """Open the sources until the stack ends. With `rows_only`, the anchor too is opened for its targets alone.

    The small files of the roles in `assets` are fetched in addition to those that the request needs. See `hsa.merge`
    for what it raises.
    """
    ids = request.ids or {}
    adapter_roles = {role for role, path in request.sources.items() if hub.is_adapter(role, path)}
    opened: dict[Role, Checkpoint] = {}
    for role, path in sorted(request.sources.items(), key=lambda item: item[0] != BASE):  # adapters need base first
        needs = _needs(
            request, role, adapted=request.anchor in adapter_roles, headers_only=headers_only, rows_only=rows_only
        )
        needs = replace(needs, assets=needs.assets or role in assets)
        opened[role] = stack.enter_context(hub.open(role, path, tally, needs, ids.get(role), opened.get(BASE)))
        require_heads(method_named(request.settings.method), opened[role])
    sources = Sources.of_checkpoints(opened.values())
    return sources.with_identities(_longer_names([source for source in sources if not ids.get(source.role)]))


def _longer_names(sources: Sequence[Checkpoint]) -> dict[Role, Identity]:
    """Names that include the parent directory, for different directories of one name, which a card could not tell
    apart."""
    return {
        source.role: Identity(name_with_parent(source.path))
        for source in sources
        if source.identity == Identity(source.path.name)
        and any(source.path != other.path and source.identity == other.identity for other in sources)
    }


def has_hub_ids(request: Request) -> bool:
    return any(find_id(path) for path in request.sources.values())


def _needs(request: Request, role: Role, *, adapted: bool, headers_only: bool, rows_only: bool) -> Needs:
    """What a merge needs of a source on the Hub. `adapted` says that the anchor is an adapter, so all of base is
    written."""
    method, preset = method_named(request.settings.method), getattr(request.settings, "targets", None)
    everywhere = preset is None or method.needs_whole(request.settings, role) or (role == BASE and adapted)
    return Needs(
        need="whole" if everywhere or (role == request.anchor and not rows_only) else "targets",
        preset=preset,
        assets=role in (BASE, request.assets_from, request.config_from) or (rows_only and role == request.anchor),
        headers_only=headers_only,
        compare=not method.elementwise and role in (BASE, request.anchor),
    )
