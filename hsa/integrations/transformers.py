"""`hsa_merge_`: a merge into a loaded Whisper model of transformers, in place, such as the one a Trainer has trained.

Imports neither transformers nor peft: a model is known by its attributes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from hsa.backends.resident import CODE_OF
from hsa.config import MergeConfig, PerTensor, Preset
from hsa.errors import RequestError, shown
from hsa.merger import Merger, Model, Source
from hsa.whisper import MODEL_TYPE, Architecture, architecture, canonical, expected_targets, is_target, parse

ModelT = TypeVar("ModelT", bound=torch.nn.Module)

_Named = tuple[str, torch.Tensor]


def hsa_merge_(
    model: ModelT,
    base: Source,
    secondary: Source,
    *,
    k: PerTensor = 0.6,
    lam: PerTensor = 0.5,
    alpha: PerTensor = 0.2,
    targets: Preset = "encoder-qkv",
    attention_scale: float = 1.0,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> ModelT:
    """Merge a loaded model, which is primary, with base and secondary, in place, and return it.

    Args:
        model: a loaded Whisper model of transformers whose targets are float32, float16 or bfloat16, on any device.
        base, secondary: each a checkpoint directory, a state dict or another loaded model. They are not changed.
        k: share of heads kept per tensor, 0 to 1, or above 1 a percentage up to 100.
        lam: lambda, the weight of the model's own task vector in a selected head, 0 to 1.
        alpha: the layer exponent, not negative. `k`, `lam` and `alpha` are numbers, or mappings from every target's
            name to a number.
        targets: `encoder-qkv`, `attention-qkv` or `attention-all`.
        attention_scale: factor on the task vectors of the targets.
        backend, device, threads: where to compute, as for `hsa.Merger`; the model stays on its device.

    The values are those of `hsa.merge` with exact numerics for the model as it stands, bit for bit. Parameters stay the
    same objects and keep `requires_grad`, so that an optimizer goes on with them. After an error the model is as it
    was. Memory for four copies of the targets is needed while it lasts. Merging again would start from the merged
    values: to try several parameters, use `hsa.Merger`.

    Raises:
        RequestError: the model is no loaded Whisper model, holds adapters, quantised or offloaded targets, or targets
            that share memory with each other or another parameter; base or secondary shares memory with the model's
            targets, or base with secondary on all targets; a parameter is out of range.
        SourceError, MismatchError, NonFiniteError, BackendUnavailable: as for `hsa.Merger`.

    Source: SPEC sections 1, 2 and 5.
    """
    MergeConfig(k, lam, alpha, targets, attention_scale)
    own = _own_targets(model, targets)
    _check_sources(own, {"base": base, "secondary": secondary}, targets)
    merger = Merger(
        base,
        model,
        secondary,
        targets=targets,
        attention_scale=attention_scale,
        backend=backend,
        device=device,
        threads=threads,
    )
    merged = merger.merge(k, lam, alpha)
    # Inference mode also writes to parameters that were made in it; autograd still counts the new versions.
    with torch.inference_mode():
        for name, tensor in merged.items():
            own[canonical(name)][1].copy_(tensor)
    return model


def _own_targets(model: torch.nn.Module, preset: Preset) -> dict[str, _Named]:
    """The model's targets by canonical name, after what can be wrong with the model alone."""
    shape = _check_whisper(model)
    own = _readable_targets("model", model, preset)
    missing = next((name for name in expected_targets(shape.layers, preset) if name not in own), None)
    if missing is not None:
        raise RequestError(
            f"model, a {type(model).__name__}, holds no target tensor {missing}; give the model itself, neither "
            f"quantised nor wrapped, as transformers loads it in float32, float16 or bfloat16"
        )
    others = [named for named in _tensors(model) if not _wanted(named[0], preset) and _has_addresses(named[1])]
    shared = _overlap([*_spans("target", own.values()), *_spans("other", others)], {"target": ("target", "other")})
    if shared is not None:
        raise RequestError(
            f"model: {shared[0]} and {shared[1]} share memory, so that a merge of one would change the other; give the "
            f"target a copy of its own"
        )
    return own


def _check_whisper(model: torch.nn.Module) -> Architecture:
    if not isinstance(model, torch.nn.Module):
        raise RequestError(
            f"model must be a loaded Whisper model, got {type(model).__name__}; use hsa.merge for directories and "
            f"hsa.Merger for state dicts"
        )
    config = getattr(model, "config", None)
    found = getattr(config, "model_type", None)
    if config is None or found != MODEL_TYPE:
        raise RequestError(
            f"model is a {type(model).__name__} with model_type {shown(found)}, expected a Whisper model of "
            f"transformers, whose config has model_type '{MODEL_TYPE}'"
        )
    return architecture(config.to_dict(), "model")


