"""Decoding with drafts gives the tokens of decoding without them, in fewer passes of the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_whisper import features, small_whisper
from transformers import WhisperForConditionalGeneration

from hsa.evaluation import speculative
from hsa.evaluation.speculative import (
    Drafts,
    SpeculativeForward,
    generate_with_drafts,
    may_draft,
    replaced_forward,
    up_to_end,
)

END, PAD = 9, 0
COUNT = 12
HOW: dict[str, Any] = {"max_new_tokens": 14, "max_length": None, "num_beams": 1, "do_sample": False}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def model(seed: int = 2, **config: object) -> WhisperForConditionalGeneration:
    """A model whose texts differ, and of which some end before the limit."""
    return small_whisper(seed, 8.0, eos_token_id=END, **config)


def plainly(owner: WhisperForConditionalGeneration, **how: Any) -> list[list[int]]:
    found: list[list[int]] = owner.generate(features(COUNT), **{**HOW, **how}).tolist()
    return found


def with_drafts(owner: WhisperForConditionalGeneration, drafts: list[Drafts], **how: Any) -> list[list[int]]:
    return generate_with_drafts(owner, {"input_features": features(COUNT)}, {**HOW, **how}, drafts)


def texts(tokens: list[list[int]]) -> list[tuple[int, ...]]:
    """Tokens up to the end; what follows it depends on the batch."""
    return [up_to_end(row, [END, PAD]) for row in tokens]


def drafts_of(*written: list[list[int]]) -> list[Drafts]:
    found = [Drafts() for _ in range(COUNT)]
    for tokens in written:
        for each, row in zip(found, tokens, strict=True):
            each.add(up_to_end(row, [END, PAD]))
    return found


def counted_passes(owner: WhisperForConditionalGeneration) -> list[tuple[int, int]]:
    """The sizes of what the decoder is given from now on: utterances and tokens."""
    sizes: list[tuple[int, int]] = []
    owner.get_decoder().register_forward_pre_hook(
        lambda _, __, keywords: sizes.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    return sizes


def changed(owner: WhisperForConditionalGeneration, by: float) -> WhisperForConditionalGeneration:
    """The same model with other weights, as a candidate of a search has them."""
    generator = torch.Generator().manual_seed(7)
    for parameter in owner.parameters():
        parameter.add_(by * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return owner


def test_the_model_of_these_tests_writes_texts_of_several_lengths() -> None:
    lengths = {len(text) for text in texts(plainly(model()))}
    assert len(lengths) > 2 and max(lengths) > HOW["max_new_tokens"]


def test_its_own_texts_are_verified_in_one_pass() -> None:
    owner = model()
    expected = plainly(owner)
    drafts = drafts_of(expected)
    passes = counted_passes(owner)
    assert texts(with_drafts(owner, drafts)) == texts(expected)
    assert passes == [(COUNT, 1 + HOW["max_new_tokens"])]


def test_texts_of_another_model_give_this_ones_in_fewer_passes() -> None:
    others = [plainly(changed(model(), by)) for by in (0.002, 0.004)]
    owner = model()
    expected = texts(plainly(owner))
    assert all(texts(other) != expected for other in others)
    drafts = drafts_of(*others)
    passes = counted_passes(owner)
    assert texts(with_drafts(owner, drafts)) == expected
    assert sum(utterances for utterances, _ in passes) < COUNT * HOW["max_new_tokens"] / 2


@pytest.mark.parametrize("tokens", [(), (END,), (5, 5, 5, END), tuple(range(40, 90))])
def test_drafts_that_are_wrong_change_nothing(tokens: tuple[int, ...]) -> None:
    owner = model()
    drafts = [Drafts() for _ in range(COUNT)]
    for each in drafts:
        each.add(tokens)
    assert texts(with_drafts(owner, drafts)) == texts(plainly(owner))


def test_utterances_without_drafts_are_decoded_beside_others() -> None:
    owner = model()
    expected = plainly(owner)
    drafts = drafts_of(expected)
    for number in (0, 3, 4, COUNT - 1):
        drafts[number] = Drafts()
    assert texts(with_drafts(owner, drafts)) == texts(expected)


def test_what_is_written_becomes_a_draft() -> None:
    owner, drafts = model(), [Drafts() for _ in range(COUNT)]
    first = with_drafts(owner, drafts)
    assert [each.continuation(()) for each in drafts] == texts(first)
    passes = counted_passes(owner)
    assert texts(with_drafts(owner, drafts)) == texts(first)
    assert len(passes) == 1


def test_tokens_that_are_barred_are_not_written() -> None:
    barred, barred_first = [89, 12], [33, 39, END]
    owner = model()
    free = plainly(owner)
    drafts = drafts_of(free)
    owner.generation_config.suppress_tokens = barred
    owner.generation_config.begin_suppress_tokens = barred_first
    expected = texts(plainly(owner))
    assert expected != texts(free)
    assert texts(with_drafts(owner, drafts)) == expected
    passes = counted_passes(owner)
    assert texts(with_drafts(owner, drafts)) == expected
    assert len(passes) <= speculative.ROUNDS


def test_a_rule_that_is_not_known_here_is_kept() -> None:
    owner = model()
    drafts = drafts_of(plainly(owner))
    how = {"no_repeat_ngram_size": 1}
    expected = texts(plainly(owner, **how))
    assert expected != [each.continuation(()) for each in drafts]
    assert texts(with_drafts(owner, drafts, **how)) == expected


def test_ties_are_decoded_without_drafts() -> None:
    owner = model()
    owner.proj_out.weight[40] = owner.proj_out.weight[12]  # shared with the embedding of both tokens
    expected = plainly(owner)
    assert any(12 in text for text in texts(expected))
    drafts = drafts_of(expected)
    passes = counted_passes(owner)
    assert texts(with_drafts(owner, drafts)) == texts(expected)
    tied = sum(12 in text for text in texts(expected))
    assert passes[1][0] == tied, "those with a tie, decoded again"


@pytest.mark.parametrize("limit", [1, 2, 30])
def test_a_limit_of_tokens_is_kept(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "MOST_TOKENS", 10)
    owner = model()
    drafts = drafts_of(plainly(owner, max_new_tokens=30))
    expected = texts(plainly(owner, max_new_tokens=limit))
    assert texts(with_drafts(owner, drafts, max_new_tokens=limit)) == expected


def test_positions_end_where_the_models_do() -> None:
    owner = model(max_target_positions=16)
    long = tuple(range(40, 90))
    drafts = [Drafts() for _ in range(COUNT)]
    for each in drafts:
        each.add(long)
    assert texts(with_drafts(owner, drafts)) == texts(plainly(owner))


@pytest.mark.parametrize(
    "rules",
    [
        {"return_timestamps": True},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": [END, 5]},
        {"eos_token_id": None},
        {"pad_token_id": 77},
    ],
)
def test_a_model_with_rules_that_are_not_known_here_gets_no_drafts(rules: dict[str, object]) -> None:
    owner = model()
    assert may_draft(owner, [END, PAD])
    for name, value in rules.items():
        setattr(owner.generation_config, name, value)
    assert not may_draft(owner, [END, PAD])


def test_a_model_that_rounds_more_gets_no_drafts() -> None:
    assert not may_draft(model().bfloat16(), [END, PAD])


def test_logits_that_take_too_much_memory_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = model()
    expected = plainly(owner)
    drafts = drafts_of(expected)
    monkeypatch.setattr(speculative, "MOST_BYTES", 4 * 100 * COUNT * 10)
    passes = counted_passes(owner)
    assert texts(with_drafts(owner, drafts)) == texts(expected)
    assert passes[0] == (COUNT, 1), "decoded without drafts"


def test_another_window_of_the_audio_is_noticed() -> None:
    """`generate` begins again with the prompt, here for utterances in which the model has written timestamps."""
    owner = model()
    drafts = drafts_of(plainly(owner))
    forward = SpeculativeForward(owner.forward, drafts, 14, 14, END)
    states = owner.get_encoder()(features(COUNT))
    prompt = torch.full((COUNT, 1), 3)
    first = forward(decoder_input_ids=prompt, encoder_outputs=states).logits[:, -1].argmax(-1)
    with pytest.raises(speculative._OtherWindowError):
        forward(decoder_input_ids=prompt, encoder_outputs=states)
    with pytest.raises(speculative._OtherWindowError):
        ids = torch.cat([prompt, first[:, None]], 1)[1:]
        forward(decoder_input_ids=ids, encoder_outputs=states)


def test_texts_with_timestamps_are_those_of_generate() -> None:
    """Whisper's `generate` cuts windows at two tokens of time in a row, which some merges write unasked."""
    for first_time in (20, 40, 60, 80):
        owner = model()
        owner.generation_config.no_timestamps_token_id = first_time
        expected = plainly(owner)
        drafts = drafts_of(plainly(changed(model(), 0.002)))
        assert texts(with_drafts(owner, drafts)) == texts(expected)
        assert texts(with_drafts(owner, drafts)) == texts(expected)


