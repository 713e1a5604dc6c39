"""Checks what a record says of its own merge: whether targets, heads and coefficients follow from its parameters.

Nothing here raises for a damaged record: each check yields a line for everything that is not as it must be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hsa.architectures.base import ModelCounts, Preset, TensorPlace
from hsa.errors import HsaError, RequestError, shown
from hsa.methods.hsa import HsaSettings
from hsa.methods.hsa_formula import keep_count, layer_coefficient
from hsa.option_names import as_keys, spelled
from hsa.outputs.output_settings import check_settings
from hsa.outputs.provenance import SETTINGS, Record, TargetRecord, changed_keys
from hsa.outputs.recording import PROGRAM
from hsa.planning.tasks import refuse_unknown_names
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.tensor_places import TensorRef

MARGIN_ERROR = 1e-12
"""A margin is taken from squared scores, and the roots that the provenance holds are rounded."""


def checkpoint_targets(checkpoint: Checkpoint, preset: Preset) -> Iterator[tuple[TensorPlace, TensorRef]]:
    """The target tensors that a checkpoint holds."""
    for name, ref in checkpoint.tensors.items():
        projection = checkpoint.architecture.target(name, preset)
        if projection is not None:
            yield projection, ref


def config_of_record(record: Record) -> HsaSettings:
    """The parameters of the merge; RequestError where they are none."""
    try:
        return HsaSettings.from_dict(record.parameters)
    except RequestError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"parameters: {error}") from error


def setting_faults(record: Record) -> Iterator[str]:
    """Whether the parameters are those that hsa records, no more and no others."""
    try:
        expected = config_of_record(record).as_dict()
    except HsaError as error:
        yield str(error)
        return
    parameters = record.parameters
    for name in changed_keys(parameters, {**parameters, **expected}):
        yield f"parameter {shown(name)} is {shown(parameters.get(name))}, hsa records {shown(expected[name])}"
    unknown = [name for name in parameters if name not in expected and name not in SETTINGS]
    if unknown:
        yield f"parameter {shown(unknown[0])} is none that hsa records; expected {', '.join((*expected, *SETTINGS))}"
    size = parameters.get("max_shard_size")
    try:
        with spelled(as_keys(parameters)):
            check_settings(record.sources, parameters["assets_from"], size, parameters["card"])
        if size is not None and type(size) is not int:
            raise RequestError(f"max_shard_size must be a number of bytes, got {shown(size)}")
    except (HsaError, KeyError, TypeError, ValueError, AttributeError) as error:
        yield f"its parameters cannot be merged with: {error}"
    if dict(record.program).get("name") != PROGRAM["name"]:
        yield f"its program is {shown(dict(record.program).get('name'))}, expected {PROGRAM['name']}"


def target_faults(record: Record, checkpoint: Checkpoint) -> Iterator[str]:
    """Whether the targets of the record are those of these weights, and follow from its parameters."""
    try:
        config = config_of_record(record)
        counts = checkpoint.architecture.counts(checkpoint.config, checkpoint.role)
    except HsaError as error:
        yield str(error)
        return
    stored = {projection.name: ref for projection, ref in checkpoint_targets(checkpoint, config.targets)}
    recorded = {target.projection.name for target in record.targets}
    unmerged = [ref.name for name, ref in stored.items() if name not in recorded]
    if unmerged:
        yield f"{len(unmerged)} targets of {shown(config.targets)} in the weights are not listed, such as {unmerged[0]}"
    unknown = [target.name for target in record.targets if target.projection.name not in stored]
    if unknown:
        yield f"{len(unknown)} targets are listed and are none of the weights' targets, such as {unknown[0]}"
    yield from _per_tensor_faults(config, recorded)
    for target in record.targets:
        ref = stored.get(target.projection.name)
        if ref is not None:
            faults = itertools.chain(_storage_faults(target, ref), _parameter_faults(target, config, counts))
            yield from itertools.islice(faults, 1)


def target_faults_without_weights(record: Record) -> Iterator[str]:
    """Whether the targets of a record follow from its parameters, where no weights are at hand.

    How many heads and layers a stack has is taken from the targets: every layer has some, and all the same heads.
    """
    try:
        config = config_of_record(record)
    except HsaError as error:
        yield str(error)
        return
    layers: dict[str, int] = {}
    heads: dict[str, int] = {}
    for target in record.targets:
        stack = target.projection.stack
        layers[stack] = max(layers.get(stack, 0), target.projection.layer + 1)
        heads.setdefault(stack, target.heads)
    recorded = {target.projection.name for target in record.targets}
    if sum(layers.values()) > len(recorded):  # before names are made of a number that may be anything
        yield f"its targets lie in {sum(layers.values())} layers, and there are {len(recorded)} of them"
        return
    absent = [name for name in record.architecture.expected_targets(layers, config.targets) if name not in recorded]
    if absent:
        yield f"{len(absent)} targets of {shown(config.targets)} are not listed, such as {absent[0]}"
    other = [t.name for t in record.targets if config.targets not in t.projection.presets]
    if other:
        yield f"{len(other)} targets are listed and are none of {shown(config.targets)}, such as {other[0]}"
    yield from _per_tensor_faults(config, recorded)
    width = record.targets[0].shape[0] if record.targets else 0
    for target in record.targets:
        expected = (width,) * len(target.shape)  # every projection of a model is as wide as the model
        if target.shape != expected:
            yield f"target {target.name} is listed with shape {list(target.shape)}, expected {list(expected)}"
        yield from itertools.islice(_parameter_faults(target, config, ModelCounts(heads, layers)), 1)


def _per_tensor_faults(config: HsaSettings, recorded: set[str]) -> Iterator[str]:
    try:
        refuse_unknown_names(config, recorded)
    except RequestError as error:
        yield str(error)


def _storage_faults(target: TargetRecord, ref: TensorRef) -> Iterator[str]:
    """Whether a target of a record is the tensor that is stored."""
    if (target.name, target.shape, target.code) != (ref.name, ref.shape, ref.code):
        yield (
            f"target {target.name} is listed with shape {shown(list(target.shape))} and dtype {shown(target.code)}; "
            f"the weights hold {ref.name}, {list(ref.shape)}, {ref.code}"
        )


def _parameter_faults(target: TargetRecord, config: HsaSettings, counts: ModelCounts) -> Iterator[str]:
    """Whether heads, coefficient and selection of a target follow from the parameters."""
    name, stack = target.projection.name, target.projection.stack
    heads = config.num_heads or counts.heads[stack]
    layers = config.num_layers or counts.layers[stack]
    if target.heads != heads or target.projection.layer >= layers:
        yield f"target {target.name} is listed with {target.heads} heads; expected {heads}, and {layers} layers"
        return
    try:
        keep = keep_count(config.of("k", name), heads)
        coefficient = layer_coefficient(
            config.of("lam", name), config.of("alpha", name), target.projection.layer, layers
        )
    except (HsaError, ArithmeticError) as error:
        yield f"target {target.name}: {error}"
        return
    if (target.keep, target.coefficient) != (keep, coefficient):
        yield (
            f"target {target.name} is listed with keep {target.keep} and lambda_i {shown(target.coefficient)}; the "
            f"parameters give {keep} and {shown(coefficient)}"
        )
    yield from _selection_faults(target)


def _selection_faults(target: TargetRecord) -> Iterator[str]:
    """Whether heads, scores, keep and margin fit together. Scores are rounded roots, so that two which are equal here
    may have differed: of those at the cut, any may be in."""
    selected = set(target.selected)
    kept = [target.scores[head] for head in target.selected]
    dropped = [score for head, score in enumerate(target.scores) if head not in selected]
    cut = sorted(target.scores, reverse=True)[target.keep - 1] if target.keep else None
    right = cut is not None and len(kept) >= target.keep and min(kept) >= cut and max(dropped, default=0.0) <= cut
    if not (right if target.keep else not kept):
        heads = shown(list(target.selected))
        yield f"target {target.name}: heads {heads} are not the {target.keep} with the largest scores"
        return
    if not kept or not dropped:
        margin = None
    else:
        last = min(kept) ** 2
        margin = (last - max(dropped) ** 2) / last if last > 0 else 0.0
    if (margin is None) != (target.margin is None) or (
        margin is not None and target.margin is not None and abs(margin - target.margin) > MARGIN_ERROR
    ):
        yield f"target {target.name}: margin {shown(target.margin)} is listed, the scores give {shown(margin)}"
