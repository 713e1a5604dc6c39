"""Read the sources of a `Merger`: checkpoints, loaded models and state dicts, and the config that they share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hsa.actions.merger.already_merged import holds_a_merge
from hsa.actions.merger.loaded_models import (
    Model,
    architecture_of_model,
    config_of,
    entries_of,
    targets_of,
    without_tied_output,
)
from hsa.actions.merger.shared_tensors import SharedTensors
from hsa.actions.merger.spot_check import Sample, sample_checkpoint, sample_model
from hsa.architectures.base import Architecture, Preset
from hsa.architectures.registry import default
from hsa.backends.resident import CODE_OF, bytes_of
from hsa.errors import RequestError
from hsa.option_names import option
from hsa.outputs.earlier_merges import EarlierMerge, read_earlier_merges
from hsa.planning.tasks import COUNTS
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.hub.client import Hub
from hsa.sources.hub.needs import Needs
from hsa.sources.identity import Identity
from hsa.sources.roles import BASE, Role, is_anchor
from hsa.sources.structure import require_shapes
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import ARITHMETIC, Array
from hsa.system.fsio import Tally

ModelSource = str | os.PathLike[str] | Model

_ALREADY_MERGED = (
    "{role} is a model that a merge was written to: {name} still holds merged values, which are taken for those of "
    "{role}; load {role} again, or keep one Merger and call apply_ with other parameters"
)


@dataclass(frozen=True)
class SourceTargets:
    """A source's targets: what a plan needs to know of them, and their bytes by canonical name.

    `others` are samples of the anchor's other tensors. `earlier_merge` says how a source that is an output of hsa was
    merged.
    """

    checkpoint: Checkpoint
    data: Mapping[str, Array]
    others: Mapping[str, Sample]
    has_config: bool
    warnings: tuple[str, ...] = ()
    earlier_merge: EarlierMerge | None = None


def read_sources(
    sources: Mapping[Role, ModelSource], preset: Preset | None, hub: Hub, shared: SharedTensors
) -> dict[Role, SourceTargets]:
    """Read the targets of every source; without a preset, every tensor that a merge can compute with.

    Those of checkpoints are taken from `shared`; what is not there yet is read into it.

    Names in a state dict are read as those of the other sources' family. If all sources are state dicts, a preset is
    one of the default family; without a preset, the names in the first source decide the family.
    """
    by_role: dict[Role, SourceTargets] = {}
    architecture = None if preset is None else default()
    for role in sorted(
        sources, key=lambda role: isinstance(sources[role], Mapping)
    ):  # state dicts, without config, last
        by_role[role] = _read_source(role, sources[role], preset, hub, shared, sources.get(BASE), architecture)
        if by_role[role].has_config or architecture is None:
            architecture = by_role[role].checkpoint.architecture
    return {role: by_role[role] for role in sources}


def _read_source(
    role: Role,
    source: ModelSource,
    preset: Preset | None,
    hub: Hub,
    shared: SharedTensors,
    base: ModelSource | None,
    architecture: Architecture | None,
) -> SourceTargets:
    """Read a source's targets. `base` is the model that an adapter was trained on, `architecture` the family of a model
    that does not give it itself."""
    if not isinstance(source, (str, os.PathLike)):
        return _read_model(role, source, preset, architecture_of_model(source, architecture))
    with ExitStack() as stack:
        adapter_base = None
        if role != BASE and hub.is_adapter(role, source) and isinstance(base, (str, os.PathLike)):
            adapter_base = stack.enter_context(hub.open(BASE, base, Tally(), Needs("targets", preset)))
        needs = Needs("whole" if preset is None or is_anchor(role) else "targets", preset)
        checkpoint = stack.enter_context(hub.open(role, source, Tally(), needs, None, adapter_base))
        data = {}
        for name, ref in checkpoint.tensors.items():
            if ref.code in ARITHMETIC if preset is None else checkpoint.architecture.target(name, preset):
                data[name] = shared.read(checkpoint, name, ref)
        others = sample_checkpoint(checkpoint, data) if is_anchor(role) else {}
        checkpoint.check_unchanged()
        earlier_merge = read_earlier_merges([checkpoint]).get(role)
    closed = replace(checkpoint, shards=())
    return SourceTargets(closed, data, others, bool(checkpoint.config), earlier_merge=earlier_merge)


def _read_model(role: Role, source: Model, preset: Preset | None, architecture: Architecture) -> SourceTargets:
    expected = "a checkpoint directory, an id on the Hub, a loaded model or a state dict"
    entries = entries_of(role, source, architecture, expected)
    if preset is None:
        entries = without_tied_output(entries, architecture)
    targets = targets_of(role, source, entries, architecture, preset)
    refs, data = {}, {}
    for stored, name, tensor in entries:
        if name in targets:
            data[name] = bytes_of(tensor.detach().to("cpu", copy=True).contiguous())
        if isinstance(tensor, torch.Tensor):  # not the number of a training step, or the like
            code = CODE_OF.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            nbytes = data[name].nbytes if name in targets else 0
            refs[name] = TensorRef(stored, code, tuple(tensor.shape), 0, 0, nbytes)
    label = "state dict" if isinstance(source, Mapping) else "model"
    checkpoint = Checkpoint(role, Path(label), Identity(label), config_of(source), architecture, Tally(), tensors=refs)
    merged_name = next((entry.stored for entry in targets.values() if holds_a_merge(entry.tensor)), None)
    warnings = () if merged_name is None else (_ALREADY_MERGED.format(role=role, name=merged_name),)
    others = sample_model(entries, data) if is_anchor(role) else {}
    return SourceTargets(checkpoint, data, others, bool(checkpoint.config), warnings)


def checked_model(source: SourceTargets, config_owner: Role | None) -> SourceTargets:
    """A model without those tensors of its family that are not merged, because a plan visits all tensors that are left.

    Raises MismatchError for shapes of the anchor that its config, or that of `config_owner`, does not allow.
    """
    checkpoint = source.checkpoint
    if is_anchor(checkpoint.role):
        if source.has_config:
            require_shapes(checkpoint)
        elif config_owner is not None:
            require_shapes(checkpoint, config_owner)
    knows = checkpoint.architecture.knows
    tensors = {name: ref for name, ref in checkpoint.tensors.items() if name in source.data or not knows(name)}
    return replace(source, checkpoint=replace(checkpoint, tensors=tensors))


def share_config(
    sources: Mapping[Role, SourceTargets], num_heads: int | None, num_layers: int | None, *, by_heads: bool
) -> tuple[dict[Role, SourceTargets], Role | None]:
    """The sources, with a config for those that have none, and the role of the source that it comes from.

    If all sources are state dicts, there is no such source, and the caller gives both counts. If nothing is merged
    `by_heads`, the tensor names are enough.
    """
    owner = next((role for role, source in sources.items() if source.has_config), None)
    if owner is not None:
        config = sources[owner].checkpoint.config
    else:
        if by_heads and (num_heads is None or num_layers is None):
            raise RequestError(
                f"{COUNTS[len(sources)]} state dicts say nothing of heads and layers: give {option('num_heads')} and "
                f"{option('num_layers')}, or one source as a directory or a model"
            )
        architecture = next(iter(sources.values())).checkpoint.architecture
        config = {
            **({"model_type": min(architecture.model_types)} if architecture.model_types else {}),
            **{architecture.heads_key(stack): num_heads or 1 for stack in architecture.all_stacks},
            **{
                architecture.layers_key(stack): num_layers or _layers_by_names(sources, stack)
                for stack in architecture.all_stacks
            },
        }
    with_configs = {
        role: source if source.has_config else replace(source, checkpoint=replace(source.checkpoint, config=config))
        for role, source in sources.items()
    }
    return with_configs, owner


def _layers_by_names(sources: Mapping[Role, SourceTargets], stack: str) -> int:
    """The number of layers of a stack, by the names of the sources' tensors."""
    places = [
        source.checkpoint.architecture.place(name) for source in sources.values() for name in source.checkpoint.tensors
    ]
    return 1 + max((place.layer for place in places if place is not None and place.stack == stack), default=0)
