"""Whether a checkpoint holds the tensors that its config.json promises, as transformers will look for them.

Merges, patches, `hsa apply`, sweeps, releases, `hsa.Merger` and `hsa verify` use this module, so that they agree. It
reads names, shapes, element types and the config, and no tensor data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.architectures import whisper
from hsa.architectures.base import Promised
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
"""Element types that transformers reads as the weights they stand for."""
_ADAPTER = (".lora_", ".base_layer.")
_QUANTIZED = ("_scale", ".scale", "_scale_inv", ".scales", "_zero_point", ".zero_point", ".SCB", "_format", ".qweight")


@dataclass(frozen=True)
class Fault:
    """One way in which tensors and config.json differ: what was found and expected, and what to do."""

    what: str
    remedy: str


def faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Everything that would keep transformers from loading this checkpoint whole, the most telling first.

    Names count as whisper.plain_names reads them. Missing tensors, and tensors without a place, are one fault each.

    Example:
        >>> from hsa.sources.checkpoint import open_checkpoint
        >>> from hsa.system.fsio import Tally
        >>> with open_checkpoint("primary", "my-fine-tune", Tally()) as checkpoint:  # doctest: +SKIP
        ...     print([fault.what for fault in faults(checkpoint)])
        []
    """
    held, config = checkpoint.tensors, checkpoint.config
    try:
        layers = sum(whisper.architecture(config, checkpoint.role).layers.values())
        yield from _contradictions(config)
        if layers > len(held):  # before names are made of a number that may be anything
            yield Fault(
                f"config.json promises {layers} layers, and there are {len(held)} tensors in all", CONTRADICTORY
            )
            return
        yield from _compare(held, config, checkpoint.role)
    except SourceError as error:
        yield Fault(str(error), CONTRADICTORY)


def require_whole(checkpoint: Checkpoint) -> None:
    """Raise MismatchError with the first of `faults`, if there is any."""
    fault = next(faults(checkpoint), None)
    if fault is not None:
        raise MismatchError(f"{checkpoint.role} {checkpoint.path}: {fault.what}; {fault.remedy}")


def require_shapes(checkpoint: Checkpoint, lender: str | None = None) -> None:
    """Raise MismatchError where a tensor that is there has another shape than config.json gives it; the others may be
    missing, as from a state dict of targets alone. `lender` is the source whose config it is, where it is another's."""
    for entry in whisper.state_dict(checkpoint.config, f"{checkpoint.role} {checkpoint.path}"):
        ref = checkpoint.tensors.get(entry.name)
        if ref is not None and ref.shape != entry.shape:
            fault = _shape(entry, ref, checkpoint.config)
            remedy = fault.remedy if lender is None else _OWN_CONFIG.format(lender=lender, role=checkpoint.role)
            raise MismatchError(f"{checkpoint.role} {checkpoint.path}: {fault.what}; {remedy}")


def odd_name(checkpoint: Checkpoint, name: str) -> str | None:
    """A stored name without a place in Whisper that holds all parts of `name` in order; None if there is none.

    Such a name is what a wrapper leaves behind: `model.encoder.shard.layers.0.fc1.bias` for
    `model.encoder.layers.0.fc1.bias`.
    """
    return _resembling(name, [ref for key, ref in checkpoint.tensors.items() if not whisper.is_known(key)])


def _contradictions(config: Mapping[str, Any]) -> Iterator[Fault]:
    """What config.json says twice, or in a type that transformers refuses, and heads that do not divide the width."""
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        yield Fault(f"config.json has tie_word_embeddings {shown(tied)}, expected true or false", "correct config.json")
    for alias, key in whisper.ALIASES.items():
        value = config.get(key, whisper.DIMENSIONS.get(key))
        if alias in config and config[alias] != value:
            yield Fault(
                f"config.json has {key} {shown(value)} and {alias} {shown(config[alias])}, which are two names of one "
                f"size, and transformers takes the latter",
                f"remove {alias} from config.json, or give both the size that the tensors have",
            )
    width = config.get("d_model", whisper.DIMENSIONS["d_model"])
    for stack in whisper.stacks_of(config):
        heads = config[f"{stack}_attention_heads"]
        if isinstance(width, int) and width % heads:
            yield Fault(
                f"config.json has {stack}_attention_heads {heads}, which do not divide d_model {width}", CONTRADICTORY
            )


