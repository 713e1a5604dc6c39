"""LoRA adapters on top of base, against the same arithmetic in torch; against peft in tests/programs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    edit_json,
    merged_bytes,
    raw_bytes,
    read_tensors,
    write_adapter,
    write_openai,
    write_pickle,
    write_tensors,
)
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.errors import NonFiniteError, RequestError
from hsa.sources import lora
from hsa.sources.checkpoint import INDEX, open_checkpoint
from hsa.sources.lora import LoraCheckpoint, open_adapter
from hsa.system.fsio import Tally
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]
EVERY = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
CONVOLUTIONS = ("conv1.weight", "conv2.weight")
NARROW = ("q_proj.weight", "v_proj.weight")


def adapted_names(base: Path, endings: tuple[str, ...] = EVERY) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in read_tensors(base).items() if name.endswith(endings)}


def folded(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Base's tensors with the adapter in them: the formula in torch, float32, rank by rank, rounded once."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = read_tensors(base)
    halves = load_file(adapter / "adapter_model.safetensors")
    for key in halves:
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            down, up = halves[key].float(), halves[key.replace("lora_A", "lora_B")].float()
            delta = torch.zeros_like(tensors[name], dtype=torch.float32)
            for rank in range(down.shape[0]):
                rows = up[:, rank].reshape(-1, *[1] * (down.ndim - 1))
                delta = delta + rows * down[None, rank]
            tensors[name] = (tensors[name].float() + delta * torch.tensor(scale)).to(tensors[name].dtype)
    return tensors


def fold_into(base: Path, adapter: Path, directory: Path) -> Path:
    """A checkpoint directory: base's files with the folded weights."""
    shutil.copytree(base, directory)
    write_tensors(directory, folded(base, adapter))
    return directory


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def typed(request: pytest.FixtureRequest, tmp_path: Path) -> Triple:
    return write_triple(tmp_path / "sources", SHAPES["test"], dtype=request.param)


@pytest.fixture
def adapters(typed: Triple, tmp_path: Path) -> Triple:
    """Base, and two adapters of it."""
    weights = adapted_names(typed["base"])
    write_adapter(tmp_path / "a1", weights, seed=1)
    write_adapter(tmp_path / "a2", weights, seed=2, rank=5, use_rslora=True, dtype=torch.float16)
    return {"base": typed["base"], "primary": tmp_path / "a1", "secondary": tmp_path / "a2"}


@pytest.fixture
def both(adapters: Triple, tmp_path: Path) -> Triple:
    return {
        role: fold_into(adapters["base"], adapters[role], tmp_path / f"{role}-f") for role in adapters if role != "base"
    }


