"""Read a LoRA adapter, as peft saves it, on top of base: adapted weights are computed as they are read.

An adapted weight is `W + scale * (B @ A)`. `W` is base's weight [d_out, d_in]; `A` [r, d_in] and `B` [d_out, r] are the
adapter's. `scale` is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`. For a convolution, the shapes are
[d_out, d_in, width], [r, d_in, width] and [d_out, r, 1]; they are read as matrices of d_in * width columns, as in
peft's Conv1d.

The product is summed over the ranks in order, in float32, one operation at a time. Its sum with `W` is rounded once to
base's dtype. So the result is deterministic: an element depends only on its own inputs. It does not depend on the range
that is read, nor on the number of threads, as it would with BLAS.

Source: Hu et al., LoRA, arXiv 2106.09685; rank-stabilised scaling: Kalajdzievski, arXiv 2312.03732.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hsa.errors import MismatchError, NonFiniteError, RequestError, SourceError, shown
from hsa.sources.checkpoint import ADAPTER_CONFIG, WHOLE_WEIGHTS, Checkpoint, open_shard, read_whole
from hsa.sources.identity import identify
from hsa.sources.peft_adapter import TIED, PeftCheckpoint, require_peft
from hsa.sources.roles import BASE, Role, is_anchor
from hsa.sources.tensor_places import Shard, TensorRef
from hsa.system.dtypes import ARITHMETIC, STORAGE, Array, Float32, all_finite, narrow, size, widen
from hsa.system.fsio import Tally
from hsa.system.strict_json import load_json

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BLOCK_ELEMENTS = 1 << 15
"""Elements of an adapted weight that are computed at a time. With scratch, they fit a core's second-level cache."""
MAX_MATRIX = 16 << 20
"""The largest `A` or `B` in bytes, since every thread holds both whole: rank 800 on large-v3's widest weight."""
MAX_ALPHA = float(np.finfo(np.float32).max)

FOLD_FIRST = "fold it into its base with peft first (PeftModel.merge_and_unload, then save_pretrained) and give that"

_PREFIX = "base_model.model."
_PAIR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>A|B)\.weight")
_LORA = re.compile(
    r"(?P<module>.+)\.(lora_[AB](\.(?P<adapter>[^.]+))?\.weight|lora_embedding_[AB](\.(?P<embedding_adapter>[^.]+))?)"
)
"""Pattern for the names of LoRA tensors. Some contain the adapter's name, which peft leaves out when it saves."""
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Values that leave the arithmetic plain, for settings where these are not just empty or false. Other ways to
initialise change base."""

_BY_PEFT = {"alpha_pattern", "bias", "modules_to_save", "rank_pattern", "use_dora"}
"""Settings beyond plain arithmetic that leave base unchanged: peft folds such an adapter in."""

_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
"""Settings on how an adapter was trained or what it is named, and those that this module reads."""


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a source is a directory that holds an adapter and no weights of a whole model."""
    directory = os.path.expanduser(path)
    if not os.path.isfile(os.path.join(directory, ADAPTER_CONFIG)):
        return False
    return not any(os.path.lexists(os.path.join(directory, name)) for name in WHOLE_WEIGHTS)


