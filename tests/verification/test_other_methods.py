"""`hsa verify` and `hsa inspect` of what methods other than HSA wrote: a method of a plugin file, which has no base, no
heads and no names for its models. The record says what the sources are that are given.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forged_outputs import COPIED, WEIGHTS, forge, forge_with_card, named, told
from helpers import poke, read_tensors, run_hsa

import hsa
from hsa.errors import RequestError
from hsa.inspection.diff import compare
from hsa.system.manifest import PROVENANCE

Triple = dict[str, Path]
PLUGIN = Path(__file__).resolve().parents[1] / "support" / "maximum_method.py"
ENVIRONMENT = {"HSA_PLUGINS": str(PLUGIN)}
LEAST = """
from dataclasses import dataclass
import numpy as np
from hsa.methods import Contract, Method, Settings, setting

@dataclass(frozen=True)
class LeastSettings(Settings):
    method = "least"
    factor: float = setting(1.0, "Factor on the least value.", low=-100.0, high=100.0)

class Least(Method):
    name, title, Settings, contract = "least", "Least", LeastSettings, Contract(base="optional", least=2)

    def decide(self, task, measured, settings, so_far):
        return settings.factor

    def apply(self, block, decision, out):
        np.minimum.reduce([block.weights(role) for role in block.models], axis=0, out=out)
        np.multiply(out, np.float32(decision), out=out)
"""
"""A method that records no decisions, and can use a base."""


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSA_PLUGINS", str(PLUGIN))


@pytest.fixture(scope="module")
def models(shared_triple: Triple) -> list[Path]:
    return [shared_triple["primary"], shared_triple["secondary"]]


@pytest.fixture(scope="module")
def made(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output for reading alone."""
    output = tmp_path_factory.mktemp("maximum") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HSA_PLUGINS", str(PLUGIN))
        hsa.merge(method="maximum", models=models, output=output, factor=0.5, sync=False)
    return output


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def options(models: list[Path]) -> list[str]:
    return [f"--model={path}" for path in models]


# --- with the sources -------------------------------------------------------------------------------------------------


def test_a_sound_output_follows_from_its_models(out: Path, models: list[Path]) -> None:
    report = hsa.verify(out, models=models)
    assert report.ok and report.sources_compared, told(report)
    assert (report.bytes_follow, report.decisions_follow) == (True, True)
    about = report.as_dict()
    assert list(about["sources"]) == ["model1", "model2"] and about["target_tensors"] > 0
    assert about["selected_heads"] is about["total_heads"] is None


