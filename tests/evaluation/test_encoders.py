"""A Whisper's encoder gets one utterance at a time on the CPU, and gives what it gives without that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_whisper import features as some_features
from small_whisper import small_whisper
from transformers import WhisperForConditionalGeneration

from hsa.evaluation.encoders import encode_one_by_one


@pytest.fixture
def model() -> WhisperForConditionalGeneration:
    return small_whisper()


def counted(encoder: Any) -> list[int]:
    """The sizes of the batches that the layers of an encoder get from now on."""
    sizes: list[int] = []
    encoder.layers[0].register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    return sizes


@torch.inference_mode()
def test_each_utterance_is_encoded_alone_and_the_result_is_that_of_a_batch(
    model: WhisperForConditionalGeneration,
) -> None:
    encoder, features = model.get_encoder(), some_features(5)
    whole = encoder(features, output_hidden_states=True)
    sizes = counted(encoder)
    encode_one_by_one(encoder)
    for found in (encoder(features, output_hidden_states=True), encoder(input_features=features)):
        assert type(found) is type(whole)
        torch.testing.assert_close(found.last_hidden_state, whole.last_hidden_state)
    assert sizes == [1] * 10
    found = encoder(features, output_hidden_states=True)
    assert len(found.hidden_states) == len(whole.hidden_states)
    for one, other in zip(found.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(one, other)


@torch.inference_mode()
def test_the_states_of_an_utterance_do_not_depend_on_its_batch(model: WhisperForConditionalGeneration) -> None:
    encoder, features = model.get_encoder(), some_features(7)
    encode_one_by_one(encoder)
    together = encoder(features).last_hidden_state
    for number in range(len(features)):
        assert torch.equal(encoder(features[number : number + 1]).last_hidden_state[0], together[number])


@torch.inference_mode()
def test_a_model_generates_the_same_tokens(model: WhisperForConditionalGeneration) -> None:
    features = some_features(4)
    before = model.generate(features, max_new_tokens=8)
    sizes = counted(model.get_encoder())
    encode_one_by_one(model.get_encoder())
    assert torch.equal(model.generate(features, max_new_tokens=8), before)
    assert sizes == [1] * 4
