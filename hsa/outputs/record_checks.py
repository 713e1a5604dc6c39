"""Checks a record against itself: whether targets, groups and decisions follow from its parameters.

Nothing here raises for a damaged record. Each check yields one line for every fault."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from hsa.architectures.base import Architecture, ModelCounts, Partition, TensorInfo
from hsa.errors import HsaError, RequestError, shown
from hsa.methods.base import Method, Treatment
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorRecord
from hsa.option_names import as_keys, spelled
from hsa.outputs.output_settings import check_settings
from hsa.outputs.provenance import changed_keys
from hsa.outputs.record import OPTIONAL_SETTINGS, SETTINGS, Record
from hsa.outputs.recording import PROGRAM
from hsa.planning.tasks import refuse_unknown_names
from hsa.planning.treatments import treatment_of
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.tensor_places import TensorRef


def settings_of_record(record: Record) -> Settings:
    """The settings of the method; RequestError if the parameters are invalid."""
    try:
        return record.settings
    except RequestError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"parameters: {error}") from error


def setting_faults(record: Record) -> Iterator[str]:
    """The faults where the parameters differ from those that hsa records, including missing and unknown ones."""
    try:
        settings = settings_of_record(record)
        with spelled(as_keys(record.parameters)):
            settings.check_models(record.models)
        expected = settings.as_dict()
    except HsaError as error:
        yield str(error)
        return
    parameters = record.parameters
    for name in changed_keys(parameters, {**parameters, **expected}):
        yield f"parameter {shown(name)} is {shown(parameters.get(name))}, hsa records {shown(expected[name])}"
    unknown = [name for name in parameters if name not in (*expected, *SETTINGS, *OPTIONAL_SETTINGS)]
    if unknown:
        yield f"parameter {shown(unknown[0])} is none that hsa records; expected {', '.join((*expected, *SETTINGS))}"
    size = parameters.get("max_shard_size")
    try:
        with spelled(as_keys(parameters)):
            origin = parameters.get("config_from")
            check_settings(record.sources, parameters["assets_from"], size, parameters["card"], origin)
        if size is not None and type(size) is not int:
            raise RequestError(f"max_shard_size must be a number of bytes, got {shown(size)}")
    except (HsaError, KeyError, TypeError, ValueError, AttributeError) as error:
        yield f"its parameters cannot be merged with: {error}"
    if dict(record.program).get("name") != PROGRAM["name"]:
        yield f"its program is {shown(dict(record.program).get('name'))}, expected {PROGRAM['name']}"
    roles = (*((record.base,) if record.base else ()), *record.method.contract.roles(len(record.sources)))
    if record.anchor != roles[1 if record.base else 0]:
        yield f"its anchor is {shown(record.anchor)}, expected {roles[1 if record.base else 0]}"
    for target in record.targets:
        if record.method.models_decided(target.decision) not in (None, record.models):
            yield f"the decision for {target.name} is not of {record.models} models"
            return


def listed_treatment(
    method: Method[Any, Any], settings: Settings, name: str, ref: TensorRef, family: Architecture
) -> Treatment | None:
    """The treatment of a tensor of these weights if the method's record lists it, else None."""
    treatment = treatment_of(method, settings, TensorInfo(name, ref.code, ref.shape), family)
    return treatment if treatment.kind == "merge" and treatment.listed else None


def target_faults(record: Record, checkpoint: Checkpoint) -> Iterator[str]:
    """The faults where the record's targets are not those of these weights, or do not follow from its parameters."""
    family, method = checkpoint.architecture, record.method
    try:
        settings = settings_of_record(record)
        counts = family.counts(checkpoint.config, checkpoint.role)
    except HsaError as error:
        yield str(error)
        return
    if family.name != record.architecture.name:
        kind = family.kind(checkpoint.config)
        yield f"its architecture is {shown(record.architecture.name)}, and by its config.json the weights are {kind}"
        return
    stored: dict[str, tuple[TensorRef, Treatment]] = {}
    for name, ref in checkpoint.tensors.items():
        treatment = listed_treatment(method, settings, name, ref, family)
        if treatment is not None:
            stored[name] = ref, treatment
    recorded = {target.canonical for target in record.targets}
    of = _named_targets(settings)
    unmerged = [ref.name for name, (ref, treatment) in stored.items() if treatment.by_heads and name not in recorded]
    if unmerged:
        yield f"{len(unmerged)} targets{of} in the weights are not listed, such as {unmerged[0]}"
    unknown = [target.name for target in record.targets if target.canonical not in stored]
    if unknown:
        yield f"{len(unknown)} targets are listed and are none of the weights' targets, such as {unknown[0]}"
    yield from _per_tensor_faults(settings, recorded)
    for target in record.targets:
        if target.canonical in stored:
            ref, treatment = stored[target.canonical]
            faults = itertools.chain(
                _storage_faults(target, ref), _decision_faults(target, method, settings, counts, treatment)
            )
            yield from itertools.islice(faults, 1)


