"""LoRA adapters that cannot be folded in: more than plain LoRA, or not made for this base."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import ADAPTER, WEIGHT, WIDTH, Refuse, Triple
from helpers import (
    merge_arguments,
    write_adapter,
)
from safetensors.torch import load_file, save_file

# A numpy warning of a worker thread would be a second line on stderr.
pytestmark = pytest.mark.filterwarnings("error")

each_tune = pytest.mark.parametrize("role", ["primary", "secondary"])
FOLD = "merge_and_unload"


def with_adapter(triple: Triple, role: str, **settings: Any) -> dict[str, Path]:
    directory = triple[role].parent / "adapter"
    write_adapter(directory, {WEIGHT: torch.empty(WIDTH, WIDTH)}, **settings)
    return {**triple, role: directory}


@each_tune
@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["proj_out"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"a_setting_of_tomorrow": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_more_than_plain_lora(
    triple: Triple,
    output: Path,
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    settings: dict[str, Any],
) -> None:
    """Without peft, which folds some of these in (tests/programs has them)."""
    monkeypatch.setitem(sys.modules, "peft", None)
    given = with_adapter(triple, role, **settings)
    (name,) = settings
    refuse(merge_arguments(given, output), f"{role}: {given[role] / 'adapter_config.json'}", name, FOLD)


@each_tune
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 4}, "have rank 3, and r is 4 in adapter_config.json"),
        ({"r": 0}, "has r = 0, expected a positive whole number"),
        ({"r": None}, "has r = None"),
        ({"lora_alpha": "8"}, "has lora_alpha = '8', expected a finite number"),
        ({"lora_alpha": 1e300}, "has lora_alpha = 1e+300"),
    ],
)
def test_an_adapters_rank_and_alpha(
    triple: Triple, output: Path, refuse: Refuse, role: str, settings: dict[str, Any], expected: str
) -> None:
    given = with_adapter(triple, role, **settings)
    refuse(merge_arguments(given, output), f"{role}: {given[role]}", expected)


AdapterTensors = dict[str, torch.Tensor]
ADAPTERS: dict[str, tuple[Callable[[str, torch.Tensor], AdapterTensors], tuple[str, ...]]] = {
    "unknown module": (
        lambda name, t: {name.replace("layers.1", "layers.7"): t},
        ("is for encoder.layers.7.self_attn.q_proj.weight, which base does not have", "trained on this base"),
    ),
    "wrong width": (lambda name, t: {name: torch.cat([t, t], 1)}, ("do not fit", "trained on this base")),
    "a magnitude": (lambda name, t: {name: t, f"{name}_magnitude_vector": t.clone()}, ("more than plain LoRA", FOLD)),
    "a saved module": (
        lambda name, t: {name: t, "base_model.model.proj_out.weight": t.clone()},
        ("more than plain", FOLD),
    ),
    "an integer": (lambda name, t: {name: t.int()}, ("has dtype I32, expected one of F32",)),
    "half a pair": (lambda name, t: {}, ("has no counterpart", "incomplete")),
}


@each_tune
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_tensors(triple: Triple, output: Path, refuse: Refuse, role: str, name: str) -> None:
    change, expected = ADAPTERS[name]
    given = with_adapter(triple, role)
    file = given[role] / "adapter_model.safetensors"
    tensors = load_file(file)
    changed: AdapterTensors = {}
    for key, tensor in tensors.items():
        changed |= change(key, tensor) if ".lora_A." in key or "module" in name else {key: tensor}
    save_file(changed, file)
    refuse(merge_arguments(given, output), f"{role}: {file}", *expected)


@each_tune
def test_an_adapter_without_weights(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    given = with_adapter(triple, role)
    (given[role] / "adapter_model.safetensors").unlink()
    refuse(merge_arguments(given, output), f"{role}: {given[role]} holds an adapter's config and no weights", ADAPTER)


@each_tune
def test_an_adapter_that_is_empty(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    given = with_adapter(triple, role)
    save_file({}, given[role] / "adapter_model.safetensors")
    refuse(merge_arguments(given, output), f"{role}: {given[role]}", "holds no tensor")


def test_an_adapter_as_base(triple: Triple, output: Path, refuse: Refuse) -> None:
    given = with_adapter(triple, "base")
    refuse(merge_arguments(given, output), f"base: {given['base']} holds a LoRA adapter", "the model it was trained on")


def test_nan_in_an_adapter(triple: Triple, output: Path, refuse: Refuse) -> None:
    given = with_adapter(triple, "secondary", scale=math.nan)
    file = given["secondary"] / "adapter_model.safetensors"
    refuse(merge_arguments(given, output), f"secondary {file}: tensor {WEIGHT}", "NaN or Inf", dry=False)
