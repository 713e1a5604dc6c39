"""`hsa.merge_patch`: write only the merged rows of a merge; and open the sources of one patch or many."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.actions.keywords import MERGE_PATCH
from hsa.actions.request import Request, has_hub_ids, open_sources, request_of
from hsa.actions.signatures import declared_keywords
from hsa.engine.open_patch import FinishedPatch
from hsa.engine.patch_writer import PatchSpec, check_patchable, write_patches
from hsa.errors import DestinationError, RequestError
from hsa.findings import Findings
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.option_names import option
from hsa.outputs.earlier_merges import EarlierMerges, read_earlier_merges
from hsa.outputs.merge_warnings import header_findings, raise_if_strict, source_findings
from hsa.outputs.patch_reader import SUFFIX, is_patch
from hsa.outputs.record import Record
from hsa.outputs.report import MergeReport, outcome_findings
from hsa.planning.plan import check_structure
from hsa.planning.tasks import Targets, find_targets
from hsa.sources import small_files
from hsa.sources.hub.client import Hub
from hsa.sources.roles import BASE
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.destinations import path_overlap, refuse_inside_output
from hsa.system.digests import digest_of
from hsa.system.memory import PeakMemory
from hsa.system.signals import deferred
from hsa.system.staging import STAGING, StagingDirectory, hidden_sibling
from hsa.system.threads import default_threads
from hsa.system.types import PathLike, Progress


@declared_keywords(MERGE_PATCH)
def merge_patch(*arguments: Any, progress: Progress | None = None, **keywords: Any) -> MergeReport:
    """Merge as `hsa.merge` does, but write only the merged rows: a patch, from which `hsa.apply` makes the output.

    Merges that change more than the merged heads (scales, casts, reference numerics) have no patch. Only headers and
    targets are read, of the anchor as of the other sources.

    Args:
        {sources}
        output: the file to write, named `*.safetensors`; it appears whole or not at all.
        method: the name of the method.
        {settings}
        {options}
        progress: called now and then with the bytes done and the total.

    Returns the report, with heads, scores and margins per tensor; its route is `patch file`.

    Raises what `hsa.merge` raises. After an error, nothing is left behind.

    Example:
        >>> report = hsa.merge_patch("whisper-small", "m1", "m2", "p.safetensors", k=0.6)
    """
    return run_patch(request_of(MERGE_PATCH, arguments, keywords), progress)


@fsio.map_os_errors()
def run_patch(request: Request, progress: Progress | None = None) -> MergeReport:
    """Carry out a request as a patch; see `merge_patch`."""
    started = time.perf_counter()
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        patch_sources = open_patch_sources([request.settings], request, tally, hub, stack)
        sources, targets = patch_sources.sources, patch_sources.targets(request.settings)
        early = Findings((*hub.notes, *patch_sources.findings.notes), patch_sources.findings.warnings)
        method = targets.method
        raise_if_strict(early + method.planned_findings(targets.tasks, request.settings), strict=request.strict)
        destination = check_patch_destination(
            request.output, [source.path for source in sources], overwrite=request.overwrite
        )
        with deferred():
            staging = stack.enter_context(
                StagingDirectory(hidden_sibling(destination, STAGING), destination, sync=request.sync)
            )
        point = PatchSpec(targets, destination.name)
        threads = request.threads or default_threads()
        (patch,) = write_patches(
            [point], sources, patch_sources.settings, patch_sources.files, staging, threads, tally, memory, progress
        )
        sources.check_unchanged()
        doubts = source_findings(patch.outcomes, sources, patch_sources.earlier_merges, request.settings)
        findings = early + doubts + outcome_findings(method, patch.outcomes)
        raise_if_strict(findings, strict=request.strict)
        check_patch_destination(destination, (), overwrite=request.overwrite)
        staging.publish_file(point.name, destination)
        memory.sample()
    return MergeReport(
        output=destination,
        seconds=time.perf_counter() - started,
        bytes_read=tally.read,
        bytes_read_by_source=dict(tally.read_by),
        bytes_written=tally.written,
        bytes_fetched=sum(hub.fetched.values()),
        peak_memory_bytes=memory.peak,
        backend="cpu",
        device="cpu",
        route="patch file",
        settings=request.settings,
        tensors={target.name: target for target in record_of(patch).targets},
        extent=method.summary(patch.outcomes),
        notes=findings.notes,
        warnings=findings.warnings,
        doubtful=bool(doubts.warnings) or BASE in patch_sources.earlier_merges,
    )


def record_of(patch: FinishedPatch) -> Record:
    """The record of a finished patch's merge."""
    return patch.contents.record


