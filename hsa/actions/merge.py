"""`hsa.merge`: merge sources into an output directory, or plan it with a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsa.actions.keywords import MERGE
from hsa.actions.request import Request, has_hub_ids, open_sources, request_of
from hsa.actions.signatures import declared_keywords
from hsa.arguments import check_functions
from hsa.backends.base import Backend
from hsa.backends.choose import resolve
from hsa.engine.compute import Calculator
from hsa.engine.pipeline import Options, execute
from hsa.errors import SourceError
from hsa.findings import Findings
from hsa.methods.tensors import Outcome
from hsa.outputs import recording, report
from hsa.outputs.card import unlinked
from hsa.outputs.earlier_merges import EarlierMerges, read_earlier_merges
from hsa.outputs.merge_warnings import header_findings, raise_if_strict, source_findings
from hsa.outputs.metadata_files import CARD, write_metadata_files
from hsa.outputs.record import Record
from hsa.outputs.report import MergeReport, PlanReport
from hsa.planning.plan import Plan, make_plan
from hsa.sources import small_files
from hsa.sources.checkpoint import INDEX, Checkpoint
from hsa.sources.hub.client import Hub
from hsa.sources.roles import BASE
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.destinations import check_destination
from hsa.system.memory import PeakMemory
from hsa.system.publish import StagedOutput
from hsa.system.signals import deferred
from hsa.system.threads import default_threads
from hsa.system.types import PathLike, Progress

__all__ = ["PathLike", "Request", "dry_run", "merge", "run_merge"]


@dataclass(frozen=True)
class PreparedMerge:
    """A merge before its first tensor is read: open sources, the plan, and where the output goes."""

    sources: Sources
    plan: Plan
    backend: Backend
    destination: Path
    earlier_merges: EarlierMerges
    config_findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True)
class WrittenMerge:
    """A merge that was written to its destination.

    `doubts` are the warnings about the sources, `findings` all notes and warnings; `notes` say what could not be
    removed of an earlier output.
    """

    record: Record
    outcomes: tuple[Outcome, ...]
    doubts: Findings
    findings: Findings
    notes: tuple[str, ...]


@declared_keywords(MERGE)
def merge(*arguments: Any, progress: Progress | None = None, **keywords: Any) -> MergeReport:
    """Merge fine-tunes of one pretrained model into a complete checkpoint directory.

    Sources are Hugging Face checkpoint directories with safetensors or pickle weights, or ids on the Hub (`org/name`,
    `org/name@revision`), which are fetched; a name that exists locally is a directory. Models may be directories with a
    LoRA adapter of base. Base, and models other than the anchor, may be OpenAI's own `.pt` files. Instead of all
    arguments but `progress`, a `hsa.Request` may be given.

    Args:
        {sources}
        output: the directory to write; it appears whole or not at all.
        method: the name of the method. Each method takes its own settings; those of all methods are listed below.
        config: a mergekit file that gives sources, method and settings (docs/mergekit.md).
        {settings}
        {options}
        progress: called now and then with the bytes done and the total.

    Returns the report, with heads, scores and margins per tensor.

    Raises TypeError for unknown arguments, and RequestError, SourceError, StrictError, MachineError or a subclass (see
    `hsa.errors`). After an error, nothing is left behind.
    Source: Shankar et al., Computer Speech & Language, 2026, 102012.

    Example:
        >>> report = hsa.merge("whisper-small", "m1", "m2", "merged", lam=0.3)
    """
    return run_merge(request_of(MERGE, arguments, keywords), progress)


@fsio.map_os_errors()
def run_merge(request: Request, progress: Progress | None = None) -> MergeReport:
    """Carry out a request; see `merge`."""
    check_functions(progress=progress)
    started = time.perf_counter()
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        prepared = _prepare(request, tally, hub, stack)
        assets = collect_small_files(request, prepared.sources, prepared.plan, tally)
        early = _findings_before_reading(request, prepared, assets, hub)
        raise_if_strict(early + _planned_findings(prepared.plan), strict=request.strict)
        total = prepared.plan.bytes_to_write
        step = None if progress is None else lambda done: progress(done, total)
        written = write_merge(request, prepared, assets, early, tally, memory, step)
        memory.sample()
    return MergeReport(
        output=prepared.destination,
        seconds=time.perf_counter() - started,
        bytes_read=tally.read,
        bytes_read_by_source=dict(tally.read_by),
        bytes_written=tally.written,
        bytes_fetched=sum(hub.fetched.values()),
        peak_memory_bytes=memory.peak,
        backend=prepared.backend.name,
        device=prepared.backend.device,
        route=prepared.plan.route,
        settings=request.settings,
        tensors={target.name: target for target in written.record.targets},
        extent=prepared.plan.method.summary(written.outcomes),
        notes=(*written.findings.notes, *(() if request.digest else (report.NO_DIGESTS,)), *written.notes),
        warnings=written.findings.warnings,
        unlinked=unlinked(written.record),
        doubtful=bool(written.doubts.warnings) or BASE in prepared.earlier_merges,
    )


def write_merge(
    request: Request,
    prepared: PreparedMerge,
    assets: small_files.Assets,
    early: Findings,
    tally: fsio.Tally,
    memory: PeakMemory,
    step: Callable[[int], None] | None = None,
) -> WrittenMerge:
    """Compute a merge and put it at its destination, whole or not at all.

    `early` are the findings so far. With `strict`, nothing is written if there are any warnings by the end. `step` gets
    the bytes done. Raises as `merge`.
    """
    plan, sources = prepared.plan, prepared.sources
    with ExitStack() as stack:
        with deferred():  # once the directory exists, the stack that removes it must know of it
            staging = stack.enter_context(
                StagedOutput(prepared.destination, overwrite=request.overwrite, sync=request.sync)
            )
        options = Options(request.threads or default_threads(), request.digest, request.sync)
        try:
            calculator = Calculator(sources, prepared.backend, plan.settings)
            digests = execute(
                plan.files,
                sources.by_role,
                sources.anchor_checkpoint,
                calculator,
                staging,
                options,
                tally,
                memory,
                step,
            )
        except SourceError:  # a source that is being written looks damaged: report the change, not the damage
            sources.check_unchanged()
            raise
        sources.check_unchanged()
        outcomes = calculator.ordered(plan.targets)
        doubts = source_findings(outcomes, sources, prepared.earlier_merges, plan.settings)
        findings = early + doubts + report.outcome_findings(plan.method, outcomes)
        raise_if_strict(findings, strict=request.strict)
        record = recording.make_record(plan, sources, outcomes, request.output_settings(prepared.backend.name))
        small = dict(assets.files)
        if plan.index is not None:
            small[INDEX] = plan.index
        weights = {file.name: digests.get(file.name) for file in plan.files}
        write_metadata_files(staging, record, small, weights, digest=request.digest, tally=tally)
        staging.publish()
        return WrittenMerge(record, tuple(outcomes), doubts, findings, tuple(staging.notes))


@fsio.map_os_errors()
def dry_run(request: Request, *, occupied: bool = False) -> PlanReport:
    """Plan a request: read headers and small files, and write nothing.

    No more than that is fetched of a source on the Hub, primary included. The exceptions are pickle weights and
    adapters, and servers that give neither ranges nor sizes. With `occupied`, any earlier output at the destination is
    accepted, and the caller decides what to do about it.
    """
    tally, hub = fsio.Tally(), Hub()
    with ExitStack() as stack:
        prepared = _open(request, tally, hub, stack, headers_only=True, occupied=occupied)
        plan = prepared.plan
        assets = collect_small_files(request, prepared.sources, prepared.plan, tally)
        needed = plan.bytes_to_write + sum(map(len, assets.files.values()))
        folder = next(parent for parent in prepared.destination.parents if parent.exists())
        free = fsio.free_bytes(folder)
        findings = _findings_before_reading(request, prepared, assets, hub) + _planned_findings(plan)
        raise_if_strict(findings, strict=request.strict)
        short = [f"{needed} bytes are to be written and {free} are free in {folder}"] if free < needed else []
        return PlanReport(
            output=prepared.destination,
            route=plan.route,
            backend=prepared.backend.name,
            device=prepared.backend.device,
            settings=request.settings,
            targets=plan.targets,
            files={file.name: file.size for file in plan.files},
            bytes_to_read=tally.read + sum(plan.weight_bytes_read.values()),
            bytes_to_write=needed,
            bytes_fetched=sum(hub.fetched.values()),
            bytes_to_fetch=sum(hub.pending.values()),
            free_bytes=free,
            notes=findings.notes,
            warnings=(*findings.warnings, *short),
            doubtful=BASE in prepared.earlier_merges,
        )


def collect_small_files(request: Request, sources: Sources, plan: Plan, tally: fsio.Tally) -> small_files.Assets:
    """Collect the small files of the output, except index, card and provenance."""
    owner = sources.anchor if plan.method.elementwise else sources.base or sources.anchor
    dtype = plan.output_dtype
    if request.config_from is not None and request.config_from != owner:
        owner = request.config_from
        dtype = dtype or _dtype_of(sources.anchor_checkpoint)
    return small_files.collect(sources, owner, request.assets_from, dtype, tally)


def _dtype_of(source: Checkpoint) -> str | None:
    """The element type of a model by its `config.json`; None if that does not give one."""
    names = (source.config.get(key) for key in ("dtype", "torch_dtype"))
    return next((name for name in names if isinstance(name, str)), None)


def _findings_before_reading(
    request: Request, prepared: PreparedMerge, assets: small_files.Assets, hub: Hub
) -> Findings:
    """Notes and warnings before the first tensor is read."""
    findings = Findings((*hub.notes, *prepared.plan.notes, *assets.notes), assets.warnings)
    return (
        findings
        + prepared.config_findings
        + prepared.plan.method.settings_findings([request.settings])
        + header_findings(prepared.sources, prepared.earlier_merges)
    )


def _planned_findings(plan: Plan) -> Findings:
    """Findings on the settings of a merge together with its targets."""
    return plan.method.planned_findings(plan.targets, plan.settings)


def _prepare(request: Request, tally: fsio.Tally, hub: Hub, stack: ExitStack) -> PreparedMerge:
    """Open what a merge needs. A request that headers alone can refuse is refused before anything large is fetched."""
    if has_hub_ids(request):
        with ExitStack() as trial:
            _open(request, fsio.Tally(), hub, trial, headers_only=True)
    return _open(request, tally, hub, stack, headers_only=False)


def _open(
    request: Request, tally: fsio.Tally, hub: Hub, stack: ExitStack, *, headers_only: bool, occupied: bool = False
) -> PreparedMerge:
    backend = resolve(request.backend, request.device, request.settings, request.models)
    sources = open_sources(request, tally, hub, stack, headers_only=headers_only)
    folders = [source.path for source in sources]
    destination = check_destination(request.output, folders, overwrite=request.overwrite, adding=occupied)
    findings = _check_config(request, sources, tally)
    plan = plan_merge(request, sources, backend)
    return PreparedMerge(sources, plan, backend, destination, read_earlier_merges(sources), findings)


def _check_config(request: Request, sources: Sources, tally: fsio.Tally) -> Findings:
    """Findings on a request's mergekit file, if it has one. Raises RequestError if the models do not fit the file."""
    if request.config is None:
        return Findings()
    from hsa.actions.mergekit_config.source_checks import check_sources

    return request.config.findings + check_sources(request.config, sources, tally)


def plan_merge(request: Request, sources: Sources, backend: Backend) -> Plan:
    """Plan a merge, and check that its record can be read back. Raises as `make_plan`, and RequestError."""
    plan = make_plan(request.settings, sources, request.shard_bytes)
    recording.check_record_size(
        plan, sources, request.output_settings(backend.name), (*small_files.names_for(sources), INDEX, CARD)
    )
    return plan
