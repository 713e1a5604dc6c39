"""Write synthetic Whisper-shaped checkpoints, for the demo, the tests and the benchmarks.

A written directory holds everything that a published Whisper checkpoint does (weights, `config.json`,
`generation_config.json`, tokenizer and feature extractor) and loads offline with transformers, but its transcriptions
are meaningless. The same arguments give the same bytes on every run and every machine.

Needs only numpy. Memory stays at a few MB per thread, whatever the shape.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hsa.testing.made_up_numbers import TaskVector, bit_stream, encode, noise
from hsa.testing.whisper_config import (
    DTYPES,
    SHAPES,
    TOKENIZER_VOCAB_SIZE,
    WEIGHT_STD,
    DType,
    WhisperShape,
    check_dtype,
    write_config,
    write_json,
    write_processor,
)
from hsa.testing.whisper_tensors import WhisperTensor, tensor_shapes, whisper_tensors

__all__ = [
    "SHAPES",
    "TOKENIZER_VOCAB_SIZE",
    "DType",
    "LoudHead",
    "Role",
    "WhisperShape",
    "tensor_shapes",
    "write_checkpoint",
    "write_config",
    "write_processor",
    "write_triple",
]

Role = Literal["base", "primary", "secondary"]
LoudHead = tuple[str, int, str, int]
"""(stack, layer, kind, head): stack "encoder" or "decoder", kind "q", "k" or "v", indices from zero."""

_ROLES: tuple[Role, ...] = ("base", "primary", "secondary")
_BLOCK_ELEMENTS = 1 << 18
_THREADS = 2

# Files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PlacedTensor:
    tensor: WhisperTensor
    file: str
    offset: int


@dataclass(frozen=True)
class _ShardLayout:
    """The layout of tensors in files: headers (with length prefix) and sizes by file, and tensors in file order."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    tensors: tuple[_PlacedTensor, ...]
    index: dict[str, Any] | None


def _split(tensors: Iterable[WhisperTensor], itemsize: int, limit: int | None) -> list[list[WhisperTensor]]:
    """Split tensors into shards as transformers does: a tensor above the limit gets its own shard, and the others fill
    shards in order."""
    shards: list[list[WhisperTensor]] = []
    current: list[WhisperTensor] = []
    used = 0
    for tensor in tensors:
        size = tensor.elements * itemsize
        if limit is not None and size > limit:
            shards.append([tensor])
            continue
        if limit is not None and current and used + size > limit:
            shards.append(current)
            current, used = [], 0
        current.append(tensor)
        used += size
    return [*shards, current] if current else shards


def _saved_name(tensor: WhisperTensor, prefix: str) -> str:
    return prefix + tensor.name.removeprefix("model.")


def _layout(shape: WhisperShape, dtype: str, max_shard_bytes: int | None, prefix: str) -> _ShardLayout:
    code, itemsize = DTYPES[dtype]
    shards = _split(whisper_tensors(shape), itemsize, max_shard_bytes)
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    placed: list[_PlacedTensor] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = sorted(shard, key=lambda tensor: tensor.name)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in shard:
            start, end = end, end + tensor.elements * itemsize
            name = _saved_name(tensor, prefix)
            entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + end
        placed += [
            _PlacedTensor(tensor, file, len(headers[file]) + entries[_saved_name(tensor, prefix)]["data_offsets"][0])
            for tensor in shard
        ]
    index = None
    if len(shards) > 1:
        parameters = sum(math.prod(tensor_shape) for tensor_shape in tensor_shapes(shape).values())
        totals = {"total_parameters": parameters, "total_size": parameters * itemsize}
        index = {"metadata": totals, "weight_map": weight_map}
    return _ShardLayout(headers, sizes, tuple(placed), index)


