"""The CPU backend where numbers are not finite or overflow, and its slices of tensors that are no target."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cpu_cases import CODES, DTYPES, NAMES, POISON, ROLES, Case, buffer, check, draw, new_worker, ref, run, shape_of
from helpers import raw_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from hsa import reference
from hsa.architectures.base import Partition
from hsa.backends import array_block
from hsa.backends.base import NotFinite
from hsa.methods.hsa import HsaSettings
from hsa.methods.tensors import TensorTask
from hsa.planning.file_layout import Computed
from hsa.sources.roles import Role

# --- NaN, Inf and overflow ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("role", ROLES)
def test_a_source_that_is_not_finite_is_named_with_its_head(role: Role, dtype: torch.dtype, value: float) -> None:
    for kind, head, k in product(NAMES, (0, 2, 4), (0, 0.2, 1)):
        case = draw(shape_of(kind, 5, 3, 7), 5, dtypes=(dtype,) * 3, kind=kind, k=k)
        tensor = getattr(case, role).clone()
        tensor.chunk(5, dim=case.head_axis)[head][-1] = value
        with pytest.raises(NotFinite) as caught:
            run(replace(case, **{role: tensor}))
        assert (caught.value.role, caught.value.group) == (role, head)


def test_the_first_head_that_is_not_finite_is_named() -> None:
    case = draw((15, 4), 5)
    case.secondary[4, 0] = math.nan  # head 1
    case.primary[10, 0] = math.inf  # head 3
    with pytest.raises(NotFinite) as caught:
        run(case)
    assert (caught.value.role, caught.value.group) == ("secondary", 1)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_cast_that_overflows_names_the_head_and_no_source(kind: str, k: float, scale: float) -> None:
    case = draw(shape_of(kind, 5, 3, 7), 5, kind=kind, k=k, scale=scale, out=torch.float16)
    for role in ROLES:
        getattr(case, role).chunk(5, dim=case.head_axis)[3][-1] += 70000.0
    with pytest.raises(NotFinite) as caught:
        run(case)
    assert (caught.value.role, caught.value.group) == (None, 3)
    check(replace(case, out=torch.bfloat16))


def test_a_result_that_overflows_names_the_head_and_no_source() -> None:
    base = torch.zeros(6, 2)
    primary = base.clone()
    primary[4:] = 1e30
    case = Case(base, primary, primary / 2, heads=3, k=0.3, scale=1e10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotFinite) as caught:
            run(case)
    assert (caught.value.role, caught.value.group) == (None, 2)


@pytest.mark.parametrize("secondary", [3e38, -3e38, 0.0])
@pytest.mark.parametrize("base", [0.0, -3e38])
def test_differences_beyond_float32_are_refused_without_a_warning(base: float, secondary: float) -> None:
    case = Case(torch.full((6, 2), base), torch.full((6, 2), 3e38), torch.full((6, 2), secondary), heads=3)
    if base == 0.0 and secondary == 0.0:
        check(case)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotFinite) as caught:
            run(case)
    assert (caught.value.role, caught.value.group) == (None, 0)


# --- slices of tensors that are no target -------------------------------------------------------------------


def slice_of(primary: Tensor, base: Tensor | None, out: torch.dtype, scale: float) -> bytes:
    """A tensor that is no target, moved along primary's task vector, or cast where there is no base."""
    sources = {"primary": primary} if base is None else {"base": base, "primary": primary}
    task = TensorTask(
        name="other",
        place=None,
        layers=0,
        shape=tuple(primary.shape),
        partition=Partition(),
        sources={role: ref("other", tensor) for role, tensor in sources.items()},
        anchor="primary",
        out_code=CODES[out],
        output_name="other",
        merged=base is not None,
        listed=False,
    )
    held = np.full(primary.numel() * out.itemsize, POISON, np.uint8)
    worker = new_worker(HsaSettings(non_attention_scale=scale))
    buffers = {role: buffer(tensor) for role, tensor in sources.items()}
    decision = worker.method.decide(task, None, worker.settings, None) if task.merged else None
    worker.slice(Computed(task, 0, primary.numel()), buffers, held, decision, None)
    assert all(buffers[role].tobytes() == raw_bytes(tensor) for role, tensor in sources.items())
    return held.tobytes()


@pytest.mark.parametrize("scale", [0.0, 0.7, -0.5, 2.0])
@pytest.mark.parametrize("elements", [1, 63, array_block.TILE, array_block.TILE + 1])
def test_scaled_slices(elements: int, scale: float) -> None:
    for base_dtype, dtype, out in product(DTYPES, repeat=3):
        case = draw((elements,), 1, dtypes=(base_dtype, dtype, dtype))
        ours = slice_of(case.primary, case.base, out, scale)
        assert ours == raw_bytes(reference.merge_other(case.base, case.primary, scale=scale, out_dtype=out))


@pytest.mark.parametrize("elements", [1, 63, array_block.TILE, 2 * array_block.TILE + 1])
def test_cast_slices(elements: int) -> None:
    for dtype, out in product(DTYPES, repeat=2):
        primary = draw((elements,), 1, dtypes=(dtype,) * 3).primary
        ours = slice_of(primary, None, out, 1.0)
        assert ours == raw_bytes(primary.to(out))


def test_every_bfloat16_and_float16_pattern_is_cast_as_torch_casts_it() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        finite = every[torch.isfinite(every)].contiguous()
        for out in DTYPES:
            kept = finite[torch.isfinite(finite.to(out))].contiguous()
            ours = slice_of(kept, None, out, 1.0)
            assert ours == raw_bytes(kept.to(out))


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint32, st.integers(1, 200), elements=st.integers(0, 2**32 - 1)), st.sampled_from(DTYPES[1:]))
def test_float32_is_rounded_to_nearest_even(bits: Any, out: torch.dtype) -> None:
    values = torch.from_numpy(bits.view(np.float32).copy())
    values[~torch.isfinite(values.to(out))] = 1.0
    ours = slice_of(values, None, out, 1.0)
    assert ours == raw_bytes(values.to(out))


@pytest.mark.parametrize("base", [None, "base"])
def test_slices_that_are_not_finite(base: str | None) -> None:
    case = draw((array_block.TILE + 5,), 1)
    start = case.base if base else None
    case.primary[-1] = math.nan
    with pytest.raises(NotFinite) as caught:
        slice_of(case.primary, start, torch.float32, 2.0)
    assert caught.value.role == "primary"
    case.primary[-1] = 1e6
    with pytest.raises(NotFinite) as caught:
        slice_of(case.primary, start, torch.float16, 2.0)
    assert caught.value.role is None


def test_a_slice_whose_base_is_not_finite_names_base() -> None:
    case = draw((70,), 1)
    case.base[3] = math.inf
    with pytest.raises(NotFinite) as caught:
        slice_of(case.primary, case.base, torch.float32, 2.0)
    assert caught.value.role == "base"
