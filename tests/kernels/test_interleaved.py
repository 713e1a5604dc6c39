"""The kernels as a GPU runs them, many programs beside each other, in the interpreter and by schedules of a seed.

`test_process` starts a process for this module. Schedules do not show what a GPU's threads do within a program.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from gpu import INTERPRETED

if not INTERPRETED:
    pytest.skip("schedules are the interpreter's; test_process runs this module", allow_module_level=True)

import interleaved as harness
import triton
import triton.language as tl
from hsa.kernels import fused, headwise, launch, tuning
from hsa.kernels.launch import KernelFault, check, faults, fused_merge, score_heads
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


CUTS = [Cut(3, 0, 1, 1), Cut(7, 1, 8, 2), Cut(16, 4, 4, 1), Cut(5, 2, 8, 2)]
KINDS = [("float32", 1.0), ("float16-new", 1.0), ("bfloat16", 0.7), ("to-float16", 0.7)]
"""Dtypes and scale: unselected heads stay, are copied, and are scaled in place and into a new buffer."""


def _merge(
    problem: Problem, cut: Cut, schedule: Schedule, parameters: Parameters
) -> tuple[Projections, Tensor, Tensor]:
    """By the kernel that a GPU gets, which does not know how programs run: plan, scores and selection."""
    plan = problem.plan(cut.tuning)
    with pytest.MonkeyPatch.context() as patch, interleaved(fused.fused_kernel, schedule) as launches:
        patch.setattr(launch, "interpreted", lambda: False)
        patch.setattr(tuning, "deciders", lambda programs: cut.deciders)
        patch.setattr(launch, "_patience", lambda group, grid: cut.patience)
        scores, selected = fused_merge(plan, 1, *parameters.weights, scale=parameters.scale, programs=cut.programs)
    assert len(launches) == len(plan.groups)
    return plan, scores, selected


def _states(problem: Problem, cut: Cut, schedule: Schedule, parameters: Parameters) -> list[int]:
    """The states of all slabs after a launch that is held to the oracle."""
    wanted = expected(problem, parameters)
    plan, scores, selected = _merge(problem, cut, schedule, parameters)
    assert_equal(problem, scores, selected, wanted)
    check(plan)
    states: list[int] = plan.workspace().states[: plan.slabs].tolist()
    assert set(states) <= {DONE, LEFT}
    return states


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_bytes_of_the_oracle(name: str, seed: int) -> None:
    """With and without programs that begin as deciders, patient or not."""
    draw = random.Random(f"{name} {seed}")
    cut, (mix, scale) = draw.choice(CUTS), draw.choice(KINDS)
    schedule = replace(SCHEDULES[name], seed=seed)
    _states(make(SHAPES, 2, mix, AXES, seed=seed), cut, schedule, Parameters(k=0.5, scale=scale))


@pytest.mark.parametrize(("mix", "scale"), KINDS)
def test_a_program_alone_leaves_every_slab_and_reads_it_again(mix: str, scale: float) -> None:
    """Nobody decides while it draws units, so it waits for nothing and closes all projections itself."""
    problem, parameters = make(SHAPES, 2, mix, AXES), Parameters(k=0.5, scale=scale)
    states = _states(problem, Cut(8, 1, 1, 2), Schedule(resident=1), parameters)
    assert states == [LEFT] * sum(SLABS)


@pytest.mark.parametrize(("mix", "scale"), KINDS)
def test_programs_that_hold_a_projection_write_it_from_registers(mix: str, scale: float) -> None:
    problem, parameters = make(SHAPES, 2, mix, AXES), Parameters(k=0.5, scale=scale)
    states = _states(problem, Cut(16, 1, 40, 2), Schedule(resident=16), parameters)
    assert states.count(DONE) > sum(SLABS) // 2, states


def test_states_and_sums_that_take_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in projections of more slabs than are looked at in one go; and a launch of each kind of storage."""
    monkeypatch.setattr(fused, "STATES", tl.constexpr(4))
    monkeypatch.setattr(headwise, "CHUNK", tl.constexpr(2))
    problem = make([*SHAPES, (66, 30)], 2, "float32-new", [*AXES, 0])
    assert len(problem.plan().groups) == 2
    for seed in range(2):
        for tensor in problem.results:
            tensor.fill_(math.nan)
        schedule = Schedule(resident=16, pause=0.02, seed=seed)
        assert set(_states(problem, Cut(16, 1, 40, 1), schedule, Parameters(k=0.5))) == {DONE, LEFT}