def _compare(held: Mapping[str, TensorRef], config: Mapping[str, Any], where: str) -> Iterator[Fault]:
    rest = dict(held)
    missing: list[Promised] = []
    absent = 0
    integer: TensorRef | None = None
    for entry in whisper.state_dict(config, where):
        ref = rest.pop(entry.name, None)
        if ref is None:
            absent += 1
            missing = missing or [entry]
        elif ref.shape != entry.shape:
            yield _shape(entry, ref, config)
        elif ref.code not in _FLOATS:
            integer = integer or ref
    output, embedding = rest.pop(whisper.UNTIED_OUTPUT, None), held.get(whisper.EMBEDDING)
    if output is not None and embedding is not None and output.shape != embedding.shape:
        promised = Promised(whisper.UNTIED_OUTPUT, embedding.shape, ("vocab_size", "d_model"))
        yield _shape(promised, output, config)
    elif output is not None and embedding is None:
        rest[whisper.UNTIED_OUTPUT] = output
    others = list(rest.values())
    if missing:
        yield _missing(missing[0], absent, held, others, config)
    if others:
        yield _without_place(others, config)
    if integer is not None:
        yield Fault(f"tensor {integer.name} has dtype {integer.code}, expected one of {', '.join(_FLOATS)}", DEQUANTIZE)


def _shape(entry: Promised, ref: TensorRef, config: Mapping[str, Any]) -> Fault:
    same_rank = len(ref.shape) == len(entry.shape)
    blamed = [
        key
        for number, key in enumerate(entry.sizes)
        if key is not None and not (same_rank and ref.shape[number] == entry.shape[number])
    ]
    why = ", ".join(_said(key, config) for key in dict.fromkeys(blamed)) or "as in every Whisper model"
    return Fault(
        f"tensor {ref.name} has shape {shown(list(ref.shape))}, config.json makes it {list(entry.shape)} ({why})",
        INCOMPLETE if 0 in ref.shape else CONTRADICTORY,
    )


def _missing(
    first: Promised,
    count: int,
    held: Mapping[str, TensorRef],
    others: Sequence[TensorRef],
    config: Mapping[str, Any],
) -> Fault:
    prefixed = any(ref.name.startswith("model.") for ref in held.values())
    name = f"model.{first.name}" if prefixed and first.name != whisper.UNTIED_OUTPUT else first.name
    why = "which every such model has" if first.because is None else _said(first.because, config)
    what = f"tensor {name} is missing, and config.json promises it ({whisper.model_class(config)}, {why})"
    if count > 1:
        what += f"; {count} tensors that config.json promises are missing"
    like = _resembling(first.name, others)
    if like is not None:
        return Fault(f"{what}; in its place is {like:.300}", f"save the model without what wraps it, or {INCOMPLETE}")
    if others:
        what += f"; without a place in that model is {others[0].name:.300}"
    return Fault(what, _remedy(others) or INCOMPLETE)


def _without_place(others: Sequence[TensorRef], config: Mapping[str, Any]) -> Fault:
    what = (
        f"tensor {others[0].name:.300} has no place in the model that config.json describes "
        f"({whisper.model_class(config)}"
    )
    key = whisper.layer_key(whisper.canonical(others[0].name))
    what += f", {_said(key, config)})" if key else ")"
    if len(others) > 1:
        what += f"; {len(others)} tensors have none"
    return Fault(what, _remedy(others) or f"remove what does not belong to the model, or {INCOMPLETE}")


def _remedy(others: Sequence[TensorRef]) -> str | None:
    if any(part in ref.name for ref in others for part in _ADAPTER):
        return FOLD_ADAPTER
    if any(ref.name.endswith(_QUANTIZED) for ref in others):
        return DEQUANTIZE
    return None


def _resembling(name: str, others: Sequence[TensorRef]) -> str | None:
    for ref in others:
        parts = iter(ref.name.split("."))
        if all(part in parts for part in name.split(".")):
            return ref.name
    return None


def _said(key: str, config: Mapping[str, Any]) -> str:
    """What config.json says of a key; the default where it says nothing."""
    if key == "id2label":
        return "num_labels, id2label"
    defaults: Mapping[str, Any] = {**whisper.DIMENSIONS, "tie_word_embeddings": True, "classifier_proj_size": 256}
    return f"{key} {shown(config.get(key, defaults.get(key)))}"
