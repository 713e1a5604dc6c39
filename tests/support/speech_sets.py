"""Sets of noise with made-up references, and small models with a CTC head, for tests of the evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch

RATE = 16_000
WORDS = ("ab", "cad", "bee", "face", "dab", "fed")
"""Words of letters that the models below can write."""

LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"abcdef")
Norm = Literal["group", "layer"]
Family = Literal["Wav2Vec2", "Hubert", "WavLM"]


def noise(seconds: float, seed: int) -> np.ndarray:
    """Coloured noise: float32 [samples]."""
    generator = np.random.default_rng(seed)
    samples = generator.standard_normal(round(seconds * RATE))
    tone = np.sin(np.arange(len(samples)) * generator.uniform(0.05, 0.6))
    return (0.1 * samples + 0.3 * tone * np.sin(np.arange(len(samples)) / 900)).astype(np.float32)


def write_set(folder: Path, seconds: Sequence[float], seed: int = 0, **columns: Sequence[str]) -> Path:
    """A table set.tsv beside its clips, one for each length; further columns as given. Returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    lines = ["\t".join(("file", "text", *columns))]
    for number, length in enumerate(seconds):
        name = f"clip_{number:03}.wav"
        soundfile.write(folder / name, noise(length, seed * 1000 + number), RATE, subtype="PCM_16")
        text = " ".join(generator.choice(WORDS, size=4 + number % 3))
        lines.append("\t".join((name, text, *(values[number] for values in columns.values()))))
    table = folder / "set.tsv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def write_ctc(
    folder: Path,
    norm: Norm = "layer",
    seed: int = 0,
    strides: tuple[int, int, int] = (5, 4, 4),
    family: Family = "Wav2Vec2",
    letters: Sequence[str] = LETTERS,
) -> Path:
    """A small random wav2vec2, or a relative of it, with a CTC head, as transformers saves it. With `layer` its
    features tell where padding is, as wav2vec2-large's do; with `group` they do not, as wav2vec2-base's. A frame has as
    many samples as the product of the strides."""
    import transformers
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: number for number, letter in enumerate(letters)}), encoding="utf-8")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(letters),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16, 16),
        conv_stride=strides,
        conv_kernel=(10, 8, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        conv_bias=norm == "layer",
        initializer_range=0.5,
        apply_spec_augment=False,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCTC")(config)
    with torch.no_grad():  # with the biases of a fresh head one token may win everywhere
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, do_normalize=True, return_attention_mask=norm == "layer"
    )
    processor = Wav2Vec2Processor(feature_extractor=extractor, tokenizer=Wav2Vec2CTCTokenizer(str(vocabulary)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load_ctc(folder: Path) -> tuple[Any, Any]:
    """Model and processor, loaded by transformers alone."""
    from transformers import AutoModelForCTC, Wav2Vec2Processor

    model = AutoModelForCTC.from_pretrained(folder, local_files_only=True).eval()
    return model, Wav2Vec2Processor.from_pretrained(folder, local_files_only=True)


def write_moonshine(folder: Path) -> Path:
    """A small random Moonshine, whose convolutions are normalised over time; it is given an attention mask."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        MoonshineConfig,
        MoonshineForConditionalGeneration,
        PreTrainedTokenizerFast,
        Wav2Vec2FeatureExtractor,
    )

    torch.manual_seed(0)
    config = MoonshineConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        pad_token_id=2,
        initializer_range=0.5,
    )
    MoonshineForConditionalGeneration(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, do_normalize=False, return_attention_mask=True
    )
    extractor.save_pretrained(folder)
    return folder
