"""Linear combinations as a user merges: files, threads, slices, `Merger`, `verify` and the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_outputs import forge
from helpers import raw_bytes, read_tensors, run_hsa, snapshot, write_tensors
from torch import Tensor

import hsa
from hsa.reference import linear_combinations as oracle

Triple = dict[str, Path]
Sources = tuple[Path, list[Path]]

EQUAL, OPPOSITE = "model.encoder.layers.0.fc1.weight", "model.encoder.layers.1.fc2.weight"

# Method, settings, number of models, with a base.
MERGES: list[tuple[str, dict[str, Any], int, bool]] = [
    ("linear", {"weights": [0.7, -0.2, 1.3, 0.4, 0.05]}, 5, False),
    ("task_arithmetic", {"lam": 0.4}, 3, True),
    ("slerp", {"t": 0.3}, 1, True),
    ("nuslerp", {"weights": [3, 1]}, 2, True),
    ("nuslerp", {}, 2, False),
    ("nuslerp", {"flatten": False}, 2, True),
    ("nuslerp", {"flatten": False, "row_wise": True}, 2, False),
    ("multislerp", {}, 3, True),
    ("multislerp", {"weights": [1, 2, 3, 4], "normalize_weights": False}, 4, False),
    ("karcher", {}, 4, False),
    ("model_stock", {}, 3, True),
    ("model_stock", {"filter_wise": True}, 2, True),
]
IDS = [f"{method}-{settings}-{count}-{'base' if based else 'bare'}" for method, settings, count, based in MERGES]
MERGED = pytest.mark.parametrize(("method", "settings", "count", "based"), MERGES, ids=IDS)


def write_sources(triple: Triple, folder: Path, dtypes: list[torch.dtype], shards: int = 1) -> Sources:
    """Base and five fine-tunes, in these element types again and again. One tensor is equal in all, and the first two
    models moved one tensor in opposite directions."""
    start = read_tensors(triple["base"])
    generator = torch.Generator().manual_seed(11)
    common = {name: torch.randn(tensor.shape, generator=generator) * 1e-3 for name, tensor in start.items()}
    paths = []
    for number in range(6):
        tensors = {}
        for name, tensor in start.items():
            step = common[name] + torch.randn(tensor.shape, generator=generator) * 1e-3
            if name == OPPOSITE and number in (1, 2):
                step = torch.full(tensor.shape, 0.25 * (3 - 2 * number))
                tensor = (tensor * 4).round() / 4
            moved = tensor if number == 0 or name == EQUAL else tensor + step
            tensors[name] = moved.to(dtypes[number % len(dtypes)])
        if number == 0:
            tensors[OPPOSITE] = ((start[OPPOSITE] * 4).round() / 4).to(dtypes[0])
        path = Path(shutil.copytree(triple["base"], folder / str(number)))
        write_tensors(path, tensors, shards=shards if number == 1 else 1)
        paths.append(path)
    return paths[0], paths[1:]


@pytest.fixture(scope="module")
def float32(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return write_sources(shared_triple, tmp_path_factory.mktemp("one"), [torch.float32])


def given(sources: Sources, count: int, based: bool) -> dict[str, Any]:
    base, models = sources
    return {"models": models[:count], **({"base": base} if based else {})}


def expected(method: str, settings: dict[str, Any], sources: Sources, count: int, based: bool) -> dict[str, Tensor]:
    """What the oracle makes of every tensor; the first model's where all sources are equal."""
    base, models = read_tensors(sources[0]), [read_tensors(path) for path in sources[1][:count]]
    every = [base, *models] if based else models
    copies = settings.get("normalize_weights", True) and (method != "linear" or settings.get("normalize", True))
    result = {}
    for name, first in models[0].items():
        tensors = [model[name] for model in every]
        same = all(each.dtype == first.dtype and torch.equal(each, first) for each in tensors)
        if same and copies:
            result[name] = first
        else:
            merge = getattr(oracle, method)
            result[name] = merge(base[name] if based else None, [model[name] for model in models], **settings)
    return result


def same_bytes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, raw_bytes(found[name])) == (tensor.dtype, raw_bytes(tensor)), name


