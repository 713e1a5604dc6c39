"""Word and character errors, held to a second counter, and their groups, intervals and differences."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from speech import errors_of, refusal, scored

from hsa.errors import DataError, RequestError
from hsa.evaluation.normalizers import normalizer
from hsa.evaluation.scores import ErrorCounts, Score, alignment, score_utterance, scores_of
from hsa.evaluation.utterance import Utterance

NO_ERRORS = ErrorCounts(0, 0, 0, 0)


def random_text(drawn: random.Random, most: int = 12) -> str:
    return " ".join(drawn.choice(("a", "b", "ab", "größer", "大", "it's")) for _ in range(drawn.randrange(most)))


# --- one utterance ----------------------------------------------------------------------------------------------------


def test_a_second_counter_finds_the_same_number_of_errors() -> None:
    drawn = random.Random(1)
    seen = set()
    for _ in range(1000):
        reference, hypothesis = random_text(drawn), random_text(drawn)
        score = scored("u", reference, hypothesis)
        for counts, ours, heard in (
            (score.words, reference.split(), hypothesis.split()),
            (score.characters, list(reference), list(hypothesis)),
        ):
            assert counts.errors == errors_of(ours, heard), (reference, hypothesis)
            assert counts.reference == len(ours)
            assert counts.deletions - counts.insertions == len(ours) - len(heard)
            seen.add(counts.errors)
    assert len(seen) > 15


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("the cat sat", "the cat sat", (0, 0, 0, 3)),
        ("the cat sat", "the bat sat", (1, 0, 0, 3)),
        ("the cat sat", "the sat", (0, 1, 0, 3)),
        ("the cat sat", "the cat sat down now", (0, 0, 2, 3)),
        ("the cat sat", "", (0, 3, 0, 3)),
        ("", "the cat", (0, 0, 2, 0)),
        ("", "", (0, 0, 0, 0)),
    ],
)
def test_substitutions_deletions_and_insertions(reference: str, hypothesis: str, expected: tuple[int, ...]) -> None:
    assert scored("u", reference, hypothesis).words == ErrorCounts(*expected)


def test_both_texts_are_normalised_and_spaces_do_not_count() -> None:
    utterance = Utterance("u1", Path("/a.wav"), "  Good\tmorning,\n ALL! ", "anna", "near")
    score = score_utterance(utterance, "good  morning\u3000all", set_name="test", normalize=normalizer("plain"))
    assert (score.reference, score.hypothesis) == ("good morning all", "good morning all")
    assert (score.words.errors, score.characters) == (0, ErrorCounts(0, 0, 0, 16))
    assert (score.id, score.set, score.speaker, score.domain) == ("u1", "test", "anna", "near")


def test_a_rate_may_exceed_one_and_is_nan_without_a_reference() -> None:
    assert scored("u", "a", "b c d").words.rate == 3.0
    assert math.isnan(scored("u", "", "b").words.rate)


def test_an_hour_of_text_is_counted() -> None:
    drawn = random.Random(2)
    words = [drawn.choice("abcdefgh") * drawn.randrange(1, 9) for _ in range(9000)]
    heard = [word for word in words if drawn.random() > 0.1]
    score = scored("u", " ".join(words), " ".join(heard))
    assert score.words == ErrorCounts(0, len(words) - len(heard), 0, len(words))


def test_an_alignment_holds_both_texts_and_every_error() -> None:
    drawn = random.Random(3)
    for _ in range(300):
        reference, hypothesis = random_text(drawn), random_text(drawn)
        pairs = alignment(reference, hypothesis)
        assert [ours for _, ours, _ in pairs if ours] == reference.split()
        assert [heard for _, _, heard in pairs if heard] == hypothesis.split()
        kinds = [kind for kind, _, _ in pairs]
        counts = scored("u", reference, hypothesis).words
        assert [kinds.count(kind) for kind in ("substitute", "delete", "insert")] == [
            counts.substitutions,
            counts.deletions,
            counts.insertions,
        ]
        for kind, ours, heard in pairs:
            expected = {"equal": ours == heard, "substitute": ours != heard, "delete": not heard, "insert": not ours}
            assert expected[kind]


# --- groups -----------------------------------------------------------------------------------------------------------


def some_scores(count: int = 40, *, speakers: int = 5, seed: int = 0, hypothesis_seed: int = 0) -> list:
    """Scores of two sets, `speakers` speakers and two domains; one reference in ten is empty."""
    drawn, heard = random.Random(seed), random.Random(hypothesis_seed + 1000)
    found = []
    for place in range(count):
        reference = "" if place % 10 == 9 else "x " + random_text(drawn)
        hypothesis = " ".join(word if heard.random() < 0.8 else "wrong" for word in reference.split())
        found.append(
            scored(
                f"u{place}",
                reference,
                hypothesis,
                set_name="noisy" if place % 2 else "clean",
                speaker=f"s{place % speakers}" if speakers else None,
                domain="near" if place % 3 else "far",
            )
        )
    return found


def by_name(scores: Sequence[Score]) -> dict[tuple[str, str], Score]:
    return {(score.group, score.name): score for score in scores}


def test_groups_are_all_then_sets_domains_and_speakers() -> None:
    utterances = some_scores()
    scores = scores_of(utterances)
    assert [(score.group, score.name) for score in scores] == [
        ("all", "all"),
        ("set", "clean"),
        ("set", "noisy"),
        ("domain", "far"),
        ("domain", "near"),
        *(("speaker", f"s{number}") for number in range(5)),
    ]
    for score in scores:
        members = [each for each in utterances if score.group == "all" or getattr(each, score.group) == score.name]
        kept = [each for each in members if each.reference]
        assert (score.utterances, score.dropped) == (len(kept), len(members) - len(kept))
        assert score.words == sum((each.words for each in kept), NO_ERRORS)
        assert score.characters == sum((each.characters for each in kept), NO_ERRORS)
        assert score.wer is not None and score.wer.low <= score.words.rate <= score.wer.high
        assert score.cer is not None and score.cer.low <= score.characters.rate <= score.cer.high
        assert score.difference is None
        assert score.speakers == (0 if score.group == "speaker" else len({each.speaker for each in kept}))
    assert scores[0].dropped == 4


def test_errors_on_an_empty_reference_do_not_count() -> None:
    (score, _) = scores_of([scored("a", "x y", "x z"), scored("b", "", "many words that nobody said")])
    assert (score.words.rate, score.utterances, score.dropped) == (0.5, 1, 1)


def test_a_group_of_empty_references_alone_is_left_out() -> None:
    scores = scores_of([scored("a", "x", "x"), scored("b", "", "y", set_name="other", speaker="s")])
    assert [(score.group, score.name, score.dropped) for score in scores] == [("all", "all", 1), ("set", "test", 0)]


def test_nothing_to_score_is_refused() -> None:
    assert "all 2 references are empty" in refusal(DataError, scores_of, [scored("a", "", "x"), scored("b", "", "")])
    assert "all 0 references are empty" in refusal(DataError, scores_of, [])


def test_the_order_of_utterances_changes_nothing_but_the_order_of_sets() -> None:
    utterances, baseline = some_scores(), some_scores(hypothesis_seed=7)
    backwards = scores_of(utterances[::-1], baseline=baseline)
    assert [score.name for score in backwards[1:3]] == ["noisy", "clean"]
    assert by_name(backwards) == by_name(scores_of(utterances, baseline=baseline[::-1]))


def test_the_seed_alone_decides_the_resamples() -> None:
    utterances = some_scores()
    assert scores_of(utterances) == scores_of(utterances) == scores_of(utterances, seed=0)
    assert scores_of(utterances)[0].wer != scores_of(utterances, seed=1)[0].wer


def test_a_single_set_and_all_have_one_interval() -> None:
    utterances = [replace(score, set="test") for score in some_scores()]
    everything, of_set = scores_of(utterances, baseline=utterances)[:2]
    assert replace(everything, group="set", name="test") == of_set


def test_higher_confidence_is_a_wider_interval() -> None:
    narrow, wide = (scores_of(some_scores(), confidence=share)[0].wer for share in (0.5, 0.99))
    assert narrow is not None and wide is not None
    assert wide.low < narrow.low < narrow.high < wide.high


def test_one_utterance_has_no_interval() -> None:
    one = [scored("a", "x y", "x", speaker="s")]
    assert all((score.wer, score.cer, score.speakers) == (None, None, 0) for score in scores_of(one))
    (score, *_) = scores_of(one, baseline=[scored("a", "x y", "x y", speaker="s")])
    assert score.difference is not None and (score.difference.wer, score.difference.interval) == (0.5, None)


def test_speakers_are_drawn_where_all_are_known_and_there_are_two() -> None:
    """One speaker has all errors: drawing speakers, the rate may be anything from 0 to 1."""
    utterances = [scored(f"u{n}", "x", "x" if n < 50 else "y", speaker=f"s{n // 50}") for n in range(100)]
    score = scores_of(utterances)[0]
    assert score.speakers == 2 and score.wer is not None and (score.wer.low, score.wer.high) == (0.0, 1.0)
    for some in (
        [replace(each, speaker=None) for each in utterances],
        [replace(utterances[0], speaker=None), *utterances[1:]],
        [replace(each, speaker="one") for each in utterances],
    ):
        score = scores_of(some)[0]
        assert score.speakers == 0 and score.wer is not None and 0.35 < score.wer.low < score.wer.high < 0.65


# --- differences ------------------------------------------------------------------------------------------------------


def test_a_difference_is_this_model_minus_the_baseline() -> None:
    ours, theirs = some_scores(), some_scores(hypothesis_seed=5)
    for score, other in zip(scores_of(ours, baseline=theirs), scores_of(theirs), strict=True):
        assert score.difference is not None and score.difference.interval is not None
        assert score.difference.wer == pytest.approx(score.words.rate - other.words.rate)
        assert score.difference.interval.low <= score.difference.wer <= score.difference.interval.high
    for score, other in zip(scores_of(ours, baseline=theirs), scores_of(theirs, baseline=ours), strict=True):
        assert other.difference is not None and score.difference is not None
        assert other.difference.wer == -score.difference.wer


def test_a_model_does_not_differ_from_itself() -> None:
    utterances = some_scores()
    for score in scores_of(utterances, baseline=utterances):
        assert score.difference is not None and score.difference.interval is not None
        found = (score.difference.wer, score.difference.interval.low, score.difference.interval.high)
        assert found == (0.0, 0.0, 0.0)


def test_pairs_narrow_the_interval_of_a_difference() -> None:
    """Utterances differ much and the two models little: each has one error less than the baseline in ten words."""
    theirs = [scored(f"u{n}", "a b c d e f g h i j", " ".join("abcdefghij"[: n % 10])) for n in range(200)]
    ours = [scored(f"u{n}", "a b c d e f g h i j", " ".join("abcdefghij"[: n % 10 + 1])) for n in range(200)]
    score = scores_of(ours, baseline=theirs)[0]
    assert score.difference is not None and score.difference.interval is not None and score.wer is not None
    assert score.difference.interval.low == pytest.approx(-0.1) == score.difference.interval.high
    assert score.wer.high - score.wer.low > 0.05


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda some: some[1:], "utterance 'u0' of set 'clean' is scored for the model and not for the baseline"),
        (lambda some: [*some, scored("v", "x", "x")], "utterance 'v' of set 'test' is scored for the baseline and not"),
        (lambda some: [*some, some[3]], "utterance 'u3' of set 'noisy' is scored twice"),
        (
            lambda some: [replace(some[0], reference="x"), *some[1:]],
            "utterance 'u0' of set 'clean' has another normalised reference",
        ),
    ],
)
def test_a_baseline_of_other_utterances_is_refused(change, expected: str) -> None:  # type: ignore[no-untyped-def]
    utterances = some_scores()
    assert expected in refusal(DataError, scores_of, utterances, baseline=change(utterances))


def test_one_id_in_two_sets_is_two_utterances() -> None:
    both = [scored("a", "x", "x", set_name="one"), scored("a", "x", "y", set_name="two")]
    assert scores_of(both)[0].words.rate == 0.5
    assert "utterance 'a' of set 'one' is scored twice" in refusal(DataError, scores_of, [both[0], both[0]])


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5, math.nan, math.inf, True, "0.95", None])
def test_a_confidence_that_is_none_is_refused(confidence: object) -> None:
    assert "confidence must be above 0 and below 1" in refusal(
        RequestError, scores_of, [scored("a", "x", "x")], confidence=confidence
    )


@pytest.mark.parametrize("seed", [-1, 0.5, True, "0", None])
def test_a_seed_that_is_none_is_refused(seed: object) -> None:
    assert "seed must be a whole number" in refusal(RequestError, scores_of, [scored("a", "x", "x")], seed=seed)


def test_jiwer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    message = refusal(RequestError, scored, "a", "x", "y")
    assert message == "hsa eval needs jiwer, which is not installed: pip install 'hsa-merge[eval]'"
