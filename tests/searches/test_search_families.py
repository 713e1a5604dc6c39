"""Searches over models that are no Whisper: what is decoded is what the written checkpoint decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from speech_sets import write_ctc, write_moonshine, write_set

import hsa
from hsa.actions.merger.loaded_models import LoadedTensor
from hsa.errors import SourceError
from hsa.searches.candidates import Candidate
from hsa.searches.resident_model import ResidentModel, places_of
from hsa.searches.sources import sources_of

OLD_NAMES = ((".parametrizations.weight.original0", ".weight_g"), (".parametrizations.weight.original1", ".weight_v"))


def with_noise(folder: Path, base: Path, seed: int) -> Path:
    """A fine-tune of a checkpoint: the same files, with other numbers."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.1 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_old_names(folder: Path) -> Path:
    """The checkpoint with the names that most checkpoints of wav2vec2 on the Hub have."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for new, old in OLD_NAMES:
            name = name.replace(new, old)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["Wav2Vec2", "Hubert", "WavLM", "moonshine"])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    moonshine = request.param == "moonshine"
    base = write_moonshine(folder / "base") if moonshine else write_ctc(folder / "base", family=request.param)
    if not moonshine:
        with_old_names(base)
        assert any(name.endswith(".weight_g") for name in load_file(base / "model.safetensors"))
    return {"base": str(base), "models": [str(with_noise(folder / f"m{number}", base, number)) for number in (1, 2)]}


def test_every_tensor_of_the_loaded_model_is_written(sources: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCTC, MoonshineForConditionalGeneration

    owner: Any = AutoModelForCTC if "moonshine" not in sources["base"] else MoonshineForConditionalGeneration
    given = sources_of(sources)
    model = owner.from_pretrained(sources["models"][0])
    resident = ResidentModel(model, given, {}, 2)
    hsa.merge(method="linear", models=sources["models"], weights=[0.3, 0.7], output=tmp_path / "merged", sync=False)
    places = {
        "base": (Candidate("base", "source", source=-1), sources["base"]),
        "merge": (Candidate("x", "sampled", "linear", {"weights": [0.3, 0.7]}), tmp_path / "merged"),
        "m2": (Candidate("m2", "source", source=1), sources["models"][1]),
    }
    for candidate, folder in places.values():
        resident.put(candidate)
        expected = owner.from_pretrained(folder).state_dict()
        found = model.state_dict()
        assert found.keys() == expected.keys()
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not differing


def test_the_scores_are_those_of_the_written_checkpoint(sources: dict[str, Any], tmp_path: Path) -> None:
    dev = write_set(tmp_path / "dev", (0.9, 0.7, 0.9, 0.6), seed=3)
    short = {"max_tokens": 8} if "moonshine" in sources["base"] else {}  # random models write on and on
    how = {"method": "linear,task_arithmetic", "dev": [str(dev)], "trials": 9, **short}
    study = hsa.search(sources, output=tmp_path / "out", **how)
    found = hsa.evaluate([str(tmp_path / "out" / "best"), sources["models"][1]], [hsa.data(dev)], **short)
    assert found["best"].wer == pytest.approx(study.best.wer)
    by_name = {trial.name: trial for trial in study.trials}
    assert found["m2"].wer == pytest.approx(by_name["m2"].value)
    assert len({trial.result.texts or trial.result.weights for trial in study.trials}) > 3


def test_a_method_that_cannot_merge_these_models_is_refused_before_anything_is_scored(
    sources: dict[str, Any], tmp_path: Path
) -> None:
    dev = write_set(tmp_path / "dev", (0.6,), seed=3)
    steps: list[Any] = []
    with pytest.raises(SourceError, match=r"heads"):
        hsa.search(
            sources, output=tmp_path / "out", method="linear,hsa", dev=[str(dev)], trials=9, progress=steps.append
        )
    assert not steps


def test_a_tensor_that_a_search_could_not_write_is_refused() -> None:
    known, other = torch.zeros(2), torch.zeros(3)
    entries = [LoadedTensor("a.weight", "a.weight", known), LoadedTensor("b.weight", "b.weight", other)]
    with pytest.raises(SourceError, match=r"the model has a tensor 'b\.weight' that no source has under this name"):
        places_of(entries, entries, {"a.weight"})
    alias = LoadedTensor("b.weight", "b.weight", known)
    assert places_of([entries[0], alias], [entries[0]], {"a.weight"}) == {"a.weight": known}
    counter = LoadedTensor("c.batches", "c.batches", torch.zeros(1, dtype=torch.int64))
    assert places_of([entries[0], counter], [entries[0], counter], {"a.weight"}) == {"a.weight": known}
