"""Inspection of merges of whole models, from their sources, a finished output, or both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsa.architectures.base import Architecture
from hsa.errors import MismatchError, listed
from hsa.findings import Findings
from hsa.inspection.model_pass import InspectedTensor, ModelPass, TensorFindings
from hsa.inspection.model_report import ModelInspection, TensorVectors, in_model_order, spot_of
from hsa.inspection.opening import identity_of, open_checked, refusal_findings
from hsa.inspection.vector_sums import KeptSums
from hsa.methods.base import BASE, Method
from hsa.methods.copied import COPIED, decision_dict
from hsa.methods.settings import Settings
from hsa.methods.tensors import Outcome, TensorRecord, TensorTask
from hsa.option_names import option
from hsa.outputs.merge_warnings import adapter_findings
from hsa.outputs.provenance import Provenance
from hsa.outputs.recording import tensors_digest
from hsa.planning.plan import mismatch_notes, some
from hsa.planning.tasks import TaskFinder
from hsa.sources.hub.client import Hub
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system.dtypes import ARITHMETIC
from hsa.system.fsio import Tally
from hsa.system.manifest import PROVENANCE
from hsa.system.threads import default_threads
from hsa.system.types import PathLike, Progress
from hsa.verification.decisions import other_decisions

NO_SOURCES = "norms, cosines and sign conflicts need the sources: give {} too; {} holds every recorded decision"
ONE_MODEL = "cosines of task vectors and sign conflicts need two models"


@dataclass(frozen=True)
class RecordedMerge:
    """An output and its provenance."""

    directory: Path
    provenance: Provenance

    @property
    def written_by(self) -> dict[str, Any]:
        record = self.provenance.record
        return {**record.program, "libraries": dict(record.libraries)}


def inspect_sources(
    method: Method[Any, Any],
    settings: Settings,
    paths: Mapping[Role, PathLike],
    output: RecordedMerge | None,
    threads: int | None,
    progress: Progress | None,
) -> ModelInspection:
    """Measure sources as a merge of them would. If `output` is given, it must have been made from them.

    Raises the errors of `hsa.inspect`.
    """
    settings.require()
    settings.check_models(sum(role != BASE for role in paths))
    tally, hub = Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        sources = open_checked(
            paths, None, tally, hub, stack, lambda opened: _finder(method, settings, opened).targets()
        )
        finder = _finder(method, settings, sources)
        tasks = finder.targets()
        targets = list(_targets(method, tasks, sources))
        planned = method.planned_findings(tasks, settings) if all(each.decides for each in targets) else Findings()
        total = sum(target.nbytes for target in targets)
        measured = ModelPass(sources, method, settings).run(
            targets, threads or default_threads(), lambda done: None if progress is None else progress(done, total)
        )
        sources.check_unchanged()
        outcomes = [each.outcome for each in measured]
        warnings = [] if output is None else list(_differences(output, method, outcomes))
        tensors = _tensors(method, sources, targets, measured, output)
        findings = method.settings_findings([settings]) + refusal_findings(settings, finder.sources) + planned
        findings += adapter_findings(sources) + method.source_findings(outcomes) + method.result_findings(outcomes)
        findings += method.decision_findings([each for each in outcomes if each.decision is not None])
        identities = {source.role: identity_of(source) for source in sources}
    notes = [*hub.notes, *(note for source in sources for note in source.notes), *mismatch_notes(finder)]
    notes += [*_notes(method, sources, tasks, targets, recorded=output is not None), *findings.notes]
    return ModelInspection(
        title=" + ".join(str(identities[role]["id"]) for role in sources.models)
        if output is None
        else output.directory.resolve().name,
        origin="sources" if output is None else "output and sources",
        method=method.name,
        models=sources.models,
        based=sources.base is not None,
        written_by=None if output is None else output.written_by,
        parameters=settings.as_dict() if output is None else output.provenance.record.parameters,
        sources=identities,
        tensors=in_model_order(tensors, sources.architecture),
        files=None if output is None else output.provenance.files,
        bytes_read=tally.read + (0 if output is None else (output.directory / PROVENANCE).stat().st_size),
        notes=tuple(notes),
        warnings=(*warnings, *findings.warnings),
    )


def inspect_record(output: RecordedMerge) -> ModelInspection:
    """Inspect an output by its provenance alone, without reading sources or weights."""
    record = output.provenance.record
    models = tuple(role for role in record.sources if role != record.base)
    tensors = [_recorded(record.method, target, models, record.architecture) for target in record.targets]
    return ModelInspection(
        title=output.directory.resolve().name,
        origin="output",
        method=record.method.name,
        models=models,
        based=record.base is not None,
        written_by=output.written_by,
        parameters=record.parameters,
        sources={role: source.as_dict() for role, source in record.sources.items()},
        tensors=in_model_order(tensors, record.architecture),
        files=output.provenance.files,
        bytes_read=(output.directory / PROVENANCE).stat().st_size,
        notes=(NO_SOURCES.format(listed(record.sources), option("json", True)),),
        warnings=(),
    )


def _finder(method: Method[Any, Any], settings: Settings, sources: Sources) -> TaskFinder:
    """The finder of the merge's tasks, without base if the method takes none."""
    if sources.base is not None and method.contract.base == "none":
        models = {role: source for role, source in sources.by_role.items() if role != sources.base}
        sources = replace(sources, by_role=models, base=None)
    return TaskFinder(method, settings, sources)


