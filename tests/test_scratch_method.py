"""A method that a user writes in one file works everywhere where HSA does: `tests/support/maximum_method.py`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_outputs import forge
from helpers import edit_json, raw_bytes, read_tensors, run_hsa, same_tensors, snapshot
from pages import run_page

import hsa
from hsa.actions import keywords
from hsa.methods.all_settings import all_settings
from hsa.methods.registry import TAKEN, methods
from hsa.planning import file_layout
from hsa.system.plugins import VARIABLE

Triple = dict[str, Path]
SUPPORT = Path(__file__).parent / "support"
PLUGIN, MEASURING = SUPPORT / "maximum_method.py", SUPPORT / "norm_weighted_method.py"


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(PLUGIN))


@pytest.fixture
def models(shared_triple: Triple) -> list[Path]:
    return [shared_triple["primary"], shared_triple["secondary"]]


def options(models: Sequence[Path], *more: str) -> list[str]:
    return ["--method=maximum", *(f"--model={path}" for path in models), *more]


def is_the_maximum(output: Path, models: Sequence[Path], factor: float) -> None:
    """Every tensor of an output is what torch makes of all models, bit for bit, in the first model's element type."""
    found, sources = read_tensors(output), [read_tensors(path) for path in models]
    assert found.keys() == sources[0].keys() != set()
    for name, first in sources[0].items():
        largest = torch.stack([source[name].to(torch.float32) for source in sources]).amax(0)
        expected = (largest * factor).to(first.dtype)
        assert (found[name].dtype, raw_bytes(found[name])) == (first.dtype, raw_bytes(expected)), name


def record_of(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "hsa_merge.json").read_text(encoding="utf-8"))
    return record


def test_python_and_the_command_line_write_the_maximum(models: list[Path], tmp_path: Path) -> None:
    report = hsa.merge(method="maximum", models=models, output=tmp_path / "python" / "out", factor=0.5)
    assert report.settings.as_dict() == {"factor": 0.5, "dtype": "auto"}
    assert report.extent.text.startswith(
        f"{len(read_tensors(models[0]))} tensors merged; the output differs from model1"
    )
    is_the_maximum(report.output, models, 0.5)
    shell = tmp_path / "shell" / "out"
    done = run_hsa("merge", *options(models, "--factor=0.5"), f"--output={shell}")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"  {report.extent.headline} (" in done.stdout
    assert snapshot(shell) == snapshot(report.output)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_any_element_type_and_number_of_models_is_merged(dtype: str, typed_triple: Triple, tmp_path: Path) -> None:
    models = list(typed_triple.values())
    output = tmp_path / "out"
    hsa.merge(method="maximum", models=models, output=output, dtype=dtype, sync=False)
    if dtype == "auto":
        is_the_maximum(output, models, 1.0)
    else:
        sources = [read_tensors(path) for path in models]
        for name, tensor in read_tensors(output).items():
            largest = torch.stack([source[name].to(torch.float32) for source in sources]).amax(0)
            assert raw_bytes(tensor) == raw_bytes(largest.to(getattr(torch, dtype))), name


def test_shards_and_threads_change_no_value(models: list[Path], tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"method": "maximum", "models": models, "max_shard_size": "200KB", "sync": False}
    for threads in (1, 3):
        output = tmp_path / str(threads)
        hsa.merge(**keywords, output=output, threads=threads)
        assert len(list(output.glob("*.safetensors"))) > 1
        is_the_maximum(output, models, 1.0)


