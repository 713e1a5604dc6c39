"""Merges of whole models: what is merged of a part, of tensors that differ in shape, of equal ones, and of slices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raw_bytes, read_tensors, run_hsa, snapshot
from safetensors.torch import load_file, save_file

import hsa
from hsa.engine import streamed
from hsa.planning import file_layout
from hsa.system.plugins import VARIABLE

Triple = dict[str, Path]
Tensors = dict[str, torch.Tensor]
FC1 = "model.encoder.layers.1.fc1.weight"
PASSES = Path(__file__).parents[1] / "support" / "two_pass_method.py"


def mean(models: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean as the linear merge makes it: each model times its share, added in order."""
    share = torch.tensor(1.0 / len(models), dtype=torch.float64).float()
    total = models[0].float() * share
    for model in models[1:]:
        total = total + model.float() * share
    return total.to(models[0].dtype)


def changed(source: Path, place: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def linear(models: Sequence[Path], output: Path, **more: Any) -> tuple[Tensors, hsa.MergeReport]:
    report = hsa.merge(method="linear", models=models, output=output, sync=False, **more)
    return read_tensors(output), report


def decisions(output: Path) -> dict[str, Any]:
    record = json.loads((output / "hsa_merge.json").read_text(encoding="utf-8"))
    return {name: target["decision"] for name, target in record["targets"].items()}


# --- a part of the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "inside"),
    [
        ({"only": "encoder.*fc*"}, lambda name: "encoder" in name and "fc" in name),
        ({"exclude": ["*norm*", "*.bias"]}, lambda name: "norm" not in name and not name.endswith(".bias")),
        ({"layers": "1"}, lambda name: ".layers.1." in name),
        ({"stack": "decoder"}, lambda name: "decoder.layers" in name),
        ({"stack": "decoder", "layers": "0", "only": "*fc1*"}, lambda name: "decoder.layers.0.fc1" in name),
    ],
)
def test_what_is_outside_of_the_limits_stays_the_first_models(
    shared_triple: Triple, tmp_path: Path, limits: dict[str, Any], inside: Callable[[str], bool]
) -> None:
    models = list(shared_triple.values())[1:]
    found, report = linear(models, tmp_path / "out", **limits)
    sources = [read_tensors(model) for model in models]
    names = {name for name in found if inside(name)}
    assert 0 < len(names) < len(found) and report.tensors.keys() == names
    for name, tensor in found.items():
        expected = mean([source[name] for source in sources]) if name in names else sources[0][name]
        assert raw_bytes(tensor) == raw_bytes(expected), name
    assert hsa.verify(tmp_path / "out", models=models).ok


def test_limits_hold_for_hsa(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**shared_triple, output=tmp_path / "all", k=1.0, lam=0.3, sync=False)
    report = hsa.merge(**shared_triple, output=tmp_path / "one", k=1.0, lam=0.3, layers="1", sync=False)
    whole, part, primary = (
        read_tensors(each) for each in (tmp_path / "all", tmp_path / "one", shared_triple["primary"])
    )
    assert report.tensors and all(".layers.1." in name for name in report.tensors)
    for name, tensor in part.items():
        assert raw_bytes(tensor) == raw_bytes((whole if name in report.tensors else primary)[name]), name
    assert hsa.verify(tmp_path / "one", **shared_triple).ok


def test_limits_on_the_command_line(shared_triple: Triple, tmp_path: Path) -> None:
    models = list(shared_triple.values())[1:]
    options = ["--method=linear", *(f"--model={path}" for path in models), "--weight=3", "--weight=1", "--no-normalize"]
    limits = ["--only=encoder.*", "--only=decoder.*", "--except=*.bias", "--layers=0", "--stack=encoder"]
    done = run_hsa("merge", *options, *limits, f"--output={tmp_path / 'shell'}")
    assert (done.returncode, done.stderr) == (0, "")
    hsa.merge(
        method="linear",
        models=models,
        weights=[3, 1],
        normalize=False,
        only=["encoder.*", "decoder.*"],
        exclude="*.bias",
        layers=0,
        stack="encoder",
        output=tmp_path / "python",
    )
    assert snapshot(tmp_path / "shell") == snapshot(tmp_path / "python")
    assert set(map(str, decisions(tmp_path / "shell").values())) == {"{'coefficients': [3.0, 1.0]}"}


