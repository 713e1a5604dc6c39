"""Check that a checkpoint holds the tensors that its config.json promises, as transformers will look for them.

Merges, patches, `hsa apply`, sweeps, releases, `hsa.Merger` and `hsa verify` use this module, so that they agree. It
reads names, shapes, element types and the config, and no tensor data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.architectures.base import Architecture, ExpectedTensor
from hsa.errors import MismatchError, SourceError, shown
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.tensor_places import TensorRef

INCOMPLETE = "save or fetch the checkpoint again"
CONTRADICTORY = "write the size that the tensors have into config.json, or give the config.json that belongs to them"
FOLD_ADAPTER = "a LoRA adapter's tensors are among them: merge it first with peft (merge_and_unload, save_pretrained)"
_OWN_CONFIG = (
    "that is the config of {lender}, as a state dict has none; give {role} as a directory or a loaded model, which has "
    "its own config, or give its tensors whole"
)
DEQUANTIZE = "give the checkpoint as it was before it was quantized"

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Element types that transformers reads directly as weights."""
_ADAPTER = (".lora_", ".base_layer.")
_QUANTIZED = ("_scale", ".scale", "_scale_inv", ".scales", "_zero_point", ".zero_point", ".SCB", "_format", ".qweight")


@dataclass(frozen=True)
class StructureFault:
    """One difference between tensors and config.json: what was found and expected, and what to do."""

    what: str
    remedy: str


def faults(checkpoint: Checkpoint) -> Iterator[StructureFault]:
    """Yield everything that would keep transformers from loading the whole checkpoint, the most telling fault first.

    Names are read as `Architecture.plain_names` reads them. All missing tensors together are one fault, and so are all
    tensors without a place.

    Example:
        >>> from hsa.sources.checkpoint import open_checkpoint
        >>> from hsa.system.fsio import Tally
        >>> with open_checkpoint("primary", "my-fine-tune", Tally()) as checkpoint:  # doctest: +SKIP
        ...     print([fault.what for fault in faults(checkpoint)])
        []
    """
    tensors, config, architecture = checkpoint.tensors, checkpoint.config, checkpoint.architecture
    try:
        layers = sum(architecture.counts(config, checkpoint.role).layers.values())
        if not architecture.lists_tensors:
            yield from _faults_of_any(tensors)
            return
        yield from _contradictions(architecture, config)
        if layers > len(tensors):  # checked before names are generated from an arbitrary number
            yield StructureFault(
                f"config.json promises {layers} layers, and there are {len(tensors)} tensors in all", CONTRADICTORY
            )
            return
        yield from _compare(architecture, tensors, config, checkpoint.role)
    except SourceError as error:
        yield StructureFault(str(error), CONTRADICTORY)


def _faults_of_any(tensors: Mapping[str, TensorRef]) -> Iterator[StructureFault]:
    """Yield the faults of a model whose required tensors are not known."""
    adapters = [ref.name for ref in tensors.values() if any(part in ref.name for part in _ADAPTER)]
    if not tensors:
        yield StructureFault("it holds no tensor", INCOMPLETE)
    elif adapters:
        yield StructureFault(f"{len(adapters)} tensors are of an adapter, such as {adapters[0]:.300}", FOLD_ADAPTER)


def require_whole(checkpoint: Checkpoint) -> None:
    """Raise MismatchError with the first of `faults`, if there is any."""
    fault = next(faults(checkpoint), None)
    if fault is not None:
        raise MismatchError(f"{checkpoint.role} {checkpoint.path}: {fault.what}; {fault.remedy}")


def require_shapes(checkpoint: Checkpoint, lender: str | None = None) -> None:
    """Raise MismatchError if a tensor has another shape than config.json gives it. Missing tensors are allowed, as in a
    state dict of targets alone. `lender` is the source that the config comes from, if it is another one."""
    architecture = checkpoint.architecture
    for entry in architecture.expected(checkpoint.config, f"{checkpoint.role} {checkpoint.path}"):
        ref = checkpoint.tensors.get(entry.name)
        if ref is not None and ref.shape != entry.shape:
            fault = _shape(architecture, entry, ref, checkpoint.config)
            remedy = fault.remedy if lender is None else _OWN_CONFIG.format(lender=lender, role=checkpoint.role)
            raise MismatchError(f"{checkpoint.role} {checkpoint.path}: {fault.what}; {remedy}")


def wrapped_name(checkpoint: Checkpoint, name: str) -> str | None:
    """Return a stored name without a place in the model that holds all parts of `name` in order; None if there is none.

    Such a name results from a wrapper: `model.encoder.shard.layers.0.fc1.bias` for
    `model.encoder.layers.0.fc1.bias`.
    """
    knows = checkpoint.architecture.knows
    return _similar_name(name, [ref for key, ref in checkpoint.tensors.items() if not knows(key)])


