"""Inspect an output by its provenance alone, without reading sources or weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hsa.errors import HsaError, ProvenanceError, listed, shown
from hsa.inspection.report import Inspection, RecordedSelection, TensorInspection, in_order
from hsa.methods.all_settings import summary
from hsa.methods.hsa import HsaSettings
from hsa.methods.hsa_formula import keep_count, layer_coefficient
from hsa.methods.hsa_warnings import percentage_findings
from hsa.methods.selection import TIE_RISK, select, selection_of
from hsa.methods.settings import PerTensor, declared
from hsa.methods.tensors import TensorRecord
from hsa.outputs.provenance import Provenance
from hsa.system.fsio import Tally
from hsa.system.manifest import PROVENANCE

NO_SOURCES = "cosines, relative sizes and the share of energy need the sources: give {} too"
ROOTS = (
    "a provenance holds norms, not their squares: heads whose squares differ in the last bit or two may look tied here "
    "at a k other than the recorded one"
)


def recorded_config(record: Provenance, directory: Path) -> HsaSettings:
    """The parameters of the merge. Raises ProvenanceError if the parameters or the tensors are not valid for a
    merge."""
    where = directory / PROVENANCE
    if not record.record.targets:
        raise ProvenanceError(f"{where} records no merged tensor; it is no provenance that hsa wrote")
    for target in record.record.targets:
        if target.heads < 1 or target.keep > target.heads:
            raise ProvenanceError(
                f"{where}: {target.name} has {target.heads} heads of which {target.keep} were to be merged"
            )
    try:
        config = HsaSettings.from_dict(record.record.parameters)
        for target in record.record.targets:
            config.of("k", target.canonical), config.of("lam", target.canonical)
            config.of("alpha", target.canonical)
    except (HsaError, TypeError) as error:
        raise ProvenanceError(f"{where}: {error}; it is no provenance that hsa wrote") from error
    return config


def changed_config(config: HsaSettings, values: Mapping[str, PerTensor]) -> HsaSettings:
    """The config with other values of `k`, `lam` or `alpha`. Raises RequestError for values out of range."""
    return replace(config, **values) if values else config  # type: ignore[arg-type]


def _layers(config: HsaSettings, records: Sequence[TensorRecord]) -> dict[str, int]:
    """The number of layers L of each stack. It follows from the targets, because a merge is refused unless every layer
    of the config has its targets."""
    layers: dict[str, int] = {}
    for target in records:
        stack = target.projection.stack
        layers[stack] = max(layers.get(stack, 0), target.projection.layer + 1)
    return {stack: config.num_layers or count for stack, count in layers.items()}


def inspect_provenance(
    record: Provenance, directory: Path, config: HsaSettings, shown_config: HsaSettings, tally: Tally
) -> Inspection:
    """The inspection of an output that was recorded with `config` and is shown with `shown_config`."""
    layers = _layers(config, record.record.targets)
    tensors = [_recorded_tensor(each, layers, config, shown_config) for each in record.record.targets]
    notes = [NO_SOURCES.format(listed(record.record.sources))]
    findings = percentage_findings([shown_config.k])
    notes += findings.notes
    if shown_config.k != config.k:
        notes.append(ROOTS)
    return Inspection(
        title=directory.resolve().name,
        origin="output",
        numerics=config.numerics,
        written_by={**record.record.program, "libraries": dict(record.record.libraries)},
        parameters=parameters_of(record, shown_config),
        sources={role: source.as_dict() for role, source in record.record.sources.items()},
        tensors=in_order(tensors, record.record.architecture),
        energy=None,
        files=record.files,
        bytes_read=tally.read,
        notes=tuple(notes),
        warnings=(
            *findings.warnings,
            *close_margins(tensors),
            *_record_differences(record.record.targets, config, layers),
        ),
    )


def _recorded_tensor(
    target: TensorRecord, layers: Mapping[str, int], config: HsaSettings, shown_config: HsaSettings
) -> TensorInspection:
    name, stack = target.canonical, target.projection.stack
    k, lam, alpha = shown_config.of("k", name), shown_config.of("lam", name), shown_config.of("alpha", name)
    selected, margin, keep = target.selected, target.margin, target.keep
    if keep_count(k, target.heads) != keep_count(config.of("k", name), target.heads):
        keep = keep_count(k, target.heads)
        selected = select(target.scores, keep).selected
        margin = selection_of([score * score for score in target.scores], selected).margin
    coefficient = target.coefficient
    if (lam, alpha) != (config.of("lam", name), config.of("alpha", name)):
        coefficient = layer_coefficient(lam, alpha, target.projection.layer, layers[stack])
    return TensorInspection(
        name=target.name,
        projection=target.projection,
        shape=target.shape,
        dtype=target.code,
        heads=target.heads,
        layers=layers[stack],
        k=k,
        lam=lam,
        alpha=alpha,
        keep=keep,
        coefficient=coefficient,
        scores=target.scores,
        squared=None,
        selected=selected,
        margin=margin,
        geometry=None,
        recorded=RecordedSelection(target.keep, target.selected),
    )


def _record_differences(
    records: Sequence[TensorRecord], config: HsaSettings, layers: Mapping[str, int]
) -> Iterator[str]:
    """Values of a record that do not follow from its own parameters; none, in a record that hsa wrote."""
    for target in records:
        name, p = target.canonical, target.projection
        keep = keep_count(config.of("k", name), target.heads)
        coefficient = layer_coefficient(config.of("lam", name), config.of("alpha", name), p.layer, layers[p.stack])
        if target.keep != keep or abs(target.coefficient - coefficient) > 1e-12:
            yield (
                f"{target.name}: {target.keep} heads to merge and lambda_i {shown(target.coefficient)} are recorded, "
                f"its parameters give {keep} and {shown(coefficient)}; shown is what is recorded"
            )
            return


def parameters_of(record: Provenance, shown_config: HsaSettings) -> dict[str, object]:
    """The recorded parameters, with those of the shown selection replaced."""
    structural = {each.key for each in declared(HsaSettings) if each.about.structural}
    shown_values = {key: value for key, value in summary(shown_config.as_dict()).items() if key not in structural}
    return {**record.record.parameters, **shown_values}


def close_margins(tensors: Sequence[TensorInspection]) -> Iterator[str]:
    close = [tensor for tensor in tensors if tensor.margin is not None and tensor.margin < TIE_RISK]
    if close:
        yield (
            f"{len(close)} tensors have a margin below {TIE_RISK:g}, such as {close[0].name}: another backend or "
            f"machine could select other heads there"
        )
