"""Racing: values that order as the objective does, and candidates that are stopped or not."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from hsa.errors import RequestError
from hsa.evaluation.utterance import Utterance
from hsa.searches.dev_sets import DevSets, Item
from hsa.searches.objectives import Objective, objective_of
from hsa.searches.racing import TESTED_WHOLE, Race, next_test


def dev_sets(seed: int, counts: dict[str, int]) -> DevSets:
    draw = random.Random(seed)
    items = [
        Item(name, Utterance(f"{name}{number}", Path("/a.wav"), "x"), draw.randint(3, 20))
        for name, count in counts.items()
        for number in range(count)
    ]
    draw.shuffle(items)
    return DevSets(tuple(counts), tuple(items), 8, dict.fromkeys(counts, 0), "", str)


def errors_of(dev: DevSets, rate: float, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [sum(draw.random() < rate for _ in range(item.words)) for item in dev.items]


@pytest.mark.parametrize("objective", [Objective("mean"), Objective("set", "b"), Objective("worst")])
def test_the_mean_of_the_values_is_the_objective(objective: Objective) -> None:
    dev = dev_sets(1, {"a": 40, "b": 25, "c": 9})
    errors = errors_of(dev, 0.3, 2)
    rates = dev.rates(errors)
    shares = objective.shares(dev, rates)
    values = [share * error for share, error in zip(shares, errors, strict=True) if share > 0]
    assert sum(values) / len(values) == pytest.approx(objective.values(rates)[0], rel=1e-12)


def test_a_much_worse_candidate_is_stopped_early_and_a_better_one_never() -> None:
    dev = dev_sets(3, {"a": 60})
    race = Race(dev, Objective("mean"), errors_of(dev, 0.2, 4))
    worse, better = errors_of(dev, 0.6, 5), errors_of(dev, 0.05, 6)
    assert race.is_lost(worse[:16])
    assert not any(race.is_lost(better[:count]) for count in range(1, 61))


def test_equal_errors_are_not_worse() -> None:
    dev = dev_sets(3, {"a": 60})
    incumbent = errors_of(dev, 0.2, 4)
    race = Race(dev, Objective("mean"), incumbent)
    assert not any(race.is_lost(incumbent[:count]) for count in range(1, 61))


def test_of_the_worst_set_only_its_utterances_count() -> None:
    dev = dev_sets(7, {"bad": 40, "good": 40})
    incumbent = [item.words // 2 if item.set == "bad" else 0 for item in dev.items]
    candidate = [0 if item.set == "bad" else item.words // 3 for item in dev.items]
    assert not Race(dev, Objective("worst"), incumbent).is_lost(candidate)
    assert Race(dev, Objective("set", "good"), incumbent).is_lost(candidate)


def test_racing_over_a_list_of_candidates_ends_with_the_same_winner() -> None:
    """Forty candidates whose errors are known: the winner with racing is that without, for every seed."""
    spared = 0
    for seed in range(8):
        dev = dev_sets(seed, {"a": 60, "b": 60})
        draw = random.Random(seed)
        candidates = [errors_of(dev, draw.uniform(0.05, 0.4), seed * 100 + number) for number in range(40)]
        objective = Objective("mean")
        values = [objective.values(dev.rates(errors))[0] for errors in candidates]
        best: int | None = None
        for number, errors in enumerate(candidates):
            race = None if best is None else Race(dev, objective, candidates[best])
            stops = [last for _, last in dev.blocks() if race is not None and race.is_lost(errors[:last])]
            if stops and stops[0] < len(dev.items):
                spared += len(dev.items) - stops[0]
            elif best is None or values[number] < values[best]:
                best = number
        assert best == values.index(min(values)), seed
    assert spared > 8 * 40 * 120 // 3


@pytest.mark.parametrize(
    ("count", "block", "expected"),
    [
        (60, 16, [(0, 8), (8, 16), (16, 32), (32, 48), (48, 60)]),
        (33, 16, [(0, 8), (8, 16), (16, 32), (32, 33)]),
        (16, 16, [(0, 8), (8, 16)]),
        (3, 16, [(0, 3)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_the_first_block_is_decoded_in_two_halves(count: int, block: int, expected: list[tuple[int, int]]) -> None:
    dev = dev_sets(0, {"a": count})
    assert replace(dev, block=block).blocks() == expected


@pytest.mark.parametrize("block", [1, 16, 100])
def test_tests_on_a_large_set_take_time_that_grows_with_it(block: int) -> None:
    """Counted in utterances that a test looks at: every block's at first, then 65 times the set at most."""
    tested, due, count = [], 0, 1_000_000
    for last in range(block, count, block):
        if last >= due:
            tested.append(last)
            due = next_test(last)
    assert tested[:TESTED_WHOLE] == [block * number for number in range(1, TESTED_WHOLE + 1)]
    assert sum(tested) < (TESTED_WHOLE + 1) * count
    assert all(later <= earlier * (1 + 1 / TESTED_WHOLE) + block for earlier, later in pairwise(tested))


def test_objectives_have_names() -> None:
    assert objective_of("clean", ["clean", "noisy"]) == Objective("set", "clean")
    assert objective_of("worst", ["worst"]) == Objective("worst")
    with pytest.raises(RequestError, match=r"mean, worst or pareto, or the name of a dev set \(clean and noisy\)"):
        objective_of("mean of all", ["clean", "noisy"])
