"""Find an output projection that duplicates the embedding, so that a merge computes and writes it once."""

from __future__ import annotations

from dataclasses import replace

from hsa.sources.checkpoint import Checkpoint
from hsa.sources.tensor_places import TensorRef
from hsa.system.ranges import covers

COMPARE_BYTES = 1 << 20
"""Bytes of two tensors that are compared at a time."""


def same_bytes(checkpoint: Checkpoint, one: TensorRef, two: TensorRef) -> bool:
    """Whether two tensors of a checkpoint have the same element type, shape and bytes."""
    if (one.code, one.shape) != (two.code, two.shape):
        return False
    for start in range(0, one.nbytes, COMPARE_BYTES):
        count = min(COMPARE_BYTES, one.nbytes - start)
        first, second = bytearray(count), bytearray(count)
        checkpoint.read_into(one, memoryview(first), start)
        checkpoint.read_into(two, memoryview(second), start)
        if first != second:
            return False
    return True


def without_tied_copy(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without an output projection that duplicates the embedding.

    This applies if `config.json` ties the two, the family declares no `tie` of its own, and both are stored with the
    same bytes. transformers leaves the projection out when it saves, and ties it when it loads. If only the headers of
    a source were fetched, the bytes are assumed to be the same. Closes the checkpoint if it cannot be read.
    """
    pair = checkpoint.architecture.tied_output(checkpoint.tensors, checkpoint.config)
    if pair is None:
        return checkpoint
    output, embedding = (checkpoint.tensors[name] for name in pair)
    if (output.code, output.shape) != (embedding.code, embedding.shape):
        return checkpoint
    try:
        readable = _is_readable(checkpoint, output) and _is_readable(checkpoint, embedding)
        if readable and not same_bytes(checkpoint, output, embedding):
            return checkpoint
    except BaseException:
        checkpoint.close()
        raise
    tensors = {name: ref for name, ref in checkpoint.tensors.items() if name != pair[0]}
    note = (
        f"{checkpoint.role}'s {output.name} is {embedding.name} once more, to which its config.json ties it, and left "
        f"out, as transformers does"
    )
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _is_readable(checkpoint: Checkpoint, ref: TensorRef) -> bool:
    """Whether a tensor's bytes are available. For a model on the Hub, only its header may have been fetched."""
    ranges = checkpoint.shards[ref.shard].source.readable
    return ranges is None or covers(ranges, ref.offset, ref.offset + ref.nbytes)
