"""The CPU backend against the oracle: merged bytes equal, scores to rounding."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cpu_cases import DTYPES, NAMES, ROLES, Case, check, draw, new_worker, run, shape_of
from helpers import raw_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from hsa import reference
from hsa.backends import array_block, cpu


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles so small that every head takes several, with rows that do not fill the last."""
    monkeypatch.setattr(cpu, "TILE", 48)
    return 48


# --- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [None, *DTYPES], ids=lambda dtype: str(dtype or "auto").removeprefix("torch."))
@pytest.mark.parametrize("kind", NAMES)
def test_every_mix_of_element_types(kind: str, out: torch.dtype | None) -> None:
    worker = new_worker()
    for number, dtypes in enumerate(product(DTYPES, repeat=3)):
        case = draw(shape_of(kind, 5, 3, 19), 5, dtypes=dtypes, kind=kind, out=out, seed=number)
        merged = check(case, worker)
        assert len(merged.decision.selected) == 3
        for scale in (0.0, -0.5, 2.0):
            check(replace(case, scale=scale), worker)


@pytest.mark.parametrize("heads", [1, 3, 5, 7])
@pytest.mark.parametrize(("head_dim", "other"), [(1, 1), (3, 5), (5, 37), (7, 65), (4, 127), (2, 128), (3, 192)])
@pytest.mark.parametrize("kind", NAMES)
def test_odd_shapes(kind: str, heads: int, head_dim: int, other: int, small_tiles: int) -> None:
    for dtypes in ((torch.float32,) * 3, (torch.float16, torch.float32, torch.bfloat16)):
        check(draw(shape_of(kind, heads, head_dim, other), heads, dtypes=dtypes, kind=kind))


@pytest.mark.parametrize(
    ("kind", "heads", "head_dim", "other"),
    [
        ("weight", 3, 1, array_block.TILE + 77),  # a row wider than a tile
        ("columns", 1, array_block.TILE + 64, 2),
        ("bias", 3, array_block.TILE + 1, 1),
        ("weight", 3, 45, 1001),  # a head of two tiles, the second partial
        ("columns", 5, 33, 1111),
        ("weight", 2, 64, 1024),  # a head of exactly two tiles
    ],
)
def test_heads_of_several_real_tiles(kind: str, heads: int, head_dim: int, other: int) -> None:
    check(draw(shape_of(kind, heads, head_dim, other), heads, kind=kind))
    check(draw(shape_of(kind, heads, head_dim, other), heads, kind=kind, dtypes=(torch.bfloat16,) * 3, out=torch.half))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, 2.0, 0.1])
@pytest.mark.parametrize("k", [0, 1, 1e-9, 0.3, 60, 100])
@pytest.mark.parametrize("kind", NAMES)
def test_shares_and_scales(kind: str, k: float, scale: float) -> None:
    for dtypes in ((torch.float32,) * 3, (torch.float32, torch.float16, torch.float32)):
        merged = check(draw(shape_of(kind, 7, 3, 11), 7, dtypes=dtypes, kind=kind, k=k, scale=scale))
        assert len(merged.decision.selected) == {0: 0, 1: 7, 1e-9: 1, 0.3: 2, 60: 4, 100: 7}[k]


@pytest.mark.parametrize("lam", [0.0, 1.0, 0.3, 1e-30])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 50.0])
@pytest.mark.parametrize("out", [None, torch.bfloat16])
def test_coefficients(lam: float, alpha: float, out: torch.dtype | None) -> None:
    case = draw((15, 8), 5, lam=lam, alpha=alpha, out=out, layer=3, layers=4)
    check(case)
    if lam == 1.0 or alpha == 0.0:  # lambda_i is 1: B + tv1, which is primary but for that sum's rounding
        ours, _ = run(replace(case, out=None))
        value = torch.frombuffer(bytearray(ours), dtype=torch.float32).view(15, 8)
        rounding = 2.0**-24 * (value.abs() + 2 * (case.primary - case.base).abs())
        assert ((value - case.primary).abs() <= rounding).all()


def test_lambda_zero_and_every_head_gives_secondary_up_to_rounding() -> None:
    case = draw((15, 8), 5, k=1, lam=0.0, alpha=1.0)
    out, _ = run(case)
    value = torch.frombuffer(bytearray(out), dtype=torch.float32).view(15, 8)
    rounding = 2.0**-24 * (value.abs() + 2 * (case.secondary - case.base).abs())
    assert ((value - case.secondary).abs() <= rounding).all()
    assert not torch.equal(value, case.primary)


def test_ties_at_the_cut_are_all_merged() -> None:
    base = torch.zeros(10, 6)
    strength = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0]).repeat_interleave(2)[:, None]
    primary = (base + strength).contiguous()
    case = Case(base, primary, -primary, heads=5, k=0.4)  # keep 2: the second place is shared by three
    merged = check(case)
    assert merged.decision.selected == (0, 2, 3, 4)
    assert merged.decision.margin == (16 - 4) / 16


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("k", [0, 0.2, 1])
def test_all_equal_inputs(kind: str, k: float) -> None:
    tensor = torch.full(shape_of(kind, 5, 3, 7), 0.3)
    merged = check(Case(tensor, tensor, tensor, heads=5, kind=kind, k=k))
    assert merged.decision.selection.squared == (0.0,) * 5
    assert merged.decision.selected == (() if k == 0 else (0, 1, 2, 3, 4))
    assert (merged.decision.measured.primary_differs, merged.decision.measured.secondary_differs) == (False, False)