def target_faults_without_weights(record: Record) -> Iterator[str]:
    """The faults where the record's targets do not follow from its parameters, when no weights are available.

    The numbers of heads and layers of a stack are taken from the targets. Every layer must have targets, all with the
    same number of heads.
    """
    try:
        settings = settings_of_record(record)
    except HsaError as error:
        yield str(error)
        return
    layers: dict[str, int] = {}
    heads: dict[str, int] = {}
    for target in record.targets:
        if target.place is not None:
            stack = target.place.stack
            layers[stack] = max(layers.get(stack, 0), target.place.layer + 1)
            heads.setdefault(stack, target.heads)
    recorded = {target.canonical for target in record.targets}
    if sum(layers.values()) > len(recorded):  # checked first: names are made from this number
        yield f"its targets lie in {sum(layers.values())} layers, and there are {len(recorded)} of them"
        return
    yield from _preset_faults(record, settings, record.architecture, layers)
    yield from _per_tensor_faults(settings, recorded)
    width = record.targets[0].shape[0] if record.targets and record.targets[0].shape else 0
    for target in record.targets:
        ref = TensorRef(target.name, target.code, target.shape, 0, 0, 0)
        treatment = listed_treatment(record.method, settings, target.canonical, ref, record.architecture)
        if treatment is None:
            continue
        expected = (width,) * len(target.shape)  # every projection of a model is as wide as the model
        if treatment.by_heads and target.shape != expected:
            yield f"target {target.name} is listed with shape {list(target.shape)}, expected {list(expected)}"
        counts = ModelCounts(heads, layers)
        yield from itertools.islice(_decision_faults(target, record.method, settings, counts, treatment), 1)


def _preset_faults(
    record: Record, settings: Settings, family: Architecture, layers: Mapping[str, int]
) -> Iterator[str]:
    """The faults where the targets are not those of a preset, if the method has presets."""
    preset = getattr(settings, "targets", None)
    if preset is None or settings.limited:
        return
    recorded = {target.canonical for target in record.targets}
    absent = [name for name in family.expected_targets(layers, preset) if name not in recorded]
    if absent:
        yield f"{len(absent)} targets of {shown(preset)} are not listed, such as {absent[0]}"
    other = [t.name for t in record.targets if t.place is None or preset not in t.place.presets]
    if other:
        yield f"{len(other)} targets are listed and are none of {shown(preset)}, such as {other[0]}"


def _named_targets(settings: Settings) -> str:
    preset = getattr(settings, "targets", None)
    return "" if preset is None else f" of {shown(preset)}"


def _per_tensor_faults(settings: Settings, recorded: set[str]) -> Iterator[str]:
    try:
        refuse_unknown_names(settings, recorded)
    except RequestError as error:
        yield str(error)


def _storage_faults(target: TensorRecord, ref: TensorRef) -> Iterator[str]:
    """The faults where a target of a record differs from the stored tensor."""
    if (target.name, target.shape, target.code) != (ref.name, ref.shape, ref.code):
        yield (
            f"target {target.name} is listed with shape {shown(list(target.shape))} and dtype {shown(target.code)}; "
            f"the weights hold {ref.name}, {list(ref.shape)}, {ref.code}"
        )


def _decision_faults(
    target: TensorRecord, method: Method[Any, Any], settings: Settings, counts: ModelCounts, treatment: Treatment
) -> Iterator[str]:
    """The faults where groups or decision of a target do not follow from the settings."""
    place, expected, layers = target.place, Partition(), 0
    if place is not None:
        layers = getattr(settings, "num_layers", None) or counts.layers.get(place.stack, 0)
    if treatment.by_heads and place is not None and place.has_heads:
        heads = getattr(settings, "num_heads", None) or counts.heads[place.stack]
        expected = Partition(place.head_axis, heads)
        if target.heads != heads or place.layer >= layers:
            yield f"target {target.name} is listed with {target.heads} heads; expected {heads}, and {layers} layers"
            return
    if target.partition != expected:
        yield (
            f"target {target.name} is listed with {target.partition.groups} groups along axis {target.partition.axis}; "
            f"expected {expected.groups} along axis {expected.axis}"
        )
        return
    yield from method.record_faults(target, settings, layers)
