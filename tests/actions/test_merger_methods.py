"""`hsa.Merger` of a method from a plugin file, which merges every tensor of the models and takes no base."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raw_bytes, read_tensors
from merger_models import load, refused

import hsa

Triple = dict[str, Path]
PLUGIN = Path(__file__).resolve().parents[1] / "support" / "maximum_method.py"
NAMES = ("base", "primary", "secondary")


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSA_PLUGINS", str(PLUGIN))


@pytest.fixture
def paths(shared_triple: Triple) -> list[Path]:
    return [shared_triple[name] for name in NAMES]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def largest(models: list[Mapping[str, torch.Tensor]], factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.stack([model[name] for model in models]).amax(0) * factor for name in models[0]}


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(raw_bytes(ours[name]) == raw_bytes(theirs[name]) for name in theirs)


def test_directories_are_merged_whole_again_and_again(paths: list[Path]) -> None:
    models = [read_tensors(path) for path in paths]
    merger = hsa.Merger(method="maximum", models=paths)
    assert same(merger.merge(factor=0.5), largest(models, 0.5))
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in models[0].items()}
    for factor in (2.0, 1.0):
        assert merger.apply_(state, factor) is state
        assert same(state, largest(models, factor))


def test_state_dicts_need_no_config(paths: list[Path]) -> None:
    models = [read_tensors(path) for path in paths]
    expected = largest(models)
    merger = hsa.Merger(method="maximum", models=models, threads=1)
    merger.apply_(models[0], factor=3.0)
    merger.apply_(models[0])
    assert same(models[0], expected)


def test_loaded_models_whose_output_is_tied_to_the_embedding(paths: list[Path]) -> None:
    models: list[Any] = [load(path) for path in paths]
    expected = largest([read_tensors(path) for path in paths])
    merger = hsa.Merger(method="maximum", models=models)
    merger.apply_(models[1])
    held = models[1].state_dict()
    assert same({name: held[name] for name in expected}, expected)
    assert models[1].proj_out.weight is models[1].model.decoder.embed_tokens.weight


def test_save_writes_the_very_bytes_of_merge(shared_triple: Triple, tmp_path: Path) -> None:
    report = hsa.Merger(**shared_triple, targets="attention-qkv").save(tmp_path / "saved" / "x", 0.3, sync=False)
    hsa.merge(**shared_triple, output=tmp_path / "merged" / "x", targets="attention-qkv", k=0.3, sync=False)
    assert report.output == tmp_path / "saved" / "x"
    assert contents(tmp_path / "saved" / "x") == contents(tmp_path / "merged" / "x")


def test_what_has_no_files_is_not_saved(paths: list[Path], tmp_path: Path) -> None:
    merger = hsa.Merger(method="maximum", models=[paths[0], read_tensors(paths[1])])
    refused(lambda: merger.save(tmp_path / "out"), "^save writes .* model2 was given as a model or state dict; give")
    assert not (tmp_path / "out").exists()


def test_what_is_hsas_own_is_refused_of_other_methods(paths: list[Path]) -> None:
    merger = hsa.Merger(method="maximum", models=paths)
    refused(lambda: merger.scores, "^method maximum scores no heads", kind=hsa.RequestError)
    refused(lambda: merger.selected(0.5), "^method maximum scores no heads", kind=hsa.RequestError)
    refused(lambda: merger.merge(k=0.5), "^method maximum has no k; its settings are factor", kind=hsa.RequestError)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'factr'\. Did you mean 'factor'"):
        merger.merge(factr=0.5)
    with pytest.raises(TypeError, match="at most 1 positional arguments, 2 were given"):
        merger.merge(0.5, 0.5)
    with pytest.raises(TypeError, match="multiple values for argument 'factor'"):
        merger.merge(0.5, factor=0.5)


def test_a_method_takes_its_own_sources(paths: list[Path]) -> None:
    base, *models = paths
    refused(lambda: hsa.Merger(method="maximum", base=base, models=models), "takes no base", kind=hsa.RequestError)
    refused(lambda: hsa.Merger(method="maximum", models=models[:1]), "merges 2 to 4 models", kind=hsa.RequestError)
    merger = hsa.Merger(base=base, models=models)
    assert repr(merger) == repr(hsa.Merger(base, *models))
    assert merger.selected() == hsa.Merger(base, *models).selected()


def test_a_merger_leaves_tensors_alone_that_are_no_targets(shared_triple: Triple) -> None:
    refused(lambda: hsa.Merger(**shared_triple, non_attention_scale=0.5), "^non_attention_scale 0.5 changes ")
    refused(lambda: hsa.Merger(**shared_triple, numerics="reference"), "keeps exact numerics")


def test_equal_models_are_warned_of(paths: list[Path]) -> None:
    with pytest.warns(hsa.HsaWarning, match="model1 and model2 are equal on all"):
        merger = hsa.Merger(method="maximum", models=[paths[0], paths[0]])
    assert len(merger.warnings) == 1
    assert "tensors merged" in merger.check().notes[0]


def test_signatures_are_made_from_declarations() -> None:
    built, applied = inspect.signature(hsa.Merger).parameters, inspect.signature(hsa.Merger.apply_).parameters
    assert list(built)[:5] == ["base", "primary", "secondary", "method", "models"]
    assert {"targets", "attention_scale", "num_heads", "num_layers", "backend", "device", "threads"} <= set(built)
    assert not {"k", "lam", "alpha", "output"} & set(built)
    assert "{" not in f"{hsa.Merger.__doc__}{hsa.Merger.apply_.__doc__}{hsa.Merger.save.__doc__}".replace("{tensor", "")
    assert all(f"        {name}: " in str(hsa.Merger.__doc__) for name in ("base", "models", "targets", "num_heads"))
    assert list(applied)[:5] == ["self", "model", "k", "lam", "alpha"]
    assert all(applied[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in ("k", "lam", "alpha"))
