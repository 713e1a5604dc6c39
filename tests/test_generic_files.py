"""Merges of Llamas: what lies beside the weights, and the commands beside `hsa merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import edit_json, read_tensors, run_hsa, same_tensors, snapshot
from llama_cases import TIED, largest, llamas, load, merge, plugin, record_of, shared_llamas
from transformers import AutoTokenizer

import hsa
from hsa.testing.llama_checkpoints import CHAT_TEMPLATE, LICENCE, write_llama

__all__ = ["llamas", "plugin", "shared_llamas"]


# --- what lies beside the weights ------------------------------------------------------------------------------------


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


# --- the other commands ----------------------------------------------------------------------------------------------


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
