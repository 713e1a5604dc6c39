"""A Whisper of a few thousand random weights, for tests of how models are called."""

from __future__ import annotations

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

FRAMES, BANDS = 60, 8


def small_whisper(seed: int = 0, scale: float = 1.0, **config: object) -> WhisperForConditionalGeneration:
    """A model that takes features of BANDS mel bands and FRAMES frames; with weights of a larger `scale` it writes more
    varied texts."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 100,
        "num_mel_bins": BANDS,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_source_positions": FRAMES // 2,
        "max_target_positions": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    model = WhisperForConditionalGeneration(WhisperConfig(**{**values, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def features(count: int, seed: int = 0) -> torch.Tensor:
    """Random features, float32 [utterances, BANDS, FRAMES]."""
    return torch.randn(count, BANDS, FRAMES, generator=torch.Generator().manual_seed(seed))
