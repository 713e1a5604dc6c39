"""Loaded models and state dicts: their targets by name, and those that a merge can neither read nor write.

Imports neither transformers nor peft: a model is recognised by its attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from hsa.architectures.base import Architecture, Preset
from hsa.architectures.registry import architecture_of, architecture_of_names, default
from hsa.backends.resident import CODE_OF
from hsa.errors import RequestError, shown

Model = torch.nn.Module | Mapping[str, torch.Tensor]


class LoadedTensor(NamedTuple):
    """A tensor of a model: its name in the model, its canonical name, and the tensor itself."""

    stored: str
    name: str
    tensor: Any


MERGE_ADAPTERS = "call merge_and_unload() of the PeftModel and give the model that it returns"


def entries_of(
    label: str, model: Model, architecture: Architecture, expected: str = "a loaded model or a state dict"
) -> list[LoadedTensor]:
    """Every parameter and buffer that a checkpoint of a model contains, tied ones under each name; all of a state dict.

    Names are read as those of a model of this family, without what wrappers such as torch.compile, DataParallel or FSDP
    add. Raises RequestError for any other object, saying what was `expected`, and for a name that is not a string.
    """
    if not isinstance(model, (torch.nn.Module, Mapping)):
        raise RequestError(f"{label}: expected {expected}, got {type(model).__name__}")
    tensors = dict(_items(model))
    for stored in tensors:
        if not isinstance(stored, str):
            raise RequestError(f"{label}: a state dict maps names to tensors, and this one has the key {shown(stored)}")
    return [
        LoadedTensor(stored, architecture.canonical(name), tensors[stored])
        for stored, name in architecture.plain_names(tensors).items()
    ]


def _items(model: Model) -> Iterator[tuple[str, Any]]:
    if isinstance(model, Mapping):
        yield from model.items()
        return
    yield from model.named_parameters(remove_duplicate=False)
    made = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name not in made)


def config_of(model: object) -> Mapping[str, Any]:
    """The content of a loaded model's config.json; empty for a state dict, and for a model without a config.

    DataParallel and similar wrappers keep the model in `module`; torch.compile's wrapper forwards `config` itself.
    """
    for holder in (model, getattr(model, "module", None)):
        config = getattr(holder, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            return dict(config.to_dict())
    return {}


def architecture_of_model(model: object, otherwise: Architecture | None) -> Architecture:
    """The family of a loaded model, by its config.

    A state dict, or a model without a config, is of the family `otherwise`; if that is None, its tensor names decide.
    """
    config = config_of(model)
    if config:
        return architecture_of(config)
    if otherwise is not None or not isinstance(model, (torch.nn.Module, Mapping)):
        return otherwise or default()
    return architecture_of_names(name for name, _ in _items(model) if isinstance(name, str))


def without_tied_output(entries: Sequence[LoadedTensor], architecture: Architecture) -> list[LoadedTensor]:
    """The entries without the output projection, if it is the embedding itself, which checkpoints store once.

    If a family does not list which tensors may be tied, every tensor that is an alias of an earlier one is left out.
    """
    if not architecture.lists_tensors:
        return _without_aliases(entries)
    by_name = {entry.name: entry.tensor for entry in entries}
    tie = architecture.tie
    if tie is None or tie.output not in by_name or tie.embedding not in by_name:
        return list(entries)
    output, embedding = by_name[tie.output], by_name[tie.embedding]
    if not (has_addresses(output) and has_addresses(embedding) and output.data_ptr() == embedding.data_ptr()):
        return list(entries)
    return [entry for entry in entries if entry.name != tie.output]


def _without_aliases(entries: Sequence[LoadedTensor]) -> list[LoadedTensor]:
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for entry in entries:
        if has_addresses(entry.tensor) and entry.tensor.numel():
            tensor = entry.tensor
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if place in seen:
                continue
            seen.add(place)
        kept.append(entry)
    return kept


def targets_of(
    label: str, model: Model, entries: Sequence[LoadedTensor], architecture: Architecture, preset: Preset | None
) -> dict[str, LoadedTensor]:
    """The targets of a model or state dict by canonical name, each a plain tensor with its data in memory.

    Without a preset, the targets are all tensors that a merge can compute with. `entries` is the result of `entries_of`
    for the model. Raises RequestError, which names the tensor, if one is not a tensor, has no data (meta device,
    offloaded), is of a special class or dtype (quantised, distributed, sparse), or appears twice; and if adapters
    change what the tensors mean.
    """
    _refuse_adapters(label, model, entries)
    targets: dict[str, LoadedTensor] = {}
    for entry in entries:
        if preset is None and getattr(entry.tensor, "dtype", None) not in CODE_OF:
            continue
        if preset is not None and architecture.target(entry.name, preset) is None:
            continue
        _require_readable(label, entry.stored, entry.tensor)
        if entry.name in targets:
            raise RequestError(
                f"{label}: {targets[entry.name].stored} and {entry.stored} are one tensor of {architecture.title}, "
                f"{entry.name}; give one of them"
            )
        targets[entry.name] = entry
    return targets


def tensor_instead_of(entries: Sequence[LoadedTensor], target: str) -> str | None:
    """What a model has in place of a target, such as `q_proj.parametrizations.weight.original0`; None if nothing."""
    module, _, part = target.rpartition(".")
    for entry in entries:
        _, inside, rest = f".{entry.name}".partition(f".{module}.")
        if inside and part in rest and rest not in ("weight", "bias"):
            return entry.stored
    return None


def has_addresses(tensor: Any) -> bool:
    """Whether the tensor knows the addresses of its elements, unlike subclasses that gather or compute them."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _require_readable(label: str, name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        kind = type(tensor)
        remedy = "; convert it with torch.from_numpy" if kind.__module__ == "numpy" else ""
        raise RequestError(
            f"{label}: target tensor {name} is a {kind.__module__}.{kind.__name__}, expected a torch tensor in a state "
            f"dict{remedy}"
        )
    if tensor.is_meta:
        raise RequestError(
            f"{label}: target tensor {name} is on the meta device, where no data is (offloaded by a device_map, or not "
            f"loaded yet); load {label} whole"
        )
    if not has_addresses(tensor) or tensor.dtype not in CODE_OF:
        layout = "" if tensor.layout == torch.strided else f" with layout {str(tensor.layout).removeprefix('torch.')}"
        raise RequestError(
            f"{label}: target tensor {name} is a {type(tensor).__name__} of {tensor.dtype}{layout}, expected a plain "
            f"tensor of float32, float16 or bfloat16; load {label} neither quantised nor distributed"
        )


def _refuse_adapters(label: str, model: Model, entries: Sequence[LoadedTensor]) -> None:
    """Raise RequestError if a model has PEFT adapters.

    PEFT's layers keep the original in `base_layer`; `peft_config` alone may remain after they are unloaded.
    """
    if isinstance(model, torch.nn.Module):
        wrapper = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        if wrapper or any(hasattr(module, "base_layer") for module in model.modules()):
            raise RequestError(
                f"{label} is a {type(model).__name__} with PEFT adapters, which are not part of its target tensors "
                f"yet; {MERGE_ADAPTERS}"
            )
    names = (entry.stored for entry in entries)
    adapter = next((name for name in names if ".lora_" in name or ".base_layer." in name), None)
    if adapter is not None:
        raise RequestError(
            f"{label} holds {adapter:.300}, a PEFT adapter's tensor, beside its targets; {MERGE_ADAPTERS}"
        )