# Merges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"targets": "attention-all", "lam": 0.1}, {"non_attention_scale": 0.5}])
def test_the_merge_is_that_of_the_folded_checkpoints(
    adapters: Triple, both: Triple, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    expected = merged_bytes({**both, "base": adapters["base"]}, tmp_path / "expected", **parameters)
    unmerged = {name: raw_bytes(tensor) for name, tensor in read_tensors(adapters["base"]).items()}
    assert sum(expected[name] != unmerged[name] for name in expected) > 30
    assert merged_bytes(adapters, tmp_path / "out", **parameters) == expected


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_one_adapter_beside_a_whole_checkpoint(
    typed: Triple, adapters: Triple, both: Triple, tmp_path: Path, role: str
) -> None:
    expected = merged_bytes({**typed, role: both[role]}, tmp_path / "expected")
    assert merged_bytes({**typed, role: adapters[role]}, tmp_path / "out") == expected


def test_error_of_the_folded_weights(adapters: Triple) -> None:
    """Against float64: a rounding per operation of the sum over ranks, and one to base's dtype."""
    halves = load_file(adapters["primary"] / "adapter_model.safetensors")
    base = read_tensors(adapters["base"])
    with (
        open_checkpoint("base", adapters["base"], Tally()) as under,
        open_adapter("primary", adapters["primary"], Tally(), under) as source,
    ):
        assert len(source.pairs) == len(adapted_names(adapters["base"]))
        for name in source.pairs:
            ref = source.tensors[name]
            buffer = bytearray(ref.nbytes)
            source.read_into(ref, memoryview(buffer))
            weight = base[ref.name]
            ours = torch.frombuffer(buffer, dtype=weight.dtype).reshape(weight.shape).double()
            prefix = f"base_model.model.{ref.name.removesuffix('.weight')}"
            down, up = (halves[f"{prefix}.lora_{half}.weight"].double() for half in "AB")
            exact = weight.double() + source.scale * (up @ down)
            bound = 2.0**-24 * (down.shape[0] + 3) * (weight.double().abs() + source.scale * (up.abs() @ down.abs()))
            bound += torch.finfo(weight.dtype).eps / 2 * exact.abs() + torch.finfo(weight.dtype).smallest_normal
            assert ((ours - exact).abs() <= bound).all()
            assert ((ours - weight.double()).abs() > bound).any()


@pytest.mark.parametrize("threads", [1, 5])
def test_bytes_do_not_depend_on_threads(adapters: Triple, tmp_path: Path, threads: int) -> None:
    default = merged_bytes(adapters, tmp_path / "default", non_attention_scale=0.5)
    assert merged_bytes(adapters, tmp_path / "out", non_attention_scale=0.5, threads=threads) == default


@pytest.mark.parametrize("block", [1, 100, 1 << 15])
def test_bytes_do_not_depend_on_the_range_read(adapters: Triple, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    with (
        open_checkpoint("base", adapters["base"], Tally()) as under,
        open_adapter("secondary", adapters["secondary"], Tally(), under) as source,
    ):
        ref = source.tensors["encoder.layers.0.fc2.weight"]
        whole = bytearray(ref.nbytes)
        source.read_into(ref, memoryview(whole))
        monkeypatch.setattr(lora, "BLOCK_ELEMENTS", block)
        for start, count in [(0, 1), (3, 7), (255, 2), (1000, 5001), (ref.nbytes - 3, 3), (17, 0), (0, ref.nbytes)]:
            part = bytearray(count)
            source.read_into(ref, memoryview(part), start)
            assert part == whole[start : start + count], (start, count)


def test_only_targets_are_formed_of_a_secondary(
    typed: Triple, adapters: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: dict[str, set[str]] = {"primary": set(), "secondary": set()}
    really = LoraCheckpoint._fold

    def watched(self: LoraCheckpoint, tensor: Any, *arguments: Any) -> Any:
        formed[self.role].add(tensor.name)
        return really(self, tensor, *arguments)

    monkeypatch.setattr(LoraCheckpoint, "_fold", watched)
    report = hsa.merge(output=tmp_path / "out", sync=False, **adapters)
    weights = {name for name in report.tensors if name.endswith("weight")}
    assert formed["secondary"] == weights
    assert formed["primary"] == set(adapted_names(adapters["base"]))


def test_memory_is_bounded_by_blocks(adapters: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    really = LoraCheckpoint.fold

    def watched(self: LoraCheckpoint, weight: Any, down: Any, up: Any) -> Any:
        nonlocal largest
        largest = max(largest, weight.size)
        return really(self, weight, down, up)

    monkeypatch.setattr(LoraCheckpoint, "fold", watched)
    monkeypatch.setattr(lora, "BLOCK_ELEMENTS", 1000)
    hsa.Merger(**adapters)
    assert 0 < largest <= 1000


# Convolutions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_lora_on_convolutions_is_folded_in(typed: Triple, tmp_path: Path, role: str) -> None:
    weights = adapted_names(typed["base"], (*NARROW, *CONVOLUTIONS))
    assert [list(weight.shape) for name, weight in weights.items() if "conv1" in name] == [[64, 80, 3]]
    write_adapter(tmp_path / "adapter", weights)
    whole = fold_into(typed["base"], tmp_path / "adapter", tmp_path / "folded")
    parameters: dict[str, Any] = {"non_attention_scale": 0.5}
    expected = merged_bytes({**typed, role: whole}, tmp_path / "expected", **parameters)
    assert merged_bytes({**typed, role: tmp_path / "adapter"}, tmp_path / "out", **parameters) == expected
    unchanged = merged_bytes({**typed, role: typed["base"]}, tmp_path / "unchanged", **parameters)
    moved = {name for name in expected if expected[name] != unchanged[name]}
    assert any(name.endswith("conv1.weight") for name in moved) == (role == "primary")


@pytest.mark.parametrize("block", [1, 100, 1 << 15])
def test_bytes_of_a_convolution_do_not_depend_on_the_range_read(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    write_adapter(tmp_path / "adapter", adapted_names(shared_triple["base"], CONVOLUTIONS))
    expected = folded(shared_triple["base"], tmp_path / "adapter")
    with (
        open_checkpoint("base", shared_triple["base"], Tally()) as under,
        open_adapter("secondary", tmp_path / "adapter", Tally(), under) as source,
    ):
        for name in ("encoder.conv1.weight", "encoder.conv2.weight"):
            ref, whole = source.tensors[name], raw_bytes(expected[f"model.{name}"])
            monkeypatch.setattr(lora, "BLOCK_ELEMENTS", block)
            for start, count in [(0, 1), (3, 7), (255, 2), (1000, 501), (ref.nbytes - 3, 3), (0, ref.nbytes)]:
                part = bytearray(count)
                source.read_into(ref, memoryview(part), start)
                assert part == whole[start : start + count], (name, start, count)


# Files that hold no adapter, or not this one's -----------------------------------------------------------------


def saved(directory: Path, tensors: dict[str, torch.Tensor], form: str) -> Path:
    (directory / "adapter_model.safetensors").unlink()
    if form == "safetensors":
        save_file(tensors, directory / "adapter_model.safetensors")
    else:
        torch.save(tensors, directory / "adapter_model.bin")
    return directory


def renamed_key(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
WRONG_FILES: dict[str, tuple[Change, str]] = {
    "every tensor of shape [0]": (
        lambda tensors: {name: torch.empty(0) for name in tensors},
        r"\.weight has shape \[0\]: the adapter's tensors are empty; DeepSpeed ZeRO-3 .*save it again",
    ),
    "one tensor of shape [0]": (
        lambda tensors: {**tensors, next(reversed(tensors)): torch.empty(0)},
        r"\.weight has shape \[0\]: the adapter's tensors are empty",
    ),
    "a rank of 0": (
        lambda tensors: {name: t[:0] if ".lora_A." in name else t[:, :0] for name, t in tensors.items()},
        r"has shape \[(0, 64|64, 0)\]: the adapter's tensors are empty",
    ),
    "no tensor": (lambda tensors: {}, r"holds no tensor; the adapter is empty; DeepSpeed ZeRO-3"),
    "the adapter's name": (
        lambda tensors: renamed_key(tensors, ".weight", ".default.weight"),
        r"lora_[AB]\.default\.weight holds that of the adapter, default, .*save_pretrained\(\)",
    ),
    "another adapter's name": (
        lambda tensors: renamed_key(tensors, ".weight", ".my_adapter.weight"),
        r"holds that of the adapter, my_adapter, .*save_pretrained\(\)",
    ),
    "no prefix of peft": (
        lambda tensors: renamed_key(tensors, "base_model.model.", ""),
        r"does not begin with base_model\.model\., .*save_pretrained\(\)",
    ),
    "another rank": (
        lambda tensors: {name: t[:2] if ".lora_A." in name else t[:, :2].clone() for name, t in tensors.items()},
        r"have rank 2, and r is 3 in adapter_config\.json; give the adapter_config\.json that was saved with",
    ),
    "the output projection": (
        lambda tensors: {
            "base_model.model.proj_out.lora_A.weight": torch.zeros(3, 64),
            "base_model.model.proj_out.lora_B.weight": torch.zeros(268, 3),
        },
        r"adapts proj_out\.weight\. Base ties its output projection to the embedding.*train the adapter without it",
    ),
    "the embedding": (
        lambda tensors: {
            "base_model.model.model.decoder.embed_tokens.base_layer.weight": torch.zeros(268, 64),
            "base_model.model.model.decoder.embed_tokens.lora_embedding_A": torch.zeros(3, 268),
            "base_model.model.model.decoder.embed_tokens.lora_embedding_B": torch.zeros(64, 3),
        },
        r"adapts decoder\.embed_tokens\.weight\. Base ties its output projection to the embedding",
    ),
    "a layer norm": (
        lambda tensors: {
            "base_model.model.model.encoder.layer_norm.lora_A.weight": torch.zeros(3, 64),
            "base_model.model.model.encoder.layer_norm.lora_B.weight": torch.zeros(64, 3),
        },
        r"are for encoder\.layer_norm\.weight, which has shape \[64\] in base; LoRA is read on matrices and",
    ),
}


OF_PLAIN_LORA = {"another rank", "a layer norm"}
"""Found by the shapes of what is read here; of anything more than plain LoRA peft checks them."""


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
@pytest.mark.parametrize(
    ("what", "settings"),
    [(what, {}) for what in WRONG_FILES]
    + [(what, {"use_dora": True}) for what in WRONG_FILES if what not in OF_PLAIN_LORA],
)
def test_an_adapters_file_that_is_wrong_is_refused_by_its_cause(
    shared_triple: Triple, tmp_path: Path, what: str, form: str, settings: dict[str, Any]
) -> None:
    change, pattern = WRONG_FILES[what]
    tensors = write_adapter(tmp_path / "a1", adapted_names(shared_triple["base"], NARROW), **settings)
    saved(tmp_path / "a1", change(tensors), form)
    with pytest.raises(hsa.HsaError, match=pattern) as caught:
        hsa.merge(output=tmp_path / "out", **{**shared_triple, "primary": tmp_path / "a1"})
    assert "trained on this base" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(3, 80, 5), (3, 81, 3), (3, 240)])
def test_lora_of_another_convolution_asks_for_its_base(
    shared_triple: Triple, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tensors = write_adapter(tmp_path / "a1", adapted_names(shared_triple["base"], CONVOLUTIONS))
    name = "base_model.model.model.encoder.conv1.lora_A.weight"
    saved(tmp_path / "a1", {**tensors, name: torch.zeros(shape)}, "safetensors")
    with pytest.raises(hsa.MismatchError, match=r"do not fit encoder\.conv1\.weight \[64, 80, 3\] of base; was the"):
        hsa.merge(output=tmp_path / "out", **{**shared_triple, "primary": tmp_path / "a1"})


def test_lora_on_an_output_projection_that_is_not_tied_is_folded_in(triple: Triple, tmp_path: Path) -> None:
    for path in triple.values():
        tensors = read_tensors(path)
        own = {"proj_out.weight": tensors["model.decoder.embed_tokens.weight"] * 2}
        write_tensors(path, {**tensors, **own})
        edit_json(path / "config.json", tie_word_embeddings=False)
    write_adapter(tmp_path / "a1", adapted_names(triple["base"], ("proj_out.weight", *NARROW)))
    whole = fold_into(triple["base"], tmp_path / "a1", tmp_path / "folded")
    expected = merged_bytes({**triple, "primary": whole}, tmp_path / "expected")
    assert merged_bytes({**triple, "primary": tmp_path / "a1"}, tmp_path / "out") == expected


# What is written -----------------------------------------------------------------------------------------------


def test_a_primary_adapter_is_written_as_base_is(triple: Triple, tmp_path: Path) -> None:
    """Base's shards, names, config and processor files; nothing of the adapter's own files."""
    write_tensors(triple["base"], read_tensors(triple["base"]), shards=3)
    write_adapter(tmp_path / "a1", adapted_names(triple["base"], NARROW))
    report = hsa.merge(output=tmp_path / "out", sync=False, **{**triple, "primary": tmp_path / "a1"})
    assert report.route == "rewrite"
    theirs, ours = (json.loads((path / INDEX).read_text())["weight_map"] for path in (triple["base"], tmp_path / "out"))
    assert ours == theirs
    assert (tmp_path / "out" / "config.json").read_bytes() == (triple["base"] / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").exists() == (triple["base"] / "tokenizer.json").exists()
    assert not list((tmp_path / "out").glob("adapter*"))
    _, info = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    source = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["sources"]["primary"]
    assert (source["id"], source["format"]) == ("a1", "adapter")
    assert list(source["files"]) == ["adapter_model.safetensors"]


def test_an_adapter_on_a_pickled_base(triple: Triple, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a1", adapted_names(triple["base"], NARROW))
    given = {**triple, "primary": tmp_path / "a1"}
    expected = merged_bytes(given, tmp_path / "expected")
    write_pickle(triple["base"], read_tensors(triple["base"]))
    assert merged_bytes(given, tmp_path / "out") == expected


def test_a_pickled_adapter(triple: Triple, tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path / "a2", adapted_names(triple["base"], NARROW))
    given = {**triple, "secondary": tmp_path / "a2"}
    expected = merged_bytes(given, tmp_path / "expected")
    (tmp_path / "a2" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "a2" / "adapter_model.bin")
    assert merged_bytes(given, tmp_path / "out") == expected


def test_names_of_a_bare_whisper_model(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "sources", SHAPES["test"], prefix="")
    write_adapter(tmp_path / "a2", adapted_names(triple["base"], NARROW))
    folded_in = fold_into(triple["base"], tmp_path / "a2", tmp_path / "folded")
    expected = merged_bytes({**triple, "secondary": folded_in}, tmp_path / "expected")
    assert merged_bytes({**triple, "secondary": tmp_path / "a2"}, tmp_path / "out") == expected


def test_weights_beside_an_adapter_go_first(triple: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(triple, tmp_path / "expected")
    write_adapter(triple["secondary"], adapted_names(triple["base"], NARROW))
    assert merged_bytes(triple, tmp_path / "out") == expected


def test_merger_takes_adapters(adapters: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(adapters, tmp_path / "out")
    found = hsa.Merger(**adapters).merge()
    assert {name: raw_bytes(tensor) for name, tensor in found.items()} == {name: expected[name] for name in found}


def test_merger_needs_base_as_a_directory(adapters: Triple) -> None:
    state = read_tensors(adapters["base"])
    with pytest.raises(RequestError, match=r"needs base as a checkpoint directory"):
        hsa.Merger(state, adapters["primary"], adapters["secondary"])


def test_a_sum_that_overflows_is_refused_where_it_is_no_target(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "sources", SHAPES["test"], dtype="float16")
    weights = {"model.encoder.layers.0.fc1.weight": torch.empty(128, 64)}
    write_adapter(tmp_path / "a1", weights, scale=2000.0)
    with pytest.raises(NonFiniteError, match=r"fc1.weight: base's weight or the adapter holds NaN .* overflows F16"):
        hsa.merge(output=tmp_path / "out", sync=False, **{**triple, "primary": tmp_path / "a1"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_secondary_stands_on_openais_file_too(tmp_path: Path, dtype: Any) -> None:
    triple = write_triple(tmp_path / "sources", SHAPES["test"], dtype=dtype)
    write_adapter(tmp_path / "a2", adapted_names(triple["base"]))
    given = {**triple, "secondary": tmp_path / "a2"}
    parameters = {"targets": "attention-all", "non_attention_scale": 0.5}
    expected = merged_bytes(given, tmp_path / "expected", **parameters)
    resident = {name: raw_bytes(tensor) for name, tensor in hsa.Merger(**given).merge().items()}
    given["base"] = write_openai(tmp_path / "base.pt", triple["base"])
    assert merged_bytes(given, tmp_path / "out", **parameters) == expected
    assert {name: raw_bytes(tensor) for name, tensor in hsa.Merger(**given).merge().items()} == resident


def test_a_primary_cannot_stand_on_openais_file(triple: Triple, tmp_path: Path) -> None:
    """The output's config.json would be base's, which has none."""
    write_adapter(tmp_path / "a1", adapted_names(triple["base"], NARROW))
    base = write_openai(tmp_path / "base.pt", triple["base"])
    with pytest.raises(RequestError, match=r"holds a LoRA adapter, which needs base as a checkpoint directory"):
        hsa.merge(output=tmp_path / "out", **{**triple, "base": base, "primary": tmp_path / "a1"})


def test_reference_numerics_are_refused(triple: Triple, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a1", adapted_names(triple["base"], NARROW))
    with pytest.raises(RequestError, match=r"primary .*a1: numerics 'reference' repeats a script"):
        hsa.merge(output=tmp_path / "out", numerics="reference", **{**triple, "primary": tmp_path / "a1"})
