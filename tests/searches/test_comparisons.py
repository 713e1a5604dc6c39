"""Models side by side on sets: what is compared, what is left out, and how many bootstraps that takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from speech import scored

from hsa.evaluation import scores as evaluation_scores
from hsa.evaluation.scores import UtteranceScore, scores_of
from hsa.searches.comparisons import compare, worst_utterances

WORDS = ("one", "two", "three", "four", "five")


def some_scores(seed: int, utterances: int = 40, speakers: int = 8) -> list[UtteranceScore]:
    """Scores of one model on two sets with speakers and domains; every tenth reference is empty."""
    references, heard = random.Random(0), random.Random(seed)
    found = []
    for number in range(utterances):
        words = [] if number % 10 == 9 else [references.choice(WORDS) for _ in range(6)]
        changed = [word if heard.random() > 0.3 else heard.choice(WORDS) for word in words]
        found.append(
            scored(
                f"u{number}",
                " ".join(words),
                " ".join(changed or WORDS),
                set_name=("clean", "noisy")[number % 2],
                speaker=f"s{number % speakers}",
                domain=f"d{number % 3}",
            )
        )
    return found


@pytest.fixture
def models() -> dict[str, list[UtteranceScore]]:
    return {name: some_scores(seed) for seed, name in enumerate(("base", "best", "primary"), start=1)}


def test_the_figures_are_those_of_the_scores_of_each_pair(models: dict[str, list[UtteranceScore]]) -> None:
    rows = compare(models, "best", 0.9)
    assert [(row.model, row.set) for row in rows] == [
        (model, name) for model in ("best", "base", "primary") for name in ("clean", "noisy")
    ]
    for row in rows:
        (alone,) = (each for each in scores_of(models[row.model], confidence=0.9) if each.name == row.set)
        assert row.score == alone and alone.group == "set"
        if row.model == "best":
            assert row.difference is None and row.verdict is None
            continue
        paired = scores_of(models["best"], confidence=0.9, baseline=models[row.model])
        (expected,) = (each.difference for each in paired if each.name == row.set)
        assert row.difference is not None and row.difference.interval is not None
        assert expected is not None and expected.interval is not None
        assert row.difference.wer == expected.wer
        assert row.difference.interval.low == pytest.approx(expected.interval.low, abs=1e-12)
        assert row.difference.interval.high == pytest.approx(expected.interval.high, abs=1e-12)


def test_a_model_that_writes_the_same_differs_by_nothing(models: dict[str, list[UtteranceScore]]) -> None:
    for row in compare({"best": models["best"], "copy": models["best"]}, "best", 0.95)[2:]:
        assert row.difference is not None and row.difference.interval is not None
        ends = (row.difference.wer, row.difference.interval.low, row.difference.interval.high)
        assert [str(end) for end in ends] == ["0.0", "0.0", "0.0"]
        assert row.verdict == "no difference shown"


def test_each_model_takes_one_bootstrap_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many speakers and domains there are."""
    real, units = evaluation_scores.resampled_sums, []

    def counting(values: Any, seed: int) -> Any:
        units.append(len(values))
        return real(values, seed)

    monkeypatch.setattr(evaluation_scores, "resampled_sums", counting)
    compare({name: some_scores(seed, 200, 50) for seed, name in enumerate(("best", "base", "primary"))}, "best", 0.95)
    assert len(units) == 3 * 2


def test_dropped_utterances_are_counted(models: dict[str, list[UtteranceScore]]) -> None:
    def counts(**more: Any) -> set[tuple[Any, ...]]:
        rows = [row.as_dict() for row in compare(models, "best", 0.95, **more)]
        return {(row["set"], row["utterances"], row["dropped"]) for row in rows}

    assert counts() == {("clean", 20, 0), ("noisy", 16, 4)}
    assert counts(dropped={"clean": 3, "noisy": 1}) == {("clean", 20, 3), ("noisy", 16, 5)}


def test_an_utterance_without_a_reference_is_not_among_the_worst() -> None:
    """Whatever was made up for it: it has no part in the score."""
    best = [scored("a", "", " ".join(["word"] * 30)), scored("b", "one two", "one"), scored("c", "one", "one")]
    other: Sequence[UtteranceScore] = [scored("a", "", ""), scored("b", "one two", ""), scored("c", "one", "two")]
    found = worst_utterances(best, other, 2)
    assert [(each.id, each.best_errors, each.other_errors) for each in found] == [("b", 1, 2), ("c", 0, 1)]
