"""Models of no family with heads, a Llama and a ViT, go through everything that merges whole models.

The method is the element-wise maximum of `tests/support/maximum_method.py`, held to plain torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, raw_bytes, read_tensors, same_tensors, write_adapter, write_pickle, write_tensors
from llama_cases import (
    TIED,
    Tensors,
    largest,
    llamas,
    load,
    logits,
    merge,
    plugin,
    record_of,
    shared_llamas,
    task_arithmetic,
)
from transformers import ViTConfig, ViTForImageClassification

import hsa
from hsa.methods.registry import methods
from hsa.methods.settings import declared
from hsa.testing.llama_checkpoints import LlamaShape, write_llama, write_llamas

__all__ = ["llamas", "plugin", "shared_llamas"]


# --- merges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_of_llamas_loads_and_has_the_values_of_plain_torch(
    dtype: Any, tied: bool, shards: int, tmp_path: Path
) -> None:
    shape = LlamaShape(tied=tied)
    models = [
        write_llama(tmp_path / "one", shape, dtype=dtype, role="one", shards=shards),
        write_llama(tmp_path / "two", shape, dtype="float32", role="two", shards=2),
        write_llama(tmp_path / "three", shape, dtype="float16", role="three"),
    ]
    output = merge(models, tmp_path / "out", factor=0.5).output
    expected = largest(models, 0.5)
    same_tensors(output, expected)
    weights = sorted(path.name for path in models[0].glob("model*"))
    assert sorted(path.name for path in output.glob("model*")) == weights
    model, plain = load(output), load(models[0])
    plain.load_state_dict({**expected, **({"lm_head.weight": expected["model.embed_tokens.weight"]} if tied else {})})
    assert raw_bytes(logits(model)) == raw_bytes(logits(plain))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_vit_merges_too(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=7, image_size=32)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(tmp_path / str(seed))
        models.append(tmp_path / str(seed))
    report = merge(models, tmp_path / "out")
    assert any("no source has processor files" in warning for warning in report.warnings)
    same_tensors(report.output, largest(models))
    load(report.output, ViTForImageClassification)
    card = (report.output / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-classification" in card and "The feature extractor is not part" in card


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_element_type_is_written_and_named_in_the_config(
    dtype: str, shared_llamas: dict[str, Path], tmp_path: Path
) -> None:
    output = merge([shared_llamas["model1"], shared_llamas["model2"]], tmp_path / "out", dtype=dtype).output
    assert {str(tensor.dtype) for tensor in read_tensors(output).values()} == {f"torch.{dtype}"}
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    assert load(output).dtype == getattr(torch, dtype)


def test_element_types_of_parts_of_a_config_are_changed_with_it(llamas: list[Path], tmp_path: Path) -> None:
    edit_json(llamas[0] / "config.json", text_config={"dtype": "float32", "x": 1}, other={"dtype": "float32"})
    output = merge(llamas, tmp_path / "out", dtype="float16").output
    config = json.loads((output / "config.json").read_text())
    assert (config["dtype"], config["text_config"]) == ("float16", {"dtype": "float16", "x": 1})
    assert config["other"] == {"dtype": "float32"}


def test_other_shards_and_threads_change_no_value(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    models = [shared_llamas["model1"], shared_llamas["model2"]]
    for threads in (1, 3):
        output = merge(models, tmp_path / str(threads), max_shard_size="20KB", threads=threads).output
        assert len([*output.glob("*.safetensors")]) > 2
        same_tensors(output, largest(models))
        load(output)


def test_pickles_merge_with_tied_tensors_once(tmp_path: Path) -> None:
    models = [write_llama(tmp_path / role, TIED, role=role) for role in ("one", "two")]
    expected = largest(models)
    for path in models:
        tensors = read_tensors(path)
        write_pickle(path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    report = merge(models, tmp_path / "out")
    assert any("lm_head.weight is model.embed_tokens.weight under another name" in note for note in report.notes)
    same_tensors(report.output, expected)
    load(report.output)


def store_twice(path: Path, **more: torch.Tensor) -> None:
    """Store a tied output projection beside the embedding, as some programs do."""
    tensors = read_tensors(path)
    write_tensors(path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone(), **more})


def test_an_output_that_is_the_embedding_once_more_is_merged_once(tmp_path: Path) -> None:
    models = [write_llama(tmp_path / role, TIED, role=role) for role in ("one", "two")]
    expected = largest(models)
    store_twice(models[0])
    report = merge(models, tmp_path / "out")
    assert any("model1's lm_head.weight is model.embed_tokens.weight once more" in note for note in report.notes)
    same_tensors(report.output, expected)
    load(report.output)


def test_an_output_that_only_the_config_calls_tied_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    models = [write_llama(tmp_path / role, TIED, role=role) for role in ("one", "two")]
    for number, path in enumerate(models):
        embedding = read_tensors(path)["model.embed_tokens.weight"]
        store_twice(path, **{"lm_head.weight": embedding + number + 1})
    same_tensors(merge(models, tmp_path / "out").output, largest(models))


def test_integers_and_tensors_of_another_shape_stay_the_first_models(llamas: list[Path], tmp_path: Path) -> None:
    for number, path in enumerate(llamas):
        tensors = read_tensors(path)
        tensors["model.positions"] = torch.arange(4) + number
        if number:
            tensors["model.embed_tokens.weight"] = torch.zeros(261, 20)
            del tensors["lm_head.weight"]
        write_tensors(path, tensors)
    report = merge(llamas, tmp_path / "out")
    found, first = read_tensors(report.output), read_tensors(llamas[0])
    for name in ("model.positions", "model.embed_tokens.weight", "lm_head.weight"):
        assert raw_bytes(found[name]) == raw_bytes(first[name])
    second = read_tensors(llamas[1])
    assert torch.equal(found["model.norm.weight"], torch.maximum(*(m["model.norm.weight"] for m in (first, second))))
    assert any("2 tensors stay model1's" in note for note in report.notes), report.notes


def test_names_that_a_wrapper_changed_are_read_without_it(llamas: list[Path], tmp_path: Path) -> None:
    expected = largest(llamas)
    for path, wrapper in zip(llamas, ("module.", "_orig_mod."), strict=True):
        write_tensors(path, {wrapper + name: tensor for name, tensor in read_tensors(path).items()})
    report = merge(llamas, tmp_path / "out")
    assert sum("are read without what a wrapper added" in note for note in report.notes) == 2
    same_tensors(report.output, expected)
    load(report.output)


def test_a_model_without_its_head_merges_with_one_that_has_it(llamas: list[Path], tmp_path: Path) -> None:
    """LlamaModel saves its tensors without `model.`."""
    tensors = read_tensors(llamas[1])
    del tensors["lm_head.weight"]
    write_tensors(llamas[1], {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    found, first = read_tensors(merge(llamas, tmp_path / "out").output), read_tensors(llamas[0])
    for name, tensor in first.items():
        other = tensors.get(name, tensor)
        assert raw_bytes(found[name]) == raw_bytes(torch.maximum(tensor, other)), name


# --- the methods of the package --------------------------------------------------------------------------------------


def mean(models: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """The weighted mean in plain torch, in the order in which hsa adds: products and sums rounded to float32."""
    whole = sum(weights)
    merged = {}
    for name, first in models[0].items():
        terms = [
            model[name].float() * torch.tensor(weight / whole, dtype=torch.float64).float()
            for model, weight in zip(models, weights, strict=True)
        ]
        merged[name] = functools.reduce(torch.add, terms).to(first.dtype)
    return merged


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_linear_merge_has_the_logits_of_a_model_merged_in_plain_torch(dtype: Any, tied: bool, tmp_path: Path) -> None:
    shape = LlamaShape(tied=tied)
    models = [write_llama(tmp_path / role, shape, dtype=dtype, role=role) for role in ("one", "two", "three")]
    weights = [2.0, 1.0, 0.5]
    report = hsa.merge(method="linear", models=models, weights=weights, output=tmp_path / "out", sync=False)
    expected = mean([read_tensors(path) for path in models], weights)
    same_tensors(report.output, expected)
    plain = load(models[0])
    plain.load_state_dict({**expected, **({"lm_head.weight": expected["model.embed_tokens.weight"]} if tied else {})})
    assert raw_bytes(logits(load(report.output))) == raw_bytes(logits(plain))
    assert hsa.verify(report.output, models=models).ok


@pytest.mark.parametrize("shards", [1, 4])
def test_task_arithmetic_adds_the_task_vectors_to_base(shards: int, tmp_path: Path) -> None:
    paths = list(write_llamas(tmp_path, ("base", "one", "two"), shards=shards).values())
    report = task_arithmetic(paths, tmp_path / "out", lam=0.5)
    base, one, two = map(read_tensors, paths)
    expected = {
        name: tensor + ((one[name] - tensor) * 0.5 + (two[name] - tensor) * 0.5) for name, tensor in base.items()
    }
    same_tensors(report.output, expected)
    load(report.output)
    assert hsa.verify(report.output, base=paths[0], models=paths[1:]).ok
    merger = hsa.Merger(method="task_arithmetic", base=paths[0], models=paths[1:])
    same_tensors(merger.merge(lam=0.5), expected)


def test_a_list_over_layers_is_interpolated_over_those_of_the_llama(
    shared_llamas: dict[str, Path], tmp_path: Path
) -> None:
    """Three layers: 0.0, 0.5 and 1.0. What lies outside of layers takes the first value."""
    paths = [shared_llamas[role] for role in ("base", "model1", "model2")]
    found = read_tensors(task_arithmetic(paths, tmp_path / "out", lam=[0.0, 1.0]).output)
    base, one, two = map(read_tensors, paths)
    for name, tensor in base.items():
        layer = re.match(r"model\.layers\.(\d)\.", name)
        factor = 0.5 * int(layer[1]) if layer else 0.0
        expected = tensor + ((one[name] - tensor) * factor + (two[name] - tensor) * factor)
        assert raw_bytes(found[name]) == raw_bytes(expected), name


@pytest.mark.parametrize(
    ("limits", "merged"),
    [
        ({"layers": "1-2"}, r"layers\.[12]\."),
        ({"layers": "0", "stack": "model"}, r"layers\.0\."),
        ({"only": "*.mlp.*"}, r"\.mlp\."),
        ({"exclude": ["embed_tokens.*", "lm_head.*"]}, r"^model\.(layers|norm)\."),
        ({"only": "model.layers.*", "exclude": "*norm*"}, r"_proj\."),
    ],
)
def test_a_part_of_a_llama_is_merged(
    limits: dict[str, Any], merged: str, shared_llamas: dict[str, Path], tmp_path: Path
) -> None:
    models = [shared_llamas["model1"], shared_llamas["model2"]]
    report = merge(models, tmp_path / "out", **limits)
    found, first, expected = read_tensors(report.output), read_tensors(models[0]), largest(models)
    parts = {name for name in first if re.search(merged, name)}
    assert 0 < len(parts) < len(first)
    for name, tensor in found.items():
        assert raw_bytes(tensor) == raw_bytes((expected if name in parts else first)[name]), name
    assert record_of(report.output)["targets"].keys() == parts
    assert hsa.verify(report.output, models=models).ok


def test_quantised_weights_may_be_left_out_of_a_merge(llamas: list[Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    for path in llamas:
        tensors = read_tensors(path)
        tensors |= {f"{name}.weight": torch.ones(37, 20, dtype=torch.int8), f"{name}.weight_scale": torch.ones(37)}
        write_tensors(path, tensors)
    report = merge(llamas, tmp_path / "out", exclude=[f"{name}.*"])
    found, first = read_tensors(report.output), read_tensors(llamas[0])
    for part in ("weight", "weight_scale"):
        assert raw_bytes(found[f"{name}.{part}"]) == raw_bytes(first[f"{name}.{part}"])
    assert hsa.verify(report.output, models=llamas).ok


def test_lora_adapters_on_a_llama_merge(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    base = read_tensors(shared_llamas["base"])
    adapted = {name: tensor for name, tensor in base.items() if name.endswith(("q_proj.weight", "up_proj.weight"))}
    for seed, role in enumerate(("one", "two")):
        write_adapter(tmp_path / role, adapted, seed=seed)
    report = task_arithmetic([shared_llamas["base"], tmp_path / "one", tmp_path / "two"], tmp_path / "out", lam=0.5)
    found = read_tensors(report.output)
    assert {name for name in base if not torch.equal(found[name], base[name])} == adapted.keys()
    load(report.output)
    assert (report.output / "tokenizer.json").read_bytes() == (shared_llamas["base"] / "tokenizer.json").read_bytes()
    paths = [tmp_path / "one", tmp_path / "two"]
    assert hsa.verify(report.output, base=shared_llamas["base"], models=paths).ok


WITHOUT_HEADS = [name for name, method in methods().items() if not method.needs_heads]


@pytest.mark.parametrize("name", WITHOUT_HEADS)
def test_every_method_without_heads_merges_llamas_that_load(name: str, tmp_path: Path) -> None:
    method = methods()[name]
    count = max(method.contract.least, min(3, method.contract.most))
    base, *models = write_llamas(tmp_path / "sources", ("base", "one", "two", "three"), TIED, dtype="bfloat16").values()
    sources: dict[str, Any] = {"models": models[:count]}
    if method.contract.base != "none":
        sources["base"] = base
    without_default = (each for each in declared(method.Settings) if each.about.required)
    required = {each.name: 0.4 if each.about.high == 1.0 else 1e-4 for each in without_default}
    output = hsa.merge(method=name, **sources, output=tmp_path / "out", sync=False, **required).output
    found, first = read_tensors(output), read_tensors(models[0])
    assert found.keys() == first.keys()
    assert any(raw_bytes(found[each]) != raw_bytes(first[each]) for each in found)
    model = load(output)
    assert torch.isfinite(logits(model).float()).all()
    assert hsa.verify(output, **sources).ok
