"""Numbers and shapes at the edge, through whole merges: every byte against the oracle, or against primary's."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import raw_bytes, read_tensors, write_tensors

import hsa
from hsa.architectures.whisper import WHISPER
from hsa.errors import NonFiniteError
from hsa.reference import merge_tensor
from hsa.testing.whisper_checkpoints import SHAPES, DType, write_triple

Triple = dict[str, Path]
SHAPE = SHAPES["test"]
TARGET = "model.encoder.layers.0.self_attn.q_proj.weight"
COPIED = "model.decoder.layers.0.fc1.weight"
TINY = math.nextafter(0.0, 1.0)
BELOW_ONE = math.nextafter(1.0, 0.0)
TYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def check(triple: Triple, output: Path, *, k: float = 0.6, lam: float = 0.5, alpha: float = 0.2, **more: object) -> int:
    """Merge, and hold targets to the oracle and all else to primary, bit for bit; returns how many heads merged."""
    report = hsa.merge(**triple, output=output, k=k, lam=lam, alpha=alpha, sync=False, **more)  # type: ignore[arg-type]
    base, primary, secondary = (read_tensors(triple[role]) for role in ("base", "primary", "secondary"))
    merged = read_tensors(output)
    assert merged.keys() == primary.keys()
    stacks = WHISPER.counts(json.loads((output / "config.json").read_text()), "output")
    merged_heads = 0
    for name, tensor in merged.items():
        projection, expected = WHISPER.target(name, "encoder-qkv"), primary[name]
        if projection is not None:
            oracle = merge_tensor(
                base[name],
                primary[name],
                secondary[name],
                k=k,
                lam=lam,
                alpha=alpha,
                layer=projection.layer,
                layers=stacks.layers[projection.stack],
                heads=stacks.heads[projection.stack],
            )
            expected = oracle.value
            assert report.tensors[name].selected == oracle.selected, name
            merged_heads += len(oracle.selected)
        assert tensor.dtype == expected.dtype
        assert raw_bytes(tensor) == raw_bytes(expected), name
    assert hsa.verify(output, **triple).problems == ()
    return merged_heads


def scaled(triple: Triple, factor: float) -> None:
    """Multiply every tensor of all three."""
    for path in triple.values():
        write_tensors(path, {name: (t.double() * factor).to(t.dtype) for name, t in read_tensors(path).items()})


# Shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.0, TINY, 0.5, 1.0])
@pytest.mark.parametrize(
    ("heads", "layers"), [(1, 1), (1, 2), (64, 1), (2, 3)], ids=["one of each", "one head", "heads of width 1", "odd"]
)
def test_few_heads_and_few_layers(tmp_path: Path, heads: int, layers: int, k: float) -> None:
    shape = replace(SHAPE, encoder_heads=heads, decoder_heads=heads, encoder_layers=layers, decoder_layers=layers)
    triple = write_triple(tmp_path / "triple", shape, processor=False)
    keep = {0.0: 0, TINY: 1, 0.5: max(1, round(heads / 2)), 1.0: heads}[k]
    assert check(triple, tmp_path / "out", k=k) == keep * 5 * layers  # q, k, v weights; q, v biases


def test_a_width_of_one(tmp_path: Path) -> None:
    shape = replace(SHAPE, d_model=1, encoder_heads=1, decoder_heads=1, encoder_layers=1, decoder_layers=1)
    triple = write_triple(tmp_path / "triple", shape, processor=False)
    assert check(triple, tmp_path / "out", k=0.1, lam=0.25) == 5


# Parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, TINY, 1.0, sys.float_info.max])
@pytest.mark.parametrize("lam", [0.0, -0.0, TINY, sys.float_info.min, BELOW_ONE, 1.0])
def test_lambda_and_alpha_at_their_ends(shared_triple: Triple, tmp_path: Path, lam: float, alpha: float) -> None:
    assert check(shared_triple, tmp_path / "out", lam=lam, alpha=alpha) > 0


@pytest.mark.parametrize(
    ("k", "keep"),
    [
        (0.0, 0),
        (-0.0, 0),
        (TINY, 1),
        (0.374, 1),
        (0.376, 2),
        (0.625, 2),
        (BELOW_ONE, 4),
        (1.0, 4),
        (math.nextafter(1.0, 2.0), 1),
        (math.nextafter(100.0, 0.0), 4),
        (100.0, 4),
    ],
)
def test_k_at_its_ends(shared_triple: Triple, tmp_path: Path, k: float, keep: int) -> None:
    """Four heads: 0.625 of them are 2.5, which rounds to even; just above 1 it is a percentage."""
    assert check(shared_triple, tmp_path / "out", k=k) == keep * 10


# Numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 2.0**-130), ("float16", 2.0**-14), ("bfloat16", 2.0**-126)])
def test_subnormal_numbers(tmp_path: Path, dtype: DType, factor: float) -> None:
    """Most numbers of all three are subnormal; nothing is flushed to zero."""
    triple = write_triple(tmp_path / "triple", SHAPE, dtype=dtype, delta=0.02)
    scaled(triple, factor)
    least = torch.finfo(TYPES[dtype]).tiny
    held = read_tensors(triple["primary"])[TARGET]
    below = (held.abs() < least) & (held != 0)
    assert below.float().mean() > 0.5
    check(triple, tmp_path / "out")
    merged = read_tensors(tmp_path / "out")[TARGET]
    assert ((merged.abs() < least) & (merged != 0)).float().mean() > 0.5


@pytest.mark.parametrize("dtype", TYPES)
def test_the_smallest_number_of_all(tmp_path: Path, dtype: DType) -> None:
    triple = write_triple(tmp_path / "triple", SHAPE, dtype=dtype)
    bits = INTEGERS[TYPES[dtype]]
    for number, path in enumerate(triple.values()):
        tensors = read_tensors(path)
        tensors[TARGET].view(bits).copy_(torch.arange(tensors[TARGET].numel()).reshape(64, 64) % (2 + number))
        write_tensors(path, tensors)
    check(triple, tmp_path / "out", k=1.0, lam=0.5, alpha=1.0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [0.0, 0.5, 1.0])
def test_negative_zero(tmp_path: Path, dtype: DType, k: float) -> None:
    """In a head that is not selected it stays; in one that is, the formula says which zero it becomes."""
    triple = write_triple(tmp_path / "triple", SHAPE, dtype=dtype)
    for number, path in enumerate(triple.values()):
        tensors = read_tensors(path)
        flat = tensors[TARGET].view(-1)
        for place in range(0, flat.numel(), 5):  # all eight ways in which the three hold +0 and -0
            flat[place] = -0.0 if place // 5 >> number & 1 else 0.0
        tensors[COPIED].view(-1)[::3] = -0.0
        write_tensors(path, tensors)
    check(triple, tmp_path / "out", k=k)
    merged, primary = read_tensors(tmp_path / "out"), read_tensors(triple["primary"])
    assert torch.signbit(merged[COPIED].view(-1)[::3]).all()
    assert torch.signbit(primary[TARGET]).logical_and(primary[TARGET] == 0).any()


@pytest.mark.parametrize("way", ["patch", "rewrite", "applied"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_nan_and_infinity_in_what_is_copied(tmp_path: Path, dtype: DType, way: str) -> None:
    """Quiet and signalling NaN of all payloads, of both signs: bit for bit, by every route."""
    triple = write_triple(tmp_path / "triple", SHAPE, dtype=dtype)
    kind = TYPES[dtype]
    tensors = read_tensors(triple["primary"])
    odd = tensors[COPIED].view(INTEGERS[kind]).view(-1)
    exponent = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}[kind]
    payloads = {torch.float32: 0x7FFFFF, torch.float16: 0x3FF, torch.bfloat16: 0x7F}[kind]
    generator = torch.Generator().manual_seed(0)
    values = exponent | torch.randint(0, payloads + 1, odd.shape, generator=generator)
    values[: 2 * 128] = exponent | torch.arange(256) % (payloads + 1)
    sign = torch.randint(0, 2, odd.shape, generator=generator).bool()
    top = 1 << (kind.itemsize * 8 - 1)
    odd.copy_(torch.where(sign, values - top, values))
    write_tensors(triple["primary"], tensors)
    out = tmp_path / "out"
    if way == "applied":
        hsa.merge_patch(**triple, output=tmp_path / "patch.safetensors")
        hsa.apply(triple["primary"], tmp_path / "patch.safetensors", output=out)
    else:
        hsa.merge(**triple, output=out, max_shard_size="400KB" if way == "rewrite" else None)
    merged = read_tensors(out)
    assert raw_bytes(merged[COPIED]) == raw_bytes(tensors[COPIED])
    assert not torch.isfinite(merged[COPIED]).any() and torch.isnan(merged[COPIED]).any()
    assert hsa.verify(out, **triple).problems == ()


@pytest.mark.parametrize(("tv", "sound"), [(1023.0, True), (1024.0, False), (-1023.0, True), (-1024.0, False)])
def test_a_merged_float16_at_the_end_of_its_range(tmp_path: Path, tv: float, sound: bool) -> None:
    """All three are finite. With lambda = 0 a selected head is secondary's, and primary's task vector adds nothing;
    with a scale of 2 it goes twice as far from base: to 65504, or to 65536, which is no float16."""
    triple = write_triple(tmp_path / "triple", SHAPE, dtype="float16")
    start = math.copysign(63456.0 if sound else 63488.0, tv)
    for role, path in triple.items():
        tensors = read_tensors(path)
        tensors[TARGET][37, 5] = start + (math.copysign(1024.0, tv) if role == "secondary" else 0.0)
        write_tensors(path, tensors)
    out = tmp_path / "out"
    if sound:
        hsa.merge(**triple, output=out, k=1, lam=0, alpha=1, attention_scale=2.0)
        value = read_tensors(out)[TARGET][37, 5].item()
        assert abs(value) == 65504.0 and math.copysign(1, value) == math.copysign(1, tv)
        assert hsa.verify(out, **triple).problems == ()
    else:
        with pytest.raises(NonFiniteError, match=r"q_proj\.weight, head 2: the result overflows F16.*float32"):
            hsa.merge(**triple, output=out, k=1, lam=0, alpha=1, attention_scale=2.0)
        assert not out.exists()
        hsa.merge(**triple, output=out, k=1, lam=0, alpha=1, attention_scale=2.0, dtype="float32")
        assert abs(read_tensors(out)[TARGET][37, 5].item()) == 65536.0
