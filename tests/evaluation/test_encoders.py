"""A Whisper's encoder gets one utterance at a time on the CPU, and gives what it gives without that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from hsa.evaluation.encoders import encode_one_by_one

FRAMES = 60


@pytest.fixture
def model() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=100,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=FRAMES // 2,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config).eval()


def counted(encoder: Any) -> list[int]:
    """The sizes of the batches that the layers of an encoder get from now on."""
    sizes: list[int] = []
    encoder.layers[0].register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    return sizes


@torch.inference_mode()
def test_each_utterance_is_encoded_alone_and_the_result_is_that_of_a_batch(
    model: WhisperForConditionalGeneration,
) -> None:
    encoder, features = model.get_encoder(), torch.randn(5, 8, FRAMES)
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
    encoder, features = model.get_encoder(), torch.randn(7, 8, FRAMES)
    encode_one_by_one(encoder)
    together = encoder(features).last_hidden_state
    for number in range(len(features)):
        assert torch.equal(encoder(features[number : number + 1]).last_hidden_state[0], together[number])


@torch.inference_mode()
def test_a_model_generates_the_same_tokens(model: WhisperForConditionalGeneration) -> None:
    features = torch.randn(4, 8, FRAMES)
    before = model.generate(features, max_new_tokens=8)
    sizes = counted(model.get_encoder())
    encode_one_by_one(model.get_encoder())
    assert torch.equal(model.generate(features, max_new_tokens=8), before)
    assert sizes == [1] * 4
