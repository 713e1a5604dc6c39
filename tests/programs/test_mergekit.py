"""`hsa mergekit` against `hsa merge`, and mergekit's other methods on Whisper, with the mergekit that is installed."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from helpers import edit_json, merged, poke, raw_bytes, read_tensors, run_hsa, same_tensors, snapshot, write_tensors
from merge_oracle import arguments
from several_models import with_more

import hsa
from hsa.cli.app import run
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]
Tensors = dict[str, torch.Tensor]

TARGET = "model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def float32(shared_triple: Triple) -> Triple:
    return shared_triple


@pytest.fixture(scope="module")
def float16(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("float16"), SHAPES["test"], dtype="float16")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    found = write_triple(tmp_path_factory.mktemp("sharded"), SHAPES["test"], max_shard_bytes=150_000)
    assert all(len(list(path.glob("*.safetensors"))) > 2 for path in found.values())
    return found


@pytest.fixture
def mixed(float32: Triple, float16: Triple) -> Triple:
    """As published and tuned: base in float16, the fine-tunes not all."""
    return {"base": float16["base"], "primary": float32["primary"], "secondary": float16["secondary"]}


def recipe(triple: Mapping[str, Path], order: Sequence[str] = ("primary", "secondary"), **more: object) -> dict:
    """A document for `hsa` that names the roles."""
    models = [{"model": str(triple[role]), "parameters": {"role": role}} for role in order]
    return {"merge_method": "hsa", "base_model": str(triple["base"]), "models": models, **more}


def mergekit(folder: Path, document: object, *options: str) -> Path:
    """Run a document through the command line in this process, and return where its output is."""
    (folder / "config.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    assert run(["mergekit", str(folder / "config.yml"), str(folder / "out"), *options]) == 0
    return folder / "out"


@pytest.mark.parametrize("saved", ["float32", "float16", "sharded", "mixed"])
def test_the_tensors_are_those_of_hsa_merge(saved: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    triple = request.getfixturevalue(saved)
    out = mergekit(tmp_path, recipe(triple))
    expected = merged(triple, tmp_path / "hsa")
    same_tensors(read_tensors(out), expected)
    assert raw_bytes(expected[TARGET]) != raw_bytes(read_tensors(triple["primary"])[TARGET])
    assert json.loads((out / "config.json").read_text())["dtype"] == str(expected[TARGET].dtype).removeprefix("torch.")


@pytest.mark.parametrize("below", ["m/", "", "./", "../models/m/"])
def test_relative_paths_of_models_ask_no_hub(
    below: str, float32: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE is set: whoever asks the Hub is told so, and the merge ends."""
    place = tmp_path / "models" / "m"
    for role, path in float32.items():
        shutil.copytree(path, place / role)
    monkeypatch.chdir(place.parent if below else place)
    if below == "./":
        monkeypatch.chdir(place)
    relative = {role: Path(f"{below}{role}") for role in float32}
    document = recipe(float32) | {
        "base_model": f"{below}base",
        "models": [{"model": f"{below}{role}", "parameters": {"role": role}} for role in ("primary", "secondary")],
    }
    assert all(path.is_dir() for path in relative.values())
    out = mergekit(tmp_path, document)
    same_tensors(read_tensors(out), merged(float32, tmp_path / "hsa"))
    assert "huggingface.co/" not in (out / "README.md").read_text(encoding="utf-8")


