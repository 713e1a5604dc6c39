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
    "assets_from": (HUGE, []),
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


# --- the other calls -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the other calls work on: an output, a patch and a recipe."""
    folder = tmp_path_factory.mktemp("made")
    hsa.merge(**shared_triple, output=folder / "merged", sync=False)
    hsa.merge_patch(**shared_triple, output=folder / "patch.safetensors", sync=False)
    entry = ", ".join(["name: one", "group: g", *(f"{role}: {path}" for role, path in shared_triple.items())])
    (folder / "recipe.yaml").write_text(f"merges:\n- {{{entry}}}\n")
    return {"output": folder / "merged", "patch": folder / "patch.safetensors", "recipe": folder / "recipe.yaml"}


NO_PATHS = (HUGE, None, [], 3, b"path")
OTHERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "sweep": {
        "k": (HUGE, [HUGE], 0.5, "0.5", None, [None], {"a": 1}, [{NAME: 0.5}]),
        "lam": (0.5, [HUGE], [2.0]),
        "alpha": ([HUGE], ["1"]),
        "targets": (None, "encoder-qkv", HUGE, ["decoder"]),
        "full": ("no", HUGE),
        "strict": ("no",),
        "jobs": (HUGE, "1"),
        "max_shard_size": (HUGE,),
        "progress": (3,),
        "base": NO_PATHS,
        "output": NO_PATHS,
    },
    "merge_patch": {"k": (HUGE,), "overwrite": ("no",), "secondary": NO_PATHS, "output": NO_PATHS},
    "merge": {"strict": ("no",), "base": NO_PATHS, "primary": NO_PATHS, "secondary": NO_PATHS, "output": NO_PATHS},
    "inspect": {"k": (HUGE,), "energy": ("no",), "progress": (3,), "base": NO_PATHS[2:], "primary": NO_PATHS[2:]},
    "verify": {"threads": (HUGE, 0), "progress": (3,), "output": NO_PATHS},
    "apply": {
        "threads": (HUGE,),
        "overwrite": ("no",),
        "sync": ("no",),
        "assets": (3, "abc", [HUGE]),
        "progress": (3,),
        "primary": NO_PATHS,
        "patch": NO_PATHS,
        "output": NO_PATHS,
    },
    "release": {
        "threads": (HUGE,),
        "overwrite": ("no",),
        "strict": ("no",),
        "progress": (3,),
        "watch": (3,),
        "recipe": NO_PATHS,
        "output": NO_PATHS,
    },
}


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        pytest.param(call, name, value, id=f"{call}-{name}-{number}")
        for call, arguments in OTHERS.items()
        for name, values in arguments.items()
        for number, value in enumerate(values)
    ],
)
def test_a_bad_argument_of_another_call_is_refused_in_one_line(
    shared_triple: Triple, made: dict[str, Path], tmp_path: Path, call: str, name: str, value: Any
) -> None:
    output = tmp_path / "new"
    given: dict[str, dict[str, Any]] = {
        "verify": {"output": made["output"]},
        "apply": {"primary": shared_triple["primary"], "patch": made["patch"], "output": output},
        "release": {"recipe": made["recipe"], "output": output},
        "inspect": {**shared_triple},
    }
    refused(getattr(hsa, call), name, **{**given.get(call, {**shared_triple, "output": output}), name: value})
    assert not output.exists()
