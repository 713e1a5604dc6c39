from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsa.testing import made_up_numbers, whisper_checkpoints
from hsa.testing.whisper_checkpoints import SHAPES, TOKENIZER_VOCAB_SIZE, WhisperShape

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

TEST = SHAPES["test"]
# A width that is no power of two, head counts that differ between the stacks, and an odd vocabulary.
ODD = WhisperShape(
    d_model=30,
    encoder_layers=1,
    decoder_layers=3,
    encoder_heads=5,
    decoder_heads=3,
    ffn_dim=7,
    vocab_size=TOKENIZER_VOCAB_SIZE + 3,
    num_mel_bins=9,
    max_source_positions=150,
    max_target_positions=21,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tensors(directory: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, read by safetensors itself."""
    loaded: dict[str, Any] = {}
    for file in sorted(directory.glob("*.safetensors")):
        loaded.update(safetensors_torch.load_file(file))
    return loaded


def header(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return dict(json.loads(raw[8 : 8 + length]))


def all_bytes(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def assert_same_tensors(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def load_model(directory: Path, cls: str = "WhisperForConditionalGeneration") -> Any:
    """The model, after checking that nothing was missing, left over or of another shape."""
    load = getattr(transformers, cls).from_pretrained
    model, info = load(directory, output_loading_info=True, dtype="auto")
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], (problem, info[problem])
    return model


# Shapes and names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tiny", 37_760_640),
        ("base", 72_593_920),
        ("small", 241_734_912),
        ("medium", 763_857_920),
        ("large-v3", 1_543_490_560),
        ("large-v3-turbo", 808_878_080),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert sum(int(np.prod(shape)) for shape in whisper_checkpoints.tensor_shapes(SHAPES[name]).values()) == parameters


@pytest.mark.parametrize("shape", [TEST, ODD], ids=["test", "odd"])
def test_tensor_shapes_are_those_transformers_saves(shape: WhisperShape, tmp_path: Path) -> None:
    whisper_checkpoints.write_config(tmp_path / "config", shape, "float32")
    config = transformers.WhisperConfig.from_pretrained(tmp_path / "config")
    model = transformers.WhisperForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "saved")
    expected = {name: tuple(tensor.shape) for name, tensor in tensors(tmp_path / "saved").items()}
    found = whisper_checkpoints.tensor_shapes(shape)
    assert found == expected
    assert list(found) == [name for name in model.state_dict() if name in found]


@pytest.mark.parametrize("field", ["d_model", "decoder_layers", "vocab_size"])
def test_shape_below_one_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0"):
        replace(TEST, **{field: 0})


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="decoder_heads is 5, which does not divide d_model 64"):
        replace(TEST, decoder_heads=5)


# Loading with transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_checkpoint_loads_completely(dtype: whisper_checkpoints.DType, tmp_path: Path) -> None:
    whisper_checkpoints.write_checkpoint(tmp_path, TEST, dtype=dtype, role="primary")
    model = load_model(tmp_path)
    assert model.dtype == getattr(torch, dtype)
    state = model.state_dict()
    for name, tensor in tensors(tmp_path).items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("name", ["test", "demo"])
def test_model_and_processor_transcribe_together(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    whisper_checkpoints.write_checkpoint(tmp_path, shape)
    processor = transformers.WhisperProcessor.from_pretrained(tmp_path)
    model = load_model(tmp_path)
    audio = np.random.default_rng(0).standard_normal(8000)
    features = processor(audio, sampling_rate=16000, return_tensors="pt").input_features
    assert features.shape == (1, shape.num_mel_bins, 2 * shape.max_source_positions)
    tokens = model.generate(features, language="de", task="translate")
    assert 0 < tokens.shape[1] <= shape.max_target_positions
    assert int(tokens.max()) < shape.vocab_size
    assert isinstance(processor.batch_decode(tokens, skip_special_tokens=True)[0], str)


def test_names_without_prefix_load_as_both_classes(tmp_path: Path) -> None:
    whisper_checkpoints.write_checkpoint(tmp_path / "with", TEST)
    whisper_checkpoints.write_checkpoint(tmp_path / "without", TEST, prefix="")
    expected = {name.removeprefix("model."): tensor for name, tensor in tensors(tmp_path / "with").items()}
    assert_same_tensors(tensors(tmp_path / "without"), expected)
    assert json.loads((tmp_path / "without" / "config.json").read_text())["architectures"] == ["WhisperModel"]
    assert_same_tensors(dict(load_model(tmp_path / "without", "WhisperModel").state_dict()), expected)
    whole = load_model(tmp_path / "without")
    assert_same_tensors(dict(whole.model.state_dict()), expected)


@pytest.mark.parametrize("name", list(SHAPES))
def test_config_says_what_the_shape_says(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    whisper_checkpoints.write_config(tmp_path, shape, "bfloat16")
    config = transformers.WhisperConfig.from_pretrained(tmp_path)
    assert config.model_type == "whisper"
    assert config.architectures == ["WhisperForConditionalGeneration"]
    assert config.dtype == torch.bfloat16
    assert config.num_hidden_layers == config.encoder_layers
    found = WhisperShape(
        d_model=config.d_model,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_heads=config.encoder_attention_heads,
        decoder_heads=config.decoder_attention_heads,
        ffn_dim=config.encoder_ffn_dim,
        vocab_size=config.vocab_size,
        num_mel_bins=config.num_mel_bins,
        max_source_positions=config.max_source_positions,
        max_target_positions=config.max_target_positions,
    )
    assert found == shape
    assert config.decoder_ffn_dim == shape.ffn_dim
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.max_length == shape.max_target_positions


def test_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"vocab_size is 100, expected at least {TOKENIZER_VOCAB_SIZE}"):
        whisper_checkpoints.write_config(tmp_path, replace(TEST, vocab_size=100), "float32")
    assert not list(tmp_path.iterdir())


# Processor -------------------------------------------------------------------------------------------------


def test_tokenizer_round_trips_text_and_special_tokens(tmp_path: Path) -> None:
    whisper_checkpoints.write_processor(tmp_path)
    tokenizer = transformers.WhisperProcessor.from_pretrained(tmp_path).tokenizer
    assert len(tokenizer) == TOKENIZER_VOCAB_SIZE
    for text in (
        "The quick brown fox",
        " leading, trailing ",
        "Grüße, 東京! \t\n",
        "".join(map(chr, range(300))),
    ):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
        whole = tokenizer(text).input_ids
        assert tokenizer.decode(whole, skip_special_tokens=True) == text
    assert sorted(tokenizer.get_vocab().values()) == list(range(TOKENIZER_VOCAB_SIZE))


def test_token_ids_agree_between_tokenizer_and_configs(tmp_path: Path) -> None:
    whisper_checkpoints.write_checkpoint(tmp_path, TEST)
    tokenizer = transformers.WhisperProcessor.from_pretrained(tmp_path).tokenizer
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    config = transformers.WhisperConfig.from_pretrained(tmp_path)
    id_of = tokenizer.convert_tokens_to_ids
    for settings in (config, generation):
        assert settings.decoder_start_token_id == id_of("<|startoftranscript|>")
        assert settings.bos_token_id == settings.eos_token_id == settings.pad_token_id == tokenizer.eos_token_id
        assert list(settings.begin_suppress_tokens) == [
            *tokenizer(" ", add_special_tokens=False).input_ids,
            id_of("<|endoftext|>"),
        ]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == id_of("<|endoftext|>")
    assert generation.no_timestamps_token_id == id_of("<|notimestamps|>")
    assert generation.prev_sot_token_id == id_of("<|startofprev|>")
    assert generation.task_to_id == {task: id_of(f"<|{task}|>") for task in ("transcribe", "translate")}
    assert generation.lang_to_id == {token: id_of(token) for token in ("<|en|>", "<|de|>", "<|es|>", "<|fr|>")}
    assert set(generation.suppress_tokens) == set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    assert {"<|startoflm|>", "<|nospeech|>"} <= set(tokenizer.all_special_tokens)
    prompt = tokenizer.get_decoder_prompt_ids(language="en", task="transcribe")
    expected = ("<|en|>", "<|transcribe|>", "<|notimestamps|>")
    assert prompt == list(enumerate(map(id_of, expected), start=1))


@pytest.mark.parametrize(("shape", "seconds", "mels"), [(None, 30, 80), (SHAPES["large-v3"], 30, 128), (ODD, 3, 9)])
def test_feature_extractor_fits_the_model(shape: WhisperShape | None, seconds: int, mels: int, tmp_path: Path) -> None:
    whisper_checkpoints.write_processor(tmp_path, shape)
    extractor = transformers.WhisperProcessor.from_pretrained(tmp_path).feature_extractor
    audio = np.random.default_rng(0).standard_normal(1000)
    features = extractor(audio, sampling_rate=16000, return_tensors="np").input_features
    assert features.shape == (1, mels, 100 * seconds)


def test_window_of_no_whole_seconds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_source_positions is 60, expected a multiple of 50"):
        whisper_checkpoints.write_processor(tmp_path, replace(TEST, max_source_positions=60))


# Weight files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [TEST, ODD], ids=["test", "odd"])
def test_file_is_what_safetensors_would_write(
    shape: WhisperShape, dtype: whisper_checkpoints.DType, tmp_path: Path
) -> None:
    whisper_checkpoints.write_checkpoint(tmp_path, shape, dtype=dtype, processor=False)
    file, again = tmp_path / "model.safetensors", tmp_path / "again"
    safetensors_torch.save_file(tensors(tmp_path), again, metadata={"format": "pt"})
    assert header(file) == header(again)
    assert header(file)["__metadata__"] == {"format": "pt"}
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    assert file.stat().st_size == again.stat().st_size
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


# 61,696 bytes are just what the first two tensors take.
@pytest.mark.parametrize("limit", [1, 20_000, 61_696, 150_000])
def test_shards_are_cut_as_transformers_cuts_them(limit: int, tmp_path: Path) -> None:
    whisper_checkpoints.write_checkpoint(tmp_path / "one", TEST, processor=False)
    whisper_checkpoints.write_checkpoint(tmp_path / "ours", TEST, processor=False, max_shard_bytes=limit)
    model = transformers.WhisperForConditionalGeneration(load_model(tmp_path / "one").config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    name = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / side / name).read_text()) for side in ("ours", "theirs"))
    assert len(set(ours["weight_map"].values())) > 1
    assert ours == theirs
    assert_same_tensors(tensors(tmp_path / "ours"), tensors(tmp_path / "one"))
    load_model(tmp_path / "ours")


def test_limit_that_is_not_exceeded_gives_one_file(tmp_path: Path) -> None:
    whisper_checkpoints.write_checkpoint(tmp_path, TEST, processor=False, max_shard_bytes=10**7)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("role", ["base", "secondary"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_float32_rounded_once(
    dtype: whisper_checkpoints.DType, role: whisper_checkpoints.Role, tmp_path: Path
) -> None:
    whisper_checkpoints.write_checkpoint(tmp_path / "wide", TEST, role=role, processor=False)
    whisper_checkpoints.write_checkpoint(tmp_path / "half", TEST, role=role, dtype=dtype, processor=False)
    wide = tensors(tmp_path / "wide")
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in wide.items()}
    assert_same_tensors(tensors(tmp_path / "half"), expected)


def test_bfloat16_rounds_ties_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808000, 0x00000000], dtype=np.uint32)
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF80, 0x0000]
    assert made_up_numbers.encode(bits.view(np.float32), "bfloat16").tolist() == expected


# Numbers ---------------------------------------------------------------------------------------------------


def test_triple_equals_three_checkpoints_byte_for_byte(tmp_path: Path) -> None:
    keywords: dict[str, Any] = {
        "dtype": "float16",
        "seed": 3,
        "delta": 5e-3,
        "loud_heads": [("encoder", 1, "q", 2)],
        "max_shard_bytes": 100_000,
    }
    paths = whisper_checkpoints.write_triple(tmp_path / "triple", TEST, **keywords)
    assert list(paths) == ["base", "primary", "secondary"]
    for role in ("base", "primary", "secondary"):
        alone = whisper_checkpoints.write_checkpoint(tmp_path / "alone" / role, TEST, role=role, **keywords)
        assert paths[role] == tmp_path / "triple" / role
        assert all_bytes(paths[role]) == all_bytes(alone)


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    whisper_checkpoints.write_triple(tmp_path / "here", ODD)
    code = (
        "import sys; from hsa.testing import whisper_checkpoints as s; "
        f"s.write_triple(sys.argv[1], s.{ODD!r}); "
        "assert not {'torch', 'transformers', 'safetensors'} & sys.modules.keys()"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1",
        "PYTHONPATH": str(Path(whisper_checkpoints.__file__).parents[2]),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    assert all_bytes(tmp_path / "here") == all_bytes(tmp_path / "there")


@pytest.mark.parametrize("shape", [TEST, ODD], ids=["test", "odd"])
def test_block_size_changes_no_value(shape: WhisperShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is written once and in its place, however many blocks a tensor takes."""
    loud = [("encoder", 0, "q", 1)]
    expected = whisper_checkpoints.write_checkpoint(tmp_path / "whole", shape, role="primary", loud_heads=loud)
    for block in (1, 640):
        monkeypatch.setattr(whisper_checkpoints, "_BLOCK_ELEMENTS", block)
        path = whisper_checkpoints.write_checkpoint(tmp_path / str(block), shape, role="primary", loud_heads=loud)
        assert all_bytes(path) == all_bytes(expected)


def test_another_seed_gives_other_tensors_everywhere(tmp_path: Path) -> None:
    first = tensors(whisper_checkpoints.write_checkpoint(tmp_path / "0", TEST, processor=False))
    second = tensors(whisper_checkpoints.write_checkpoint(tmp_path / "1", TEST, seed=1, processor=False))
    assert [name for name in first if torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_both_task_vectors_live_in_every_tensor(dtype: whisper_checkpoints.DType, tmp_path: Path) -> None:
    base, primary, secondary = (
        tensors(path)
        for path in whisper_checkpoints.write_triple(tmp_path, TEST, dtype=dtype, processor=False).values()
    )
    for name, tensor in base.items():
        first, second = primary[name].float() - tensor.float(), secondary[name].float() - tensor.float()
        assert torch.count_nonzero(first) > 0.05 * first.numel(), name
        assert torch.count_nonzero(second) > 0.05 * second.numel(), name
        assert not torch.equal(first, second), name


def test_weights_have_the_promised_mean_and_spread(tmp_path: Path) -> None:
    base, primary, _ = (
        tensors(path) for path in whisper_checkpoints.write_triple(tmp_path, TEST, delta=2e-3, processor=False).values()
    )
    norms = torch.cat([base[name] for name in base if "layer_norm.weight" in name])
    others = torch.cat([base[name].flatten() for name in base if "layer_norm.weight" not in name])
    delta = torch.cat([(primary[name] - base[name]).flatten() for name in base])
    assert norms.mean().item() == pytest.approx(1.0, abs=0.005)
    assert others.mean().item() == pytest.approx(0.0, abs=0.0005)
    assert others.std().item() == pytest.approx(0.02, rel=0.02)
    assert delta.std().item() == pytest.approx(2e-3, rel=0.05)


def test_no_head_is_a_copy_and_no_two_score_alike(tmp_path: Path) -> None:
    base, primary, secondary = (
        tensors(path) for path in whisper_checkpoints.write_triple(tmp_path, TEST, processor=False).values()
    )
    for name in base:
        if "_proj." not in name or name.endswith("out_proj.bias"):
            continue
        proxy = (primary[name] - base[name]).abs() + (secondary[name] - base[name]).abs()
        heads = (proxy.T if "out_proj" in name else proxy).reshape(4, -1)
        values = (base[name].T if "out_proj" in name else base[name]).reshape(4, -1)
        scores = heads.double().square().sum(dim=1).sort().values
        # A bias has 16 elements a head: there chance moves the scores by more than the heads' strengths do.
        least_gap = 1e-4 if name.endswith("bias") else 0.05
        assert ((scores[1:] - scores[:-1]) / scores[1:]).min() > least_gap, name
        assert len({tuple(head.tolist()) for head in values}) == 4, name


# Loud heads ------------------------------------------------------------------------------------------------


LOUD = [("encoder", 0, "q", 1), ("encoder", 1, "k", 0), ("encoder", 1, "k", 3), ("decoder", 1, "v", 2)]


def by_head(tensor: Any) -> Any:
    return tensor.reshape(4, -1)


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_loud_heads_are_louder_by_the_factor_and_the_rest_is_untouched(role: str, tmp_path: Path) -> None:
    quiet = whisper_checkpoints.write_triple(tmp_path / "quiet", TEST, processor=False)
    loud = whisper_checkpoints.write_triple(tmp_path / "loud", TEST, loud_heads=LOUD, loud_factor=7.0, processor=False)
    assert all_bytes(quiet["base"]) == all_bytes(loud["base"])
    base, before, after = tensors(quiet["base"]), tensors(quiet[role]), tensors(loud[role])
    changed = set()
    for name in base:
        if torch.equal(before[name], after[name]):
            continue
        for head in range(4):
            was, now = by_head(before[name])[head], by_head(after[name])[head]
            if torch.equal(was, now):
                continue
            changed.add((name, head))
            expected = 7.0 * (was - by_head(base[name])[head])
            # All values are below 2**-4, so a rounding moves one by 2**-29 at most, and the factor that by 7.
            assert torch.allclose(now - by_head(base[name])[head], expected, rtol=0, atol=2.0**-25), name
    expected_names = {
        (f"model.{stack}.layers.{layer}.self_attn.{kind}_proj.{part}", head)
        for stack, layer, kind, head in LOUD
        for part in (("weight",) if kind == "k" else ("weight", "bias"))
    }
    assert changed == expected_names


def test_loud_heads_have_the_highest_scores(tmp_path: Path) -> None:
    base, primary, secondary = (
        tensors(path)
        for path in whisper_checkpoints.write_triple(tmp_path, TEST, loud_heads=LOUD, processor=False).values()
    )
    for stack, layer, kind in {entry[:3] for entry in LOUD}:
        name = f"model.{stack}.layers.{layer}.self_attn.{kind}_proj.weight"
        proxy = (primary[name] - base[name]).abs() + (secondary[name] - base[name]).abs()
        scores = by_head(proxy).norm(dim=1)
        loud = [head for *projection, head in LOUD if tuple(projection) == (stack, layer, kind)]
        quiet = [head for head in range(4) if head not in loud]
        assert scores[loud].min() > 2.5 * scores[quiet].max()


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"role": "third"}, "role is 'third'"),
        ({"prefix": "whisper."}, "prefix is 'whisper.'"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"loud_heads": [("encoder", 2, "q", 0)]}, "does not exist"),
        ({"loud_heads": [("encoder", 0, "q", 4)]}, "does not exist"),
        ({"loud_heads": [("encoder", 0, "q", -1)]}, "does not exist"),
        ({"loud_heads": [("encoder", 0, "out", 0)]}, "does not exist"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    keywords: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        whisper_checkpoints.write_checkpoint(tmp_path / "out", TEST, **keywords)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [whisper_checkpoints.write_checkpoint, whisper_checkpoints.write_triple])
def test_directory_with_weights_is_refused_and_kept(write: Callable[..., Any], tmp_path: Path) -> None:
    whisper_checkpoints.write_triple(tmp_path, TEST, max_shard_bytes=100_000)
    before = all_bytes(tmp_path)
    target = tmp_path if write is whisper_checkpoints.write_triple else tmp_path / "base"
    with pytest.raises(FileExistsError, match="already holds weights"):
        write(target, TEST, seed=1)
    assert all_bytes(tmp_path) == before
