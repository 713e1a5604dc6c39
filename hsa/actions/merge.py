"""`hsa.merge`: merge sources into an output directory, or plan it with a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hsa.actions.request import Request, has_hub_ids, open_sources
from hsa.architectures.base import Preset
from hsa.arguments import check_functions
from hsa.backends.base import Backend
from hsa.backends.choose import resolve
from hsa.engine.compute import Calculator
from hsa.engine.pipeline import Options, execute
from hsa.errors import SourceError
from hsa.findings import Findings
from hsa.methods.hsa import HsaSettings, LoadDtype, Numerics
from hsa.methods.hsa_formula import percentage_findings
from hsa.methods.settings import OutputDtype, PerTensor
from hsa.outputs import recording, report
from hsa.outputs.card import unlinked
from hsa.outputs.earlier_merges import EarlierMerges, read_earlier_merges
from hsa.outputs.extent import Extent
from hsa.outputs.merge_warnings import header_findings, parameter_findings, raise_if_strict, source_findings
from hsa.outputs.metadata_files import CARD, write_metadata_files
from hsa.outputs.report import MergeReport, PlanReport, TensorReport
from hsa.planning.plan import MergePlan, make_plan
from hsa.sources import small_files
from hsa.sources.checkpoint import INDEX
from hsa.sources.hub.client import Hub
from hsa.sources.roles import BASE, Role
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.destinations import check_destination
from hsa.system.memory import PeakMemory
from hsa.system.publish import StagedOutput
from hsa.system.signals import deferred
from hsa.system.threads import default_threads
from hsa.system.types import PathLike

__all__ = ["PathLike", "Request", "dry_run", "merge", "run_merge"]


def merge(
    *,
    base: PathLike,
    primary: PathLike,
    secondary: PathLike,
    output: PathLike,
    k: PerTensor = 0.6,
    lam: PerTensor = 0.5,
    alpha: PerTensor = 0.2,
    targets: Preset = "encoder-qkv",
    attention_scale: float = 1.0,
    non_attention_scale: float = 1.0,
    num_heads: int | None = None,
    num_layers: int | None = None,
    numerics: Numerics = "exact",
    load_dtype: LoadDtype = "auto",
    dtype: OutputDtype = "auto",
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    assets_from: Role = "primary",
    max_shard_size: str | int | None = None,
    base_id: str | None = None,
    primary_id: str | None = None,
    secondary_id: str | None = None,
    card: Mapping[str, str] | None = None,
    digest: bool = True,
    sync: bool = True,
    overwrite: bool = False,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge two fine-tunes of one pretrained Whisper model into a complete checkpoint directory.

    Args:
        base, primary, secondary: Hugging Face checkpoint directories with safetensors or pickle weights, or ids on the
            Hub (`org/name`, `org/name@revision`), which are fetched; what exists locally is a directory. Primary and
            secondary may be directories with a LoRA adapter of base, base and secondary OpenAI's own `.pt` files.
        output: the directory to write; it appears whole or not at all.
        k: share of heads merged per tensor, in [0, 1], or a percentage up to 100.
        lam: weight of primary's task vector in a selected head, in [0, 1].
        alpha: layer exponent, at least 0. `k`, `lam` and `alpha` also take a mapping from every target
            tensor's name to its own value.
        targets: `encoder-qkv`, `attention-qkv` or `attention-all`.
        attention_scale, non_attention_scale: factors on the task vectors of targets and of all else.
        num_heads, num_layers: instead of what config.json says, for both stacks.
        numerics: `exact`, or `reference` for the reference script's own torch operations.
        load_dtype: with `reference`, how its loader reads: `auto` or `float32`.
        dtype: element type of the output; `auto` keeps each tensor's.
        backend, device: where to compute; only `auto` chooses.
        threads: worker threads; by default the usable cores and one more.
        assets_from: whose tokenizer and processor files are taken.
        max_shard_size: bytes, or a size such as `5GB`; by default primary's own shards.
        base_id, primary_id, secondary_id: hub ids to record instead of the directories' names or the ids fetched.
        card: model card fields, of `hsa.outputs.card.FIELDS`.
        digest: record BLAKE3 digests of whole files.
        sync: fsync everything before the output appears.
        overwrite: replace an earlier output.
        strict: make warnings errors; nothing is written then.
        progress: called now and then with bytes done and bytes in all.

    Returns the report, with heads, scores and margins per tensor.

    Raises RequestError, SourceError, StrictError, MachineError or a subclass (see `hsa.errors`); nothing is left behind
    then.
    Source: SPEC section 1, after Shankar et al., Computer Speech & Language, 2026, 102012.
    """
    settings = HsaSettings(
        k=k,
        lam=lam,
        alpha=alpha,
        targets=targets,
        attention_scale=attention_scale,
        non_attention_scale=non_attention_scale,
        num_heads=num_heads,
        num_layers=num_layers,
        numerics=numerics,
        load_dtype=load_dtype,
        dtype=dtype,
    )
    request = Request(
        sources={"base": base, "primary": primary, "secondary": secondary},
        output=output,
        settings=settings,
        backend=backend,
        device=device,
        threads=threads,
        assets_from=assets_from,
        max_shard_size=max_shard_size,
        ids={"base": base_id, "primary": primary_id, "secondary": secondary_id},
        card=card,
        digest=digest,
        sync=sync,
        overwrite=overwrite,
        strict=strict,
    )
    return run_merge(request, progress)