@pytest.mark.parametrize("cut", CUTS[1:3], ids=str)
@pytest.mark.parametrize(("name", "mix"), [("two", "float16"), ("all-pausing-stale", "float16-new")])
def test_a_source_that_is_not_finite_stops_its_projection_alone(name: str, mix: str, cut: Cut) -> None:
    problem = make(SHAPES, 2, mix, AXES)
    problem.secondary[3][5, 9] = math.inf
    whole, untouched = problem.fresh(), problem.results[3].clone()
    plan, _, selected = _merge(problem, cut, SCHEDULES[name], Parameters(k=0.5))
    assert faults(plan) == [KernelFault(3, 0, "secondary"), KernelFault(3, 0, "score")]
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
    assert len(launches) == 1


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
def _wait_kernel(words, ATOMIC: tl.constexpr):  # noqa: N803
    found = tl.load(words)
    while found == 0:
        if ATOMIC:
            found = tl.atomic_add(words, 0, sem="relaxed")
        else:
            found = tl.load(words)


@pytest.mark.parametrize("atomic", [True, False])
def test_a_launch_that_never_ends_is_found(atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MOST_TURNS", 500)
    threads = threading.active_count()
    with (
        interleaved(_wait_kernel, Schedule(resident=2)),
        pytest.raises(triton.runtime.errors.InterpreterError, match="no end after 500 turns"),
    ):
        _wait_kernel[(2,)](torch.zeros(1, dtype=torch.int32), ATOMIC=atomic)
    assert threading.active_count() == threads


@triton.jit
def _tell_kernel(words, ATOMIC: tl.constexpr):  # noqa: N803
    if tl.program_id(0) == 0:
        tl.store(words, 7)
        tl.atomic_add(words + 1, 1, sem="relaxed")
    else:
        while tl.atomic_add(words + 1, 0, sem="relaxed") == 0:
            pass
        if ATOMIC:
            tl.store(words + 2, tl.atomic_add(words, 0, sem="relaxed"))
        else:
            tl.store(words + 2, tl.load(words))


def test_a_plain_load_of_what_another_program_wrote_is_refused() -> None:
    """On a GPU no order holds between the two words."""
    words = torch.zeros(3, dtype=torch.int32)
    with interleaved(_tell_kernel, Schedule(resident=2)):
        _tell_kernel[(2,)](words, ATOMIC=True)
        assert words.tolist() == [7, 1, 7]
        with pytest.raises(triton.runtime.errors.InterpreterError, match="program 1 reads plainly what program 0"):
            _tell_kernel[(2,)](torch.zeros(3, dtype=torch.int32), ATOMIC=False)


@triton.jit
def _order_kernel(order, TURNS: tl.constexpr):  # noqa: N803
    for _ in range(TURNS):
        place = tl.atomic_add(order, 1, sem="relaxed")
        tl.store(order + 1 + place, tl.program_id(0))


def test_a_program_that_pauses_is_not_heard_of_until_all_do() -> None:
    """Of two, the one that goes on has many turns in a row, which it would not have by a fair draw."""
    longest = {}
    for pause in (0.0, 0.05):
        order = torch.zeros(201, dtype=torch.int32)
        with interleaved(_order_kernel, Schedule(resident=2, pause=pause)):
            _order_kernel[(2,)](order, TURNS=100)
        turns = order[1:].tolist()
        assert turns.count(0) == turns.count(1) == 100
        longest[pause] = max(len(list(run)) for _, run in itertools.groupby(turns))
    assert longest[0.05] > 2 * longest[0.0]


def test_a_seed_repeats_its_schedule() -> None:
    orders = []
    for seed in (1, 1, 2):
        order = torch.zeros(32, dtype=torch.int32)
        with interleaved(_order_kernel, Schedule(resident=8, seed=seed)):
            _order_kernel[(31,)](order, TURNS=1)
        orders.append(order[1:].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(31))
