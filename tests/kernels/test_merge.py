"""The kernels against the oracle, on a GPU or interpreted, for which `test_process` starts a process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu import DEVICE, NO_DEVICE
from torch import Tensor

from hsa import reference

if NO_DEVICE:
    pytest.skip(NO_DEVICE, allow_module_level=True)

import triton
import triton.language as tl
from hsa.kernels import fused, headwise, tuning
from hsa.kernels.launch import (
    KernelFault,
    NonFiniteInput,
    NonFiniteResult,
    apply_heads,
    check,
    faults,
    fused_merge,
    score_heads,
)
from hsa.kernels.primitives import magnitude, rounded
from hsa.kernels.projections import Projections
from hsa.kernels.tuning import NARROW, UNALIGNED, Tuning
from kernel_problems import (
    BF16,
    BITS,
    F16,
    F32,
    LARGE,
    LAYER,
    MIXES,
    Parameters,
    Problem,
    assert_equal,
    assert_merges,
    expected,
    make,
    poison,
    same_bits,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("programs", [1, 3, 16])
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_dtypes_at_every_grid_equals_the_oracle(mix: str, programs: int) -> None:
    assert_merges(make(LAYER, 2, mix, [0, 0, 1]), Parameters(k=0.5), programs, two_launches=programs == 3)


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (192, 3), (384, 6), (512, 8), (768, 12), (1280, 20)])
@pytest.mark.parametrize("mix", ["float32", "float16"])
def test_every_width_of_whisper(width: int, heads: int, mix: str) -> None:
    assert_merges(make([(width, width), (width,)], heads, mix), tuned=LARGE)


@pytest.mark.parametrize("heads", [1, 5, 16, 20])
def test_columns_of_out_proj(heads: int) -> None:
    width = 64 * heads
    assert_merges(make([(width, width)], heads, "float16", [1]), tuned=LARGE)


def test_default_slabs_cover_a_head_of_many() -> None:
    assert_merges(make([(384, 384), (384, 384)], 6, "float16", [0, 1]))


@pytest.mark.parametrize(
    ("shape", "heads", "axis"),
    [
        ((30, 7), 3, 0),
        ((63,), 9, 0),
        ((20, 70), 7, 1),
        ((1, 1), 1, 0),
        ((130, 65), 2, 0),
        ((5, 190), 1, 1),
        ((62,), 62, 0),
    ],
)
@pytest.mark.parametrize("mix", ["float32", "float16-new"])
def test_shapes_that_fill_no_tile(shape: tuple[int, ...], heads: int, axis: int, mix: str) -> None:
    problem = make([shape], heads, mix, [axis])
    assert not problem.plan().groups[0].variant.aligned
    assert_merges(problem)


@pytest.mark.parametrize("role", ["base", "primary", "secondary", "out"])
def test_storage_that_is_not_aligned(role: str) -> None:
    problem = make(LAYER, 2, "float16-new", [0, 0, 1])
    wanted = expected(problem, Parameters())
    tensors = getattr(problem, role)
    for g, tensor in enumerate(tensors):
        moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:].view(tensor.shape)
        tensors[g] = moved.copy_(tensor)
    plan = problem.plan()
    assert [group.variant.aligned for group in plan.groups] == [False]
    c1, c2 = Parameters().weights
    scores, selected = fused_merge(plan, 1, c1, c2, programs=3)
    assert_equal(problem, scores, selected, wanted)
    for tensor in problem.results:
        tensor.copy_(poison(tensor))
    assert_equal(problem, score_heads(plan), apply_heads(plan, score_heads(plan).clone(), 1, c1, c2), wanted)


def test_one_tensor_that_is_not_aligned_leaves_the_others_fast() -> None:
    problem = make(LAYER, 2, "float16", [0, 0, 1])
    problem.base[1] = torch.empty(129, dtype=F16, device=DEVICE)[1:].copy_(problem.base[1])
    assert sorted(group.variant.aligned for group in problem.plan().groups) == [False, True]
    wanted = expected(problem, Parameters())
    c1, c2 = Parameters().weights
    scores, selected = fused_merge(problem.plan(), 1, c1, c2)
    assert_equal(problem, scores, selected, wanted)


def test_a_write_stays_inside_its_tensor() -> None:
    guard = 64
    for shape, axis in (((30, 7), 0), ((128, 128), 1), ((128,), 0)):
        problem = make([shape], 2, "float32-new", [axis])
        size = math.prod(shape)
        whole = torch.full((size + 2 * guard,), 7.0, device=DEVICE)
        problem.out = [whole[guard : guard + size].view(shape)]
        fused_merge(problem.plan(), 1, 0.5, 0.5)
        assert (whole[:guard] == 7).all()
        assert (whole[-guard:] == 7).all()
        assert not (whole[guard:-guard] == 7).any()


@pytest.mark.parametrize("k", [0.0, 0.01, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("mix", ["float32", "to-float16"])
def test_keep_none_one_some_all(k: float, mix: str) -> None:
    assert_merges(make([(256, 64), (256,)], 4, mix), Parameters(k=k))


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("mix", ["float32", "bfloat16"])
def test_coefficients_at_their_ends(lam: float, mix: str) -> None:
    assert_merges(make([(256, 64), (256,)], 4, mix), Parameters(lam=lam))


@pytest.mark.parametrize("scale", [0.7, -1.5, 0.0, 1.0 + 2**-40])
@pytest.mark.parametrize("mix", ["float32", "float16", "bfloat16-new", "to-float16"])
def test_a_scale_moves_every_head(scale: float, mix: str) -> None:
    """A scale that float32 rounds to 1 is still no 1: B + (M1 - B) is then not M1, where B is much the greater."""
    problem = make([(256, 64), (256,)], 4, mix)
    problem.base[0][::64, :8], problem.primary[0][::64, :8] = 1.0, 1e-9
    assert_merges(problem, Parameters(scale=scale))


@pytest.mark.parametrize(("k", "place"), [(0.25, -1), (0.5, -1), (0.75, 0), (0.5, 0)])
@pytest.mark.parametrize("mix", ["float32", "float16-new"])
def test_ties_at_the_cut_are_all_selected(k: float, place: int, mix: str) -> None:
    """Five of eight heads are equal to the one of the greatest score (place -1), or of the least (0)."""
    problem = make([(512, 24), (512,)], 8, mix)
    ranking = expected(problem, Parameters())[0].squared_scores.argsort()
    source, others = ranking[place], ranking[1:5] if place == 0 else ranking[3:7]
    for role in (problem.base, problem.primary, problem.secondary):
        for tensor in role:
            heads = tensor.view(8, 64, -1)
            heads[others] = heads[source].clone()
    weight = expected(problem, Parameters(k=k))[0]
    assert len(weight.selected) == (5 if place == -1 else 8) > reference.keep_count(k, 8)
    assert_merges(problem, Parameters(k=k))


def test_equal_models_select_all_heads_and_keep_their_values() -> None:
    problem = make([(256, 64)], 4)
    problem.primary = [tensor.clone() for tensor in problem.base]
    problem.secondary = [tensor.clone() for tensor in problem.base]
    plan = problem.plan()
    scores, selected = fused_merge(plan, 1, 0.3, 0.7)
    assert not scores.any()
    assert selected[0, :4].all()
    assert same_bits(problem.primary[0], problem.base[0])


def test_permuted_heads_give_the_permuted_result() -> None:
    problem = make([(512, 64)], 8, "float32-new")
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])

    def permuted(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.view(8, 64, -1)[order].reshape(tensor.shape).contiguous() for tensor in tensors]

    other = Problem(permuted(problem.base), permuted(problem.primary), permuted(problem.secondary),
                    [poison(problem.out[0])], 8, [0])  # fmt: skip
    first, second = problem.plan(), other.plan()
    _, selected = fused_merge(first, 5, 0.9, 0.1)
    _, moved = fused_merge(second, 5, 0.9, 0.1)
    assert selected[0, :8].sum() == 5
    assert torch.equal(selected[0, order], moved[0, :8])
    assert same_bits(permuted(problem.out)[0], other.out[0])


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_unselected_heads_keep_every_bit(dtype: torch.dtype) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32)
    values = bits.to(torch.int16).view(dtype) if dtype != F32 else (bits << 16 | (bits * 2 & 0xFFFF)).view(F32)
    ordinary = torch.where(values.isfinite(), values, torch.zeros((), dtype=dtype))
    ordinary = torch.where(ordinary.abs() < 1e15, ordinary, torch.ones((), dtype=dtype)).view(1024, 64).to(DEVICE)
    assert (ordinary.view(BITS[dtype]) == torch.tensor(-0.0, dtype=dtype).view(BITS[dtype])).any()
    problem = Problem([ordinary.clone()], [ordinary.clone()], [ordinary.clone()], [poison(ordinary)], 2, [0])
    _, selected = fused_merge(problem.plan(), 0, 0.5, 0.5)
    assert not selected.any()
    assert same_bits(problem.out[0], ordinary)


@triton.jit
def _round_kernel(source, out, DTYPE: tl.constexpr, N: tl.constexpr):  # noqa: N803
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + lanes, rounded(tl.load(source + lanes), DTYPE))


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    high = torch.arange(0, 1 << 16, 3, dtype=torch.int32)
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    bits = ((high[:, None] << 16) | lows[None, :]).flatten()[: 1 << 17]
    assert len(bits) == 1 << 17
    source, out = bits.view(F32).to(DEVICE), torch.empty(len(bits), dtype=BF16, device=DEVICE)
    _round_kernel[(128,)](source, out, DTYPE=tl.bfloat16, N=len(bits) // 128)
    wanted, out = source.cpu().to(BF16), out.cpu()
    numbers = ~wanted.isnan()
    assert numbers.sum() > 1000
    assert same_bits(out[numbers], wanted[numbers])
    assert out[~numbers].isnan().all()
    assert (~numbers).any()


@triton.jit
def _magnitude_kernel(source, out):
    rows = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out, magnitude(tl.load(source + rows)))


@pytest.mark.parametrize(("value", "bad"), [(math.nan, True), (math.inf, True), (-math.inf, True), (-3.4e38, False)])
def test_magnitude_tells_numbers_from_the_rest(value: float, bad: bool) -> None:
    source, out = torch.zeros(256, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    source[77] = value
    _magnitude_kernel[(1,)](source, out)
    assert (out.item() >= 0x7F800000) == bad


# --- numbers that are not finite, or nearly not ---------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
@pytest.mark.parametrize("mix", ["float16", "float32-new"])
def test_a_source_that_is_not_finite_stops_its_projection_alone(role: str, value: float, mix: str) -> None:
    problem = make([(256, 64), (256, 64), (256,)], 4, mix)
    getattr(problem, role)[1][130, 5] = value
    untouched = problem.results[1].clone()
    parameters = Parameters(k=0.5)
    whole = problem.fresh()
    plan = problem.plan()
    _, selected = fused_merge(plan, 2, *parameters.weights, programs=3)
    assert faults(plan) == [KernelFault(1, 2, role), KernelFault(1, 2, "score")]
    assert same_bits(problem.results[1], untouched)
    assert not selected[1].any()
    wanted = expected(whole, parameters)
    for g in (0, 2):
        assert same_bits(problem.results[g], wanted[g].value)
    with pytest.raises(NonFiniteInput, match=rf"{role} of projection 1, head 2 \(and 1 more\)") as raised:
        check(plan)
    assert raised.value.faults[0] == KernelFault(1, 2, role)

    apart = whole.fresh()
    untouched = apart.results[1].clone()
    plan = apart.plan()
    scores = score_heads(plan)
    assert faults(plan) == [KernelFault(1, 2, role), KernelFault(1, 2, "score")]
    selected = apply_heads(plan, scores, 2, *parameters.weights)
    assert faults(plan) == [KernelFault(1, 2, "score")]
    assert not selected[1].any()
    assert same_bits(apart.results[1], untouched)
    assert same_bits(apart.results[0], wanted[0].value)


def test_faults_are_those_of_the_last_launch() -> None:
    problem = make([(256, 64)], 4)
    plan = problem.plan()
    problem.secondary[0][0, 0] = math.nan
    score_heads(plan)
    assert faults(plan)
    problem.secondary[0][0, 0] = 0.0
    score_heads(plan)
    assert faults(plan) == []


@pytest.mark.parametrize("keep", [0, 4])
def test_a_result_that_overflows_is_found(keep: int) -> None:
    problem = make([(256, 64), (256, 64)], 4, "float16-new")
    problem.base[1].zero_()
    problem.primary[1][70, 3] = problem.secondary[1][70, 3] = 40000.0
    plan = problem.plan()
    fused_merge(plan, keep, 0.5, 0.5, scale=2.0)
    assert faults(plan) == [KernelFault(1, 1, "result")]
    with pytest.raises(NonFiniteResult, match=r"result of projection 1, head 1: .*loaded again"):
        check(plan)
    apply_heads(plan, score_heads(plan).clone(), keep, 0.5, 0.5, scale=2.0)
    assert faults(plan) == [KernelFault(1, 1, "result")]


@pytest.mark.parametrize("seed", range(4))
def test_a_result_that_overflows_changes_no_score(seed: int) -> None:
    """Two heads with the same task vectors tie, though what one of them becomes overflows."""
    moved = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).repeat(2, 1).to(DEVICE, F16)
    base, tunes = torch.zeros_like(moved), moved
    base[0, 0], base[64, 0] = 60000.0, -60000.0
    tunes[0, 0], tunes[64, 0] = 60000.0 + 2016, -60000.0 + 2016
    problem = Problem([base], [tunes], [tunes.clone()], [poison(base)], 2, [0])
    plan = problem.plan()
    overflow = [KernelFault(0, 0, "result")]
    scores, selected = fused_merge(plan, 1, 2.0, 2.0)
    assert selected[0].nonzero().flatten().tolist() == [0, 1]
    assert faults(plan) == overflow
    assert scores[0, 0] == scores[0, 1]
    selected = apply_heads(plan, score_heads(plan), 1, 2.0, 2.0)
    assert selected[0].nonzero().flatten().tolist() == [0, 1]
    assert faults(plan) == overflow


@pytest.mark.parametrize(("mix", "value"), [("to-float16", 70000.0), ("to-bfloat16", 3.4e38)])
def test_a_cast_that_overflows_is_found(mix: str, value: float) -> None:
    problem = make([(256, 64)], 4, mix)
    problem.primary[0][200, 9] = value
    plan = problem.plan()
    fused_merge(plan, 0, 0.5, 0.5)
    assert faults(plan) == [KernelFault(0, 3, "result")]


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-19, 1e19, 1e25, 1e37])
@pytest.mark.parametrize("shape", [(256, 64), (28, 9)])
def test_scores_are_right_at_the_ends_of_float32(size: float, shape: tuple[int, int]) -> None:
    problem = make([shape], 4, "float32-new")
    generator = torch.Generator().manual_seed(1)
    problem.base[0].zero_()
    for role in (problem.primary, problem.secondary):
        role[0].copy_((torch.rand(shape, generator=generator) + 0.5) * size)
    assert_merges(problem, Parameters(k=0.5))


def test_task_vectors_that_overflow_are_refused() -> None:
    problem = make([(256, 64)], 4)
    problem.base[0][0, 0], problem.primary[0][0, 0] = -3e38, 3e38
    plan = problem.plan()
    fused_merge(plan, 2, 0.5, 0.5)
    assert faults(plan) == [KernelFault(0, 0, "score")]


# --- many projections, many calls -----------------------------------------------------------------------------


@pytest.mark.parametrize("held", [1, 2])
@pytest.mark.parametrize("programs", [1, 16])
def test_projections_of_all_kinds_in_one_plan(held: int, programs: int) -> None:
    parts = [make(LAYER, 2, mix, [0, 0, 1], seed=i) for i, mix in enumerate(("float32", "float16-new", "float16"))]
    rows = Tuning(rows=64, warps=8, stages=1, registers=128, fused_registers=128, per_processor=1, held=held)
    wanted = [expected(part, Parameters(k=0.5)) for part in parts]
    roles = [[tensor for part in parts for tensor in getattr(part, role)] for role in ("base", "primary", "secondary")]
    out = [tensor for part in parts for tensor in part.results]
    plan = Projections(*roles, out, heads=2, head_axis=[0, 0, 1] * 3, tuned=rows)
    assert len(plan.groups) == 3
    scores, selected = fused_merge(plan, 1, *Parameters().weights, programs=programs)
    for i, part in enumerate(parts):
        assert_equal(part, scores[3 * i : 3 * i + 3], selected[3 * i : 3 * i + 3], wanted[i])


@pytest.mark.parametrize("held", [1, 2])
@pytest.mark.parametrize("mix", ["float32", "float16-new", "bfloat16"])
def test_slabs_are_written_from_registers_or_left_and_read_again(mix: str, held: int) -> None:
    """One program alone decides a projection with its last slab, while it holds `held` more; all others are left."""
    tuned = Tuning(rows=16, warps=4, stages=1, registers=128, fused_registers=168, per_processor=1, held=held)
    problem = make([(128, 128), (128,), (128, 128)], 2, mix)
    wanted = expected(problem, Parameters(k=0.5))
    plan = problem.plan(tuned)
    scores, selected = fused_merge(plan, 1, *Parameters().weights, programs=1)
    assert_equal(problem, scores, selected, wanted)
    states = plan.workspace().states[: plan.slabs].tolist()
    assert set(states) <= {fused.DONE.value, fused.LEFT.value}
    if DEVICE == "cpu":
        left, done = fused.LEFT.value, fused.DONE.value
        weight = [left] * (2 * 8 - held - 1) + [done] * (held + 1)
        assert states == weight + [done] * 2 + weight


@pytest.mark.parametrize("mix", ["float32", "float16-new"])
def test_several_programs_select(mix: str) -> None:
    tuned = Tuning(rows=16, warps=4, stages=1, registers=128, fused_registers=168, per_processor=1, held=2)
    problem = make([(512, 64), (512,), (512, 128)] * 2, 8, mix)
    work = [len(group.items) for group in problem.plan(tuned).groups]
    assert tuning.deciders(min(*work, 100)) > 1
    assert_merges(problem, programs=100, tuned=tuned)


@pytest.mark.parametrize("mix", ["float32", "float16-new"])
def test_amd_merges_in_two_launches(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the want of such a GPU what is launched is seen here, not that it runs there."""
    launched = []
    for module, name in ((fused, "fused_kernel"), (headwise, "score_kernel"), (headwise, "apply_kernel")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, _Noting(kernel, name, launched))
    monkeypatch.setattr(torch.version, "hip", "6.4" if DEVICE == "cpu" else torch.version.hip)
    problem = make([(256, 64), (256,)], 4, mix)
    wanted = expected(problem, Parameters())
    scores, selected = fused_merge(problem.plan(), Parameters().keep(4), *Parameters().weights)
    assert_equal(problem, scores, selected, wanted)
    assert launched == (["score_kernel", "apply_kernel"] if torch.version.hip else ["fused_kernel"])
    problem.secondary[0][0, 0] = math.nan
    plan = problem.plan()
    fused_merge(plan, 2, 0.5, 0.5)
    assert faults(plan) == [KernelFault(0, 0, "secondary"), KernelFault(0, 0, "score")]