def _targets(method: Method[Any, Any], tasks: Sequence[TensorTask], sources: Sources) -> Iterator[InspectedTensor]:
    """The tensors to measure: all merged tensors, except those without a matching tensor in a given base."""
    for task in tasks:
        base = None if sources.base is None else sources.base_checkpoint.tensors.get(task.name)
        if base is not None and (base.shape != task.shape or base.code not in ARITHMETIC):
            base = None
        if base is not None or sources.base is None:
            yield InspectedTensor.of(method, task, base)


def _notes(
    method: Method[Any, Any],
    sources: Sources,
    tasks: Sequence[TensorTask],
    targets: Sequence[InspectedTensor],
    *,
    recorded: bool,
) -> Iterator[str]:
    """Notes on what cannot be shown, and why."""
    use = method.contract.base
    if sources.base is None:
        remedy = "which changes nothing of the merge" if use == "none" else f"with which {method.name} merges those"
        yield (
            f"without {option('base')} there are no task vectors: norms and cosines are those of the models "
            f"themselves, and sign conflicts and sizes beside base are left out; give {option('base')}, {remedy}"
        )
    elif use == "none":
        yield f"method {method.name} takes no base: it serves to show task vectors, and changes nothing of the merge"
    if len(sources.models) == 1:
        yield ONE_MODEL
    missing = {task.name for task in tasks} - {target.task.name for target in targets}
    if missing:
        yield (
            f"{len(missing)} tensors are merged and not shown, for base lacks them or has them in another shape or "
            f"type: {some(sorted(missing))}"
        )
    open_ = sum(not target.decides for target in targets)
    if open_:
        yield (
            f"what {method.name} decides of {open_} tensors takes the whole merge, such as decompositions, and is not "
            f"computed here: {'what is recorded is shown' if recorded else 'merge, and inspect the output'}"
        )


def _tensors(
    method: Method[Any, Any],
    sources: Sources,
    targets: Sequence[InspectedTensor],
    measured: Sequence[TensorFindings],
    output: RecordedMerge | None,
) -> list[TensorVectors]:
    recorded = {} if output is None else {each.canonical: each for each in output.provenance.record.targets}
    return [
        _tensor(method, sources, target, found, recorded.get(target.task.name))
        for target, found in zip(targets, measured, strict=True)
    ]


def _tensor(
    method: Method[Any, Any],
    sources: Sources,
    target: InspectedTensor,
    found: TensorFindings,
    recorded: TensorRecord | None,
) -> TensorVectors:
    task, decision = target.task, found.outcome.decision
    models = tuple(role for role in task.sources if role != BASE)
    known = decision is not None and decision is not COPIED
    return TensorVectors(
        name=task.stored.name if recorded is None else recorded.name,
        spot=spot_of(sources.architecture, task.name),
        shape=task.shape,
        dtype=task.stored.code,
        copied=decision is COPIED,
        vectors=found.sums.vectors,
        kept=found.sums.kept,
        angle=found.sums.angle,
        decision=None if decision is None else decision_dict(method, decision),
        coefficients=method.coefficients_of(decision, models) if known else {},
        recorded=None if recorded is None else decision_dict(method, recorded.decision),
    )


def _recorded(
    method: Method[Any, Any], target: TensorRecord, models: tuple[Role, ...], architecture: Architecture
) -> TensorVectors:
    decision = target.decision
    known = decision is not COPIED
    counts = method.kept_counts(decision) if known else None
    elements = (math.prod(target.shape),) * len(models)
    kept = KeptSums(elements, counts) if counts is not None and len(counts) == len(models) else None
    entry = decision_dict(method, decision)
    return TensorVectors(
        name=target.name,
        spot=spot_of(architecture, target.canonical),
        shape=target.shape,
        dtype=target.code,
        copied=not known,
        vectors=None,
        kept=kept,
        angle=None,
        decision=entry,
        coefficients=method.coefficients_of(decision, models) if known else {},
        recorded=entry,
    )


def _differences(output: RecordedMerge, method: Method[Any, Any], outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Differences between the recorded decisions and those that follow from the sources.

    Raises MismatchError if the sources' tensors are not those that the output was made from.
    """
    record = output.provenance.record
    for role in record.sources:
        lines = []
        for outcome in outcomes:
            ref = outcome.task.sources.get(role)
            if ref is not None:
                lines.append((outcome.task.name, ref.code, ref.shape, outcome.digests[role]))
        if tensors_digest(lines) != record.sources[role].targets:
            raise MismatchError(
                f"{role}: its merged tensors are not those that {output.directory} was made from "
                f"({record.sources[role].identity.id}); give that source, or inspect the sources without the output"
            )
    decided = [outcome for outcome in outcomes if outcome.decision is not None]
    found = list(other_decisions(method, {each.canonical: each.decision for each in record.targets}, decided))
    if found:
        more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        yield f"{found[0]}{more}: another machine or version may decide otherwise, else this is a bug"
