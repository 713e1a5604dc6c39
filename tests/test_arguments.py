"""Arguments of Python's calls that make no sense: each is refused in one line, before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hsa

Triple = dict[str, Path]
HUGE = 10**5000
NAME = "encoder.layers.0.self_attn.q_proj.weight"

OF_A_MERGE: dict[str, tuple[Any, ...]] = {
    "k": (HUGE, "0.6", None, True, float("nan"), [0.5], {1: 0.5}, {NAME: HUGE}, torch.tensor(0.5), np.array([0.5, 1])),
    "lam": (HUGE, {None: 0.5}, {NAME: 0.5, f"model.{NAME}": 0.6}),
    "alpha": (HUGE, np.array([1.0, 2.0]), {NAME: True}),
    "targets": (HUGE, None, np.array(["encoder-qkv", "attention-qkv"])),
    "attention_scale": (HUGE, 1e300, -4e38, float("inf")),
    "num_heads": (HUGE, -HUGE, 0, 2.0, True, 10_001),
    "num_layers": (HUGE, 10**6),
    "backend": (HUGE, None, np.array(["auto", "cpu"])),
    "device": (HUGE, None, 0, "cuda:" + "9" * 400),
    "threads": (HUGE, 0, -1, 2.5, True, "2", 257),
}
"""Arguments that `hsa.merge` and `hsa.Merger` share, and values that they must refuse."""

OF_AN_OUTPUT: dict[str, tuple[Any, ...]] = {
    "non_attention_scale": (HUGE, 1e300),
    "numerics": (HUGE, None),
    "dtype": (HUGE, torch.float16),
    "assets_from": (HUGE, [], None),
    "max_shard_size": (HUGE, 0, -1, 2.5, True, b"5GB"),
    "card": (HUGE, ["title"], "title", {1: "a"}),
    "digest": (HUGE, "no", None, 0),
    "sync": ("no", 1),
    "overwrite": ("False", 1),
    "progress": (HUGE, "yes"),
}
"""Arguments of `hsa.merge` alone. A text such as "False" counts as true in Python: an output must not be lost by it."""


def cases(arguments: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in arguments.items()
        for number, value in enumerate(values)
    ]


def refused(call: Callable[..., Any], name: str, **arguments: Any) -> None:
    with pytest.raises(hsa.HsaError) as caught:
        call(**arguments)
    message = str(caught.value)
    assert message.startswith((name, "card field")), message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(("name", "value"), cases({**OF_A_MERGE, **OF_AN_OUTPUT}))
def test_a_bad_argument_of_merge_is_refused_in_one_line(
    shared_triple: Triple, tmp_path: Path, name: str, value: Any
) -> None:
    refused(hsa.merge, name, **{**shared_triple, "output": tmp_path / "out", name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), cases(OF_A_MERGE))
def test_a_bad_argument_of_merger_is_refused_in_one_line(shared_triple: Triple, name: str, value: Any) -> None:
    if name in ("k", "lam", "alpha"):
        merger = hsa.Merger(**shared_triple)
        refused(merger.merge, name, **{name: value})
        refused(merger.apply_, name, model=merger.merge(), **{name: value})
    else:
        refused(hsa.Merger, name, **{**shared_triple, name: value})