class _Noting:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self._kernel, self._name, self._launched = kernel, name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._launched.append(self._name)
        return self._kernel[grid]


def test_items_are_every_slab_once_in_the_order_of_slots() -> None:
    tuned = Tuning(rows=32, warps=8, stages=1, registers=128, fused_registers=128, per_processor=1, held=1)
    parts = [make(LAYER, 2, mix, [0, 0, 1]) for mix in ("float16", "float32")]
    roles = [[tensor for part in parts for tensor in getattr(part, role)] for role in ("base", "primary", "secondary")]
    plan = Projections(*roles, heads=2, head_axis=[0, 0, 1] * 2, tuned=tuned)
    units = [tuple(unit) for group in plan.groups for unit in group.items.tolist()]
    assert sorted(slot for *_, slot in units) == list(range(plan.slabs))
    assert len({unit[:3] for unit in units}) == len(units)
    for g, head, slab, slot in units:
        assert slot == plan.geometry[g][6] + head * plan.geometry[g][5] + slab
    for group in plan.groups:
        slots = group.items[:, 3].tolist()
        assert slots == sorted(slots)
        assert group.members.tolist() == sorted({g for g, *_ in group.items.tolist()})
    assert sorted(g for group in plan.groups for g in group.members.tolist()) == list(range(6))