def test_limits_that_leave_nothing_are_refused(shared_triple: Triple, tmp_path: Path) -> None:
    models = list(shared_triple.values())[1:]
    for limits in ({"only": "nothing.*"}, {"layers": "77"}, {"stack": "tower"}):
        with pytest.raises(hsa.SourceError, match="holds no tensor that method linear would merge"):
            linear(models, tmp_path / "out", **limits)
    assert not (tmp_path / "out").exists()


# --- tensors that differ ---------------------------------------------------------------------------------------------


@pytest.fixture
def unlike(shared_triple: Triple, tmp_path: Path) -> list[Path]:
    """Three models: the second lacks a tensor, the third has another in a larger shape."""
    base, one, two = shared_triple.values()

    def grown(tensors: Tensors) -> None:
        embedding = tensors["model.decoder.embed_tokens.weight"]
        tensors["model.decoder.embed_tokens.weight"] = torch.cat([embedding, embedding[:3]])

    second = changed(one, tmp_path / "second", lambda tensors: tensors.pop(FC1))
    return [two, second, changed(base, tmp_path / "third", grown)]


@pytest.mark.parametrize("mode", ["first", "skip-model"])
def test_tensors_that_differ_stay_or_are_merged_of_those_that_agree(
    unlike: list[Path], tmp_path: Path, mode: str
) -> None:
    found, report = linear(unlike, tmp_path / "out", on_mismatch=mode, weights=1)
    sources = [read_tensors(model) for model in unlike]
    for name, tensor in found.items():
        fitting = [each[name] for each in sources if name in each and each[name].shape == tensor.shape]
        expected = mean(fitting) if len(fitting) == 3 or mode == "skip-model" else sources[0][name]
        assert raw_bytes(tensor) == raw_bytes(expected), name
    named = {"first": "2 tensors stay model1's", "skip-model": "2 tensors are merged of some of the models"}[mode]
    assert any(named in note and FC1.removeprefix("model.") in note for note in report.notes), report.notes
    assert hsa.verify(tmp_path / "out", models=unlike).ok


def test_a_weight_belongs_to_its_model_where_another_lacks_a_tensor(unlike: list[Path], tmp_path: Path) -> None:
    linear(unlike, tmp_path / "out", on_mismatch="skip-model", weights=[1, 2, 7])
    found = decisions(tmp_path / "out")
    assert found[FC1] == {"coefficients": [0.125, 0.875]}
    assert found["model.encoder.conv1.weight"] == {"coefficients": [0.1, 0.2, 0.7]}


def test_tensors_that_differ_are_refused_where_that_is_asked_for(unlike: list[Path], tmp_path: Path) -> None:
    with pytest.raises(hsa.MismatchError, match=r"is not the same in all sources: model1 F32 \[.*\], model2 "):
        linear(unlike, tmp_path / "out", on_mismatch="error")
    assert not (tmp_path / "out").exists()


def test_base_that_lacks_a_tensor_leaves_the_first_models(shared_triple: Triple, tmp_path: Path) -> None:
    base = changed(shared_triple["base"], tmp_path / "base", lambda tensors: tensors.pop(FC1))
    models = list(shared_triple.values())[1:]
    for mode in ("first", "skip-model"):
        out = tmp_path / mode
        hsa.merge(method="task_arithmetic", base=base, models=models, on_mismatch=mode, output=out, sync=False)
        assert raw_bytes(read_tensors(out)[FC1]) == raw_bytes(read_tensors(models[0])[FC1])


