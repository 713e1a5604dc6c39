"""Bootstrap resamples, held to a formula in plain numpy and to what an interval promises."""

from __future__ import annotations

import numpy as np
import pytest
from peak_memory import with_peak
from speech import scored

from hsa.evaluation import bootstrap
from hsa.evaluation.bootstrap import RESAMPLES, number_of_resamples, percentile_interval, resampled_sums
from hsa.evaluation.scores import ErrorCounts, UtteranceScore, scores_of


def some_units(count: int, columns: int = 5) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 30, size=(count, columns))


@pytest.mark.parametrize("count", [2, 3, 60, 300])
@pytest.mark.parametrize("seed", [0, 17, 2**70])
def test_the_sums_are_those_of_a_plain_formula(count: int, seed: int) -> None:
    units = some_units(count)
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(0, count, size=(RESAMPLES, count))
    assert np.array_equal(resampled_sums(units, seed), units[drawn].sum(axis=1))


def test_intervals_of_scores_are_those_of_a_plain_formula() -> None:
    ours = [scored(f"u{n:02}", "a b c d", " ".join("abcd"[: n % 5])) for n in range(30)]
    theirs = [scored(f"u{n:02}", "a b c d", " ".join("abxd"[: n * 7 % 5])) for n in range(30)]
    drawn = np.random.default_rng(9).integers(0, 30, size=(RESAMPLES, 30))
    errors, other = (np.array([each.words.errors for each in some])[drawn].mean(axis=1) / 4 for some in (ours, theirs))
    score = scores_of(ours, baseline=theirs, confidence=0.9, seed=9)[0]
    assert score.wer is not None and score.difference is not None and score.difference.interval is not None
    assert [score.wer.low, score.wer.high] == pytest.approx(np.percentile(errors, [5, 95]))
    found = [score.difference.interval.low, score.difference.interval.high]
    assert found == pytest.approx(np.percentile(errors - other, [5, 95]))


def test_the_size_of_blocks_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = resampled_sums(some_units(50), 3)
    for size in (1, 49, 50, 777):
        monkeypatch.setattr(bootstrap, "BLOCK", size)
        monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
        assert np.array_equal(resampled_sums(some_units(50), 3), expected[:1000])


def test_large_sums_are_exact() -> None:
    sums = resampled_sums(np.array([[2**40 + 1, 1], [2**40 + 3, 1]]), 0)
    assert set(sums[:, 0].tolist()) == {2**41 + 2, 2**41 + 4, 2**41 + 6}


def test_large_groups_get_fewer_resamples_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [number_of_resamples(count) for count in (2, 100_000, 200_000, 1_000_000, 2_000_000)] == [
        10_000,
        10_000,
        5_000,
        1_000,
        1_000,
    ]
    monkeypatch.setattr(bootstrap, "FEWEST_RESAMPLES", 20)
    monkeypatch.setattr(bootstrap, "MAX_DRAWS", 1)
    units = some_units(2_000_000)
    bound = 2 * units.nbytes + 4 * 8 * max(bootstrap.BLOCK, len(units))
    sums, peak = with_peak(lambda: resampled_sums(units, 0), bound)
    assert sums.shape == (20, 5)
    assert peak < bound


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(5).normal(size=10_000)
    for confidence in (0.5, 0.9, 0.95, 0.99):
        expected = np.percentile(values, [50 * (1 - confidence), 50 * (1 + confidence)])
        assert percentile_interval(values, confidence) == pytest.approx(tuple(expected))


def counted(place: int, errors: int, words: int, speaker: str | None) -> UtteranceScore:
    """A score made of its counts."""
    counts = ErrorCounts(errors, 0, 0, words)
    return UtteranceScore(f"u{place:03}", "test", speaker, None, "x", "y", counts, counts)


@pytest.mark.parametrize("by_speaker", [False, True])
def test_an_interval_of_90_percent_holds_the_true_rate_in_about_90_of_100_samples(
    by_speaker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speakers differ in their error rates: then an interval over utterances is too narrow, one over speakers not."""
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    drawn = np.random.default_rng(6)
    held = 0
    samples = 300
    for _ in range(samples):
        rates = drawn.beta(2, 6, size=30)  # of 30 speakers with 4 utterances each; their mean is 0.25
        some = [
            counted(place, int(drawn.binomial(10, rates[place // 4])), 10, f"s{place // 4}" if by_speaker else None)
            for place in range(120)
        ]
        wer = scores_of(some, confidence=0.9)[0].wer
        assert wer is not None
        held += wer.low <= 0.25 <= wer.high
    if by_speaker:
        assert 0.82 < held / samples < 0.95
    else:
        assert held / samples < 0.8