def test_calls_leave_nothing_behind_for_the_next() -> None:
    problem = make([(256, 64), (256,), (256, 256)], 4, "float32-new", [0, 0, 1])
    plan = problem.plan()
    results = []
    for keep, lam in ((2, 0.5), (0, 0.5), (4, 0.25), (2, 0.5)):
        space = plan.workspace()
        space.zeroed.fill_(-1)
        space.scores.fill_(math.nan)
        space.selected.fill_(1)
        for tensor in problem.out:
            tensor.fill_(math.nan)
        scores, selected = fused_merge(plan, keep, lam, 1 - lam, programs=2)
        assert selected.sum(dim=1).tolist() == [keep] * 3
        results.append((scores.clone(), selected.clone(), [tensor.clone() for tensor in problem.out]))
    first, last = results[0], results[-1]
    assert torch.equal(first[0], last[0])
    assert torch.equal(first[1], last[1])
    assert all(same_bits(one, other) for one, other in zip(first[2], last[2], strict=True))
    assert not same_bits(results[1][2][0], first[2][0])
    assert not same_bits(results[2][2][0], first[2][0])


def test_parameters_on_the_device_are_those_of_the_host() -> None:
    problem = make([(256, 64), (256,), (256, 256)], 4, "float32-new")
    plan = problem.plan()
    keep, c1, c2 = [1, 2, 3], [0.9, 0.5, 0.1], [0.1, 0.6, 0.9]
    _, selected = fused_merge(plan, keep, c1, c2)
    assert selected.sum(dim=1).tolist() == keep
    before = [tensor.clone() for tensor in problem.out]
    for tensor in problem.out:
        tensor.fill_(math.nan)
    weights = torch.tensor([c1, c2], device=DEVICE)
    fused_merge(plan, torch.tensor(keep, dtype=torch.int32, device=DEVICE), *weights)
    assert all(same_bits(one, other) for one, other in zip(before, problem.out, strict=True))


def test_a_sweep_applies_cached_scores() -> None:
    problem = make([(256, 64), (256,)], 4, "float16-new")
    plan = problem.plan()
    scores = score_heads(plan).clone()
    for k, lam in ((0.25, 0.9), (0.75, 0.1), (1.0, 0.0)):
        parameters = Parameters(k=k, lam=lam)
        for tensor in problem.out:
            tensor.fill_(math.nan)
        selected = apply_heads(plan, scores, parameters.keep(4), *parameters.weights)
        assert_equal(problem, scores, selected, expected(problem, parameters))


def test_tuning_is_no_part_of_the_result() -> None:
    problem = make([(192, 192)], 3, "bfloat16")
    for tuned in (NARROW, UNALIGNED, LARGE):
        assert_merges(problem, tuned=tuned)
