"""What inspections of heads and of whole models share: opening and naming sources, and the checks of a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from hsa.architectures.base import Preset
from hsa.errors import MismatchError
from hsa.findings import Findings
from hsa.methods.settings import Settings
from hsa.planning.plan import check_structure
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.hub.client import Hub
from hsa.sources.hub.needs import Needs
from hsa.sources.hub.repository import find_id
from hsa.sources.roles import BASE, Role
from hsa.sources.source_set import Sources
from hsa.system.fsio import Tally
from hsa.system.types import PathLike


def open_checked(
    paths: Mapping[Role, PathLike],
    preset: Preset | None,
    tally: Tally,
    hub: Hub,
    stack: ExitStack,
    check: Callable[[Sources], object],
) -> Sources:
    """Open the sources until the stack closes. From the Hub, fetch the targets of a preset, or whole models without
    one.

    `check` runs on the headers first, so that bad sources are refused before anything large is fetched.
    """
    if remote_roles(paths):
        with ExitStack() as trial:
            check(_open(paths, preset, Tally(), hub, trial, headers_only=True))
    return _open(paths, preset, tally, hub, stack, headers_only=False)


def remote_roles(paths: Mapping[Role, PathLike]) -> list[Role]:
    """The roles of the sources on the Hub."""
    return [role for role, path in paths.items() if find_id(path)]


def _open(
    paths: Mapping[Role, PathLike],
    preset: Preset | None,
    tally: Tally,
    hub: Hub,
    stack: ExitStack,
    *,
    headers_only: bool,
) -> Sources:
    needs = Needs(need="whole" if preset is None else "targets", preset=preset, headers_only=headers_only)

    def open_source(role: Role, base: Checkpoint | None = None) -> Checkpoint:
        return stack.enter_context(hub.open(role, paths[role], tally, needs, None, base))

    base = open_source(BASE) if BASE in paths else None  # adapters are applied to it
    models = [open_source(role, base) for role in paths if role != BASE]
    return Sources.of_checkpoints(models if base is None else [base, *models])


def identity_of(source: Checkpoint) -> dict[str, object]:
    """The identity of a source, for reports."""
    return {
        "id": source.identity.id,
        "revision": source.identity.revision,
        "format": source.kind,
        "tensors": len(source.tensors),
    }


def refusal_findings(settings: Settings, sources: Sources) -> Findings:
    """A warning if a merge would refuse the sources because a config.json does not match the tensors."""
    try:
        check_structure(settings, sources)
    except MismatchError as error:
        return Findings(warnings=(f"a merge would refuse these sources: {error}",))
    return Findings()