@MERGED
def test_verify_finds_a_decision_that_does_not_follow_from_the_sources(
    method: str, settings: dict[str, Any], count: int, based: bool, float32: Sources, tmp_path: Path
) -> None:
    output, chosen = tmp_path / "out", given(float32, count, based)
    hsa.merge(method=method, **chosen, **settings, output=output, sync=False)
    assert hsa.verify(output, **chosen).ok
    by_row = not settings.get("flatten", True) or settings.get("filter_wise", False)

    def change(document: dict[str, Any]) -> None:
        decision = document["targets"]["model.encoder.layers.1.fc1.weight"]["decision"]
        assert ("digest" in decision) == by_row
        if by_row:
            decision["digest"] = decision["digest"][::-1]
        else:
            decision["coefficients"][0] += 1e-9

    forge(output, change)  # type: ignore[arg-type]
    report = hsa.verify(output, **chosen)
    assert report.decisions_follow is False
    assert any("fc1.weight does not follow from the sources" in problem.what for problem in report.problems)
    # The bytes are made of the recorded coefficients; where the record holds their digest, of those of the sources.
    assert report.bytes_follow or not by_row


def test_a_flipped_bit_is_found(float32: Sources, tmp_path: Path) -> None:
    output, chosen = tmp_path / "out", given(float32, 2, True)
    hsa.merge(method="model_stock", filter_wise=True, **chosen, output=output, sync=False)
    weights = bytearray((output / "model.safetensors").read_bytes())
    weights[-5000] ^= 1
    (output / "model.safetensors").write_bytes(weights)
    report = hsa.verify(output, **chosen)
    assert not report.ok and report.bytes_follow is False


def test_t_may_be_a_list_over_layers_with_filters(float32: Sources, tmp_path: Path) -> None:
    """mergekit's usual form: other values for attention, and a list over the layers for the rest."""
    schedule = [{"filter": "self_attn", "value": 1.0}, {"filter": "fc1", "value": [0.0, 0.5]}, 0.25]
    hsa.merge(method="slerp", **given(float32, 1, True), t=schedule, output=tmp_path / "out", sync=False)
    merged, base, model = (read_tensors(path) for path in (tmp_path / "out", float32[0], float32[1][0]))
    for name, t in (
        ("model.encoder.layers.0.self_attn.q_proj.weight", 1.0),
        ("model.encoder.layers.0.fc1.bias", 0.0),
        ("model.encoder.layers.1.fc1.weight", 0.5),
        ("model.decoder.layers.1.fc2.weight", 0.25),
    ):
        assert torch.equal(merged[name], oracle.slerp(base[name], [model[name]], t=t)), name
    record = json.loads((tmp_path / "out" / "hsa_merge.json").read_text(encoding="utf-8"))
    assert record["parameters"]["t"] == schedule