def _pwrite_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@dataclass(frozen=True)
class _Numbers:
    """The parameters of the values, apart from tensor and role."""

    dtype: str
    seed: int
    delta: float
    loud: Mapping[tuple[str, int, str], frozenset[int]]
    loud_factor: float

    def delta_of(self, tensor: WhisperTensor, role: str) -> TaskVector:
        loud = self.loud.get(tensor.projection, frozenset()) if tensor.projection else frozenset()
        return TaskVector(tensor, role, self.seed, self.delta, loud, self.loud_factor)


def _write_tensor(placed: _PlacedTensor, descriptors: Mapping[str, int], numbers: _Numbers) -> None:
    """Write one tensor into each role's open file. Base's numbers are drawn once for all roles."""
    tensor = placed.tensor
    base_generator = bit_stream(numbers.seed, "base", tensor.name)
    deltas = {role: numbers.delta_of(tensor, role) for role in descriptors if role != "base"}
    # An even number of rows: no block ends within a raw number, so the values do not depend on the block size.
    step = max(2, _BLOCK_ELEMENTS // tensor.row_elements // 2 * 2)
    row_bytes = tensor.row_elements * DTYPES[numbers.dtype][1]
    for first in range(0, tensor.rows, step):
        rows = min(step, tensor.rows - first)
        base = noise(base_generator, rows * tensor.row_elements, WEIGHT_STD).reshape(rows, -1)
        if tensor.mean:
            base += np.float32(tensor.mean)
        for role, descriptor in descriptors.items():
            values = base
            if role != "base":
                values = deltas[role].block(first, rows, tensor.row_elements)
                values += base
            data = encode(values, numbers.dtype).view(np.uint8).data
            _pwrite_all(descriptor, data, placed.offset + first * row_bytes)


def _write_weights(directories: Mapping[str, Path], layout: _ShardLayout, numbers: _Numbers) -> None:
    """Write the weights of several roles together, with tensors in parallel."""
    with ExitStack() as stack:
        descriptors: dict[str, dict[str, int]] = {file: {} for file in layout.headers}
        for role, directory in directories.items():
            for file, header in layout.headers.items():
                descriptor = os.open(directory / file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                stack.callback(os.close, descriptor)
                os.truncate(descriptor, layout.sizes[file])
                _pwrite_all(descriptor, memoryview(header), 0)
                descriptors[file][role] = descriptor
        pool = ThreadPoolExecutor(_THREADS)
        stack.callback(pool.shutdown, cancel_futures=True)
        tasks = [pool.submit(_write_tensor, placed, descriptors[placed.file], numbers) for placed in layout.tensors]
        for task in tasks:
            task.result()
    if layout.index is not None:
        for directory in directories.values():
            write_json(directory / "model.safetensors.index.json", layout.index)


# Checkpoints -----------------------------------------------------------------------------------------------


def _loud_by_projection(
    shape: WhisperShape, loud_heads: Collection[LoudHead]
) -> dict[tuple[str, int, str], frozenset[int]]:
    heads_of = {tensor.projection: tensor.heads for tensor in whisper_tensors(shape) if tensor.projection}
    loud: dict[tuple[str, int, str], frozenset[int]] = {}
    for stack, layer, kind, head in loud_heads:
        projection = (stack, layer, kind)
        if projection not in heads_of or not 0 <= head < heads_of[projection]:
            raise ValueError(f"loud head {(stack, layer, kind, head)} does not exist in {shape}")
        loud[projection] = loud.get(projection, frozenset()) | {head}
    return loud


def _write_roles(
    directories: Mapping[str, Path],
    shape: WhisperShape,
    *,
    dtype: DType,
    seed: int,
    delta: float,
    loud_heads: Collection[LoudHead],
    loud_factor: float,
    max_shard_bytes: int | None,
    prefix: str,
    processor: bool,
) -> None:
    check_dtype(dtype)
    if prefix not in ("model.", ""):
        raise ValueError(f"prefix is {prefix!r}, expected 'model.' or ''")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    numbers = _Numbers(dtype, seed, delta, _loud_by_projection(shape, loud_heads), loud_factor)
    architecture = "WhisperForConditionalGeneration" if prefix else "WhisperModel"
    for directory in directories.values():
        # Old shards with another layout next to the new ones would mix two models in one checkpoint.
        if any(directory.glob("model*.safetensors*")):
            raise FileExistsError(f"{directory} already holds weights, expected a directory without")
    for directory in directories.values():
        write_config(directory, shape, dtype, architecture=architecture)
        if processor:
            write_processor(directory, shape)
    _write_weights(directories, _layout(shape, dtype, max_shard_bytes, prefix), numbers)


def write_checkpoint(
    directory: str | os.PathLike[str],
    shape: WhisperShape,
    *,
    dtype: DType = "float32",
    role: Role = "base",
    seed: int = 0,
    delta: float = 1e-3,
    loud_heads: Collection[LoudHead] = (),
    loud_factor: float = 10.0,
    max_shard_bytes: int | None = None,
    prefix: str = "model.",
    processor: bool = True,
) -> Path:
    """Write one synthetic checkpoint and return its directory.

    Weights are uniform around 0 (layer norm weights around 1) with a standard deviation of 0.02. The base depends only
    on the seed. "primary" and "secondary" are that base plus their own deltas, so the three roles written with the same
    arguments form a triple. Values are computed in float32 and rounded once.

    Args:
        directory: created if it does not exist; must not hold weights yet.
        shape: the model's dimensions.
        dtype: the dtype of every tensor in the file.
        role: which model of the triple to write.
        seed: the seed of the base and of both deltas.
        delta: standard deviation of the delta; heads vary between 0.5 and 1.5 times this.
        loud_heads: heads of self-attention projections whose delta, in weight and bias, is `loud_factor` times larger.
        loud_factor: see `loud_heads`.
        max_shard_bytes: the most tensor bytes in one file before the next is started; None writes a single file.
        prefix: the prefix of names: "model." as in WhisperForConditionalGeneration, "" as in WhisperModel. The numbers
            are the same.
        processor: whether to write the tokenizer and the feature extractor too.

    Raises:
        ValueError: an argument is out of its range, or a loud head does not exist.
        FileExistsError: the directory already holds weights.
        OSError: the disk is full or not writable; an incomplete checkpoint stays behind.
    """
    if role not in _ROLES:
        raise ValueError(f"role is {role!r}, expected one of {', '.join(_ROLES)}")
    _write_roles(
        {role: Path(directory)},
        shape,
        dtype=dtype,
        seed=seed,
        delta=delta,
        loud_heads=loud_heads,
        loud_factor=loud_factor,
        max_shard_bytes=max_shard_bytes,
        prefix=prefix,
        processor=processor,
    )
    return Path(directory)


def write_triple(
    root: str | os.PathLike[str],
    shape: WhisperShape,
    *,
    dtype: DType = "float32",
    seed: int = 0,
    delta: float = 1e-3,
    loud_heads: Collection[LoudHead] = (),
    loud_factor: float = 10.0,
    max_shard_bytes: int | None = None,
    prefix: str = "model.",
    processor: bool = True,
    more: Sequence[str] = (),
) -> dict[str, Path]:
    """Write `root/base`, `root/primary` and `root/secondary`, and return the three directories by role.

    The files equal those of three `write_checkpoint` calls, byte for byte, but base's numbers are drawn only once.
    `more` are names of further fine-tunes of the same base. The other arguments and the errors are those of
    `write_checkpoint`.
    """
    directories: dict[str, Path] = {role: Path(root) / role for role in (*_ROLES, *more)}
    _write_roles(
        directories,
        shape,
        dtype=dtype,
        seed=seed,
        delta=delta,
        loud_heads=loud_heads,
        loud_factor=loud_factor,
        max_shard_bytes=max_shard_bytes,
        prefix=prefix,
        processor=processor,
    )
    return directories