# --- equal tensors, slices, passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [file_layout.MAX_WHOLE, 0])
def test_a_tensor_that_is_equal_in_all_sources_is_copied(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    """Its mean by three weights would differ in the last bit."""
    monkeypatch.setattr(file_layout, "MAX_WHOLE", whole)
    first = shared_triple["primary"]
    held = read_tensors(first)[FC1]
    models = [
        first,
        *(
            changed(shared_triple[role], tmp_path / role, lambda t: t.update({FC1: held}))
            for role in ("base", "secondary")
        ),
    ]
    found, report = linear(models, tmp_path / "out", weights=[1, 1, 1])
    assert raw_bytes(found[FC1]) == raw_bytes(held) != raw_bytes(mean([held] * 3))
    assert decisions(tmp_path / "out")[FC1] == {"copied": True}
    count = len(found)
    said = f"{count - 1} of {count} tensors merged; the other 1 is equal in all sources and was copied; the output"
    assert report.extent.text.startswith(said)
    assert hsa.verify(tmp_path / "out", models=models).ok
    merger = hsa.Merger(method="linear", models=models)
    assert raw_bytes(merger.merge()[FC1]) == raw_bytes(held)
    scaled, _ = linear(models, tmp_path / "scaled", weights=[1, 1, 0], normalize=False)
    assert raw_bytes(scaled[FC1]) == raw_bytes(held * 2)


@pytest.fixture
def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(PASSES))


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize("layout", ["flat", "rows"])
def test_slices_threads_and_memory_change_no_byte(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """A method of two passes, of which the second measures by what the first decided."""
    base, *models = shared_triple.values()
    arguments: dict[str, Any] = {"method": "two_passes", "base": base, "models": models, "layout": layout}
    hsa.merge(**arguments, output=tmp_path / "whole" / "out", threads=1)
    expected = snapshot(tmp_path / "whole")
    monkeypatch.setattr(file_layout, "MAX_WHOLE", 0)
    for kept, count, threads in ((1 << 30, 1024, 1), (1 << 30, 4096, 3), (0, 1024, 3), (0, 1 << 18, 2)):
        monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
        monkeypatch.setattr(file_layout, "SLICE_ELEMENTS", count)
        place = tmp_path / f"{kept}-{count}-{threads}"
        hsa.merge(**arguments, output=place / "out", threads=threads)
        assert snapshot(place) == expected
        assert decisions(place / "out") == decisions(tmp_path / "whole" / "out")
        assert hsa.verify(place / "out", base=base, models=models).ok


@pytest.mark.usefixtures("two_passes")
@pytest.mark.parametrize(("kept", "reads"), [(1 << 30, 1), (0, 3)])
def test_sources_that_fit_into_memory_are_read_once(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int, reads: int
) -> None:
    monkeypatch.setattr(file_layout, "MAX_WHOLE", 0)
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
    base, *models = shared_triple.values()
    report = hsa.merge(method="two_passes", base=base, models=models, output=tmp_path / "out", sync=False)
    weights = sum(tensor.nbytes for tensor in read_tensors(base).values())
    for role in ("base", "model1", "model2"):
        assert reads * weights <= report.bytes_read_by_source[role] < (reads + 0.5) * weights


@pytest.mark.usefixtures("two_passes")
def test_a_source_that_is_not_finite_is_named_whatever_measures_it(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[FC1].view(-1)[-1] = torch.nan

    base, one, two = shared_triple.values()
    damaged = changed(two, tmp_path / "damaged", damage)
    for whole in (file_layout.MAX_WHOLE, 0):
        monkeypatch.setattr(file_layout, "MAX_WHOLE", whole)
        for method in ("two_passes", "task_arithmetic"):
            with pytest.raises(hsa.NonFiniteError, match=rf"damaged/model.safetensors: tensor {FC1} holds NaN or Inf"):
                hsa.merge(method=method, base=base, models=[one, damaged], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