def test_other_calls_reach_the_model() -> None:
    """Such as the one by which `generate` detects the language."""
    forward = SpeculativeForward(lambda **keywords: keywords, [Drafts(), Drafts()], 5, 5, END)
    ids = torch.tensor([[3], [3]])
    assert forward(input_features=None, decoder_input_ids=ids) == {"input_features": None, "decoder_input_ids": ids}


def test_the_models_forward_is_put_back() -> None:
    owner = model()
    with pytest.raises(ZeroDivisionError), replaced_forward(owner, lambda **_: 1 / 0):
        owner(decoder_input_ids=None)
    assert "forward" not in owner.__dict__
    own = owner.forward
    owner.forward = own  # somebody has put one there already
    with replaced_forward(owner, lambda **_: 5):
        assert owner(decoder_input_ids=None) == 5
    assert owner.__dict__["forward"] is own


def test_drafts_that_were_written_most_often_are_kept() -> None:
    drafts = Drafts()
    for number in range(100):
        drafts.add((number, END))
        drafts.add((200, END))
    assert drafts.continuation(()) == (200, END)
    assert sum(drafts.continuation((number,)) == (END,) for number in range(100)) == 100
    assert len(drafts) == speculative.KEPT


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((), (5, 6, 7, 8, 9)),
        ((5, 6, 7), (8, 9)),
        ((5, 4), (7, 8, 9)),  # one instead of another
        ((5, 4, 7), (8, 9)),
        ((5, 4, 4, 7), (8, 9)),  # one more
        ((5, 7), (8, 9)),  # one less
        ((5, 6, 7, 8, 9), ()),
        ((1, 1, 1, 1, 1, 1, 1, 1), ()),
    ],
)
def test_a_draft_is_followed_after_a_difference(tokens: tuple[int, ...], expected: tuple[int, ...]) -> None:
    drafts = Drafts()
    assert drafts.continuation(tokens) == ()
    drafts.add((5, 6, 7, 8, 9))
    assert drafts.continuation(tokens) == expected
