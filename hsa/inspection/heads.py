"""Inspection of the heads that HSA selects, from their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from hsa.backends.base import changed_ranges
from hsa.errors import MismatchError, listed
from hsa.findings import Findings
from hsa.inspection.from_provenance import close_margins, parameters_of, recorded_config
from hsa.inspection.measure import Buffers, TargetMeasures, bytes_of_other_tensors, measure, measure_other_tensors
from hsa.inspection.opening import identity_of, open_checked, refusal_findings, remote_roles
from hsa.inspection.report import Energy, Inspection, RecordedSelection, TensorInspection, in_order
from hsa.methods.geometry import AnyGeometry
from hsa.methods.hsa import HsaSettings
from hsa.methods.hsa_decision import HeadScores
from hsa.methods.hsa_formula import keep_count, settings_of, shares_of
from hsa.methods.registry import method_named
from hsa.methods.selection import select, selection_of
from hsa.methods.tensors import Outcome, TensorRecord, TensorTask
from hsa.outputs.merge_warnings import adapter_findings
from hsa.outputs.provenance import Provenance
from hsa.outputs.recording import tensors_digest
from hsa.planning.tasks import Targets, find_targets
from hsa.sources.hub.client import Hub
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system.fsio import Tally
from hsa.system.types import PathLike, Progress

HSA = "hsa"
"""The method whose scores are shown, also for reference numerics, which differ only in rounding."""


def inspect_heads(
    paths: Mapping[Role, PathLike],
    config: HsaSettings,
    record: Provenance | None,
    directory: Path | None,
    energy: bool,
    progress: Progress | None,
) -> Inspection:
    """Scores, selection and task vectors of the heads of the sources, compared with an output if there is one."""
    config.check_models(len(paths) - 1)
    tally, hub, method = Tally(), Hub(bars=progress is not None), method_named(HSA)
    remote = remote_roles(paths)
    with ExitStack() as stack:
        sources = open_checked(
            paths, config.targets, tally, hub, stack, lambda opened: find_targets(method, config, opened)
        )
        targets = find_targets(method, config, sources)
        tasks = targets.tasks
        whole = energy and not remote
        total = sum(ref.nbytes for task in tasks for ref in task.sources.values())
        total += bytes_of_other_tensors(sources, tasks) if whole else 0
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        buffers = Buffers()
        measured = dict(zip((task.name for task in tasks), measure(sources, targets, buffers, step), strict=True))
        layers = _stack_layers(config, sources)
        recorded = {} if record is None else {t.canonical: t for t in record.record.targets}
        warnings: list[str] = []
        if record is not None and directory is not None:
            _check_sources(record, directory, tasks, measured)
            warnings += _selection_differences(recorded, tasks, measured, recorded_config(record, directory))
        tensors = [
            _inspect_target(task, measured[task.name], layers, config, recorded.get(task.name)) for task in tasks
        ]
        findings = method.settings_findings([config]) + refusal_findings(config, sources) + adapter_findings(sources)
        findings += _merge_findings(targets, measured)
        geometries = {task.name: measured[task.name].geometry for task in tasks}
        energies = _energies(sources, geometries, tensors, buffers, step) if whole else None
        sources.check_unchanged()
        identities = {source.role: identity_of(source) for source in sources}
    notes = [*hub.notes, *(note for source in sources for note in source.notes)]
    if remote and energy:
        notes.append(
            f"the share of energy is left out: of {' and '.join(remote)}, on the Hub, only targets were fetched; "
            f"download the models and give their directories"
        )
    notes += [*_mean_notes(sources), *findings.notes]
    warnings += [*findings.warnings, *close_margins(tensors)]
    return Inspection(
        title=directory.resolve().name if directory else " + ".join(str(identities[r]["id"]) for r in sources.models),
        origin="output and sources" if directory else "sources",
        numerics=config.numerics,
        written_by=None if record is None else {**record.record.program, "libraries": dict(record.record.libraries)},
        parameters=config.as_dict() if record is None else parameters_of(record, config),
        sources=identities,
        tensors=in_order(tensors, sources.architecture),
        energy=energies,
        files=None if record is None else record.files,
        bytes_read=tally.read,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _mean_notes(sources: Sources) -> Iterator[str]:
    """A note on the meaning of tv2 if there are more than two models."""
    if len(sources.models) > 2:
        yield (
            f"tv2 is the weighted mean of the task vectors of {listed(sources.models[1:])}, and a score adds the "
            f"magnitudes of all {len(sources.models)}"
        )


def _merge_findings(targets: Targets, measured: Mapping[str, TargetMeasures]) -> Findings:
    """The findings that a merge of the same sources with the same parameters would report."""
    outcomes = []
    for task in targets.tasks:
        measures = measured[task.name]
        scored = HeadScores(measures.squared, measures.moved, measures.geometry)
        decision = targets.method.decide(task, scored, targets.settings, None)
        changed = changed_ranges(task, targets.method.untouched(task.partition.groups, decision))
        outcomes.append(Outcome(task, decision, changed, measures.digests, measures.equal))
    return targets.method.source_findings(outcomes) + targets.method.result_findings(outcomes)


def _stack_layers(config: HsaSettings, sources: Sources) -> dict[str, int]:
    counts = sources.architecture.counts(sources.anchor_checkpoint.config, sources.anchor).layers
    return {stack: config.num_layers or count for stack, count in counts.items()}


def _inspect_target(
    task: TensorTask,
    measures: TargetMeasures,
    layers: Mapping[str, int],
    config: HsaSettings,
    recorded: TensorRecord | None,
) -> TensorInspection:
    assert task.place is not None
    keep, coefficient = settings_of(task, config)
    selection = select(measures.squared, keep)
    squared: tuple[float, ...] | None = measures.squared
    scores, selected, margin = selection.scores, selection.selected, selection.margin
    if recorded is not None and config.numerics == "reference":  # its scores and its selection come from torch
        squared, scores = None, recorded.scores
        selected, margin = recorded.selected, recorded.margin
        if keep != recorded.keep:
            selected = select(scores, keep).selected
            margin = selection_of([score * score for score in scores], selected).margin
    return TensorInspection(
        name=task.stored.name if recorded is None else recorded.name,
        projection=task.place,
        shape=task.shape,
        dtype=task.out_code if recorded is None else recorded.code,
        heads=task.partition.groups,
        layers=layers[task.place.stack],
        k=config.of("k", task.name),
        lam=config.of("lam", task.name),
        alpha=config.of("alpha", task.name),
        keep=keep,
        coefficient=coefficient,
        scores=scores,
        squared=squared,
        selected=selected,
        margin=margin,
        geometry=measures.geometry.blended(shares_of(task, config)),
        recorded=None if recorded is None else RecordedSelection(recorded.keep, recorded.selected),
    )


def _check_sources(
    record: Provenance, directory: Path, targets: Sequence[TensorTask], measured: Mapping[str, TargetMeasures]
) -> None:
    """Raise MismatchError unless these are the target bytes that the output was made from."""
    for role in record.record.sources:
        lines = []
        for target in targets:
            ref = target.sources[role]
            lines.append((target.name, ref.code, ref.shape, measured[target.name].digests[role]))
        if tensors_digest(lines) != record.record.sources[role].targets:
            was = record.record.sources[role].identity.id
            raise MismatchError(
                f"{role}: its target tensors are not those that {directory} was made from ({was}); give that source, "
                f"or inspect the sources without the output"
            )


def _selection_differences(
    recorded: Mapping[str, TensorRecord],
    targets: Sequence[TensorTask],
    measured: Mapping[str, TargetMeasures],
    config: HsaSettings,
) -> Iterator[str]:
    """Recorded selections that do not follow from the sources; only exact numerics can be repeated here."""
    if config.numerics == "reference":
        return
    for target in targets:
        recorded_target = recorded.get(target.name)
        if recorded_target is None:
            continue
        keep = keep_count(config.of("k", target.name), target.partition.groups)
        selection = select(measured[target.name].squared, keep)
        if selection.selected != recorded_target.selected:
            yield (
                f"{recorded_target.name}: heads {list(recorded_target.selected)} are recorded and the sources give "
                f"{list(selection.selected)} (margin {selection.margin}); another backend may differ at so small a "
                f"margin, else this is a bug"
            )


def _energies(
    sources: Sources,
    geometries: Mapping[str, AnyGeometry],
    tensors: Sequence[TensorInspection],
    buffers: Buffers,
    step: Callable[[int], None],
) -> tuple[Energy, ...]:
    """The energies of the models; `geometries` holds those of the targets, by canonical name."""
    outside = measure_other_tensors(sources, geometries, buffers, step)
    energies = []
    for number, role in enumerate(sources.models):
        groups = dict(outside[role].groups)
        inside = selected = 0.0
        for tensor in tensors:
            heads = geometries[tensor.projection.name].squares[number]
            group = " ".join(sources.architecture.group_of(tensor.projection.name))
            groups[group] = groups.get(group, 0.0) + sum(heads)
            inside += sum(heads)
            selected += sum(heads[head] for head in tensor.selected)
        total = inside + sum(outside[role].groups.values())
        ordered = dict(sorted(groups.items(), key=lambda item: -item[1]))
        energies.append(Energy(role, total, inside, selected, ordered, tuple(outside[role].skipped)))
    return tuple(energies)