Structure = tuple[Any, ...]
"""The settings that a plan depends on; see `Settings.structure`."""


@dataclass(frozen=True)
class PatchSources:
    """Open sources for patches.

    `settings` is what a provenance records besides a merge's parameters. `small` holds the small files that a merge
    writes, by name. `findings` are the notes and warnings about all this. `earlier_merges` are the merges whose outputs
    the sources are. `plans` holds the targets by the structure of settings.
    """

    sources: Sources
    settings: Mapping[str, Any]
    small: Mapping[str, bytes]
    findings: Findings
    earlier_merges: EarlierMerges
    plans: dict[Structure, Targets]

    def targets(self, settings: Settings) -> Targets:
        """The targets under settings; they are planned once for each structure of settings."""
        structure = settings.structure()
        if structure not in self.plans:
            self.plans[structure] = find_targets(method_named(settings.method), settings, self.sources)
        return self.plans[structure].with_settings(settings)

    @property
    def files(self) -> dict[str, str]:
        return {name: digest_of(data) for name, data in self.small.items()}


def open_patch_sources(
    candidates: Sequence[Settings],
    request: Request,
    tally: fsio.Tally,
    hub: Hub,
    stack: ExitStack,
    *,
    rows_only: bool = True,
) -> PatchSources:
    """Open the sources of a request for patches with these parameters; primary is opened whole unless `rows_only`.

    Raises as `hsa.merge`.
    """
    if request.backend == "triton" or request.device not in ("auto", "cpu"):
        raise RequestError(
            f"patches are made on the CPU, for the disk sets their pace; leave {option('backend')} and "
            f"{option('device')} out, or use hsa.Merger(device='cuda') for merges that stay in memory"
        )
    if has_hub_ids(request):
        with ExitStack() as trial:
            headers = open_sources(request, fsio.Tally(), hub, trial, headers_only=True, rows_only=rows_only)
            _plan(candidates, headers)
    sources = open_sources(request, tally, hub, stack, headers_only=False, rows_only=rows_only)
    plans = _plan(candidates, sources)
    assets = small_files.collect(sources, sources.anchor, request.assets_from, None, tally)
    notes = (*(note for source in sources for note in source.notes), *assets.notes)
    merges = read_earlier_merges(sources)
    findings = Findings(notes, assets.warnings) + method_named(candidates[0].method).settings_findings(candidates)
    return PatchSources(
        sources,
        request.output_settings("cpu"),
        assets.files,
        findings + header_findings(sources, merges),
        merges,
        plans,
    )


def _plan(candidates: Sequence[Settings], sources: Sources) -> dict[Structure, Targets]:
    """The targets of candidates, planned once for each structure of their settings, and checked."""
    plans: dict[Structure, Targets] = {}
    for settings in candidates:
        check_patchable(settings, sources)
        structure = settings.structure()
        if structure in plans:
            plans[structure].with_settings(settings)
        else:
            plans[structure] = find_targets(method_named(settings.method), settings, sources)
    check_structure(candidates[0], sources)
    return plans


def check_patch_destination(output: PathLike, sources: Sequence[Path], *, overwrite: bool) -> Path:
    """The path at which a patch may be written, links resolved. Raises DestinationError if it may not be."""
    path = Path(output)
    if path.suffix != SUFFIX:
        raise DestinationError(f"output {path} is no name of a patch: expected one that ends in {SUFFIX}")
    try:
        destination = (Path.cwd() / path.expanduser()).resolve()
        for source in sources:
            overlap = path_overlap(destination.parent, source)
            if overlap in ("is", "lies in"):
                raise DestinationError(
                    f"output {destination} lies in the source {source}; choose a directory apart from the sources"
                )
        label = f"output {destination}"
        if destination.is_dir():
            raise DestinationError(f"{label} is a directory; a patch is one file: name one outside any output")
        refuse_inside_output(destination, label)
        if not os.path.lexists(destination):
            return destination
        if not overwrite:
            raise DestinationError(f"output {destination} exists; choose another, or give {option('overwrite', True)}")
        if not destination.is_file() or not is_patch(destination):
            raise DestinationError(
                f"output {destination} exists and is no patch of hsa; {option('overwrite', True)} replaces no other"
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"output {path} cannot be looked at: {error}; choose another destination") from error
    return destination