def test_a_moved_source_is_told_apart_even_by_one_element() -> None:
    base = torch.full((9, 4), 0.3)
    other = base.clone()
    other[8, 3] = 0.5
    assert check(Case(base, other, base, heads=3)).decision.measured.primary_differs
    assert not check(Case(base, other, base, heads=3)).decision.measured.secondary_differs
    assert check(Case(base, base, other, heads=3)).decision.measured.secondary_differs
    assert not check(Case(base, base, other, heads=3)).decision.measured.primary_differs


@pytest.mark.parametrize("kind", NAMES)
def test_one_head_selected_is_a_range_of_its_own(kind: str) -> None:
    case = draw(shape_of(kind, 5, 2, 3), 5, kind=kind, k=0.2)
    _, merged = run(case)
    (head,) = merged.decision.selected
    whole = case.base.numel() * 4
    expected = (0, whole) if kind == "columns" else (head * whole // 5, (head + 1) * whole // 5)
    assert merged.changed == (expected,)


def test_signed_zeros_and_subnormals_survive() -> None:
    for dtype in DTYPES:
        tiny = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=dtype) * torch.finfo(dtype).smallest_normal
        primary = torch.stack([tiny, tiny / 4, -tiny])
        check(Case(torch.zeros(3, 4, dtype=dtype), primary, primary.flip(0), heads=3, k=0.4))
        check(Case(primary, primary / 2, -primary, heads=3, k=1, scale=0.5))


ELEMENTS = st.integers(-48, 48).map(lambda n: n / 16)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shape, type and parameter; values whose squares sum exactly, so that ties are ties everywhere."""
    heads, head_dim, other = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(list(NAMES)))
    shape = shape_of(kind, heads, head_dim, other)
    tensors = [
        torch.from_numpy(draw(arrays(np.float32, shape, elements=ELEMENTS))).to(draw(st.sampled_from(DTYPES)))
        for _ in range(3)
    ]
    layers = draw(st.integers(1, 32))
    return Case(
        *tensors,
        heads=heads,
        kind=kind,
        k=draw(st.one_of(st.sampled_from([0.0, 1.0, 0.6, 60.0]), st.floats(0, 100))),
        lam=draw(st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1))),
        alpha=draw(st.one_of(st.sampled_from([0.0, 0.2]), st.floats(0, 10))),
        layer=draw(st.integers(0, layers - 1)),
        layers=layers,
        scale=draw(st.one_of(st.just(1.0), st.floats(-3, 3, width=32))),
        out=draw(st.sampled_from([None, *DTYPES])),
    )


@settings(max_examples=250, deadline=None)
@given(cases())
def test_bytes_are_the_oracles(case: Case) -> None:
    check(case)


@settings(max_examples=60, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_permuting_the_heads_permutes_the_result(case: Case, random: Any) -> None:
    order = list(range(case.heads))
    random.shuffle(order)

    def permuted(tensor: Tensor) -> Tensor:
        parts = tensor.chunk(case.heads, dim=case.head_axis)
        return torch.cat([parts[head] for head in order], dim=case.head_axis)

    moved = replace(case, **{role: permuted(getattr(case, role)) for role in ROLES})
    out, merged = run(case)
    result = torch.frombuffer(bytearray(out), dtype=case.out_dtype).view(case.base.shape)
    ours, theirs = run(moved)
    assert ours == raw_bytes(permuted(result))
    assert theirs.decision.selection.squared == tuple(merged.decision.selection.squared[head] for head in order)


# --- scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-25, 1e-12, 1e-3, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("kind", NAMES)
def test_score_error_against_float64(delta: float, kind: str) -> None:
    """Base is as small as its task vectors, so that the differences themselves lose little."""
    case = draw(shape_of(kind, 3, 64, 320), 3, delta=delta, base=delta, kind=kind)
    _, merged = run(case)
    wide = reference.head_scores(
        case.base, case.primary, case.secondary, heads=3, head_axis=case.head_axis, dtype=torch.float64
    )
    assert min(merged.decision.selection.squared) > 0
    for ours, exact in zip(merged.decision.selection.squared, wide.tolist(), strict=True):
        assert abs(ours - exact) < 1e-6 * exact
        assert abs(math.sqrt(ours) - math.sqrt(exact)) < 1e-6 * math.sqrt(exact)
    assert merged.decision.scores == tuple(map(math.sqrt, merged.decision.selection.squared))


def test_scores_of_one_size_in_many_elements_do_not_drift() -> None:
    base = torch.zeros(2, 1 << 20)
    case = Case(base, base + 0.1, base + 0.1, heads=2)
    _, merged = run(case)
    exact = float(np.float32(0.1) * 2) ** 2 * (1 << 20)
    assert merged.decision.selection.squared == pytest.approx((exact, exact), rel=1e-12, abs=0)


# --- the same every time ------------------------------------------------------------------------------------


def test_workers_threads_and_reuse_change_nothing() -> None:
    many = [
        draw(shape_of(kind, 5, 7, 300), 5, kind=kind, dtypes=dtypes, seed=seed)
        for seed, (kind, dtypes) in enumerate(product(NAMES, [(torch.float32,) * 3, (torch.float16,) * 3]))
    ]
    alone = [run(case) for case in many]
    worker = new_worker()
    assert [run(case, worker=worker) for case in reversed(many)] == alone[::-1]
    with ThreadPoolExecutor(5) as pool:
        for _ in range(4):
            assert list(pool.map(run, many)) == alone


def test_tile_size_changes_no_merged_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [draw(shape_of(kind, 3, 8, 128), 3, kind=kind) for kind in NAMES]
    expected = [run(case)[0] for case in many]
    for tile in (1, 31, 1000):
        monkeypatch.setattr(cpu, "TILE", tile)
        assert [run(case)[0] for case in many] == expected
