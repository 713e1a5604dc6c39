"""Models of no family with heads, a Llama and a ViT, go through everything that merges whole models.

The method is the element-wise maximum of `tests/support/maximum_method.py`, held to plain torch.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    edit_json,
    raw_bytes,
    read_tensors,
    run_hsa,
    same_tensors,
    snapshot,
    write_adapter,
    write_pickle,
    write_tensors,
)
from transformers import AutoTokenizer, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import hsa
from hsa.methods.registry import methods
from hsa.methods.settings import declared
from hsa.system.plugins import VARIABLE
from hsa.testing.llama_checkpoints import CHAT_TEMPLATE, LICENCE, LlamaShape, write_llama, write_llamas

PLUGIN = Path(__file__).parent / "support" / "maximum_method.py"
TIED, UNTIED = LlamaShape(tied=True), LlamaShape()
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(PLUGIN))


@pytest.fixture(scope="module")
def shared_llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float32 Llamas with one base, for reading alone."""
    return write_llamas(tmp_path_factory.mktemp("llamas"))


@pytest.fixture
def llamas(shared_llamas: dict[str, Path], tmp_path: Path) -> list[Path]:
    """Two fine-tunes that a test may damage."""
    return [Path(shutil.copytree(shared_llamas[role], tmp_path / "sources" / role)) for role in ("model1", "model2")]


def merge(models: Sequence[Path], output: Path, **keywords: Any) -> hsa.MergeReport:
    return hsa.merge(method="maximum", models=models, output=output, sync=False, **keywords)


def largest(models: Sequence[Path], factor: float = 1.0) -> Tensors:
    """The merge in plain torch: of all models, in the first one's element types."""
    sources = [read_tensors(path) for path in models]
    merged = {}
    for name, first in sources[0].items():
        wide = torch.stack([source[name].to(torch.float32) for source in sources]).amax(0) * factor
        merged[name] = wide.to(first.dtype)
    return merged


def load(path: Path, kind: Any = LlamaForCausalLM) -> Any:
    """The model as transformers loads it, offline, with nothing missing and nothing left over."""
    model, info = kind.from_pretrained(path, output_loading_info=True, local_files_only=True, dtype="auto")
    assert not {key: names for key, names in info.items() if names}
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(1, 12)[None]
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def record_of(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "hsa_merge.json").read_text(encoding="utf-8"))
    return record


# --- merges -----------------------------------------------------------------------------------------------------


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


# --- the methods of the package ----------------------------------------------------------------------------------


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


def task_arithmetic(paths: Sequence[Path], output: Path, **keywords: Any) -> hsa.MergeReport:
    base, *models = paths
    return hsa.merge(method="task_arithmetic", base=base, models=models, output=output, sync=False, **keywords)


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


# --- what lies beside the weights -------------------------------------------------------------------------------