def _contradictions(architecture: Architecture, config: Mapping[str, Any]) -> Iterator[StructureFault]:
    """Yield contradictions within config.json, types that transformers refuses, and heads that do not divide the
    width."""
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        yield StructureFault(
            f"config.json has tie_word_embeddings {shown(tied)}, expected true or false", "correct config.json"
        )
    for alias, key in architecture.aliases.items():
        value = config.get(key, architecture.defaults.get(key))
        if alias in config and config[alias] != value:
            yield StructureFault(
                f"config.json has {key} {shown(value)} and {alias} {shown(config[alias])}, which are two names of one "
                f"size, and transformers takes the latter",
                f"remove {alias} from config.json, or give both the size that the tensors have",
            )
    width = config.get(architecture.width, architecture.defaults[architecture.width])
    for stack in architecture.stacks(config):
        key = architecture.heads_key(stack)
        if isinstance(width, int) and width % config[key]:
            yield StructureFault(
                f"config.json has {key} {config[key]}, which do not divide {architecture.width} {width}", CONTRADICTORY
            )


def _compare(
    architecture: Architecture, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], where: str
) -> Iterator[StructureFault]:
    unmatched = dict(tensors)
    missing: list[ExpectedTensor] = []
    count = 0
    quantized: TensorRef | None = None
    for entry in architecture.expected(config, where):
        ref = unmatched.pop(entry.name, None)
        if ref is None:
            count += 1
            missing = missing or [entry]
        elif ref.shape != entry.shape:
            yield _shape(architecture, entry, ref, config)
        elif ref.code not in _FLOATS:
            quantized = quantized or ref
    tie = architecture.tie
    if tie is not None and tie.output in unmatched and tie.embedding in tensors:
        output, embedding = unmatched.pop(tie.output), tensors[tie.embedding]
        if output.shape != embedding.shape:
            expected = ExpectedTensor(tie.output, embedding.shape, tie.size_keys)
            yield _shape(architecture, expected, output, config)
    unplaced = list(unmatched.values())
    if missing:
        yield _missing(architecture, missing[0], count, tensors, unplaced, config)
    if unplaced:
        yield _without_place(architecture, unplaced, config)
    if quantized is not None:
        yield StructureFault(
            f"tensor {quantized.name} has dtype {quantized.code}, expected one of {', '.join(_FLOATS)}", DEQUANTIZE
        )


def _shape(
    architecture: Architecture, entry: ExpectedTensor, ref: TensorRef, config: Mapping[str, Any]
) -> StructureFault:
    same_rank = len(ref.shape) == len(entry.shape)
    keys = [
        key
        for axis, key in enumerate(entry.size_keys)
        if key is not None and not (same_rank and ref.shape[axis] == entry.shape[axis])
    ]
    values = [_config_value(architecture, key, config) for key in dict.fromkeys(keys)]
    reason = ", ".join(values) or f"as in every {architecture.title} model"
    return StructureFault(
        f"tensor {ref.name} has shape {shown(list(ref.shape))}, config.json makes it {list(entry.shape)} ({reason})",
        INCOMPLETE if 0 in ref.shape else CONTRADICTORY,
    )


def _missing(
    architecture: Architecture,
    first: ExpectedTensor,
    count: int,
    tensors: Mapping[str, TensorRef],
    unplaced: Sequence[TensorRef],
    config: Mapping[str, Any],
) -> StructureFault:
    prefix, tie = architecture.prefix, architecture.tie
    prefixed = any(ref.name.startswith(prefix) for ref in tensors.values())
    prefixed = prefixed and (tie is None or first.name != tie.output)
    name = f"{prefix}{first.name}" if prefixed else first.name
    required_by = first.required_by
    reason = "which every such model has" if required_by is None else _config_value(architecture, required_by, config)
    model_class = architecture.model_class(config).name
    what = f"tensor {name} is missing, and config.json promises it ({model_class}, {reason})"
    if count > 1:
        what += f"; {count} tensors that config.json promises are missing"
    similar = _similar_name(first.name, unplaced)
    if similar is not None:
        return StructureFault(
            f"{what}; in its place is {similar:.300}", f"save the model without what wraps it, or {INCOMPLETE}"
        )
    if unplaced:
        what += f"; without a place in that model is {unplaced[0].name:.300}"
    return StructureFault(what, _remedy(unplaced) or INCOMPLETE)


def _without_place(
    architecture: Architecture, unplaced: Sequence[TensorRef], config: Mapping[str, Any]
) -> StructureFault:
    what = (
        f"tensor {unplaced[0].name:.300} has no place in the model that config.json describes "
        f"({architecture.model_class(config).name}"
    )
    key = architecture.layers_key_of(architecture.canonical(unplaced[0].name))
    what += f", {_config_value(architecture, key, config)})" if key else ")"
    if len(unplaced) > 1:
        what += f"; {len(unplaced)} tensors have none"
    return StructureFault(what, _remedy(unplaced) or f"remove what does not belong to the model, or {INCOMPLETE}")


def _remedy(unplaced: Sequence[TensorRef]) -> str | None:
    if any(part in ref.name for ref in unplaced for part in _ADAPTER):
        return FOLD_ADAPTER
    if any(ref.name.endswith(_QUANTIZED) for ref in unplaced):
        return DEQUANTIZE
    return None


def _similar_name(name: str, refs: Sequence[TensorRef]) -> str | None:
    for ref in refs:
        parts = iter(ref.name.split("."))
        if all(part in parts for part in name.split(".")):
            return ref.name
    return None


def _config_value(architecture: Architecture, key: str, config: Mapping[str, Any]) -> str:
    """Describe the value of a key in config.json, or its default if config.json does not set it."""
    if key == "id2label":
        return "num_labels, id2label"
    return f"{key} {shown(config.get(key, architecture.defaults.get(key)))}"
