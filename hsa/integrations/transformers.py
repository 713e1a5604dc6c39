"""Merge into a loaded Whisper model of transformers, in place; for example, into the model that a Trainer has trained.

Imports neither transformers nor peft: a model is recognized by its attributes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from hsa.actions.keywords import candidate, candidate_settings
from hsa.actions.merger.already_merged import find_marked, forget, mark_modules, some_values
from hsa.actions.merger.loaded_models import LoadedTensor, config_of, entries_of, targets_of, tensor_instead_of
from hsa.actions.merger.merger import Merger
from hsa.actions.merger.read_sources import ModelSource
from hsa.actions.merger.shared_memory import first_shared, spans
from hsa.actions.merger.writable_targets import require_own_memory
from hsa.actions.signatures import declared_keywords
from hsa.architectures.base import Architecture, Preset
from hsa.architectures.registry import with_heads
from hsa.errors import RequestError, shown, warn
from hsa.methods.base import BASE
from hsa.methods.hsa import SECONDARY, Hsa, HsaSettings

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


HSA_MERGE = candidate("hsa_merge_", ("backend", "device", "threads"))


@declared_keywords(HSA_MERGE)
def hsa_merge_(
    model: ModelT,
    base: ModelSource,
    secondary: ModelSource | Sequence[ModelSource],
    *arguments: Any,
    targets: Preset = HsaSettings.targets,
    attention_scale: float = HsaSettings.attention_scale,
    again: bool = False,
    **keywords: Any,
) -> ModelT:
    """Merge a loaded model, which is primary, with base and secondary, in place, and return it.

    Args:
        model: a loaded Whisper model of transformers whose targets are float32, float16 or bfloat16, on any device.
        base, secondary: each a checkpoint directory, a state dict or another loaded model. They are not changed.
            Several secondaries are given as a list.
        {settings}
        targets: `encoder-qkv`, `attention-qkv` or `attention-all`.
        attention_scale: factor on the task vectors of the targets.
        {options}
        again: merge a model that this function has merged before. By default such a model is refused as long as it
            holds merged values, because a notebook cell that is run twice would merge the merged model again.

    The values equal those of `hsa.merge` with exact numerics for the current model, bit for bit. Parameters remain the
    same objects and keep `requires_grad`, so that an optimizer can continue with them. After an error, the model is
    unchanged (see `hsa.Merger.apply_`). The call needs memory for a copy of the targets of every source. To try several
    parameters, use `hsa.Merger`, which always starts from the sources.

    Raises:
        RequestError: the model is no loaded Whisper model, or holds adapters, quantised or offloaded targets, or
            targets that share memory with each other or with another parameter; it was merged already; base or
            secondary shares memory with the model's targets, or base with secondary on all targets; a parameter is out
            of range.
        SourceError, MismatchError, NonFiniteError, BackendUnavailable: as for `hsa.Merger`.

    Example:
        >>> hsa_merge_(trainer.model, "whisper-small", "m2", lam=0.3)  # doctest: +SKIP
    """
    options = {name: keywords.pop(name) for name in HSA_MERGE.options & keywords.keys()}
    values = candidate_settings(HSA_MERGE, HsaSettings, arguments, keywords)
    secondaries: list[Any] = list(secondary) if isinstance(secondary, (list, tuple)) else [secondary]
    others: dict[str, ModelSource] = dict(
        zip(Hsa.contract.roles_of(SECONDARY, len(secondaries)), secondaries, strict=True)
    )
    HsaSettings(**values, targets=targets, attention_scale=attention_scale).check_models(1 + len(others))
    architecture = _architecture_of(model)
    model_targets = _model_targets(model, architecture, targets)
    _check_sources(model_targets, {"base": base, **others}, architecture, targets)
    if again:
        forget(entry.tensor for entry in model_targets.values())
    else:
        _refuse_merged(model, model_targets)
    merger = Merger(
        base,
        model,
        secondary,
        targets=targets,
        attention_scale=attention_scale,
        **options,
    )
    for text in merger.check(**values).warnings:
        warn(text)
    original_values = {stored: some_values(tensor) for stored, _, tensor in model_targets.values()}
    merger.apply_(model, **values)
    mark_modules(model, model_targets, original_values)
    return model


def _model_targets(model: torch.nn.Module, architecture: Architecture, preset: Preset) -> dict[str, LoadedTensor]:
    """The model's targets by canonical name. Raises RequestError if the model itself is not suitable."""
    layers = architecture.counts(config_of(model), "model").layers
    entries = entries_of("model", model, architecture)
    model_targets = targets_of("model", model, entries, architecture, preset)
    expected = architecture.expected_targets(layers, preset)
    missing = next((name for name in expected if name not in model_targets), None)
    if missing is not None:
        replacement = tensor_instead_of(entries, missing)
        instead = "" if replacement is None else f" and {replacement:.300} in its place"
        raise RequestError(
            f"model, a {type(model).__name__}, holds no target tensor {missing}{instead}; give the model itself, "
            f"neither quantised nor wrapped, as transformers loads it in float32, float16 or bfloat16"
        )
    require_own_memory(model_targets, entries)
    return model_targets