def test_the_command_line_merges_as_python_does(float32: Sources, tmp_path: Path) -> None:
    base, models = float32
    hsa.merge(method="slerp", base=base, models=models[:1], t=0.25, output=tmp_path / "python" / "out", sync=False)
    slerp = ["--method=slerp", f"--base={base}", f"--model={models[0]}", "--t=0.25"]
    done = run_hsa("merge", *slerp, f"--output={tmp_path / 'shell' / 'out'}", "--no-sync")
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "shell") == snapshot(tmp_path / "python")
    card = (tmp_path / "shell" / "out" / "README.md").read_text(encoding="utf-8")
    assert "SLERP: `sin((1 - t) * o) / sin(o) * B + sin(t * o) / sin(o) * M" in card and "| t | `0.25` |" in card
    swept = ["--method=nuslerp", *(f"--model={path}" for path in models[:2]), "--no-flatten", "--row-wise"]
    done = run_hsa("merge", *swept, f"--output={tmp_path / 'rows'}", "--no-sync")
    assert done.returncode == 0, done.stderr
    wanted = expected("nuslerp", {"flatten": False, "row_wise": True}, float32, 2, False)
    same_bytes(read_tensors(tmp_path / "rows"), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method=slerp", "--base", "--model"], "method slerp needs --t; give it: Where the result lies"),
        (["--method=slerp", "--base", "--model", "--model", "--t=0.5"], "method slerp merges 1 model, got 2"),
        (["--method=slerp", "--model", "--t=0.5"], "method slerp needs --base, the model that the others"),
        (["--method=nuslerp", "--model", "--model", "--model"], "method nuslerp merges 2 models, got 3"),
        (["--method=model_stock", "--base", "--model"], "method model_stock merges 2 to 8 models, got 1"),
        (["--method=karcher", "--base", "--model", "--model"], "method karcher takes no base"),
        (["--method=multislerp", "--model", "--model", "--weight=1", "--weight=-1"], "--weight sum to 0 for tensor"),
        (["--method=linear", "--model", "--model", "--weight=1", "--weight=-1"], "--weight sum to 0 for tensor"),
        (
            ["--method=linear", "--model", "--model", "--weight=1", "--weight=2", "--weight=3"],
            "as many values as there are models, 2, got 3",
        ),
        (["--method=karcher", "--model", "--model", "--weight=1"], "method karcher has no --weight"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line(
    options: list[str], message: str, float32: Sources, tmp_path: Path
) -> None:
    models = iter(float32[1])
    places = {"--base": lambda: f"--base={float32[0]}", "--model": lambda: f"--model={next(models)}"}
    done = run_hsa("merge", *(places.get(each, each.__str__)() for each in options), f"--output={tmp_path / 'out'}")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = (each for each in done.stderr.splitlines() if "error" in each)
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_directions_that_cancel_leave_nothing_behind(float32: Sources, tmp_path: Path, shared_triple: Triple) -> None:
    base, (model, *_) = float32
    start, moved = read_tensors(base), read_tensors(model)
    opposed = Path(shutil.copytree(base, tmp_path / "opposed"))
    write_tensors(opposed, {name: 2 * start[name] - moved[name] for name in start})
    exact = {name: (start[name] * 256).round() / 256 for name in start if start[name].is_floating_point()}
    for path, sign in ((tmp_path / "plus", 1), (tmp_path / "minus", -1), (tmp_path / "zero", 0)):
        shutil.copytree(base, path)
        write_tensors(path, {name: exact[name] + sign / 64 for name in exact})
    origin = Path(shutil.copytree(base, tmp_path / "origin"))
    write_tensors(origin, exact)
    models = [tmp_path / name for name in ("plus", "minus", "zero")]
    with pytest.raises(hsa.RequestError, match=r"weighted directions of the models cancel in tensor \S+, so that"):
        hsa.merge(method="multislerp", base=origin, models=models, output=tmp_path / "out", sync=False)
    assert not (tmp_path / "out").exists()
    hsa.merge(method="multislerp", base=origin, models=models[:2], output=tmp_path / "two", sync=False)
    merged = read_tensors(tmp_path / "two")
    assert all(torch.equal(merged[name], exact[name]) for name in exact)


def test_slerp_says_that_it_needs_t(float32: Sources, tmp_path: Path) -> None:
    chosen = given(float32, 1, True)
    with pytest.raises(hsa.RequestError, match=r"method slerp needs t; give it: Where the result lies"):
        hsa.merge(method="slerp", **chosen, output=tmp_path / "out")
    with pytest.raises(hsa.RequestError, match=r"method slerp needs t; give it"):
        hsa.sweep(method="slerp", **chosen, output=tmp_path / "out", full=True)
    assert not (tmp_path / "out").exists()
    merger = hsa.Merger(method="slerp", **chosen)
    for call in (merger.merge, merger.check):
        with pytest.raises(hsa.RequestError, match=r"method slerp needs t; give it"):
            call()
    with pytest.raises(hsa.RequestError, match=r"method slerp needs t; give it"):
        merger.save(tmp_path / "out")
    assert torch.equal(merger.merge(t=1.0)[OPPOSITE], read_tensors(float32[1][0])[OPPOSITE])


def test_a_merger_of_weights_that_are_not_normalized(float32: Sources) -> None:
    """Other methods have a `normalize` that may differ between candidates; of this one a plan depends on it."""
    models = given(float32, 2, False)
    settings: dict[str, Any] = {"normalize": False, "weights": [0.5, -1.5]}
    merger = hsa.Merger(method="linear", **models, normalize=False)
    same_bytes(merger.merge(weights=settings["weights"]), expected("linear", settings, float32, 2, False))
    with pytest.raises(
        hsa.RequestError, match="normalize of method linear is the same for all candidates; give it when"
    ):
        merger.merge(normalize=True)


def test_a_record_without_t_is_refused(float32: Sources, tmp_path: Path) -> None:
    hsa.merge(method="slerp", **given(float32, 1, True), t=0.5, output=tmp_path / "out", sync=False)
    forge(tmp_path / "out", lambda document: document["parameters"].update(t=None))  # type: ignore[arg-type]
    report = hsa.verify(tmp_path / "out")
    assert not report.ok and "method slerp needs t" in report.problems[0].what
