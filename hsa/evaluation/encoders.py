"""Run a Whisper's encoder on one utterance at a time on the CPU.

A Whisper hears 30 s of every utterance. What the encoder computes for a batch of them does not fit into the caches of a
processor: with Whisper tiny on two cores a batch of 16 takes one and a half times as long as 16 batches of one. Alone,
an utterance also has the same encoder states whatever is decoded beside it.
"""

from __future__ import annotations

from typing import Any


def encode_one_by_one(encoder: Any) -> None:
    """Let an encoder of transformers give each utterance of a batch to its layers alone where the batch is on the CPU.

    Every tensor that the encoder is called with has the utterances along its first axis.
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
    """How many utterances a call has on the CPU."""
    tensors = [value for value in (*arguments, *keywords.values()) if _is_tensor(value)]
    return len(tensors[0]) if tensors and tensors[0].device.type == "cpu" else 0


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _part(value: Any, number: int) -> Any:
    return value[number : number + 1] if _is_tensor(value) else value


def _joined(values: list[Any]) -> Any:
    """The values of all utterances as one: tensors side by side, tuples of them by their places."""
    import torch

    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return tuple(_joined(list(each)) for each in zip(*values, strict=True))
