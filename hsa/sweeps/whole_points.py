"""Points of methods that have no patches: each is a separate merge of sources that are opened and planned once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsa.actions.merge import PreparedMerge, WrittenMerge, collect_small_files, plan_merge, write_merge
from hsa.actions.patch import PatchSources, Structure
from hsa.actions.request import Request, has_hub_ids, open_sources
from hsa.backends.base import Backend
from hsa.backends.choose import resolve
from hsa.errors import RequestError
from hsa.findings import Findings
from hsa.methods.base import Method
from hsa.methods.settings import Settings
from hsa.option_names import option
from hsa.outputs.earlier_merges import read_earlier_merges
from hsa.outputs.merge_warnings import header_findings
from hsa.planning.plan import Plan
from hsa.planning.tasks import Targets
from hsa.sources.hub.client import Hub
from hsa.sources.small_files import Assets
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.memory import PeakMemory


@dataclass(frozen=True)
class WholeSources(PatchSources):
    """Open sources for whole merges; `merges` holds one plan for each structure of settings."""

    backend: Backend
    assets: Assets
    merges: dict[Structure, Plan]

    def plan(self, settings: Settings) -> Plan:
        """The plan of a point, shared by all settings with the same structure."""
        return self.merges[settings.structure()].with_settings(settings)


def has_patches(method: Method[Any, Any], candidates: Sequence[Settings]) -> bool:
    """Whether merges with these settings can be stored as patches."""
    return not any(why for settings in candidates for why in method.patch_obstacles(settings))


def require_full(method: Method[Any, Any], settings: Settings, *, full: bool) -> None:
    """Raise RequestError if a sweep should write patches, but the method has none."""
    if not full:
        why = next(iter(method.patch_obstacles(settings)))
        raise RequestError(f"a sweep writes patches, and {why}; give {option('full', True)} to write checkpoints")


def open_whole_sources(
    candidates: Sequence[Settings], request: Request, tally: fsio.Tally, hub: Hub, stack: ExitStack
) -> WholeSources:
    """Open the sources of a request for merges with these settings. Raises the errors of `hsa.merge`."""
    backend = resolve(request.backend, request.device, request.settings, request.models)
    if has_hub_ids(request):
        with ExitStack() as trial:
            headers = open_sources(request, fsio.Tally(), hub, trial, headers_only=True)
            _plan(candidates, request, headers, backend)
    sources = open_sources(request, tally, hub, stack, headers_only=False)
    merges = _plan(candidates, request, sources, backend)
    first = merges[candidates[0].structure()]
    assets = collect_small_files(request, sources, first, tally)
    earlier = read_earlier_merges(sources)
    findings = Findings((*first.notes, *assets.notes), assets.warnings) + first.method.settings_findings(candidates)
    return WholeSources(
        sources=sources,
        settings=request.output_settings(backend.name),
        small=assets.files,
        findings=findings + header_findings(sources, earlier),
        earlier_merges=earlier,
        plans={structure: Targets(plan.method, plan.settings, plan.targets) for structure, plan in merges.items()},
        backend=backend,
        assets=assets,
        merges=merges,
    )


def merge_point(
    settings: Settings,
    request: Request,
    sources: WholeSources,
    destination: Path,
    threads: int,
    tally: fsio.Tally,
    memory: PeakMemory,
    step: Callable[[int], None] | None,
) -> WrittenMerge:
    """Merge with the settings of a point. Raises the errors of `hsa.merge`."""
    own = replace(request, settings=settings, threads=threads, overwrite=True)
    prepared = PreparedMerge(
        sources.sources, sources.plan(settings), sources.backend, destination, sources.earlier_merges
    )
    return write_merge(own, prepared, sources.assets, Findings(), tally, memory, step)


def _plan(
    candidates: Sequence[Settings], request: Request, sources: Sources, backend: Backend
) -> dict[Structure, Plan]:
    """The plans of the candidates, one for each structure of settings."""
    plans: dict[Structure, Plan] = {}
    for settings in candidates:
        structure = settings.structure()
        if structure in plans:
            plans[structure].with_settings(settings)
        else:
            plans[structure] = plan_merge(replace(request, settings=settings), sources, backend)
    return plans
