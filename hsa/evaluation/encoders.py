"""Run a Whisper's encoder on one utterance at a time on the CPU.

A Whisper hears 30 s of every utterance. The encoder's intermediate results for a batch do not fit into the caches of a
processor: with Whisper tiny on two cores, a batch of 16 takes one and a half times as long as 16 batches of one.
Encoded alone, an utterance also has the same encoder states whatever else is in its batch.
"""

from __future__ import annotations

from typing import Any


def encode_one_by_one(encoder: Any) -> None:
    """Make a transformers encoder process each utterance of a batch separately if the batch is on the CPU.

    The first axis of every tensor passed to the encoder must be the utterances.
    """
    forward = encoder.forward

    def encode(*arguments: Any, **keywords: Any) -> Any:
        count = _utterances(arguments, keywords)
        if count < 2:
            return forward(*arguments, **keywords)
        parts = [
            forward(
                *(_part(value, number) for value in arguments),
                **{name: _part(value, number) for name, value in keywords.items()},
            )
            for number in range(count)
        ]
        return type(parts[0])(**{name: _joined([part[name] for part in parts]) for name in parts[0]})

    encoder.forward = encode


def _utterances(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int:
    """The number of utterances of a call if they are on the CPU."""
    tensors = [value for value in (*arguments, *keywords.values()) if _is_tensor(value)]
    return len(tensors[0]) if tensors and tensors[0].device.type == "cpu" else 0


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _part(value: Any, number: int) -> Any:
    return value[number : number + 1] if _is_tensor(value) else value


def _joined(values: list[Any]) -> Any:
    """Join the values of all utterances: tensors are concatenated, tuples are joined item by item."""
    import torch

    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return tuple(_joined(list(each)) for each in zip(*values, strict=True))
