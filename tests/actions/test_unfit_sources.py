"""Sources that do not fit together: missing tensors, other shapes and head counts, and a likely mix-up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from bad_input import BIAS, COPIED, ROLES, WEIGHT, Refuse, Triple, change_tensors, damage, each_role
from helpers import (
    edit_json,
    merge_arguments,
    read_tensors,
    write_tensors,
)

from hsa.sources.checkpoint import CONFIG, WEIGHTS

# A numpy warning of a worker thread would be a second line on stderr.
pytestmark = pytest.mark.filterwarnings("error")


# Sources that do not fit together ----------------------------------------------------------------------------


@each_role
def test_target_missing_from_one_source(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    change_tensors(triple[role], lambda tensors: tensors.pop(WEIGHT))
    others = ", ".join(other for other in ROLES if other != role)
    bare = WEIGHT.removeprefix("model.")
    refuse(merge_arguments(triple, output), f"target tensor {bare} is missing from {role} and stands in {others}")


@each_role
def test_target_in_one_source_alone(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    extra = "encoder.layers.0.self_attn.k_proj.bias"
    change_tensors(triple[role], lambda tensors: tensors.update({f"model.{extra}": torch.zeros(64)}))
    others = ", ".join(other for other in ROLES if other != role)
    refuse(merge_arguments(triple, output), f"target tensor {extra} is missing from {others} and stands in {role}")


@each_role
def test_shapes_differ(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    change_tensors(triple[role], lambda tensors: tensors.update({WEIGHT: torch.zeros(32, 64)}))
    each = ", ".join(f"{other} {'[32, 64]' if other == role else '[64, 64]'}" for other in ROLES)
    bare = WEIGHT.removeprefix("model.")
    refuse(merge_arguments(triple, output), f"target tensor {bare}: the shape differs: {each}")


@each_role
def test_head_counts_differ(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    edit_json(triple[role] / CONFIG, encoder_attention_heads=2)
    each = ", ".join(f"{other} {2 if other == role else 4}" for other in ROLES)
    refuse(merge_arguments(triple, output), "target tensor encoder.layers.", f"the number of heads differs: {each}")


def test_head_counts_of_the_other_stack_do_not_matter(
    triple: Triple, output: Path, refuse: Refuse, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    edit_json(triple["secondary"] / CONFIG, decoder_attention_heads=2)
    arguments = merge_arguments(triple, output, "--targets=attention-qkv")
    refuse(arguments, "target tensor decoder.layers.", "base 4, primary 4, secondary 2")
    finish(merge_arguments(triple, output))


@each_role
@pytest.mark.parametrize("shape", [(64, 64, 1), (64,), (64, 0)])
def test_shapes_that_no_projection_has(
    triple: Triple, output: Path, refuse: Refuse, role: str, shape: tuple[int, ...]
) -> None:
    for path in triple.values():
        change_tensors(path, lambda tensors: tensors.update({WEIGHT: torch.zeros(shape)}))
    refuse(merge_arguments(triple, output), WEIGHT.removeprefix("model."), f"shape {list(shape)}, expected a matrix")


@each_role
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_targets_of_a_dtype_that_cannot_be_merged(
    triple: Triple, output: Path, refuse: Refuse, role: str, dtype: torch.dtype
) -> None:
    change_tensors(triple[role], lambda tensors: tensors.update({WEIGHT: torch.zeros(64, 64).to(dtype)}))
    code = {torch.float64: "F64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    file = triple[role] / WEIGHTS
    refuse(merge_arguments(triple, output), f"{role} {file}: target tensor {WEIGHT} has dtype {code}, expected", "BF16")


def test_no_target_anywhere(triple: Triple, output: Path, refuse: Refuse) -> None:
    for path in triple.values():
        tensors = {name.replace("q_proj.", "query."): tensor for name, tensor in read_tensors(path).items()}
        tensors = {name.replace("k_proj.", "key."): tensor for name, tensor in tensors.items()}
        write_tensors(path, {name.replace("v_proj.", "value."): tensor for name, tensor in tensors.items()})
    refuse(merge_arguments(triple, output), "holds no tensor that 'encoder-qkv' would merge", "q_proj.weight")


def test_a_tensor_that_a_scale_needs_is_missing_from_base(
    triple: Triple, output: Path, refuse: Refuse, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    change_tensors(triple["base"], lambda tensors: tensors.pop(COPIED))
    scaled = merge_arguments(triple, output, "--non-attention-scale=0.5")
    refuse(scaled, f"tensor {COPIED} is missing from base", "--non-attention-scale 0.5")
    notes = finish(merge_arguments(triple, output))
    assert any("1 tensors of primary are missing from base" in note for note in notes)


# A likely mix-up -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("numerics", ["exact", "reference"])
def test_base_equal_to_a_fine_tune_is_a_warning(
    triple: Triple, output: Path, finish: Callable[[Sequence[str]], list[str]], role: str, numerics: str
) -> None:
    """On the targets, that is: what is different elsewhere does not silence it."""
    shutil.copy(triple["base"] / WEIGHTS, triple[role] / WEIGHTS)
    damage(triple[role], COPIED, 0, 0.5, "float32")
    lines = finish(merge_arguments(triple, output, f"--numerics={numerics}"))
    warnings = [line for line in lines if line.startswith("hsa: warning: ")]
    assert len(warnings) == 1
    assert f"base and {role} are equal on all 10 target tensors" in warnings[0]
    assert (output / "hsa_merge.json").exists()
    assert read_tensors(output).keys() == read_tensors(triple["primary"]).keys()


def test_one_value_that_differs_is_no_mix_up(
    triple: Triple, output: Path, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    shutil.copy(triple["base"] / WEIGHTS, triple["secondary"] / WEIGHTS)
    damage(triple["secondary"], BIAS, 5, 0.5, "float32")
    assert not [line for line in finish(merge_arguments(triple, output)) if "are equal on all" in line]


def test_a_sound_merge_warns_of_nothing(
    triple: Triple, output: Path, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    assert finish(merge_arguments(triple, output)) == []