@pytest.fixture
def least(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output of the method that records no decisions."""
    (tmp_path / "least.py").write_text(LEAST)
    monkeypatch.setenv("HSA_PLUGINS", str(tmp_path / "least.py"))
    hsa.merge(method="least", models=models, output=tmp_path / "out", factor=0.5, sync=False)
    return tmp_path / "out"


def change_a_byte(output: Path, models: list[Path]) -> None:
    poke(output / WEIGHTS, COPIED, 7, np.float32(0.5).tobytes())


def record_another_factor(output: Path, models: list[Path]) -> None:
    forge_with_card(output, lambda document: document["targets"][COPIED]["decision"].update(factor=2.0))


def record_another_factor_and_follow_it(output: Path, models: list[Path]) -> None:
    values = [read_tensors(path)[COPIED].numpy() for path in models]
    poke(output / WEIGHTS, COPIED, 0, (np.maximum(*values) * np.float32(2.0)).tobytes())
    record_another_factor(output, models)


CHANGES: dict[str, tuple[Callable[[Path, list[Path]], None], bool, bool, set[str]]] = {
    "a byte": (change_a_byte, False, True, {WEIGHTS, PROVENANCE}),
    "a decision": (record_another_factor, False, False, {WEIGHTS, PROVENANCE}),
    "a decision and the bytes": (record_another_factor_and_follow_it, True, False, {PROVENANCE}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_is_found(out: Path, models: list[Path], what: str) -> None:
    change, bytes_follow, decisions_follow, files = CHANGES[what]
    change(out, models)
    forge(out)
    assert hsa.verify(out).ok, told(hsa.verify(out))
    report = hsa.verify(out, models=models)
    assert (report.bytes_follow, report.decisions_follow) == (bytes_follow, decisions_follow), told(report)
    assert named(report) == files, told(report)
    if not decisions_follow:
        assert f"the decision for {COPIED} does not follow from the sources: factor 2.0 is recorded" in told(report)


def test_a_changed_byte_is_found_without_the_sources(out: Path, models: list[Path]) -> None:
    change_a_byte(out, models)
    assert named(hsa.verify(out)) == {WEIGHTS}


def test_what_a_method_does_not_record_is_decided_again(least: Path, models: list[Path]) -> None:
    report = hsa.verify(least, models=models)
    assert report.ok and report.bytes_follow, told(report)
    change_a_byte(least, models)
    forge(least)
    damaged = hsa.verify(least, models=models)
    assert damaged.bytes_follow is False and named(damaged) == {WEIGHTS, PROVENANCE}, told(damaged)


def test_models_in_another_order_are_not_the_recorded_ones(out: Path, models: list[Path]) -> None:
    report = hsa.verify(out, models=models[::-1])
    assert named(report) >= {"model1", "model2"}, told(report)
    assert "model1: is not the recorded source" in told(report)


def test_ids_are_compared_in_the_order_of_the_models(out: Path, models: list[Path]) -> None:
    report = hsa.verify(out, models=models, model_ids=[None, "org/other"])
    assert named(report) == {"model2"} and "the source given is 'org/other'" in told(report)
    assert named(hsa.verify(out, models=models, model1_id="org/other")) == {"model1"}


def test_a_base_that_a_method_can_use_is_needed_where_it_was_used(
    least: Path, models: list[Path], tmp_path: Path
) -> None:
    hsa.merge(method="least", models=models, base=models[0], output=tmp_path / "based", sync=False)
    report = hsa.verify(tmp_path / "based", models=models, base=models[0])
    assert report.ok and report.bytes_follow, told(report)
    with pytest.raises(RequestError, match="merged by method least from base, model1 and model2; base is not given"):
        hsa.verify(tmp_path / "based", models=models)
    with pytest.raises(RequestError, match="merged by method least from model1 and model2; base is none of these"):
        hsa.verify(least, models=models, base=models[0])


# --- sources that the record does not name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": 1}, "model2 is not given, and all are needed; give the models by models, in this order"),
        ({"models": 3}, "model3 is none of these"),
        ({"base": "b", "models": 2}, "base is none of these"),
        ({"primary": "a"}, "primary is none of these"),
        ({"models": 2, "primary_id": "org/name"}, "primary_id is none of these"),
        ({"models": 2, "model7_id": "org/name"}, "model7_id is none of these"),
    ],
)
def test_other_sources_than_the_recorded_ones(out: Path, change: dict[str, Any], message: str) -> None:
    keywords = {name: ["a", "b", "c"][:value] if name == "models" else value for name, value in change.items()}
    expected = f"{out} was merged by method maximum from model1 and model2; {message}"
    with pytest.raises(RequestError, match=re.escape(expected)) as caught:
        hsa.verify(out, **keywords)
    assert "\n" not in str(caught.value)


def test_other_arguments_than_a_path_for_each_source(out: Path, models: list[Path]) -> None:
    for keywords, message in (
        ({"models": "ab"}, "models must be a list"),
        ({"models": [1, 2]}, "model1 must be a path"),
        ({"models": models, "model_ids": ["org/name"]}, "model_ids must be as many as models"),
        ({"models": models, "model_ids": ["a b", None]}, "model1_id must be a hub id"),
        ({"model_ids": ["org/name"]}, "give the sources too"),
    ):
        with pytest.raises(RequestError, match=message):
            hsa.verify(out, **keywords)  # type: ignore[arg-type]


def test_a_damaged_record_says_nothing_of_sources(out: Path, models: list[Path]) -> None:
    (out / PROVENANCE).write_text("{}")
    report = hsa.verify(out, models=models)
    assert named(report) == {PROVENANCE}
    assert any("nothing was recomputed" in note for note in report.notes)


# --- HSA's own outputs ------------------------------------------------------------------------------------------------


def test_hsa_s_models_in_their_order(merged: Path, shared_triple: Triple, models: list[Path]) -> None:
    report = hsa.verify(merged, base=shared_triple["base"], models=models)
    assert report.ok and report.bytes_follow, told(report)
    swapped = hsa.verify(merged, base=shared_triple["base"], models=models[::-1])
    assert named(swapped) >= {"primary", "secondary"}
    with pytest.raises(RequestError, match="by method hsa from base, primary and secondary; base is not given"):
        hsa.verify(merged, models=models)
    with pytest.raises(RequestError, match="models and primary both say what is merged"):
        hsa.verify(merged, **shared_triple, models=models)
    with pytest.raises(RequestError, match="model3 is none of these"):
        hsa.verify(merged, base=shared_triple["base"], models=[*models, models[0]])


def test_a_patch_and_a_sweep_of_hsa(shared_triple: Triple, models: list[Path], tmp_path: Path) -> None:
    triple = {"base": shared_triple["base"], "models": models}
    hsa.merge_patch(**triple, output=tmp_path / "p.safetensors", sync=False)
    hsa.sweep(**triple, output=tmp_path / "sweep", lam=[0.2, 0.6], targets=["encoder-qkv", "attention-qkv"], sync=False)
    for place in (tmp_path / "p.safetensors", tmp_path / "sweep"):
        report = hsa.verify(place, base=shared_triple["base"], models=models)
        assert report.ok and report.bytes_follow and report.decisions_follow, told(report)
        with pytest.raises(RequestError, match="by method hsa from base, primary and secondary"):
            hsa.verify(place, models=models)


def test_a_sweep_of_another_method(models: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    hsa.sweep(method="maximum", models=models, output=place, factor=[0.5, 1.0], full=True, sync=False)
    report = hsa.verify(place, models=models)
    assert report.ok and report.bytes_follow and len(report.members) == 2, told(report)
    with pytest.raises(RequestError, match="by method maximum from model1 and model2; model2 is not given"):
        hsa.verify(place, models=models[:1])
    point = report.members[1].output
    change_a_byte(point, models)
    forge(point)
    damaged = hsa.verify(place, models=models)
    assert damaged.bytes_follow is False and f"{point.name}/{WEIGHTS}" in named(damaged), told(damaged)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_an_output_without_heads_is_inspected_as_whole_models(out: Path, models: list[Path]) -> None:
    alone, both = hsa.inspect(out), hsa.inspect(out, models=models)
    for found in (alone, both):
        assert (
            isinstance(found, hsa.ModelInspection)
            and found.method == "maximum"
            and found.models == ("model1", "model2")
        )
    assert alone.tensors.keys() == both.tensors.keys()
    assert both.whole.vectors is not None and both.whole.vectors.cosine(0, 1) == pytest.approx(1.0, abs=1e-3)
    assert any("without base there are no task vectors" in note for note in both.notes)


def test_hsa_is_inspected_by_its_models_in_their_order(merged: Path, shared_triple: Triple, models: list[Path]) -> None:
    base = shared_triple["base"]
    by_name = hsa.inspect(merged, **shared_triple, energy=False)
    assert hsa.inspect(merged, base=base, models=models, energy=False).as_dict() == by_name.as_dict()
    alone = hsa.inspect(**shared_triple, energy=False)
    assert hsa.inspect(base=base, models=models, energy=False).as_dict() == alone.as_dict()
    with pytest.raises(RequestError, match="secondary not given"):
        hsa.inspect(base=base, models=models[:1])
    with pytest.raises(RequestError, match="method hsa merges 2 to 8 models, got 9"):
        hsa.inspect(base=base, models=[*models, *models, *models, *models, models[0]])


def test_outputs_without_heads_are_compared(out: Path, merged: Path, models: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    hsa.merge(method="maximum", models=models, output=other, factor=1.0, sync=False)
    found = compare(out, other)
    assert found.heads is None and found.parameters == {"factor": (0.5, 1.0)}
    assert list(found.sources) == ["model1", "model2"] and found.sources["model1"]["same_targets"]
    assert found.weights is not None and found.weights.whole.relative == pytest.approx(1.0, rel=1e-6)
    assert any("method maximum selects none" in note for note in found.notes)
    mixed = compare(merged, out)
    assert mixed.parameters["method"] == ("hsa", "maximum")
    assert mixed.sources["model1"]["a"] is None and not mixed.sources["model1"]["same_targets"]


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(out: Path, merged: Path, shared_triple: Triple, models: list[Path]) -> None:
    done = run_hsa("verify", out, "--sources", *options(models), env=ENVIRONMENT)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"{out}: sound"), done.stderr
    assert "model1 primary" in done.stdout and "tensors merged" in done.stdout
    done = run_hsa("verify", out, "--sources", *options(models[::-1]), "--json", env=ENVIRONMENT)
    assert done.returncode == 2 and not json.loads(done.stdout)["ok"]
    done = run_hsa("verify", merged, "--sources", f"--base={shared_triple['base']}", *options(models))
    assert done.returncode == 0 and "every weight recomputed from the sources" in done.stdout, done.stderr
    ids = ("--model-id=org/one", "--model-id=org/two")
    done = run_hsa("verify", out, "--sources", *options(models), *ids, env=ENVIRONMENT)
    assert done.returncode == 2 and "the source given is 'org/two'" in done.stderr


def test_the_command_line_refuses_in_one_line(out: Path, merged: Path, models: list[Path]) -> None:
    for arguments, message in (
        (("verify", out, "--sources"), "add --base, --primary, --secondary, or each model by --model"),
        (("verify", out, "--sources", *options(models[:1])), "model2 is not given, and all are needed; give the"),
        (("verify", out, "--sources", f"--primary={models[0]}"), "from model1 and model2; --primary is none of these"),
        (("verify", out, *options(models)), "add --sources"),
        (("inspect", out, f"--png={out.parent / 'p.png'}"), "--png draws heads, and this method selects none"),
        (("inspect", out, *options(models[::-1])), "model1: its merged tensors are not those that"),
    ):
        done = run_hsa(*arguments, env=ENVIRONMENT)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    done = run_hsa("inspect", "--diff", merged, out, env=ENVIRONMENT)
    assert done.returncode == 0 and "no heads are compared" in done.stderr, done.stderr
    assert "selected heads" not in done.stdout and "model2" in done.stdout and "weights: relative" in done.stdout