def _check_sources(own: Mapping[str, _Named], sources: Mapping[str, Source], preset: Preset) -> None:
    """Refuse a source that shares memory with the model's targets, and two that are one."""
    loaded = {
        role: _readable_targets(role, source, preset)
        for role, source in sources.items()
        if isinstance(source, (torch.nn.Module, Mapping))
    }
    for role, theirs in loaded.items():
        shared = _overlap([*_spans("model", own.values()), *_spans(role, theirs.values())], {"model": (role,)})
        if shared is not None:
            raise RequestError(
                f"{role} and model share memory: {shared[0]} and {shared[1]} lie in the same place, so that training "
                f"the model changed {role} too; load {role} again, or give its directory"
            )
    if _are_one(sources["base"], sources["secondary"], loaded):
        raise RequestError(
            "base and secondary are one: all their targets lie in the same place; give the pretrained model as base "
            "and another fine-tune of it as secondary"
        )


def _are_one(base: Source, secondary: Source, loaded: Mapping[str, Mapping[str, _Named]]) -> bool:
    """Whether two sources are one directory, or share the memory of every target."""
    if isinstance(base, (str, os.PathLike)) and isinstance(secondary, (str, os.PathLike)):
        return os.path.exists(base) and os.path.exists(secondary) and os.path.samefile(base, secondary)
    first, second = loaded.get("base", {}), loaded.get("secondary", {})
    return bool(first) and all(
        name in second
        and _overlap([*_spans("base", [named]), *_spans("secondary", [second[name]])], {"base": ("secondary",)})
        for name, named in first.items()
    )


def _readable_targets(label: str, source: Model, preset: Preset) -> dict[str, _Named]:
    """The targets of a model or state dict: name as stored and tensor, by canonical name.

    Raises RequestError when one of them has no elements in memory of its own, or adapters stand beside it.
    """
    if isinstance(source, torch.nn.Module):
        _check_adapters(label, source)
    found = {}
    for name, tensor in _tensors(source):
        if not _wanted(name, preset):
            continue
        if tensor.is_meta:
            raise RequestError(
                f"{label}: target tensor {name} is on the meta device, where no data is (offloaded by a device_map, or "
                f"not loaded yet); load {label} whole"
            )
        if not _has_addresses(tensor) or tensor.dtype not in CODE_OF:
            raise RequestError(
                f"{label}: target tensor {name} is a {type(tensor).__name__} of {tensor.dtype}, expected a plain "
                f"tensor of float32, float16 or bfloat16; load {label} neither quantised nor distributed"
            )
        found[canonical(name)] = (name, tensor)
    return found


def _check_adapters(label: str, model: torch.nn.Module) -> None:
    """PEFT's layers keep the original in `base_layer`; `peft_config` alone may outlast their unloading."""
    wrapper = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    if wrapper or any(hasattr(module, "base_layer") for module in model.modules()):
        raise RequestError(
            f"{label} is a {type(model).__name__} with PEFT adapters, which are not part of its target tensors yet; "
            f"call merge_and_unload() of the PeftModel and give the model that it returns"
        )


def _tensors(source: Model) -> Iterator[_Named]:
    """Every parameter and buffer by name, tied ones under each of their names."""
    if isinstance(source, torch.nn.Module):
        yield from source.named_parameters(remove_duplicate=False)
        yield from source.named_buffers(remove_duplicate=False)
    else:
        yield from source.items()


def _wanted(name: str, preset: Preset) -> bool:
    projection = parse(name)
    return projection is not None and is_target(projection, preset)


def _has_addresses(tensor: torch.Tensor) -> bool:
    """Whether the elements lie at addresses that the tensor can say: no subclass that gathers or computes them."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and not tensor.is_quantized


@dataclass(frozen=True)
class _Span:
    """The addresses from a tensor's first byte to behind its last, on its device."""

    device: str
    start: int
    stop: int
    group: str
    name: str


def _spans(group: str, tensors: Iterable[_Named]) -> Iterator[_Span]:
    for name, tensor in tensors:
        if tensor.numel():
            last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            yield _Span(str(tensor.device), start, start + (last + 1) * tensor.element_size(), group, name)


def _overlap(spans: Iterable[_Span], apart: Mapping[str, Collection[str]]) -> tuple[str, str] | None:
    """The names of two spans that overlap though their groups must lie apart; None if there are none."""
    pairs = {pair for one, others in apart.items() for other in others for pair in ((one, other), (other, one))}
    furthest: dict[tuple[str, str], _Span] = {}
    for span in sorted(spans, key=lambda span: span.start):
        for (device, group), before in furthest.items():
            if device == span.device and before.stop > span.start and (group, span.group) in pairs:
                return before.name, span.name
        place = (span.device, span.group)
        if place not in furthest or span.stop > furthest[place].stop:
            furthest[place] = span
    return None
