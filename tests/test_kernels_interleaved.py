"""The kernels as a GPU runs them, many programs beside each other, in the interpreter and by schedules of a seed.

`test_kernels_process` starts a process for this module. Schedules do not show what a GPU's threads do within a program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from gpu import INTERPRETED

if not INTERPRETED:
    pytest.skip("schedules are the interpreter's; test_kernels_process runs this module", allow_module_level=True)

import interleaved as harness
import triton
import triton.language as tl
from hsa.kernels import fused, headwise, launch, tuning
from hsa.kernels.launch import Fault, check, faults, fused_merge, score_heads
from hsa.kernels.projections import Projections
from hsa.kernels.tuning import Tuning
from interleaved import Schedule, interleaved
from kernel_problems import Parameters, Problem, assert_equal, expected, make, same_bits
from torch import Tensor

SHAPES = [(128, 64), (128,), (64, 128), (128, 128)]
AXES = [0, 0, 1, 0]
SLABS = [8, 2, 8, 16]
"""Two heads each; in slabs of 16 tile rows, 34 units of work."""

DONE, LEFT = fused.DONE.value, fused.LEFT.value

SCHEDULES = {
    "one-after-the-other": Schedule(resident=1),
    "two": Schedule(resident=2),
    "three-pausing": Schedule(resident=3, pause=0.02),
    "all": Schedule(resident=64),
    "all-pausing": Schedule(resident=64, pause=0.02),
    "all-stale": Schedule(resident=64, stale=0.05),
    "all-pausing-stale": Schedule(resident=64, pause=0.05, stale=0.05),
}


@dataclass(frozen=True)
class Cut:
    """How the fused kernel is launched; none of it is part of a result."""

    programs: int
    deciders: int
    patience: int
    held: int

    @property
    def tuning(self) -> Tuning:
        return Tuning(
            rows=16, warps=4, stages=1, registers=128, fused_registers=168, per_processor=1, held=self.held
        )  # fmt: skip


CUTS = [Cut(3, 0, 1, 1), Cut(7, 1, 8, 2), Cut(16, 4, 4, 1), Cut(5, 3, 2, 2)]
MIXES = ["float32", "float16-new", "bfloat16", "to-float16"]


def _merge(
    problem: Problem, cut: Cut, schedule: Schedule, parameters: Parameters
) -> tuple[Projections, list[int], Tensor, Tensor]:
    """One launch of the kernel that a GPU gets, which does not know how programs run: plan, states of its slabs, scores
    and selection."""
    plan = problem.plan(cut.tuning)
    with pytest.MonkeyPatch.context() as patch, interleaved(fused.fused_kernel, schedule) as launches:
        patch.setattr(launch, "interpreted", lambda: False)
        patch.setattr(tuning, "deciders", lambda programs: cut.deciders)
        patch.setattr(launch, "_patience", lambda group, grid: cut.patience)
        scores, selected = fused_merge(plan, 1, *parameters.weights, scale=parameters.scale, programs=cut.programs)
    assert len(launches) == 1
    states = plan.workspace().states[: plan.slabs].tolist()
    assert set(states) <= {DONE, LEFT}
    return plan, states, scores, selected


@pytest.mark.parametrize("seed", range(len(CUTS)))
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_bytes_of_the_oracle(name: str, seed: int) -> None:
    """With and without programs that begin as deciders, patient or not."""
    problem = make(SHAPES, 2, MIXES[(seed + list(SCHEDULES).index(name)) % len(MIXES)], AXES, seed=seed)
    parameters = Parameters(k=0.5, scale=0.7 if seed == 3 else 1.0)
    wanted = expected(problem, parameters)
    plan, _, scores, selected = _merge(problem, CUTS[seed], replace(SCHEDULES[name], seed=seed), parameters)
    assert_equal(problem, scores, selected, wanted)
    check(plan)


def test_a_program_alone_leaves_every_slab_and_reads_it_again() -> None:
    """Nobody decides while it draws units, so it waits for nothing and closes all projections itself."""
    problem = make(SHAPES, 2, "float32", AXES)
    wanted = expected(problem, Parameters(k=0.5))
    _, states, scores, selected = _merge(problem, Cut(8, 1, 1, 2), Schedule(resident=1), Parameters(k=0.5))
    assert_equal(problem, scores, selected, wanted)
    assert states == [LEFT] * sum(SLABS)


def test_programs_that_hold_a_projection_write_it_from_registers() -> None:
    problem = make(SHAPES, 2, "float16", AXES)
    wanted = expected(problem, Parameters(k=0.5))
    _, states, scores, selected = _merge(problem, Cut(16, 1, 8, 2), Schedule(resident=16), Parameters(k=0.5))
    assert_equal(problem, scores, selected, wanted)
    assert states.count(DONE) > sum(SLABS) // 2, states


@pytest.mark.parametrize("cut", CUTS[1:3], ids=str)
@pytest.mark.parametrize(("name", "mix"), [("two", "float16"), ("all-pausing-stale", "float16-new")])
def test_a_source_that_is_not_finite_stops_its_projection_alone(name: str, mix: str, cut: Cut) -> None:
    problem = make(SHAPES, 2, mix, AXES)
    problem.secondary[3][5, 9] = math.inf
    whole, untouched = problem.fresh(), problem.results[3].clone()
    plan, _, _, selected = _merge(problem, cut, SCHEDULES[name], Parameters(k=0.5))
    assert faults(plan) == [Fault(3, 0, "secondary"), Fault(3, 0, "score")]
    assert same_bits(problem.results[3], untouched)
    assert selected.sum(dim=1).tolist() == [1, 1, 1, 0]
    for g, want in enumerate(expected(whole, Parameters(k=0.5))[:3]):
        assert same_bits(problem.results[g], want.value)


@pytest.mark.parametrize("seed", range(4))
def test_whoever_scores_the_last_slab_adds_them_up(seed: int) -> None:
    """Not with stale words: here an atomic orders them."""
    plan = make(SHAPES, 2, "float32", AXES).plan(CUTS[0].tuning)
    alone = score_heads(plan).clone()
    plan.workspace().scores.fill_(math.nan)
    with interleaved(headwise.score_kernel, Schedule(resident=(5, 64)[seed % 2], pause=0.02, seed=seed)) as launches:
        assert torch.equal(score_heads(plan), alone)
    assert alone.any()
    assert launches[0].turns > sum(SLABS)


# --- the schedules themselves ---------------------------------------------------------------------------------


@triton.jit
def _count_kernel(words, ATOMIC: tl.constexpr):  # noqa: N803
    if ATOMIC:
        tl.atomic_add(words, 1, sem="relaxed")
    else:
        tl.store(words, tl.load(words, volatile=True) + 1)


def test_programs_come_between_a_load_and_a_store_but_into_no_atomic() -> None:
    counted = {}
    for atomic in (True, False):
        words = torch.zeros(1, dtype=torch.int32)
        with interleaved(_count_kernel, Schedule(resident=20)):
            _count_kernel[(20,)](words, ATOMIC=atomic)
        counted[atomic] = words.item()
    assert counted[True] == 20
    assert 0 < counted[False] < 20


@triton.jit
def _wait_kernel(words):
    found = tl.atomic_add(words, 0, sem="relaxed")
    while found == 0:
        found = tl.atomic_add(words, 0, sem="relaxed")


def test_a_launch_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MOST_TURNS", 500)
    with (
        interleaved(_wait_kernel, Schedule(resident=2)),
        pytest.raises(triton.runtime.errors.InterpreterError, match="no end after 501 turns"),
    ):
        _wait_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def test_a_seed_repeats_its_schedule() -> None:
    orders = []
    for seed in (1, 1, 2):
        order = torch.zeros(32, dtype=torch.int32)
        with interleaved(_order_kernel, Schedule(resident=8, seed=seed)):
            _order_kernel[(31,)](order)
        orders.append(order[1:].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(31))


@triton.jit
def _order_kernel(order):
    place = tl.atomic_add(order, 1, sem="relaxed")
    tl.store(order + 1 + place, tl.program_id(0))
