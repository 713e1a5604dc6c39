"""Merges that files of mergekit's ask for: the same bytes as by arguments, and what of the models does not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, read_tensors, run_hsa, same_tensors, write_tensors

import hsa
from hsa.actions.mergekit_config.merge_methods import METHODS
from hsa.actions.request import Request
from hsa.errors import HsaError, MismatchError, RequestError
from hsa.methods.registry import methods
from hsa.methods.settings import declared
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]


def document(triple: Triple, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(triple["base"]),
        "models": [
            {
                "model": str(triple["primary"]),
                "parameters": {"weight": [{"filter": "model.encoder.layers.1", "value": [0, 1]}, {"value": 0.25}]},
            },
            {"model": str(triple["secondary"]), "parameters": {"weight": [0.5, 2]}},
        ],
        "parameters": {"lambda": 1.5},
        **more,
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.yml").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder / "config.yml"


def models_of(triple: Triple) -> list[Path]:
    return [triple["primary"], triple["secondary"]]


# --- the same as by arguments -----------------------------------------------------------------------------------------


def test_a_file_is_the_merge_that_it_says(shared_triple: Triple, tmp_path: Path) -> None:
    report = hsa.merge(config=write(tmp_path, document(shared_triple)), output=tmp_path / "of file", sync=False)
    filtered = [{"filter": "encoder.layers.1", "value": [0, 1]}, 0.25]
    hsa.merge(
        method="task_arithmetic",
        base=shared_triple["base"],
        models=models_of(shared_triple),
        weights=[filtered, [0.5, 2]],
        lam=1.5,
        output=tmp_path / "of arguments",
        sync=False,
    )
    same_tensors(tmp_path / "of file", tmp_path / "of arguments")
    assert report.settings.method == "task_arithmetic" and not report.warnings
    tensors, base = read_tensors(tmp_path / "of file"), read_tensors(shared_triple["base"])
    assert not torch.equal(tensors["model.encoder.layers.0.fc1.weight"], base["model.encoder.layers.0.fc1.weight"])


def test_an_output_of_a_file_is_verified_by_its_sources(shared_triple: Triple, tmp_path: Path) -> None:
    file = write(tmp_path, document(shared_triple, out_dtype="float16"))
    run_hsa("merge", "--config", file, "--output", tmp_path / "out", "--no-sync")
    record = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())
    assert (record["parameters"]["config_from"], record["parameters"]["assets_from"]) == ("base", "base")
    assert record["parameters"]["lambda"] == 1.5
    report = hsa.verify(tmp_path / "out", base=shared_triple["base"], models=models_of(shared_triple))
    assert report.problems == ()
    assert "| lambda | `1.5` |" in (tmp_path / "out" / "README.md").read_text()


def test_configs_are_those_of_base(triple: Triple, tmp_path: Path) -> None:
    edit_json(triple["base"] / "config.json", dropout=0.125)
    edit_json(triple["base"] / "generation_config.json", max_length=77)
    hsa.merge(config=write(tmp_path, document(triple)), output=tmp_path / "out", sync=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dropout"] == 0.125
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == 77


def test_the_config_of_base_names_the_element_type_of_the_weights(triple: Triple, tmp_path: Path) -> None:
    half = write_triple(tmp_path / "half", SHAPES["test"], dtype="float16")
    file = write(tmp_path, document({**triple, "base": half["base"]}))
    hsa.merge(config=file, output=tmp_path / "out", sync=False)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    file = write(tmp_path, document({**half, "base": triple["base"]}))
    report = hsa.merge(config=file, output=tmp_path / "narrow", sync=False)
    assert any("mergekit takes the widest" in note for note in report.notes)


def test_base_of_linear_is_a_model(shared_triple: Triple, tmp_path: Path) -> None:
    content = document(shared_triple, merge_method="linear", parameters={"weight": 1}) | {
        "models": [{"model": str(path)} for path in models_of(shared_triple)]
    }
    hsa.merge(config=write(tmp_path, content), output=tmp_path / "of file", sync=False)
    models = [*models_of(shared_triple), shared_triple["base"]]
    hsa.merge(method="linear", models=models, output=tmp_path / "of arguments", sync=False)
    same_tensors(tmp_path / "of file", tmp_path / "of arguments")
    record = json.loads((tmp_path / "of file" / "hsa_merge.json").read_text())
    assert record["parameters"]["config_from"] == "model3"


def test_hsa_of_a_file_is_hsa(shared_triple: Triple, tmp_path: Path) -> None:
    content = document(shared_triple, merge_method="hsa", parameters={"k": 0.3, "alpha": 0.1})
    content["models"] = [
        {"model": str(shared_triple["secondary"]), "parameters": {"role": "secondary"}},
        {"model": str(shared_triple["primary"])},
    ]
    hsa.merge(config=write(tmp_path, content), output=tmp_path / "of file", sync=False)
    hsa.merge(**shared_triple, k=0.3, alpha=0.1, output=tmp_path / "of arguments", sync=False)
    for name in ("model.safetensors", "hsa_merge.json", "config.json", "README.md"):
        assert (tmp_path / "of file" / name).read_bytes() == (tmp_path / "of arguments" / name).read_bytes()


def test_what_a_file_leaves_open_stands_beside_it(shared_triple: Triple, tmp_path: Path) -> None:
    file = write(tmp_path, document(shared_triple))
    arguments = ("merge", "--config", file, "--output", tmp_path / "out", "--no-sync")
    run_hsa(*arguments, "--only", "*fc1*", "--threads", "2", "--model-id", "org/a", "--model-id", "org/b")
    record = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())
    assert record["sources"]["model2"]["id"] == "org/b"
    assert record["parameters"]["only"] == ["*fc1*"]
    shown = run_hsa(*arguments[:4], tmp_path / "other", "--dry-run").stdout
    assert "dry run" in shown and not (tmp_path / "other").exists()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [("base", "b"), ("models", ["m"]), ("primary", "p"), ("method", "linear"), ("weights", 1), ("lam", 1), ("k", 0.5)],
)
def test_what_a_file_settles_is_refused_beside_it(
    option: str, value: Any, shared_triple: Triple, tmp_path: Path
) -> None:
    file = write(tmp_path, document(shared_triple))
    with pytest.raises(RequestError, match=f"{option} cannot be combined with config, whose file says which models"):
        hsa.merge(config=file, output=tmp_path / "out", **{option: value})


def test_the_command_line_names_options_as_its_own(shared_triple: Triple, tmp_path: Path) -> None:
    file = write(tmp_path, document(shared_triple))
    failed = run_hsa("merge", "--config", file, "--output", tmp_path / "o", "--dtype", "float16")
    assert failed.returncode == 2 and failed.stderr.startswith(
        "hsa: error: --dtype cannot be combined with --config, whose file says"
    )
    failed = run_hsa("merge", "--config", tmp_path / "none.yml", "--output", tmp_path / "o")
    assert failed.returncode == 2 and "none.yml" in failed.stderr and failed.stderr.count("\n") == 1


def test_a_call_with_a_file_needs_an_output_by_name(shared_triple: Triple, tmp_path: Path) -> None:
    file = write(tmp_path, document(shared_triple))
    with pytest.raises(TypeError, match="missing required argument: 'output'"):
        hsa.merge(config=file)
    with pytest.raises(RequestError, match="config says which models are merged; give output by its name"):
        hsa.merge(tmp_path / "out", config=file)
    with pytest.raises(TypeError, match="unexpected keyword argument 'outptu'"):
        hsa.merge(config=file, outptu=tmp_path / "out", output=tmp_path / "out")
    with pytest.raises(RequestError, match="config must be a path or a text, got 5"):
        hsa.merge(config=5, output=tmp_path / "out")


def test_a_value_out_of_range_is_found_in_its_line(shared_triple: Triple, tmp_path: Path) -> None:
    file = write(tmp_path, document(shared_triple, parameters={"weight": 1, "lambda": 1e39}))
    message = re.escape(f"{file}:") + r"[0-9]+: parameters.lambda: lambda must be finite"
    with pytest.raises(RequestError, match=message):
        hsa.merge(config=file, output=tmp_path / "out")


def test_a_tensor_without_a_value_is_named(shared_triple: Triple, tmp_path: Path) -> None:
    content = document(shared_triple)
    content["models"][1]["parameters"] = {"weight": [{"filter": "encoder", "value": 1}]}
    with pytest.raises(RequestError, match="of model 2 has no value for tensor decoder"):
        hsa.merge(config=write(tmp_path, content), output=tmp_path / "out")


def test_a_shape_that_differs_stops_the_merge(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["secondary"])
    tensors["model.decoder.embed_positions.weight"] = tensors["model.decoder.embed_positions.weight"][:-1]
    write_tensors(triple["secondary"], tensors)
    file = write(tmp_path, document(triple))
    with pytest.raises(MismatchError, match="embed_positions"):
        hsa.merge(config=file, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hsa.merge(config=file, output=tmp_path / "out", on_mismatch="first", sync=False)


def both_modules(encoder: Any, decoder: Any, triple: Triple) -> dict[str, Any]:
    def module(ranges: Any) -> dict[str, Any]:
        paths = [triple[role] for role in ("base", "primary", "secondary")]
        return {
            "slices": [
                {"sources": [{"model": str(path), "layer_range": span} for path in paths], "parameters": parameters}
                for span, parameters in ranges
            ]
        }

    modules = {name: module(ranges) for name, ranges in (("encoder", encoder), ("decoder", decoder)) if ranges}
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(triple["base"]),
        "modules": modules,
        "parameters": {"weight": 0.5},
    }


def test_modules_and_slices_are_merged_in_their_places(shared_triple: Triple, tmp_path: Path) -> None:
    content = both_modules([([0, 1], {"weight": 0}), ([1, 2], {"weight": [2, 0.125]})], [([0, 2], {})], shared_triple)
    hsa.merge(config=write(tmp_path, content), output=tmp_path / "out", sync=False)
    found, base = read_tensors(tmp_path / "out"), read_tensors(shared_triple["base"])
    for name in ("model.encoder.conv1.weight", "model.encoder.layers.0.fc2.weight"):
        assert torch.equal(found[name], base[name])
    models = [read_tensors(path) for path in models_of(shared_triple)]
    for name, weight in (("encoder.layers.1.fc2.bias", 0.125), ("encoder.layer_norm.bias", 2.0)):
        expected = base[f"model.{name}"] + weight * sum(m[f"model.{name}"] - base[f"model.{name}"] for m in models)
        assert torch.allclose(found[f"model.{name}"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        ([([0, 3], {})], [([0, 2], {})], "the slices of the encoder end at layer 3 and base has 2 layers"),
        ([([0, 1], {})], [([0, 2], {})], "the slices of the encoder end at layer 1 and base has 2 layers"),
        ([([0, 2], {})], None, "modules are 'encoder', and the models have the stacks 'decoder' and 'encoder'"),
    ],
)
def test_slices_that_do_not_fit_the_models(
    encoder: Any, decoder: Any, message: str, shared_triple: Triple, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        hsa.merge(
            config=write(tmp_path, both_modules(encoder, decoder, shared_triple)), output=tmp_path / "out", sync=False
        )


def test_slices_of_a_model_with_two_stacks_need_modules(shared_triple: Triple, tmp_path: Path) -> None:
    content = both_modules([([0, 2], {})], [([0, 2], {})], shared_triple)
    content |= content.pop("modules")["encoder"]
    with pytest.raises(RequestError, match="slices count the layers of one stack, and the models have 'decoder' and"):
        hsa.merge(config=write(tmp_path, content), output=tmp_path / "out")


@pytest.mark.parametrize("source", ["base", "union", "primary"])
def test_one_vocabulary_may_come_from_any_model(source: str, triple: Triple, tmp_path: Path) -> None:
    edit_json(triple["primary"] / "tokenizer_config.json", model_max_length=9)
    content = document(triple, tokenizer_source=str(triple["primary"]) if source == "primary" else source)
    hsa.merge(config=write(tmp_path, content), output=tmp_path / "out", sync=False)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["model_max_length"] == 9) == (source == "primary")


def test_vocabularies_that_differ_are_not_put_together(triple: Triple, tmp_path: Path) -> None:
    path = triple["secondary"] / "vocab.json"
    tokens = json.loads(path.read_text())
    tokens["new"] = tokens.pop("a")
    path.write_text(json.dumps(tokens))
    file = write(tmp_path, document(triple, tokenizer_source="union"))
    with pytest.raises(RequestError, match="the tokenizers of base and model2 differ, as in the token 'a'") as error:
        hsa.merge(config=file, output=tmp_path / "out")
    assert "leave tokenizer_source out" in str(error.value)


def pad_embedding(path: Path, rows: int) -> None:
    """Rows of the embedding that stand for no token."""
    tensors = read_tensors(path)
    embedding = tensors["model.decoder.embed_tokens.weight"]
    tensors["model.decoder.embed_tokens.weight"] = torch.cat([embedding, embedding[:rows]])
    write_tensors(path, tensors)
    edit_json(path / "config.json", vocab_size=len(embedding) + rows)


@pytest.mark.parametrize("source", ["base", "union"])
def test_rows_of_the_embedding_beyond_the_tokens_are_kept(source: str, triple: Triple, tmp_path: Path) -> None:
    for path in triple.values():
        pad_embedding(path, 4)
    report = hsa.merge(
        config=write(tmp_path, document(triple, tokenizer_source=source)), output=tmp_path / "out", sync=False
    )
    (note,) = [note for note in report.notes if "tokens and the embeddings" in note]
    assert re.search(r"which are all kept and merged; mergekit would cut them to the tokens$", note)
    hsa.merge(config=write(tmp_path, document(triple)), output=tmp_path / "plain", sync=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert weights[0] == weights[1]


def test_embeddings_that_differ_in_their_rows(triple: Triple, tmp_path: Path) -> None:
    pad_embedding(triple["secondary"], 4)
    file = write(tmp_path, document(triple, tokenizer_source="base"))
    with pytest.raises(RequestError, match=r"the embeddings differ in their rows .*, which mergekit would cut to the"):
        hsa.merge(config=file, output=tmp_path / "out", on_mismatch="first")
    assert not (tmp_path / "out").exists()


def test_tokens_without_a_row_in_the_embedding(triple: Triple, tmp_path: Path) -> None:
    for path in triple.values():
        tokens = json.loads((path / "vocab.json").read_text())
        (path / "vocab.json").write_text(json.dumps({**tokens, "beyond": 10**6}))
    file = write(tmp_path, document(triple, tokenizer_source="union"))
    with pytest.raises(RequestError, match=r"token ids up to 1000000 and its embedding [0-9]+ rows"):
        hsa.merge(config=file, output=tmp_path / "out")


def test_a_model_twice_under_two_names(triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(triple["base"], tmp_path / "base", dirs_exist_ok=True)
    content = document(triple, base_model="base") | {
        "models": [{"model": "./base", "parameters": {"weight": 1}}, {"model": str(triple["primary"])}],
        "parameters": {"weight": 1},
    }
    try:
        report = hsa.merge(config=write(tmp_path, content), output=tmp_path / "out", sync=False)
    except HsaError as error:
        assert "\n" not in str(error)
    else:
        assert report.warnings


# --- the table of methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_settings_with_mergekits_defaults(name: str) -> None:
    if name not in methods():
        pytest.skip(f"this hsa has no method {name}")
    owner = methods()[name].Settings
    settings = {each.name: each for each in declared(owner)}
    for parameter in METHODS[name].parameters:
        if parameter.has_effect:
            assert parameter.python in settings, parameter.name
            needed = {each.python: 0.5 for each in METHODS[name].parameters if each.required}
            given = {} if parameter.required else {parameter.python: parameter.default}
            assert owner(**needed, **given) == owner(**needed), parameter.name
            about = settings[parameter.python].about
            assert about.per_model == (parameter.scope != "shared"), parameter.name


def test_a_method_that_is_not_here_is_named(shared_triple: Triple, tmp_path: Path) -> None:
    missing = next((name for name in METHODS if name not in methods()), None)
    if missing is None:
        pytest.skip("this hsa has every method of the table")
    content = document(shared_triple, merge_method=missing, parameters={"weight": 1, "t": 0.5})
    content["models"] = content["models"][: 1 if missing in ("slerp", "nearswap") else 2]
    with pytest.raises(RequestError, match=f"merge_method {missing} is not among the methods of this version"):
        Request.of(config=write(tmp_path, content), output=tmp_path / "out")