def test_other_methods_take_relative_paths_without_the_hub(
    float32: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role, path in float32.items():
        shutil.copytree(path, tmp_path / "m" / role)
    monkeypatch.chdir(tmp_path)
    models = [{"model": f"m/{role}", "parameters": {"weight": 0.5}} for role in ("primary", "secondary")]
    mergekit(tmp_path, {"merge_method": "linear", "models": models})


def test_the_order_does_not_matter_where_roles_are_given(float32: Triple, tmp_path: Path) -> None:
    expected = merged(float32, tmp_path / "hsa")
    for order in (("secondary", "primary"), ("secondary", "primary", "base"), ("base", "primary", "secondary")):
        document = recipe(float32, order)
        (tmp_path / "-".join(order)).mkdir()
        same_tensors(read_tensors(mergekit(tmp_path / "-".join(order), document)), expected)


def test_one_role_settles_both(float32: Triple, tmp_path: Path) -> None:
    document = recipe(float32, ("secondary", "primary"))
    del document["models"][0]["parameters"]
    same_tensors(read_tensors(mergekit(tmp_path, document)), merged(float32, tmp_path / "hsa"))


def test_without_roles_the_first_is_primary(float32: Triple, tmp_path: Path) -> None:
    document = recipe(float32)
    for entry in document["models"]:
        del entry["parameters"]
    same_tensors(read_tensors(mergekit(tmp_path, document)), merged(float32, tmp_path / "hsa"))


@pytest.mark.parametrize(
    "parameters",
    [
        {"k": 0.25, "lambda": 0.0, "alpha": 1.0},
        {"k": 80, "lambda": 0.9, "alpha": 0.0},
        {"k": 0},
        {"k": 1, "lambda": 0.3, "alpha": 2.5, "targets": "attention-qkv"},
        {"targets": "attention-all", "alpha": 0.7},
    ],
    ids=str,
)
def test_parameters_arrive(float32: Triple, tmp_path: Path, parameters: dict[str, object]) -> None:
    out = mergekit(tmp_path, recipe(float32, parameters=parameters))
    named = {"lam" if name == "lambda" else name: value for name, value in parameters.items()}
    expected = merged(float32, tmp_path / "hsa", **named)
    same_tensors(read_tensors(out), expected)
    usual = hsa.merge(**float32, output=tmp_path / "usual", device="cpu", sync=False)
    assert any(raw_bytes(t) != raw_bytes(expected[n]) for n, t in read_tensors(usual.output).items())


def test_filters_are_parameters_per_tensor(float32: Triple, tmp_path: Path) -> None:
    first = [{"filter": "layers.0.", "value": 0.2}, {"value": 0.9}]
    out = mergekit(tmp_path, recipe(float32, parameters={"lambda": first}))
    names = hsa.merge(**float32, output=tmp_path / "names", device="cpu", sync=False).tensors
    lam = {name: 0.2 if "layers.0." in name else 0.9 for name in names}
    same_tensors(read_tensors(out), merged(float32, tmp_path / "hsa", lam=lam))


def test_out_dtype_rounds_the_result_once(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = mergekit(tmp_path, recipe(float32, out_dtype="bfloat16"))
    assert "warning" not in capsys.readouterr().err
    same_tensors(read_tensors(out), merged(float32, tmp_path / "hsa", dtype="bfloat16"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtype_widens_before_the_merge(float16: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = mergekit(tmp_path, recipe(float16, dtype="float32"))
    assert "warning" not in capsys.readouterr().err
    same_tensors(read_tensors(out), merged(float16, tmp_path / "hsa", dtype="float32"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_dtype_warns(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    out = mergekit(tmp_path, recipe(float32, dtype=dtype))
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hsa: warning: ")]
    assert len(printed) == 1
    assert f"dtype: {dtype} makes mergekit cast all three models before heads are scored" in printed[0]
    narrow = {}
    for role, path in float32.items():
        narrow[role] = Path(shutil.copytree(path, tmp_path / "narrow" / role))
        write_tensors(narrow[role], {n: t.to(getattr(torch, dtype)) for n, t in read_tensors(path).items()})
    same_tensors(read_tensors(out), merged(narrow, tmp_path / "hsa"))


# --- the rest of the output -------------------------------------------------------------------------------------------


def test_the_output_is_whole_and_loads_offline(float32: Triple, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    sources = {role: Path(shutil.copytree(path, tmp_path / "sources" / role)) for role, path in float32.items()}
    for role in ("primary", "base"):
        edit_json(sources[role] / "generation_config.json", max_length=30 if role == "primary" else 29)
    features = json.loads((sources["base"] / "preprocessor_config.json").read_text())
    processor = {"processor_class": "WhisperProcessor", "feature_extractor": features}
    (sources["base"] / "processor_config.json").write_text(json.dumps(processor))
    before = snapshot(tmp_path / "sources")
    out = mergekit(tmp_path, recipe(sources))
    assert snapshot(tmp_path / "sources") == before
    assert json.loads((out / "generation_config.json").read_text())["max_length"] == 30
    assert (out / "processor_config.json").read_bytes() == (sources["base"] / "processor_config.json").read_bytes()
    model, loading = WhisperForConditionalGeneration.from_pretrained(
        out, local_files_only=True, output_loading_info=True, torch_dtype=torch.float32
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert raw_bytes(model.state_dict()[TARGET]) == raw_bytes(merged(sources, tmp_path / "hsa")[TARGET])
    assert WhisperProcessor.from_pretrained(out, local_files_only=True).tokenizer("x")["input_ids"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yml", "hsa", "out", "sources"]
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~umask}
    card, document = (out / "README.md").read_text(), (tmp_path / "config.yml").read_text()
    assert card.split("---\n")[2].startswith("# out\n")
    assert document in card and "role: primary" in document
    assert (out / "mergekit_config.yml").read_text() == document


def test_a_donor_with_a_tokenizer_keeps_primarys_generation_config(float32: Triple, tmp_path: Path) -> None:
    """mergekit copies base's then."""
    from transformers import WhisperTokenizerFast

    base = Path(shutil.copytree(float32["base"], tmp_path / "base"))
    WhisperTokenizerFast.from_pretrained(base).save_pretrained(base)
    assert (base / "tokenizer.json").is_file()
    edit_json(base / "generation_config.json", max_length=29)
    out = mergekit(tmp_path, recipe({**float32, "base": base}))
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    wanted = (float32["primary"] / "generation_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == wanted


def test_mergekits_own_options_pass_through_in_any_place(float32: Triple, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(recipe(float32)), encoding="utf-8")
    place = [str(tmp_path / "config.yml"), str(tmp_path / "out")]
    assert (
        run(["mergekit", "--out-shard-size", "100K", "-v", *place, "--no-copy-tokenizer", "--no-write-model-card"]) == 0
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert "model.safetensors.index.json" in names
    assert not names & {"README.md", "vocab.json", "tokenizer.json"}
    assert "generation_config.json" in names
    same_tensors(read_tensors(tmp_path / "out"), merged(float32, tmp_path / "hsa"))


def test_a_program_of_its_own_registers_the_method(float32: Triple, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    from hsa.integrations.mergekit import register

    register()
    register()
    document = MergeConfiguration.model_validate(recipe(float32, ("secondary", "primary")))
    run_merge(document, str(tmp_path / "out"), options=MergeOptions(quiet=True))
    same_tensors(read_tensors(tmp_path / "out"), merged(float32, tmp_path / "hsa"))


# --- other methods on Whisper -----------------------------------------------------------------------------------------


def other(triple: Triple, method: str, **parameters: float) -> dict:
    models = [{"model": str(triple[role]), "parameters": dict(parameters)} for role in ("primary", "secondary")]
    return {"merge_method": method, "base_model": str(triple["base"]), "models": models, "dtype": "float32"}


def test_task_arithmetic_is_its_formula(float32: Triple, tmp_path: Path) -> None:
    out = mergekit(tmp_path, other(float32, "task_arithmetic", weight=0.5))
    base, primary, secondary = (read_tensors(float32[role]) for role in ("base", "primary", "secondary"))
    found = read_tensors(out)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        b, m1, m2 = base[name], primary[name], secondary[name]
        assert raw_bytes(tensor) == raw_bytes(b + (0.5 * (m1 - b) + 0.5 * (m2 - b))), name
    for name in ("generation_config.json", "preprocessor_config.json", "normalizer.json"):
        assert (out / name).read_bytes() == (float32["base"] / name).read_bytes()


def test_ties_runs_on_whisper(float32: Triple, tmp_path: Path) -> None:
    out = mergekit(tmp_path, other(float32, "ties", weight=0.5, density=0.5))
    (tmp_path / "plain").mkdir()
    plain = read_tensors(mergekit(tmp_path / "plain", other(float32, "task_arithmetic", weight=0.5)))
    found, base = read_tensors(out), read_tensors(float32["base"])
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        assert tensor.isfinite().all()
        assert tensor.shape == base[name].shape
        unchanged = (tensor == base[name]).float().mean()
        assert unchanged < 0.6, name
    assert all(raw_bytes(found[name]) != raw_bytes(plain[name]) for name in found)


def test_what_another_method_misses_comes_from_the_next_model(float32: Triple, tmp_path: Path) -> None:
    sources = {role: Path(shutil.copytree(path, tmp_path / "sources" / role)) for role, path in float32.items()}
    (sources["base"] / "generation_config.json").unlink()
    edit_json(sources["secondary"] / "generation_config.json", max_length=17)
    out = mergekit(tmp_path, other(sources, "task_arithmetic", weight=0.5))
    wanted = (sources["primary"] / "generation_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == wanted


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(folder: Path, document: object, capsys: pytest.CaptureFixture[str], *options: str, code: int = 2) -> str:
    """The one line that a document is refused with; nothing may be written."""
    (folder / "config.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    before = snapshot(folder)
    capsys.readouterr()
    assert run(["mergekit", str(folder / "config.yml"), str(folder / "out"), *options]) == code
    assert snapshot(folder) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("hsa: error: ")]
    assert len(lines) == 1 and printed.err.endswith(lines[0] + "\n")
    return lines[0].removeprefix("hsa: error: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": None}, "merge_method hsa needs base_model"),
        ({"parameters": {"targets": "everything"}}, "targets must be one of encoder-qkv, attention-qkv, attention-all"),
        ({"parameters": {"k": 101}}, "k must be in [0, 100]"),
        ({"parameters": {"lambda": [0.5, 1.5]}}, "lambda must be in [0, 1], got 1.5"),
        ({"parameters": {"lambda": [{"filter": "q_proj", "value": -1}]}}, "lambda must be in [0, 1], got -1"),
        ({"parameters": {"alpha": "much"}}, "alpha must be a number"),
        ({"parameters": {"lam": 0.5}}, "no parameter 'lam'; it has k, lambda, alpha, targets"),
        ({"parameters": {"role": "primary"}}, "role belongs under each model"),
        ({"models": []}, "got 0"),
        ({"models": None}, "needs models"),
        ({"slices": []}, "list them under models, not under slices"),
    ],
    ids=str,
)
def test_a_bad_document_is_one_line(
    float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    assert message in refused(tmp_path, recipe(float32) | change, capsys)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"role": "third"}, "the role of {secondary} is 'third', expected primary or secondary"),
        ({"role": "primary"}, "{primary} and {secondary} both have the role primary"),
        ({"role": "secondary", "k": 0.5}, "k stands under {secondary}"),
        ({"density": 0.5}, "{secondary} has a parameter 'density'; merge_method hsa knows role and weight there"),
        ({"weight": 200}, "weight must be in [-100, 100], got 200"),
        ({"weight": 0}, "weights 0 of the secondaries sum to 0"),
        ({"role": "primary", "weight": 2}, "{primary} and {secondary} both have the role primary"),
    ],
    ids=str,
)
def test_a_wrong_role_is_one_line(
    float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str], parameters: dict[str, object], message: str
) -> None:
    document = recipe(float32)
    document["models"][1]["parameters"] = parameters
    assert message.format(**float32) in refused(tmp_path, document, capsys)


def test_a_weight_belongs_to_a_secondary(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = recipe(float32)
    document["models"][0]["parameters"] = {"role": "primary", "weight": 2}
    assert f"{float32['primary']} is primary, which lambda weighs" in refused(tmp_path, document, capsys)
    assert "weight belongs under each secondary" in refused(
        tmp_path, recipe(float32, parameters={"weight": 0.5}), capsys
    )


def test_further_secondaries_are_merged_in_their_order(float32: Triple, tmp_path: Path) -> None:
    sources = with_more(float32, tmp_path / "more", 4)
    order = ("secondary", "primary", "model3", "model4")
    models: list[dict[str, object]] = [{"model": str(sources[role])} for role in order]
    models[1]["parameters"] = {"role": "primary"}
    models[2]["parameters"] = {"role": "secondary", "weight": 0.25}
    document = {"merge_method": "hsa", "base_model": str(sources["base"]), "models": models, "parameters": {"k": 0.5}}
    out = mergekit(tmp_path, document)
    hsa.merge(**arguments(sources), output=tmp_path / "hsa", k=0.5, weights=[1.0, 0.25, 1.0], sync=False)
    same_tensors(out, tmp_path / "hsa")


def test_base_cannot_be_primary_and_nine_are_too_many(
    float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = recipe(float32)
    document["models"][1] = {"model": str(float32["base"]), "parameters": {"role": "secondary"}}
    assert "is base_model and cannot have the role 'secondary'" in refused(tmp_path, document, capsys)
    document = recipe(float32)
    document["models"] += [{"model": str(tmp_path / f"further{number}")} for number in range(7)]
    assert "merges 2 to 8 models besides base_model, primary and secondaries, got 9" in refused(
        tmp_path, document, capsys
    )


def test_another_architecture_is_one_line(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama")
    message = refused(tmp_path, recipe({**float32, "secondary": tmp_path / "llama"}), capsys)
    assert message == (
        f"secondary {tmp_path / 'llama'} is not a Whisper checkpoint: its config.json has model_type 'llama', "
        f"supported is 'whisper'"
    )


def test_a_missing_model_is_one_line(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path, recipe({**float32, "primary": tmp_path / "empty"}), capsys)
    assert (
        message == f"primary: {tmp_path / 'empty'} has no config.json, which says how many heads and layers there are"
    )


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_nan_in_a_target_names_model_tensor_and_head(
    float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    damaged = Path(shutil.copytree(float32[role], tmp_path / "damaged"))
    poke(damaged / "model.safetensors", TARGET, 64 * 16 * 2 + 5, b"\x00\x00\xc0\x7f")
    message = refused(tmp_path, recipe({**float32, role: damaged}), capsys)
    assert message.startswith(f"{role} {damaged}: tensor {TARGET}, head 2 holds NaN or Inf")


def test_heads_that_differ_are_one_line(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_heads = Path(shutil.copytree(float32["secondary"], tmp_path / "heads"))
    edit_json(other_heads / "config.json", encoder_attention_heads=2)
    message = refused(tmp_path, recipe({**float32, "secondary": other_heads}), capsys)
    assert "the number of heads differs: base 4, primary 4, secondary 2" in message


def test_mergekits_own_errors_are_one_line(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "mergekit stopped: RuntimeError" in refused(tmp_path, other(float32, "nothing"), capsys)
    assert "No such option" in refused(tmp_path, recipe(float32), capsys, "--no-such-option")
    assert "mergekit stopped: ValidationError" in refused(tmp_path, {"merge_method": "ties", "models": 3}, capsys)
    assert "is no mapping" in refused(tmp_path, ["hsa"], capsys)


def test_an_output_in_the_way_is_refused(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "is not empty" in refused(tmp_path, recipe(float32), capsys)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(recipe(float32)))
    for place in (float32["base"], float32["primary"] / "merged"):
        before = snapshot(float32["base"].parent)
        assert run(["mergekit", str(tmp_path / "config.yml"), str(place)]) == 2
        assert f"the source {float32['base' if place == float32['base'] else 'primary']}" in capsys.readouterr().err
        assert snapshot(float32["base"].parent) == before


def test_a_fine_tune_that_is_base_is_said(float32: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = Path(shutil.copytree(float32["base"], tmp_path / "twin"))
    mergekit(tmp_path, recipe({**float32, "secondary": twin}))
    assert "base and secondary are equal on all 10 target tensors" in capsys.readouterr().err


def test_the_command_in_a_process_of_its_own(float32: Triple, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(recipe(float32)))
    done = run_hsa("mergekit", tmp_path / "config.yml", tmp_path / "out", "--low-cpu-memory")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[:2] == [f"{tmp_path / 'out'}", "  20 of 40 heads merged in 10 tensors"]
    assert told[2].startswith("  secondary weighs 7 to 13 % in 20 of 40 heads; the output differs from primary by ")
    assert len(told) == 3
    assert "%|" not in done.stderr
    same_tensors(read_tensors(tmp_path / "out"), merged(float32, tmp_path / "hsa"))
