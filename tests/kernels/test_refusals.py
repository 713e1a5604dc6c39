# ruff: noqa: E501 -- one refusal a line reads best
"""What the host refuses before a kernel starts, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from gpu import DEVICE, NO_DEVICE
from torch import Tensor

if NO_DEVICE:
    pytest.skip(NO_DEVICE, allow_module_level=True)

from hsa.kernels import projections, tuning
from hsa.kernels.launch import apply_heads, fused_merge, score_heads
from hsa.kernels.projections import KernelInputError, KernelTypeError, Projections


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(shape or (128, 64), dtype=dtype, device=DEVICE) for _ in range(2)]


def wide() -> Tensor:
    return torch.zeros(128 * 64 * 3, device=DEVICE)


def overlapping_outputs() -> dict[str, object]:
    memory = wide()
    return {"out": [memory[: 128 * 64].view(128, 64), memory[128 * 64 - 1 : 2 * 128 * 64 - 1].view(128, 64)]}


def output_on_base() -> dict[str, object]:
    base = tensors()
    return {"base": base, "out": [torch.zeros(128, 64, device=DEVICE), base[1]]}


def output_beside_primary() -> dict[str, object]:
    memory = wide()
    primary = [torch.zeros(128, 64, device=DEVICE), memory[: 128 * 64].view(128, 64)]
    return {"primary": primary, "out": [primary[0], memory[16 : 16 + 128 * 64].view(128, 64)]}


def output_on_another_primary() -> dict[str, object]:
    primary = tensors()
    return {"primary": primary, "out": [primary[1], primary[0]]}


def in_place_on_a_shared_tensor() -> dict[str, object]:
    shared = torch.zeros(128, 64, device=DEVICE)
    return {
        "primary": [shared, torch.zeros(128, 64, device=DEVICE)],
        "secondary": [torch.zeros(128, 64, device=DEVICE), shared],
    }


def same_primary_twice() -> dict[str, object]:
    shared = torch.zeros(128, 64, device=DEVICE)
    return {"primary": [shared, shared]}


def cast_over_primary() -> dict[str, object]:
    primary = tensors()
    out = [tensor.view(torch.float16).view(-1)[: 128 * 64].view(128, 64) for tensor in primary]
    return {"primary": primary, "out": out}


HERE = str(torch.zeros(1, device=DEVICE).device)
WANTED = "cpu (kernels are interpreted)" if DEVICE == "cpu" else "cuda"

REFUSED: list[tuple[str, Callable[[], dict[str, object]], type[Exception], str]] = [
    ("no sequence", lambda: {"base": torch.zeros(2, 128, 64)}, KernelTypeError, "base: expected a sequence"),
    ("no tensors", lambda: {"base": [], "primary": [], "secondary": []}, KernelInputError, "at least one"),
    ("no tensor", lambda: {"secondary": [torch.zeros(128, 64), 3]}, KernelTypeError, "secondary[1]: expected a tensor, found int"),
    ("too few", lambda: {"primary": tensors()[:1]}, KernelInputError, "primary: expected 2 tensors, as many as base, found 1"),
    ("float64", lambda: {"primary": tensors(dtype=torch.float64)}, KernelTypeError, "primary[0]: expected one of torch.float32"),
    ("integers", lambda: {"base": tensors(dtype=torch.int16)}, KernelTypeError, "base[0]: expected one of"),
    ("transposed", lambda: {"base": [t.t() for t in tensors(64, 128)]}, KernelInputError, "base[0]: expected a contiguous tensor, found strides (1, 128)"),
    ("sparse", lambda: {"base": [t.to_sparse() for t in tensors()]}, KernelInputError, "base[0]: expected a contiguous tensor, found layout"),
    ("other shape", lambda: {"secondary": tensors(64, 128)}, KernelInputError, "secondary[0]: expected the shape of base[0], (128, 64), found (64, 128)"),
    ("other device", lambda: {"secondary": [t.to("meta") for t in tensors()]}, KernelInputError, f"secondary[0]: expected device {HERE}, that of base[0], found meta"),
    ("wrong device", lambda: {"base": [t.to("meta") for t in tensors()]}, KernelInputError, f"base[0]: expected a tensor on device {WANTED}, found meta"),
    ("three axes", lambda: {r: tensors(2, 64, 64) for r in ("base", "primary", "secondary")}, KernelInputError, "base[0]: expected a weight [d_out, d_in] or a bias [d], found shape (2, 64, 64)"),
    ("empty", lambda: {r: tensors(0, 64) for r in ("base", "primary", "secondary")}, KernelInputError, "found shape (0, 64)"),
    ("heads that do not divide", lambda: {"heads": 3}, KernelInputError, "heads[0]: expected a divisor of 128, the size of axis 0 of base[0], found 3"),
    ("no heads", lambda: {"heads": [2, 0]}, KernelInputError, "heads[1]: expected 1 to 62, found 0"),
    ("too many heads", lambda: {"heads": 128}, KernelInputError, "heads[0]: expected 1 to 62, found 128"),
    ("heads of another count", lambda: {"heads": [2, 2, 2]}, KernelInputError, "heads: expected 2 numbers, one for each projection, found 3"),
    ("fractional heads", lambda: {"heads": [2, 2.0]}, KernelTypeError, "heads[1]: expected a whole number, found 2.0"),
    ("no such axis", lambda: {"head_axis": 2}, KernelInputError, "head_axis[0]: expected an axis of shape (128, 64), found 2"),
    ("axis of columns in a bias", lambda: {**{r: tensors(128) for r in ("base", "primary", "secondary")}, "head_axis": 1}, KernelInputError, "head_axis[0]: expected an axis of shape (128,), found 1"),
    ("outputs that overlap", overlapping_outputs, KernelInputError, "out[1] overlaps out[0]"),
    ("output on base", output_on_base, KernelInputError, "overlaps"),
    ("output beside primary", output_beside_primary, KernelInputError, "out[1] overlaps primary[1]"),
    ("output on another primary", output_on_another_primary, KernelInputError, "overlaps out"),
    ("in place on a shared tensor", in_place_on_a_shared_tensor, KernelInputError, "overlaps"),
    ("in place twice", same_primary_twice, KernelInputError, "overlaps out"),
    ("cast over primary", cast_over_primary, KernelInputError, "overlaps"),
]  # fmt: skip


def build(**changes: object) -> Projections:
    arguments: dict[str, object] = {"base": tensors(), "primary": tensors(), "secondary": tensors(), "heads": 2}
    return Projections(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("changes", "error", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_tensors_are_refused_by_name(changes: Callable[[], dict[str, object]], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        build(**changes())
    assert isinstance(raised.value, KernelInputError)
    assert isinstance(raised.value, ValueError)
    assert error is not KernelTypeError or isinstance(raised.value, TypeError)


def test_sources_may_share_memory() -> None:
    shared = tensors()
    plan = build(base=shared, secondary=shared, primary=shared, out=tensors())
    assert len(plan.groups) == 1
    memory = wide().view(3 * 128, 64)
    neighbours = [memory[:128], memory[128:256]]
    assert build(primary=neighbours).count == 2


GOOD = {"keep": 1, "c1": 0.5, "c2": 0.5}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": 3}, KernelInputError, "keep[0]: expected 0 to 2, found 3"),
        ({"keep": [1, -1]}, KernelInputError, "keep[1]: expected 0 to 2, found -1"),
        ({"keep": [1]}, KernelInputError, "keep: expected 2 numbers, one for each projection, found 1"),
        ({"keep": [1, 1.0]}, KernelTypeError, "keep[1]: expected a whole number, found 1.0"),
        ({"keep": torch.ones(2)}, KernelTypeError, "keep: expected torch.int32, found torch.float32"),
        ({"keep": torch.ones(3, dtype=torch.int32)}, KernelInputError, "keep: expected contiguous (2,), found shape (3,)"),
        ({"c1": math.nan}, KernelInputError, "c1[0]: expected a number finite in float32, found nan"),
        ({"c2": [0.5, math.inf]}, KernelInputError, "c2[1]: expected a number finite in float32, found inf"),
        ({"c2": [0.5, "a"]}, KernelTypeError, "c2[1]: expected a number, found 'a'"),
        ({"c1": [0.5] * 3}, KernelInputError, "c1: expected 2 numbers"),
        ({"c1": torch.ones(2, dtype=torch.float64)}, KernelTypeError, "c1: expected torch.float32, found torch.float64"),
        ({"c1": torch.ones(4)[::2]}, KernelInputError, "c1: expected contiguous (2,), found shape (2,), strides (2,)"),
        ({"c1": torch.ones(2, device="meta")}, KernelInputError, f"c1: expected device {HERE}, found meta"),
        ({"c1": 1e300}, KernelInputError, "c1[0]: expected a number finite in float32, found 1e+300"),
        ({"scale": math.inf}, KernelInputError, "scale: expected a number finite in float32, found inf"),
        ({"scale": "1"}, KernelTypeError, "scale: expected a number, found '1'"),
        ({"programs": 0}, KernelInputError, "programs: expected at least 1, found 0"),
    ],
)  # fmt: skip
def test_parameters_are_refused_by_name(changes: dict[str, object], error: type, message: str) -> None:
    plan = build()
    with pytest.raises(error, match=re.escape(message)):
        fused_merge(plan, **{**GOOD, **changes})  # type: ignore[arg-type]
    if "programs" not in changes:
        with pytest.raises(error, match=re.escape(message)):
            apply_heads(plan, score_heads(plan), **{**GOOD, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (torch.zeros(2, 32), KernelTypeError, "scores: expected torch.float64, found torch.float32"),
        (torch.zeros(2, 2, dtype=torch.float64), KernelInputError, "scores: expected contiguous (2, 32), found shape (2, 2)"),
        ([[1.0]], KernelTypeError, "scores: expected a tensor, found list"),
    ],
)  # fmt: skip
def test_scores_are_refused_by_name(scores: object, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        apply_heads(build(), scores, **GOOD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{"rows": 8}, {"rows": 48}, {"warps": 0}, {"held": 0}, {"held": 3}, {"per_processor": 0}]
)
def test_tuning_is_checked(changes: dict[str, int]) -> None:
    good = {
        "rows": 64,
        "warps": 8,
        "stages": 1,
        "registers": 128,
        "fused_registers": 128,
        "per_processor": 1,
        "held": 2,
    }
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        tuning.Tuning(**{**good, **changes})


def test_tuning_is_chosen_by_bytes_shapes_and_device() -> None:
    assert tuning.choose([2, 2, 2, 2], True, True, "any") is tuning.NARROW
    assert tuning.choose([2, 4, 2, 2], True, True, "any") is tuning.WIDE
    assert tuning.choose([2, 2, 2, 4], True, True, "any") is tuning.WIDE
    assert tuning.choose([2, 2, 2, 2], False, False, "any") is tuning.UNALIGNED
    for part, measured in tuning.BY_DEVICE.items():
        device = f"NVIDIA {part} of some kind"
        for size, entry in measured.items():
            assert tuning.choose([size] * 4, True, True, device) is entry
            assert tuning.choose([size] * 4, True, False, device) in (tuning.NARROW, tuning.WIDE)
            assert tuning.choose([size] * 4, False, False, device) is tuning.UNALIGNED
        assert tuning.choose([4, 4, 4, 2], True, True, device) is measured.get(4, tuning.WIDE)
        assert tuning.choose([2, 2, 2, 4], True, True, device) is tuning.WIDE
        assert tuning.choose([2, 4, 4, 4], True, True, device) is tuning.WIDE


@pytest.mark.parametrize(
    ("major", "version", "exact"),
    [
        (10, "3.6.0", False),
        (12, "3.6.1", False),
        (10, "3.7.1", True),
        (10, "3.10.0", True),
        (9, "3.6.0", True),
        (8, "3.6.0", True),
    ],
)
def test_a_triton_that_fuses_multiply_adds_is_known(major: int, version: str, exact: bool) -> None:
    """What compile_check finds in code for capability 10.0 when Triton 3.6 compiles it."""
    assert (projections.inexact(major, version) == "") == exact
    if not exact:
        assert version in projections.inexact(major, version)