def test_a_dry_run_says_what_would_happen(models: list[Path], tmp_path: Path) -> None:
    count = len(read_tensors(models[0]))
    done = run_hsa("merge", *options(models), f"--output={tmp_path / 'out'}", "--dry-run")
    assert done.returncode == 0
    assert f"targets {count} tensors to merge: " in done.stdout
    done = run_hsa("merge", *options(models), f"--output={tmp_path / 'out'}", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["parameters"] == {"factor": 1.0, "dtype": "auto"}
    assert len(plan["targets"]) == count and not any(plan["targets"].values())
    assert not (tmp_path / "out").exists()


def test_json_has_the_report(models: list[Path], tmp_path: Path) -> None:
    done = run_hsa("merge", *options(models, "--factor=0.5"), f"--output={tmp_path / 'out'}", "--json")
    report = json.loads(done.stdout)
    assert report["parameters"] == {"factor": 0.5, "dtype": "auto"}
    assert report["target_tensors"] == len(read_tensors(models[0]))
    assert report["bytes_read_by_source"].keys() == {"model1", "model2"}


def test_the_provenance_says_how_the_output_was_made(models: list[Path], tmp_path: Path) -> None:
    hsa.merge(method="maximum", models=models, output=tmp_path / "out", factor=0.5, model_ids=["me/one", "me/two"])
    record = record_of(tmp_path / "out")
    assert (record["format"], record["method"]) == (2, {"name": "maximum", "version": 1})
    assert (record["architecture"], record["anchor"], record["base"]) == ("whisper", "model1", None)
    assert {role: source["id"] for role, source in record["sources"].items()} == {
        "model1": "me/one",
        "model2": "me/two",
    }
    assert (record["parameters"]["factor"], record["parameters"]["dtype"]) == (0.5, "auto")
    tensors = read_tensors(models[0])
    assert record["targets"].keys() == tensors.keys()
    for name, target in record["targets"].items():
        assert (tuple(target["shape"]), target["groups"]) == (tuple(tensors[name].shape), 1)
        assert target["decision"] == {"factor": 0.5}


def test_the_card_names_method_settings_and_models(models: list[Path], tmp_path: Path) -> None:
    hsa.merge(method="maximum", models=models, output=tmp_path / "out", factor=0.5, model_ids=["me/one", "me/two"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in (
        "# Merge of me/one and me/two by Maximum",
        "base_model:\n- me/one\n- me/two\n",
        "- Model1: `me/one`\n- Model2: `me/two`\n",
        "Maximum: `factor * max(models)`.",
        "| factor | `0.5` |",
    ):
        assert line in card, line
    assert "head" not in card.lower() and "primary" not in card and "secondary" not in card


def test_verify_finds_an_output_sound_and_a_changed_decision_not(models: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    hsa.merge(method="maximum", models=models, output=output, factor=0.5)
    done = run_hsa("verify", output)
    assert done.returncode == 0
    assert f"{output}: sound\n  model1 primary, model2 secondary\n  factor 0.5\n" in done.stdout
    done = run_hsa("verify", output, env={VARIABLE: ""})
    assert done.returncode == 2
    assert (
        "its method is 'maximum', which is none of " in done.stderr
        and "(one of a plugin needs the plugin's file" in done.stderr
    )
    targets = record_of(output)["targets"]
    next(iter(targets.values()))["decision"]["factor"] = 0.25
    edit_json(output / "hsa_merge.json", targets=targets)
    report = hsa.verify(output)
    assert not report.ok and {problem.file for problem in report.problems} == {"hsa_merge.json"}


def test_verify_with_the_sources_makes_the_merge_again(models: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    hsa.merge(method="maximum", models=models, output=output, factor=0.5)
    done = run_hsa("verify", output, "--sources", *options(models)[1:])
    assert (done.returncode, done.stderr) == (0, "")
    assert "the bytes follow from the recorded decisions, which follow from the sources" in done.stdout
    assert hsa.verify(output, models=models).ok
    other = hsa.verify(output, models=models[::-1])
    assert not other.ok and any("model1" in problem.what for problem in other.problems)


def test_a_merger_merges_in_memory_and_saves_the_same_bytes(models: list[Path], tmp_path: Path) -> None:
    merger = hsa.Merger(method="maximum", models=models)
    merged, sources = merger.merge(factor=0.5), [read_tensors(path) for path in models]
    for name, tensor in merged.items():
        assert raw_bytes(tensor) == raw_bytes(torch.maximum(*(source[name] for source in sources)) * 0.5), name
    merger.save(tmp_path / "merger" / "out", factor=0.5)
    hsa.merge(method="maximum", models=models, output=tmp_path / "merge" / "out", factor=0.5)
    assert snapshot(tmp_path / "merger") == snapshot(tmp_path / "merge")


def test_a_sweep_writes_a_checkpoint_for_each_value(models: list[Path], tmp_path: Path) -> None:
    done = run_hsa("sweep", *options(models, "--factor=0.5,1.0", "--full"), f"--output={tmp_path / 'sweep'}")
    assert (done.returncode, done.stderr) == (0, "")
    index = json.loads((tmp_path / "sweep" / "index.json").read_text(encoding="utf-8"))
    points = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert len(index["points"]) == len(points) == 2
    for path in points:
        is_the_maximum(path, models, record_of(path)["parameters"]["factor"])
    assert {record_of(path)["parameters"]["factor"] for path in points} == {0.5, 1.0}
    again = hsa.sweep(method="maximum", models=models, factor=[0.5, 1.0], output=tmp_path / "sweep", full=True)
    assert (again.made, len(again.skipped)) == ((), 2)
    assert hsa.verify(tmp_path / "sweep").ok


def test_help_lists_the_method_and_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(run_hsa("merge", "--help").stdout.split())
    assert re.search(r"--method NAME How to merge: .*hsa, .*maximum.*\. \[default: hsa\]", text)
    assert "--factor NUMBER maximum: Factor on the largest value. [default: 1.0]" in text


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("merge", ["--factr=1"], r"No such option: --factr .*--factor"),
        ("merge", ["--k=0.5"], r"method maximum has no --k; its settings are --factor, --dtype"),
        ("merge", ["--factor=101"], r"--factor must be in \[-100, 100\], got 101"),
        ("merge", ["--base=b"], r"method maximum takes no base"),
        ("merge", ["--patch"], r"a patch holds .* method maximum changes whole tensors; write a whole checkpoint"),
        ("sweep", ["--factor=0.5,1"], r".*method maximum .*--full"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    command: str, more: list[str], message: str, models: list[Path], tmp_path: Path
) -> None:
    done = run_hsa(command, *options(models, *more), f"--output={tmp_path / 'out.safetensors'}")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert re.match(f"hsa: error: {message}", line), line
    assert not (tmp_path / "out.safetensors").exists()


def test_one_model_alone_is_refused(models: list[Path], tmp_path: Path) -> None:
    done = run_hsa("merge", *options(models[:1]), f"--output={tmp_path / 'out'}")
    assert (done.returncode, done.stderr) == (2, "hsa: error: method maximum merges 2 to 4 models, got 1\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name, title, formula = "maximum", "Maximum",', "formula = (", "has no name and title"),
        ('    method = "maximum"', '    method = "max"', "is named 'maximum'; say method = 'maximum' in its Settings"),
        ("    def longest(", "    def longer(", "records its decisions in part; define longest too"),
        ("    def decide(", "    def decides(", None),
        ('"maximum"', '"../maximum"', "is named '../maximum'; use small letters"),
        ("    contract =", "    version = 0\n    contract =", "has the version 0; expected a whole number from 1"),
        ("    factor: float", "    output: float", "has the setting 'output', which is an option of every run"),
    ],
)
def test_a_method_that_lacks_something_is_refused_by_name(
    old: str, new: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PLUGIN.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "changed.py"
    changed = text.replace(old, new)
    path.write_text(changed.replace('"factor * max(models)"', '"")') if new == "formula = (" else changed)
    monkeypatch.setenv(VARIABLE, str(path))
    if message is None:
        assert "maximum" in methods()
        return
    with pytest.raises(hsa.RequestError, match=rf"changed\.py: the method Maximum {message}"):
        methods()


def test_no_setting_has_the_name_of_an_argument_of_a_call_or_a_command() -> None:
    own = set(all_settings())
    calls = (keywords.MERGE, keywords.MERGER, keywords.MERGE_PATCH, keywords.SWEEP, keywords.RELEASE, keywords.VERIFY)
    roles = {"primary", "secondary", "primary_id", "secondary_id", "base_id"}
    for call in calls:
        assert set(call.names()) - own - roles <= TAKEN, call.name
    for command in ("merge", "sweep", "apply"):
        shown = set(re.findall(r"^\W*--([a-z-]+)", run_hsa(command, "--help").stdout, re.MULTILINE))
        taken = {name.replace("-", "_").removeprefix("no_") for name in shown}
        assert taken - own - roles - {"lambda", "except", "weight"} <= TAKEN, command


def test_a_later_version_of_the_method_makes_points_anew_and_is_named(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = {"method": "maximum", "models": models, "output": tmp_path / "sweep", "factor": [0.5], "full": True}
    hsa.sweep(**swept, sync=False)
    later = tmp_path / "later.py"
    later.write_text(PLUGIN.read_text(encoding="utf-8").replace("    contract =", "    version = 2\n    contract ="))
    monkeypatch.setenv(VARIABLE, str(later))
    report = hsa.verify(tmp_path / "sweep" / "maximum_factor0.5", models=models)
    assert any("'method maximum' 1 (here 2)" in note for note in report.notes), report.notes
    with pytest.raises(hsa.DestinationError, match="its version of method maximum differ"):
        hsa.sweep(**swept, sync=False)
    assert hsa.sweep(**swept, sync=False, overwrite=True).made == ("maximum_factor0.5",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: next(iter(d["targets"].values()))["decision"].update(factor=10**400), "too large to convert"),
        (lambda d: d.update(base="model2"), "takes no base"),
        (lambda d: d["sources"].update({f"model{n}": d["sources"]["model1"] for n in range(3, 9)}), "merges 2 to 4"),
    ],
)
def test_a_record_that_the_method_cannot_have_written_is_refused(
    models: list[Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    hsa.merge(method="maximum", models=models, output=tmp_path / "out", sync=False)
    forge(tmp_path / "out", change)  # type: ignore[arg-type]
    report = hsa.verify(tmp_path / "out")
    assert not report.ok and message in report.problems[0].what


def test_a_recorded_decision_that_does_not_fit_the_sources_is_named(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three weights for two models: the record alone does not tell that, and the method's own code fails on it."""
    monkeypatch.setenv(VARIABLE, str(MEASURING))
    base, *models = shared_triple.values()
    hsa.merge(method="norm_weighted", base=base, models=models, output=tmp_path / "out", sync=False)
    forge(tmp_path / "out", lambda d: next(iter(d["targets"].values()))["decision"].update(weights=[0.1, 0.1, 0.1]))
    done = run_hsa("verify", tmp_path / "out", "--sources", f"--base={base}", *(f"--model={path}" for path in models))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the recorded decision for model." in done.stderr and "cannot be applied" in done.stderr


def test_a_method_that_ends_the_program_does_not_look_like_success(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ending.py"
    path.write_text(PLUGIN.read_text(encoding="utf-8").replace("        return settings.factor\n", "        exit(0)\n"))
    monkeypatch.setenv(VARIABLE, str(path))
    done = run_hsa("merge", *options(models), f"--output={tmp_path / 'out'}")
    assert done.returncode == 1 and "a method's code asked to end the program" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_two_questions_come_apart_for_tensors_in_slices(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and decisions of factor 2 in a record of factor 0.5."""
    monkeypatch.setattr(file_layout, "MAX_WHOLE", 0)
    for factor in (0.5, 2.0):
        hsa.merge(method="maximum", models=models, output=tmp_path / str(factor), factor=factor, sync=False)
    shutil.copy(tmp_path / "2.0" / "model.safetensors", tmp_path / "0.5")
    forge(tmp_path / "0.5", lambda d: [each["decision"].update(factor=2.0) for each in d["targets"].values()])  # type: ignore[arg-type, return-value]
    report = hsa.verify(tmp_path / "0.5", models=models)
    assert (report.bytes_follow, report.decisions_follow) == (True, False)


def test_a_bias_that_all_heads_share_is_one_group(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_heads = tmp_path / "by_heads.py"
    method = """
    def treatment(self, info, place, settings):
        from hsa.methods import KEEP, Treatment
        return KEEP if place is None else Treatment("merge", layout="heads")

    def decide("""
    by_heads.write_text(PLUGIN.read_text(encoding="utf-8").replace("\n    def decide(", method))
    monkeypatch.setenv(VARIABLE, str(by_heads))
    models = [shared_triple["primary"], shared_triple["secondary"]]
    report = hsa.merge(method="maximum", models=models, output=tmp_path / "out", sync=False)
    groups = {name.split(".", 5)[-1]: record.partition.groups for name, record in report.tensors.items()}
    assert (groups["out_proj.weight"], groups["out_proj.bias"], groups["q_proj.bias"]) == (4, 1, 4)
    assert hsa.verify(tmp_path / "out", models=models).ok


def test_a_release_with_the_method_is_built_and_then_verified(models: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    listed = ", ".join(f"'{path}'" for path in models)
    recipe.write_text(f"merges:\n- {{name: one, group: all, method: maximum, models: [{listed}], factor: 0.5}}\n")
    for result in ("built", "verified"):
        (entry,) = hsa.release(recipe, tmp_path / "tree", sync=False).entries
        assert (entry.result, entry.problem) == (result, None)


def test_the_page_on_methods_is_true(shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("contributing/add-a-method.md", [PLUGIN, MEASURING], shared_triple, tmp_path, monkeypatch)
    same_tensors(tmp_path / "merged", tmp_path / "from-python")
    same_tensors(tmp_path / "merged", tmp_path / "saved")


def test_a_method_that_measures_weights_by_norms(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(MEASURING))
    base, *models = (read_tensors(path) for path in shared_triple.values())
    output = tmp_path / "out"
    hsa.merge(
        method="norm_weighted", base=shared_triple["base"], models=list(shared_triple.values())[1:], output=output
    )
    found, targets = read_tensors(output), record_of(output)["targets"]
    assert {name for name in found if "_proj." in name} == targets.keys()
    for name, tensor in found.items():
        expected = models[0][name]
        if name in targets:
            vectors = [model[name] - base[name] for model in models]
            norms = [float(vector.double().norm()) for vector in vectors]
            weights = targets[name]["decision"]["weights"]
            assert weights == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-12)
            expected = base[name] + vectors[0] * weights[0] + vectors[1] * weights[1]
        assert torch.equal(tensor, expected), name
