"""NaN and Inf in sources, and numbers that overflow: refused by tensor and head."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from bad_input import COPIED, PLACES, ROLES, WEIGHT, Refuse, Triple, bits, damage, each_role
from helpers import (
    merge_arguments,
    poke,
    read_tensors,
)

from hsa.sources.checkpoint import INDEX, WEIGHTS
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

# A numpy warning of a worker thread would be a second line on stderr.
pytestmark = pytest.mark.filterwarnings("error")
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def triples_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Triple]:
    root = tmp_path_factory.mktemp("triples")
    return {dtype: write_triple(root / dtype, SHAPES["test"], dtype=dtype, processor=False) for dtype in DTYPES}  # type: ignore[arg-type]


@pytest.fixture
def triple_of(triples_once: dict[str, Triple], tmp_path: Path) -> Callable[[str], Triple]:
    """A copy of the triple of that dtype."""

    def copy(dtype: str) -> Triple:
        once = triples_once[dtype]
        return {role: Path(shutil.copytree(path, tmp_path / "sources" / role)) for role, path in once.items()}

    return copy


@each_role
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_not_finite_in_a_target(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, role: str, dtype: str, value: float, place: str
) -> None:
    triple = triple_of(dtype)
    tensor, element, head = PLACES[place]
    damage(triple[role], tensor, element, value, dtype)
    arguments = merge_arguments(triple, output, "--targets=attention-all")
    refuse(arguments, f"{role} {triple[role] / WEIGHTS}: tensor {tensor}, head {head} holds NaN or Inf", dry=False)


@each_role
@pytest.mark.parametrize("options", [["--k=0"], ["--lambda=1"], ["--k=1", "--lambda=0"], ["--dtype=float16"]])
def test_not_finite_in_a_target_that_may_not_matter(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, role: str, options: list[str]
) -> None:
    """Whether or not a source's value would reach the output, a damaged source is refused."""
    triple = triple_of("float32")
    damage(triple[role], WEIGHT, 7, math.nan, "float32")
    expected = f"{role} {triple[role] / WEIGHTS}: tensor {WEIGHT}, head 0 holds NaN or Inf"
    refuse(merge_arguments(triple, output, *options), expected, dry=False)


@each_role
def test_not_finite_in_reference_numerics(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, role: str
) -> None:
    triple = triple_of("float16")
    tensor, element, head = PLACES["weight"]
    damage(triple[role], tensor, element, math.inf, "float16")
    expected = f"{role} {triple[role] / WEIGHTS}: tensor {tensor}, head {head} holds NaN or Inf"
    refuse(merge_arguments(triple, output, "--numerics=reference"), expected, dry=False)


@each_role
def test_not_finite_in_a_shard(sharded: Triple, output: Path, refuse: Refuse, role: str) -> None:
    shard = json.loads((sharded[role] / INDEX).read_text())["weight_map"][WEIGHT]
    poke(sharded[role] / shard, WEIGHT, 0, bits(math.nan, "float32"))
    expected = f"{role} {sharded[role] / shard}: tensor {WEIGHT}, head 0 holds NaN or Inf"
    refuse(merge_arguments(sharded, output), expected, dry=False)


def test_not_finite_where_it_is_only_copied(
    triple_of: Callable[[str], Triple], output: Path, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    triple = triple_of("float32")
    for element, value in enumerate((math.nan, math.inf, -math.inf)):
        damage(triple["primary"], COPIED, element, value, "float32")
    poke(triple["primary"] / WEIGHTS, COPIED, 3, b"\x01\x00\xa0\xff")
    finish(merge_arguments(triple, output))
    before, after = (read_tensors(path)[COPIED].view(torch.int32) for path in (triple["primary"], output))
    assert torch.equal(before, after)


@pytest.mark.parametrize("role", ["base", "primary"])
def test_not_finite_where_it_is_scaled(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, role: str
) -> None:
    triple = triple_of("float32")
    damage(triple[role], COPIED, 0, math.inf, "float32")
    for more in ([], ["--numerics=reference"]):
        arguments = merge_arguments(triple, output, "--non-attention-scale=0.5", *more)
        refuse(arguments, f"{role} {triple[role] / WEIGHTS}: tensor {COPIED} holds NaN or Inf", dry=False)


@pytest.mark.parametrize("k", ["0", "1"])
@pytest.mark.parametrize("place", PLACES)
def test_float16_overflow_of_a_merged_value(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, k: str, place: str
) -> None:
    triple = triple_of("float16")
    tensor, element, head = PLACES[place]
    for role, value in (("base", -30000.0), ("primary", 30000.0), ("secondary", 30000.0)):
        damage(triple[role], tensor, element, value, "float16")
    arguments = merge_arguments(triple, output, "--targets=attention-all", "--attention-scale=3", f"--k={k}")
    expected = f"{triple['primary'] / WEIGHTS}: tensor {tensor}, head {head}: the result overflows F16"
    refuse(arguments, expected, "--dtype float32 or bfloat16", dry=False)


@pytest.mark.parametrize("k", ["0", "1"])
@pytest.mark.parametrize("place", PLACES)
def test_float16_overflow_of_a_cast_target(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, k: str, place: str
) -> None:
    triple = triple_of("float32")
    tensor, element, head = PLACES[place]
    damage(triple["primary"], tensor, element, 1e6, "float32")
    arguments = merge_arguments(triple, output, "--targets=attention-all", "--dtype=float16", f"--k={k}")
    expected = f"{triple['primary'] / WEIGHTS}: tensor {tensor}, head {head}: the result overflows F16"
    refuse(arguments, expected, dry=False)


def test_float16_overflow_of_a_cast_copy(triple_of: Callable[[str], Triple], output: Path, refuse: Refuse) -> None:
    triple = triple_of("bfloat16")
    damage(triple["primary"], COPIED, 3, -1e6, "bfloat16")
    expected = f"{triple['primary'] / WEIGHTS}: tensor {COPIED}: the result overflows F16"
    refuse(merge_arguments(triple, output, "--dtype=float16"), expected, dry=False)


@pytest.mark.parametrize(
    ("base", "primary", "secondary"), [(-3e38, 3e38, 0.0), (3e38, 0.0, -3e38), (0.0, 3e38, 3e38), (0.0, -3e38, 3e38)]
)
def test_float32_overflow_of_a_score(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, base: float, primary: float, secondary: float
) -> None:
    triple = triple_of("float32")
    for role, value in zip(ROLES, (base, primary, secondary), strict=True):
        damage(triple[role], WEIGHT, 0, value, "float32")
    expected = f"{triple['primary'] / WEIGHTS}: tensor {WEIGHT}, head 0: the result overflows F32"
    refuse(merge_arguments(triple, output), expected, dry=False)


def test_a_scale_beyond_float32_is_refused_by_name(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse
) -> None:
    triple = triple_of("float32")
    for option in ("--attention-scale", "--non-attention-scale"):
        refuse(merge_arguments(triple, output, f"{option}=1e300"), option, "float32 ends at 3.4e38")