def _architecture_of(model: torch.nn.Module) -> Architecture:
    """The family of a loaded model, found by the `model_type` of its config."""
    families = with_heads()
    titles = " or ".join(family.title for family in families)
    if not isinstance(model, torch.nn.Module):
        raise RequestError(
            f"model must be a loaded {titles} model, got {type(model).__name__}; use hsa.merge for directories and "
            f"hsa.Merger for state dicts"
        )
    model_type = getattr(getattr(model, "config", None), "model_type", None) or config_of(model).get("model_type")
    for family in families:
        if family.is_family_of({"model_type": model_type}):
            return family
    expected = " or ".join(f"'{each}'" for family in families for each in sorted(family.model_types))
    raise RequestError(
        f"model is a {type(model).__name__} with model_type {shown(model_type)}, expected a {titles} model of "
        f"transformers, whose config has model_type {expected}"
    )


def _check_sources(
    model_targets: Mapping[str, LoadedTensor],
    sources: Mapping[str, ModelSource],
    architecture: Architecture,
    preset: Preset,
) -> None:
    """Refuse a source that shares memory with the model's targets, and a base that is the same as another source."""
    loaded = {
        role: targets_of(role, source, entries_of(role, source, architecture), architecture, preset)
        for role, source in sources.items()
        if isinstance(source, (torch.nn.Module, Mapping))
    }
    for role, source_targets in loaded.items():
        shared = first_shared(
            [*spans("model", model_targets.values()), *spans(role, source_targets.values())], {"model": (role,)}
        )
        if shared is not None:
            raise RequestError(
                f"{role} and model share memory: {shared[0]} and {shared[1]} lie in the same place, so that training "
                f"the model changed {role} too; load {role} again, or give its directory"
            )
    for role in sources:
        if role != BASE and _are_same_source(sources, role, loaded):
            raise RequestError(
                f"base and {role} are one: all their targets lie in the same place; give the pretrained model as base "
                f"and another fine-tune of it as {role}"
            )


def _are_same_source(
    sources: Mapping[str, ModelSource], role: str, loaded: Mapping[str, Mapping[str, LoadedTensor]]
) -> bool:
    """Whether base and another source are the same directory, or share the memory of every target."""
    base, other = sources[BASE], sources[role]
    if isinstance(base, (str, os.PathLike)) and isinstance(other, (str, os.PathLike)):
        return os.path.exists(base) and os.path.exists(other) and os.path.samefile(base, other)
    first, second = loaded.get(BASE, {}), loaded.get(role, {})
    return bool(first) and all(
        name in second and first_shared([*spans(BASE, [entry]), *spans(role, [second[name]])], {BASE: (role,)})
        for name, entry in first.items()
    )


def _refuse_merged(model: torch.nn.Module, model_targets: Mapping[str, LoadedTensor]) -> None:
    """Refuse a model that still has values written by `hsa_merge_`, because they would be treated as primary's."""
    stored = find_marked(model, model_targets)
    if stored is not None:
        raise RequestError(
            f"model was merged by hsa_merge_ already: {stored} still holds merged values, which a second merge "
            f"would take for primary's; load primary again, give again=True to merge the merged model, or use "
            f"hsa.Merger, which always starts from the sources"
        )