def test_small_files_are_the_first_models(llamas: list[Path], tmp_path: Path) -> None:
    for path in llamas:
        for name in ("optimizer.pt", "trainer_state.json", "notes.txt"):
            (path / name).write_text(path.name)
    (llamas[0] / "special.tiktoken").write_text("first")
    (llamas[1] / "NOTICE").write_text("second")
    output = merge(llamas, tmp_path / "out").output
    own = {"README.md", "hsa_merge.json", "model.safetensors"}
    expected = {path.name for path in llamas[0].iterdir()} - {"optimizer.pt", "trainer_state.json", "notes.txt"}
    assert {path.name for path in output.iterdir()} - own == expected - {"model.safetensors"}
    assert {"LICENSE", "chat_template.jinja", "special.tiktoken", "generation_config.json"} < expected
    for name in expected - own:
        assert (output / name).read_bytes() == (llamas[0] / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.decode(tokenizer("merged")["input_ids"]) == "merged"
    assert (output / "LICENSE").read_text() == LICENCE


def test_a_tokenizer_comes_whole_from_one_place(llamas: list[Path], tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (llamas[0] / name).rename(tmp_path / "sources" / name)
    (tmp_path / "sources" / "unrelated.model").write_text("of another model")
    report = merge(llamas, tmp_path / "out")
    assert any("tokenizer files" in note and "come from the directory above model1" in note for note in report.notes)
    assert (report.output / "chat_template.jinja").is_file() and not (report.output / "unrelated.model").exists()
    report = merge(llamas, tmp_path / "other", assets_from="model2")
    assert (report.output / "tokenizer.json").read_bytes() == (llamas[1] / "tokenizer.json").read_bytes()


def test_a_missing_tokenizer_is_warned_of(tmp_path: Path) -> None:
    models = [write_llama(tmp_path / role / "model", role=role, small_files=False) for role in ("one", "two")]
    report = merge(models, tmp_path / "out")
    assert any("no source has tokenizer files" in warning and "AutoTokenizer" in warning for warning in report.warnings)
    card = (report.output / "README.md").read_text(encoding="utf-8")
    assert "The tokenizer is not part of this checkpoint" in card and "AutoTokenizer" not in card


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_warned_of(llamas: list[Path], tmp_path: Path) -> None:
    (llamas[0] / "added_tokens.json").write_text('{"<more>": 300}')
    report = merge(llamas, tmp_path / "out")
    assert any("token ids up to 300 and the embedding only 259 rows" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("name", "text"), [("vocab.json", '{"eng": {"a": 0}}'), ("tokenizer.json", '{"model": "of another kind"}')]
)
def test_files_that_are_unlike_whispers_are_copied(name: str, text: str, llamas: list[Path], tmp_path: Path) -> None:
    (llamas[0] / name).write_text(text)
    assert (merge(llamas, tmp_path / "out").output / name).read_text() == text


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_damaged_small_file_is_refused(name: str, llamas: list[Path], tmp_path: Path) -> None:
    (llamas[0] / name).write_text('{"model"')
    with pytest.raises(hsa.SourceError, match=rf"{name}: .* is not valid JSON"):
        merge(llamas, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_of_the_models_own_is_copied_with_what_it_imports(llamas: list[Path], tmp_path: Path) -> None:
    edit_json(llamas[0] / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM"})
    edit_json(llamas[0] / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    (llamas[0] / "modeling_mine.py").write_text("from .helpers_mine import help\nimport torch\n")
    (llamas[0] / "helpers_mine.py").write_text("from .modeling_mine import x\n")
    (llamas[0] / "tokenization_mine.py").write_text("")
    (llamas[0] / "unrelated.py").write_text("print('no')\n")
    report = merge(llamas, tmp_path / "out")
    code = {"modeling_mine.py", "helpers_mine.py", "tokenization_mine.py"}
    assert {path.name for path in report.output.glob("*.py")} == code
    assert any("code of the model's own is copied" in note and "trust_remote_code" in note for note in report.notes)
    card = (report.output / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)" in card
    assert "- `modeling_mine.py`: code of the model" in card
    assert hsa.verify(report.output, models=llamas).ok
    (report.output / "modeling_mine.py").write_text("import os\n")
    assert not hsa.verify(report.output).ok


@pytest.mark.parametrize("value", ["gone.Mine", "../outside.Mine", "other/repo--modeling.Mine", 7, None])
def test_code_that_is_not_there_is_no_error(value: Any, llamas: list[Path], tmp_path: Path) -> None:
    (tmp_path / "sources" / "outside.py").write_text("")
    edit_json(llamas[0] / "config.json", auto_map={"AutoModel": value})
    report = merge(llamas, tmp_path / "out")
    assert any("name code that is not there (gone.py)" in text for text in report.warnings) == (value == "gone.Mine")
    assert not [*report.output.glob("*.py")]


def test_record_and_card_say_what_the_models_are(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    models = [shared_llamas["model1"], shared_llamas["model2"]]
    output = merge(models, tmp_path / "out", model_ids=["me/one", "me/two"]).output
    record = record_of(output)
    assert (record["architecture"], record["anchor"], record["base"]) == ("generic", "model1", None)
    assert record["targets"].keys() == read_tensors(models[0]).keys()
    card = (output / "README.md").read_text(encoding="utf-8")
    for line in (
        "base_model:\n- me/one\n- me/two\n",
        "library_name: transformers\n",
        "pipeline_tag: text-generation\n",
        "tags:\n- merge\n- model-merging\n",
        "- Model type: llama (LlamaForCausalLM)\n",
        "Text generation in the domains",
        "from transformers import AutoTokenizer, LlamaForCausalLM\n",
        "tokenizer = AutoTokenizer.from_pretrained(path)\n",
        "- `LICENSE`: terms of use\n",
        "- `chat_template.jinja`: chat template\n",
    ):
        assert line in card, line
    assert "whisper" not in card.lower() and "feature extractor" not in card


def test_a_config_without_a_model_type_names_no_library(llamas: list[Path], tmp_path: Path) -> None:
    for path in llamas:
        edit_json(path / "config.json", model_type=None, architectures=None)
    card = (merge(llamas, tmp_path / "out").output / "README.md").read_text(encoding="utf-8")
    assert "library_name" not in card and "pipeline_tag" not in card
    assert "- Model type: not named\n" in card and "model = AutoModel.from_pretrained(path)" in card


# --- the other commands -----------------------------------------------------------------------------------------


def test_the_command_line_writes_what_python_does(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    models = [shared_llamas["model1"], shared_llamas["model2"]]
    options = ["--method=maximum", *(f"--model={path}" for path in models), "--factor=0.5"]
    done = run_hsa("merge", *options, f"--output={tmp_path / 'shell' / 'out'}")
    assert done.returncode == 0 and f"{len(read_tensors(models[0]))} tensors merged" in done.stdout
    merge(models, tmp_path / "python" / "out", factor=0.5)
    assert snapshot(tmp_path / "shell") == snapshot(tmp_path / "python")
    done = run_hsa("verify", tmp_path / "shell" / "out", "--sources", *options[1:3])
    assert (done.returncode, done.stderr) == (0, "")
    done = run_hsa("merge", *options, f"--output={tmp_path / 'dry'}", "--dry-run", "--json")
    assert len(json.loads(done.stdout)["targets"]) == len(read_tensors(models[0]))


def test_verify_finds_a_flipped_bit_and_another_source(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    models = [shared_llamas["model1"], shared_llamas["model2"]]
    output = merge(models, tmp_path / "out").output
    assert hsa.verify(output, models=models).ok
    other = hsa.verify(output, models=[models[0], shared_llamas["model3"]])
    assert not other.ok and any("model2" in problem.what for problem in other.problems)
    raw = bytearray((output / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (output / "model.safetensors").write_bytes(raw)
    assert not hsa.verify(output).ok


def test_a_sweep_writes_a_checkpoint_for_each_value(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    models = [shared_llamas["model1"], shared_llamas["model2"]]
    swept: dict[str, Any] = {"method": "maximum", "models": models, "output": tmp_path / "sweep", "full": True}
    hsa.sweep(**swept, factor=[0.5, 1.0], sync=False)
    points = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert len(points) == 2
    for path in points:
        same_tensors(path, largest(models, record_of(path)["parameters"]["factor"]))
        load(path)
    again = hsa.sweep(**swept, factor=[0.5, 1.0], sync=False)
    assert (again.made, len(again.skipped)) == ((), 2)
    assert hsa.verify(tmp_path / "sweep", models=models).ok


def test_a_release_of_llamas_is_built_and_then_verified(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    listed = ", ".join(f"'{shared_llamas[role]}'" for role in ("model1", "model2"))
    recipe.write_text(f"merges:\n- {{name: one, group: all, method: maximum, models: [{listed}], factor: 0.5}}\n")
    for result in ("built", "verified"):
        (entry,) = hsa.release(recipe, tmp_path / "tree", sync=False).entries
        assert (entry.result, entry.problem) == (result, None)
    readme = (tmp_path / "tree" / "README.md").read_text(encoding="utf-8")
    assert "whisper" not in readme.lower()
    assert hsa.verify(tmp_path / "tree").ok


def test_a_comparison_of_two_outputs_names_stacks_and_kinds(shared_llamas: dict[str, Path], tmp_path: Path) -> None:
    models = [shared_llamas["model1"], shared_llamas["model2"]]
    for factor in (1.0, 0.5):
        merge(models, tmp_path / str(factor), factor=factor)
    done = run_hsa("inspect", "--diff", tmp_path / "1.0", tmp_path / "0.5")
    assert done.returncode == 0, done.stderr
    assert "model" in done.stdout


def test_a_merger_merges_directories_and_writes_into_a_loaded_model(
    shared_llamas: dict[str, Path], tmp_path: Path
) -> None:
    models = [shared_llamas["model1"], shared_llamas["model2"]]
    merger = hsa.Merger(method="maximum", models=models)
    same_tensors(merger.merge(factor=0.5), largest(models, 0.5))
    model = load(models[0])
    for factor in (0.5, 1.0):
        assert merger.apply_(model, factor=factor) is model
        same_tensors(dict(model.state_dict()), largest(models, factor))
    merger.save(tmp_path / "saved" / "out", factor=0.5, sync=False)
    merge(models, tmp_path / "merged" / "out", factor=0.5)
    assert snapshot(tmp_path / "saved") == snapshot(tmp_path / "merged")


def test_a_merger_of_loaded_models_leaves_them_tied(tmp_path: Path) -> None:
    paths = [write_llama(tmp_path / role, TIED, role=role) for role in ("one", "two")]
    models = [load(path) for path in paths]
    merger = hsa.Merger(method="maximum", models=models)
    expected = largest(paths)
    same_tensors(merger.merge(), expected)
    merger.apply_(models[1])
    held = dict(models[1].state_dict())
    assert models[1].lm_head.weight is models[1].model.embed_tokens.weight
    del held["lm_head.weight"]
    same_tensors(held, expected)


def test_a_merger_of_state_dicts_needs_no_config(shared_llamas: dict[str, Path]) -> None:
    paths = [shared_llamas["model1"], shared_llamas["model2"]]
    same_tensors(hsa.Merger(method="maximum", models=[read_tensors(path) for path in paths]).merge(), largest(paths))


# --- what is refused --------------------------------------------------------------------------------------------


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