@fsio.map_os_errors()
def run_merge(request: Request, progress: Callable[[int, int], None] | None = None) -> MergeReport:
    """Do what a request says; see `merge`."""
    check_functions(progress=progress)
    started = time.perf_counter()
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        prepared = _prepare(request, tally, hub, stack)
        assets = collect_small_files(request, prepared.sources, prepared.plan, tally)
        early = _findings_before_reading(request, prepared, assets, hub)
        raise_if_strict(early + parameter_findings(prepared.plan.targets), strict=request.strict)
        with deferred():  # a directory that was made must be known to the stack that removes it
            staging = stack.enter_context(
                StagedOutput(prepared.destination, overwrite=request.overwrite, sync=request.sync)
            )
        options = Options(request.threads or default_threads(), request.digest, request.sync)
        total = prepared.plan.bytes_to_write
        step = None if progress is None else lambda done: progress(done, total)
        try:
            calculator = Calculator(prepared.sources, prepared.backend, request.settings.numerics)
            digests = execute(
                prepared.plan.files, prepared.sources.by_role, calculator, staging, options, tally, memory, step
            )
        except SourceError:  # a file that is being written looks damaged: say what happened, not what it looks like
            prepared.sources.check_unchanged()
            raise
        prepared.sources.check_unchanged()
        outcomes = calculator.ordered(prepared.plan.targets)
        doubts = source_findings(outcomes, prepared.sources, prepared.earlier_merges, request.settings.targets)
        findings = early + doubts + report.outcome_findings(outcomes)
        raise_if_strict(findings, strict=request.strict)
        record = recording.make_record(
            prepared.plan, prepared.sources, outcomes, request.output_settings(prepared.backend.name)
        )
        small = dict(assets.files)
        if prepared.plan.index is not None:
            small[INDEX] = prepared.plan.index
        weights = {file.name: digests.get(file.name) for file in prepared.plan.files}
        write_metadata_files(staging, record, small, weights, digest=request.digest, tally=tally)
        staging.publish()
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
        parameters=request.settings.as_dict(),
        tensors={target.name: TensorReport.of(target) for target in record.targets},
        extent=Extent.of(outcomes),
        notes=(*findings.notes, *(() if request.digest else (report.NO_DIGESTS,)), *staging.notes),
        warnings=findings.warnings,
        unlinked=unlinked(record),
        doubtful=bool(doubts.warnings) or BASE in prepared.earlier_merges,
    )


@fsio.map_os_errors()
def dry_run(request: Request, *, occupied: bool = False) -> PlanReport:
    """The plan of a request: reads headers and small files, writes nothing.

    Of a source on the Hub no more than that is fetched either, primary included, except pickle weights and adapters,
    and from a server that gives neither ranges nor sizes. With `occupied` an earlier output at the destination is
    accepted, whatever it is: the caller decides about it.
    """
    tally, hub = fsio.Tally(), Hub()
    with ExitStack() as stack:
        prepared = _open(request, tally, hub, stack, headers_only=True, occupied=occupied)
        plan = prepared.plan
        assets = collect_small_files(request, prepared.sources, prepared.plan, tally)
        needed = plan.bytes_to_write + sum(map(len, assets.files.values()))
        folder = next(parent for parent in prepared.destination.parents if parent.exists())
        free = fsio.free_bytes(folder)
        findings = _findings_before_reading(request, prepared, assets, hub) + parameter_findings(plan.targets)
        raise_if_strict(findings, strict=request.strict)
        short = [f"{needed} bytes are to be written and {free} are free in {folder}"] if free < needed else []
        return PlanReport(
            output=prepared.destination,
            route=plan.route,
            backend=prepared.backend.name,
            device=prepared.backend.device,
            parameters=request.settings.as_dict(),
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


def collect_small_files(request: Request, sources: Sources, plan: MergePlan, tally: fsio.Tally) -> small_files.Assets:
    """The small files of the output, but for index, card and provenance."""
    owner = BASE if request.settings.numerics == "reference" else sources.anchor
    return small_files.collect(sources, owner, request.assets_from, plan.output_dtype, tally)


def _findings_before_reading(
    request: Request, prepared: _PreparedMerge, assets: small_files.Assets, hub: Hub
) -> Findings:
    """Notes and warnings before the first tensor is read."""
    findings = Findings((*hub.notes, *prepared.plan.notes, *assets.notes), assets.warnings)
    return (
        findings
        + percentage_findings([request.settings.k])
        + header_findings(prepared.sources, prepared.earlier_merges)
    )


@dataclass(frozen=True)
class _PreparedMerge:
    sources: Sources
    plan: MergePlan
    backend: Backend
    destination: Path
    earlier_merges: EarlierMerges


def _prepare(request: Request, tally: fsio.Tally, hub: Hub, stack: ExitStack) -> _PreparedMerge:
    """Open what a merge needs. Before anything large is fetched, whatever can be refused by headers is refused."""
    if has_hub_ids(request):
        with ExitStack() as trial:
            _open(request, fsio.Tally(), hub, trial, headers_only=True)
    return _open(request, tally, hub, stack, headers_only=False)


def _open(
    request: Request, tally: fsio.Tally, hub: Hub, stack: ExitStack, *, headers_only: bool, occupied: bool = False
) -> _PreparedMerge:
    backend = resolve(request.backend, request.device, request.settings)
    sources = open_sources(request, tally, hub, stack, headers_only=headers_only)
    folders = [source.path for source in sources]
    destination = check_destination(request.output, folders, overwrite=request.overwrite, adding=occupied)
    plan = make_plan(request.settings, sources, request.shard_bytes)
    recording.check_record_size(
        plan, sources, request.output_settings(backend.name), (*small_files.SMALL_FILES, INDEX, CARD)
    )
    return _PreparedMerge(sources, plan, backend, destination, read_earlier_merges(sources))
