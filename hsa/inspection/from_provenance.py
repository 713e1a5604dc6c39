"""What a finished output says of its heads: its provenance alone, no source and no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hsa.errors import HsaError, ProvenanceError, shown
from hsa.inspection.report import Inspection, Recorded, TensorInspection, in_order
from hsa.methods.config import MergeConfig, PerTensor, keep_count, layer_coefficient, percentage_findings
from hsa.methods.selection import TIE_RISK, select, selection_of
from hsa.outputs.provenance import Provenance, TargetRecord
from hsa.system.fsio import Tally
from hsa.system.manifest import PROVENANCE

NO_SOURCES = "cosines, relative sizes and the share of energy need the sources: give base, primary and secondary too"
ROOTS = (
    "a provenance holds norms, not their squares: heads whose squares differ in the last bit or two may look tied here "
    "at a k other than the recorded one"
)


def recorded_config(record: Provenance, directory: Path) -> MergeConfig:
    """The parameters of the merge. Raises ProvenanceError where they, or the tensors, are none that a merge has."""
    where = directory / PROVENANCE
    if not record.record.targets:
        raise ProvenanceError(f"{where} records no merged tensor; it is no provenance that hsa wrote")
    for each in record.record.targets:
        if each.heads < 1 or each.keep > each.heads:
            raise ProvenanceError(f"{where}: {each.name} has {each.heads} heads of which {each.keep} were to be merged")
    try:
        config = MergeConfig.from_dict(record.record.parameters)
        for each in record.record.targets:
            config.of("k", each.projection.name), config.of("lam", each.projection.name)
            config.of("alpha", each.projection.name)
    except (HsaError, TypeError) as error:
        raise ProvenanceError(f"{where}: {error}; it is no provenance that hsa wrote") from error
    return config


def changed_config(config: MergeConfig, values: Mapping[str, PerTensor]) -> MergeConfig:
    """The config with other values of `k`, `lam` or `alpha`. Raises RequestError for those out of range."""
    return replace(config, **values) if values else config  # type: ignore[arg-type]


def _layers(config: MergeConfig, records: Sequence[TargetRecord]) -> dict[str, int]:
    """L of each stack: a merge is refused unless every layer that the config promises has its targets."""
    found: dict[str, int] = {}
    for each in records:
        stack = each.projection.stack
        found[stack] = max(found.get(stack, 0), each.projection.layer + 1)
    return {stack: config.num_layers or count for stack, count in found.items()}


def from_output(
    record: Provenance, directory: Path, config: MergeConfig, asked: MergeConfig, tally: Tally
) -> Inspection:
    """The inspection of an output: recorded with `config`, shown with `asked`."""
    layers = _layers(config, record.record.targets)
    tensors = [_recorded_tensor(each, layers, config, asked) for each in record.record.targets]
    notes = [NO_SOURCES]
    told = percentage_findings([asked.k])
    notes += told.notes
    if asked.k != config.k:
        notes.append(ROOTS)
    return Inspection(
        title=directory.resolve().name,
        origin="output",
        numerics=config.numerics,
        written_by={**record.record.program, "libraries": dict(record.record.libraries)},
        parameters=parameters_of(record, asked),
        sources={role: source.as_dict() for role, source in record.record.sources.items()},
        tensors=in_order(tensors),
        energy=None,
        files=record.files,
        bytes_read=tally.read,
        notes=tuple(notes),
        warnings=(*told.warnings, *close_margins(tensors), *_unlike(record.record.targets, config, layers)),
    )


def _recorded_tensor(
    each: TargetRecord, layers: Mapping[str, int], config: MergeConfig, asked: MergeConfig
) -> TensorInspection:
    name, stack = each.projection.name, each.projection.stack
    k, lam, alpha = asked.of("k", name), asked.of("lam", name), asked.of("alpha", name)
    selected, margin, keep = each.selected, each.margin, each.keep
    if keep_count(k, each.heads) != keep_count(config.of("k", name), each.heads):
        keep = keep_count(k, each.heads)
        chosen = select(each.scores, keep).selected
        selected, margin = chosen, selection_of([score * score for score in each.scores], chosen).margin
    coefficient = each.coefficient
    if (lam, alpha) != (config.of("lam", name), config.of("alpha", name)):
        coefficient = layer_coefficient(lam, alpha, each.projection.layer, layers[stack])
    return TensorInspection(
        name=each.name,
        projection=each.projection,
        shape=each.shape,
        dtype=each.code,
        heads=each.heads,
        layers=layers[stack],
        k=k,
        lam=lam,
        alpha=alpha,
        keep=keep,
        coefficient=coefficient,
        scores=each.scores,
        squared=None,
        selected=selected,
        margin=margin,
        geometry=None,
        recorded=Recorded(each.keep, each.selected),
    )


def _unlike(records: Sequence[TargetRecord], config: MergeConfig, layers: Mapping[str, int]) -> Iterator[str]:
    """What in a record does not follow from its own parameters: nothing, in a record that hsa wrote."""
    for each in records:
        name, p = each.projection.name, each.projection
        keep = keep_count(config.of("k", name), each.heads)
        value = layer_coefficient(config.of("lam", name), config.of("alpha", name), p.layer, layers[p.stack])
        if each.keep != keep or abs(each.coefficient - value) > 1e-12:
            yield (
                f"{each.name}: {each.keep} heads to merge and lambda_i {shown(each.coefficient)} are recorded, its "
                f"parameters give {keep} and {shown(value)}; shown is what is recorded"
            )
            return


def parameters_of(record: Provenance, asked: MergeConfig) -> dict[str, object]:
    """The recorded parameters, those of the shown selection in their places."""
    shown = {key: value for key, value in asked.as_dict().items() if key in ("k", "lambda", "alpha")}
    return {**record.record.parameters, **shown}


def close_margins(tensors: Sequence[TensorInspection]) -> Iterator[str]:
    close = [tensor for tensor in tensors if tensor.margin is not None and tensor.margin < TIE_RISK]
    if close:
        yield (
            f"{len(close)} tensors have a margin below {TIE_RISK:g}, such as {close[0].name}: another backend or "
            f"machine could select other heads there"
        )
