"""Models of no family with heads that do not merge: each is refused in one line, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import edit_json, read_tensors, run_hsa, write_adapter, write_tensors
from llama_cases import llamas, merge, plugin, shared_llamas, task_arithmetic

import hsa
from hsa.testing.llama_checkpoints import LlamaShape, write_llama

__all__ = ["llamas", "plugin", "shared_llamas"]


@pytest.mark.parametrize("call", ["merge", "patch", "sweep", "inspect", "merger"])
def test_hsa_names_the_families_that_have_heads(call: str, shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    sources = [shared_llamas[role] for role in ("base", "model1", "model2")]
    output = tmp_path / "out"
    calls = {
        "merge": lambda: hsa.merge(*sources, output),
        "patch": lambda: hsa.merge_patch(*sources, output),
        "sweep": lambda: hsa.sweep(*sources, output, lam=[0.1]),
        "inspect": lambda: hsa.inspect(base=sources[0], primary=sources[1], secondary=sources[2]),
        "merger": lambda: hsa.Merger(*sources),
    }
    expected = (
        rf"^base {sources[0]} is not a Whisper checkpoint: its config.json has model_type 'llama', supported is "
        r"'whisper'; method hsa merges attention heads, which are known of such a checkpoint alone; a method that "
        r"needs no heads merges it, such as karcher, linear or \w+$"
    )
    with pytest.raises(hsa.SourceError, match=expected) as caught:
        calls[call]()
    assert "\n" not in str(caught.value) and not output.exists()


def test_reference_numerics_need_heads_too(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    sources = [shared_llamas[role] for role in ("base", "model1", "model2")]
    with pytest.raises(hsa.SourceError, match="is not a Whisper checkpoint"):
        hsa.merge(*sources, tmp_path / "out", numerics="reference")


def refused(models: Sequence[Path], output: Path, pattern: str) -> None:
    """One line that matches, on the command line and in Python, and nothing written."""
    done = run_hsa("merge", "--method=maximum", *(f"--model={path}" for path in models), f"--output={output}")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("hsa: error: ") and re.search(pattern, line.removeprefix("hsa: error: ")), line
    with pytest.raises(hsa.HsaError, match=pattern):
        merge(models, output)
    assert not output.exists()


def test_a_whisper_and_a_llama_do_not_merge(llamas: list[Path], triple: dict[str, Path], tmp_path: Path) -> None:
    pattern = r"model1 .* is a checkpoint of model_type 'llama', and model2 .* a Whisper checkpoint; they must be"
    refused([llamas[0], triple["primary"]], tmp_path / "out", pattern)


def test_models_of_two_types_do_not_merge(llamas: list[Path], tmp_path: Path) -> None:
    edit_json(llamas[1] / "config.json", model_type="mistral")
    refused(llamas, tmp_path / "out", "model_type 'llama', and model2 .* a checkpoint of model_type 'mistral'; they")


def test_a_directory_without_a_config_or_weights_is_refused(llamas: list[Path], tmp_path: Path) -> None:
    (llamas[1] / "config.json").unlink()
    refused(llamas, tmp_path / "out", rf"^model2: {llamas[1]} has no config.json, which says what model it is$")
    (llamas[0] / "model.safetensors").unlink()
    refused(llamas, tmp_path / "out", rf"^model1: {llamas[0]} holds no weights; looked for model.safetensors")


def test_models_without_a_tensor_in_common_are_refused(llamas: list[Path], tmp_path: Path) -> None:
    write_tensors(llamas[1], {"other": torch.zeros(3)})
    refused(llamas, tmp_path / "out", "model1 .* and model2 .* have no tensor in common")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("number", [0, 1])
def test_quantised_weights_are_refused_by_name(
    dtype: torch.dtype, number: int, llamas: list[Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj"
    tensors = read_tensors(llamas[number])
    tensors[f"{name}.weight"] = torch.ones(37, 20).to(dtype)
    tensors[f"{name}.weight_scale"] = torch.ones(37)
    write_tensors(llamas[number], tensors)
    pattern = (
        rf"model{number + 1} .*model.safetensors: tensor {name}.weight is quantised .*{name.removeprefix('model.')}"
    )
    refused(llamas, tmp_path / "out", pattern)


def test_an_adapters_tensors_among_the_weights_are_refused(llamas: list[Path], tmp_path: Path) -> None:
    tensors = read_tensors(llamas[0])
    write_tensors(llamas[0], {**tensors, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 20)})
    refused(llamas, tmp_path / "out", "1 tensors are of an adapter, such as .*lora_A.weight; .*merge_and_unload")


def test_names_that_differ_by_the_prefix_alone_are_refused(llamas: list[Path], tmp_path: Path) -> None:
    tensors = read_tensors(llamas[0])
    write_tensors(llamas[0], {**tensors, "norm.weight": torch.ones(20)})
    refused(llamas, tmp_path / "out", "tensors .* are one tensor of .*norm.weight")


def test_nan_is_refused(llamas: list[Path], tmp_path: Path) -> None:
    tensors = read_tensors(llamas[1])
    tensors["model.norm.weight"][3] = torch.nan
    write_tensors(llamas[1], tensors)
    refused(llamas, tmp_path / "out", "model2 .*tensor model.norm.weight holds NaN or Inf")


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_a_tied_embedding_is_refused(tied: bool, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", LlamaShape(tied=tied))
    name = "model.embed_tokens.weight"
    for role in ("one", "two"):
        write_adapter(tmp_path / role, {name: read_tensors(base)[name]})
    paths = [base, tmp_path / "one", tmp_path / "two"]
    if not tied:
        task_arithmetic(paths, tmp_path / "out")
        return
    with pytest.raises(hsa.RequestError, match=r"adapts embed_tokens.weight. Base ties its output projection to the"):
        task_arithmetic(paths, tmp_path / "out")