@dataclass(frozen=True)
class LoraCheckpoint(Checkpoint):
    """Base with an adapter on it. `pairs` maps canonical names of adapted weights to `A` and `B` in the adapter."""

    base: Checkpoint = field(kw_only=True)
    pairs: Mapping[str, tuple[TensorRef, TensorRef]] = field(default_factory=dict)
    scale: float = 1.0

    def read_into(self, tensor: TensorRef, view: memoryview, start: int = 0) -> None:
        """Fill `view` with the tensor's bytes from byte `start` on: base's, or computed. Raises NonFiniteError."""
        pair = self.pairs.get(self.architecture.canonical(tensor.name))
        if pair is None:
            self.base.read_into(tensor, view, start)
            return
        columns = math.prod(tensor.shape[1:])
        width = columns * size(tensor.code)
        down = self._matrix(pair[0], 0, pair[0].shape[0])
        step = max(1, BLOCK_ELEMENTS // columns)
        stop = start + len(view)
        for first in range(start // width, -(-stop // width), step):
            last = min(first + step, -(-stop // width))
            rows = self._fold(tensor, first, last, down, self._matrix(pair[1], first, last))
            low, high = max(start, first * width), min(stop, last * width)
            view[low - start : high - start] = rows.data[low - first * width : high - first * width]

    def check_unchanged(self) -> None:
        super().check_unchanged()
        self.base.check_unchanged()

    def file_of(self, tensor: TensorRef) -> str:
        if self.architecture.canonical(tensor.name) not in self.pairs:
            return self.base.file_of(tensor)
        return f"{self.role} {self.path / self.shards[0].name if self.shards else self.path}"

    def fold(self, weight: Float32, down: Float32, up: Float32) -> Float32:
        """`weight + scale * (up @ down)` in float32: weight [n, d_in], down [r, d_in], up [n, r]."""
        total, product = np.zeros_like(weight), np.empty_like(weight)
        with np.errstate(over="ignore", invalid="ignore"):
            for rank in range(down.shape[0]):
                np.multiply(up[:, rank : rank + 1], down[rank], out=product)
                np.add(total, product, out=total)
            np.multiply(total, np.float32(self.scale), out=total)
            return np.add(weight, total, out=total)

    def _fold(self, tensor: TensorRef, first: int, last: int, down: Float32, up: Float32) -> Array:
        """Compute rows `first` to `last` of an adapted weight, as one-dimensional uint8 bytes."""
        columns = math.prod(tensor.shape[1:])
        width = columns * size(tensor.code)
        out = np.empty((last - first) * width, np.uint8)
        self.base.read_into(tensor, out.data, first * width)
        stored = out.view(STORAGE[tensor.code]).reshape(last - first, columns)
        weight = widen(tensor.code, stored, np.empty(stored.shape, np.float32))
        narrow(tensor.code, self.fold(weight, down, up), stored, np.empty(stored.shape, np.uint32))
        if not all_finite(tensor.code, stored):
            raise NonFiniteError(
                f"{self.file_of(tensor)}: tensor {tensor.name}: base's weight or the adapter holds NaN or Inf, or "
                f"their sum overflows {tensor.code}; does the adapter belong to this base?"
            )
        return out

    def _matrix(self, ref: TensorRef, first: int, last: int) -> Float32:
        """Read rows `first` to `last` of `A` or `B`, widened to float32."""
        columns = math.prod(ref.shape[1:])
        raw = np.empty((last - first) * columns * size(ref.code), np.uint8)
        self.shards[0].source.read_into(raw.data, ref.offset + first * columns * size(ref.code))
        stored = raw.view(STORAGE[ref.code]).reshape(last - first, columns)
        return widen(ref.code, stored, np.empty(stored.shape, np.float32))


def open_adapter(
    role: Role, path: str | os.PathLike[str], tally: Tally, base: Checkpoint | None, claimed: str | None = None
) -> LoraCheckpoint | PeftCheckpoint:
    """Open a LoRA adapter on top of `base`, which must stay open as long. Reads no tensor data.

    An adapter that is more than plain LoRA is left to peft, which runs at the first read. `claimed` is the identity to
    record.

    Raises RequestError for an adapter as base, for one that cannot be folded in, and for one as the anchor on a file of
    OpenAI's, which has no config.json for the output. Raises SourceError or MismatchError if the adapter is damaged or
    does not fit base.
    """
    directory = Path(path).expanduser().resolve()
    where = f"{role}: {directory}"
    if role == BASE:
        raise RequestError(f"{where} holds a LoRA adapter, not a pretrained model; give the model it was trained on")
    if base is None or (base.kind == "openai" and is_anchor(role)):
        raise RequestError(
            f"{where} holds a LoRA adapter, which needs base as a checkpoint directory to stand on; give one, or "
            f"{FOLD_FIRST}"
        )
    config = load_json(
        read_whole(role, directory, ADAPTER_CONFIG, tally), f"{where}/{ADAPTER_CONFIG}", "adapter config"
    )
    setting = _setting_for_peft(config, f"{where}/{ADAPTER_CONFIG}")
    rank, scale = _scaling(config, f"{where}/{ADAPTER_CONFIG}")
    name = next((name for name in WEIGHTS if os.path.lexists(directory / name)), None)
    if name is None:
        raise SourceError(f"{where} holds an adapter's config and no weights; looked for {' and '.join(WEIGHTS)}")
    trained_on = config.get("base_model_name_or_path")
    shard = open_shard(role, directory, name, tally)
    try:
        _check_entries(f"{role}: {shard.source.path}", shard, base)
        fields: dict[str, Any] = {
            "shards": (shard,),
            "kind": "adapter",
            "config_from": base.config_from or base.path,
            "tensors": base.tensors,
            "base": base,
            "trained_on": trained_on if isinstance(trained_on, str) else None,
        }
        identity = identify(directory, claimed)
        if setting is None:
            pairs = _pairs(role, shard, base, rank)
            return LoraCheckpoint(
                role, directory, identity, base.config, base.architecture, tally, **fields, pairs=pairs, scale=scale
            )
        require_peft(f"{where}/{ADAPTER_CONFIG} has {setting}, which is more than plain LoRA", FOLD_FIRST)
        if base.kind == "openai":
            raise RequestError(f"{where} has {setting}, which needs base as a checkpoint directory; or {FOLD_FIRST}")
        note = f"{role}'s adapter has {setting}: peft folds it in, with base and adapter as whole models in memory"
        return PeftCheckpoint(role, directory, identity, base.config, base.architecture, tally, **fields, notes=(note,))
    except BaseException:
        shard.source.close()
        raise


def _setting_for_peft(config: Mapping[str, Any], where: str) -> str | None:
    """The first setting that only peft can fold in; RequestError for one that changes more than the adapted layers."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RequestError(f"{where} has peft_type {shown(kind, 40)}, only LORA is read; {FOLD_FIRST}")
    setting = None
    for key, value in config.items():
        if key in _WITHOUT_EFFECT or value in _PLAIN.get(key, ()):
            continue
        if key in _BY_PEFT and value:
            setting = setting or f"{key} = {shown(value)}"
        elif key in _PLAIN or value not in (None, False, "", [], {}):
            raise RequestError(f"{where} has {key} = {shown(value)}, which is more than plain LoRA; {FOLD_FIRST}")
    return setting


def _scaling(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    """Return rank and scale of an adapter; SourceError if they are not valid numbers."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_MATRIX:
        raise SourceError(f"{where} has r = {shown(rank, 40)}, expected a positive whole number")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= MAX_ALPHA:
        raise SourceError(f"{where} has lora_alpha = {shown(alpha, 40)}, expected a finite number")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_entries(where: str, shard: Shard, base: Checkpoint) -> None:
    """Refuse an adapter's file without data, with names that peft does not read, or with LoRA on what base ties."""
    if not shard.header.entries:
        raise SourceError(f"{where} holds no tensor; the adapter is empty; {_GATHER}")
    for entry in shard.header.entries:
        if 0 in entry.shape:
            raise SourceError(
                f"{where}: {entry.name} has shape {list(entry.shape)}: the adapter's tensors are empty; {_GATHER}"
            )
        match = _LORA.fullmatch(entry.name)
        adapter_name = None if match is None else match["adapter"] or match["embedding_adapter"]
        if adapter_name is not None:
            raise RequestError(
                f"{where}: the name of tensor {entry.name} holds that of the adapter, {adapter_name}, as those of "
                f"state_dict() do; save the adapter with save_pretrained() of the PeftModel"
            )
        if not entry.name.startswith(_PREFIX):
            raise RequestError(
                f"{where}: the name of tensor {entry.name} does not begin with {_PREFIX}, as peft's do; save the "
                f"adapter with save_pretrained() of the PeftModel"
            )
        name = "" if match is None else base.architecture.canonical(f"{match['module'].removeprefix(_PREFIX)}.weight")
        if base.is_tied(name):
            raise RequestError(f"{where}: tensor {entry.name} adapts {name}. {TIED}")


def _pairs(role: Role, shard: Shard, base: Checkpoint, rank: int) -> dict[str, tuple[TensorRef, TensorRef]]:
    """Return all tensors of the adapter's file as pairs, each of which fits a weight of base."""
    where = f"{role}: {shard.source.path}"
    matrices_of: dict[str, dict[str, TensorRef]] = {}
    for entry in shard.header.entries:
        match = _PAIR.fullmatch(entry.name)
        if match is None:
            raise RequestError(f"{where} holds tensor {entry.name}, which is more than plain LoRA; {FOLD_FIRST}")
        if entry.code not in ARITHMETIC:
            raise SourceError(
                f"{where}: tensor {entry.name} has dtype {entry.code}, expected one of {', '.join(ARITHMETIC)}"
            )
        offset = shard.origin + entry.start
        ref = TensorRef(entry.name, entry.code, entry.shape, 0, offset, entry.stop - entry.start)
        name = base.architecture.canonical(f"{match['module']}.weight")
        matrices_of.setdefault(name, {})[match["matrix"]] = ref
    pairs = {}
    for name, matrices in matrices_of.items():
        weight = base.tensors.get(name)
        first = next(iter(matrices.values()))
        if weight is None:
            raise MismatchError(f"{where}: tensor {first.name} is for {name}, which base does not have; {_WRONG_BASE}")
        if len(matrices) != 2:
            raise SourceError(
                f"{where}: tensor {first.name} has no counterpart; the adapter is incomplete, copy it again"
            )
        down, up = matrices["A"], matrices["B"]
        _check_shapes(where, name, weight, (down, up), rank)
        if weight.code not in ARITHMETIC:
            raise SourceError(
                f"{base.file_of(weight)}: tensor {weight.name} has dtype {weight.code}, and the adapter of "
                f"{role} needs one of {', '.join(ARITHMETIC)}"
            )
        if max(down.nbytes, up.nbytes) > MAX_MATRIX:
            raise RequestError(
                f"{where}: lora_A and lora_B of {name} take {down.nbytes} and {up.nbytes} bytes, at most {MAX_MATRIX} "
                f"each are held in memory; {FOLD_FIRST}"
            )
        pairs[name] = (down, up)
    return pairs


def _check_shapes(where: str, name: str, weight: TensorRef, pair: tuple[TensorRef, TensorRef], rank: int) -> None:
    """Refuse matrices that do not produce a weight of this shape; the message blames the adapter's rank, or base."""
    (down_rank, *rest), (rows, *columns) = (list(matrix.shape) or [0] for matrix in pair)
    shapes = f"lora_A {list(pair[0].shape)} and lora_B {list(pair[1].shape)}"
    up_rank = columns[0] if columns else 0
    if len(weight.shape) not in (2, 3):
        raise RequestError(
            f"{where}: {shapes} are for {name}, which has shape {list(weight.shape)} in base; LoRA is read on matrices "
            f"and convolutions; {FOLD_FIRST}"
        )
    if [rows, *rest] != list(weight.shape) or columns[1:] != [1] * (len(weight.shape) - 2):
        raise MismatchError(f"{where}: {shapes} do not fit {name} {list(weight.shape)} of base; {_WRONG_BASE}")
    if not down_rank == up_rank == rank:
        ranks = down_rank if down_rank == up_rank else f"{down_rank} and {up_rank}"
        raise SourceError(
            f"{where}: {shapes} of {name} have rank {ranks}, and r is {rank} in {ADAPTER_CONFIG}; give the "
            f"{ADAPTER_CONFIG} that was saved with these weights"
        )


_WRONG_BASE = "was the adapter trained on this base?"
_GATHER = (
    "DeepSpeed ZeRO-3 and FSDP leave such files where weights are not gathered before they are saved "
    "(stage3_gather_16bit_weights_on_model_save); save it again"
)
