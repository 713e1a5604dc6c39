"""`hsa inspect --diff A B`: equal outputs, outputs that differ in one thing at a time, damaged and hostile ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forger import forge
from helpers import read_tensors, run_hsa, snapshot, write_tensors
from peak_memory import with_peak

import hsa
from hsa.inspection.diff import compare
from hsa.system.manifest import PROVENANCE

Triple = dict[str, Path]


@pytest.fixture(scope="module")
def outputs(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`a`, the very same again, and merges that differ from it in one parameter."""
    folder = tmp_path_factory.mktemp("outputs")
    parameters: dict[str, dict[str, Any]] = {
        "a": {},
        "same": {},
        "k": {"k": 0.25},
        "lambda": {"lam": 0.1},
        "half": {"dtype": "float16"},
        "wide": {"targets": "attention-qkv"},
    }
    for name, given in parameters.items():
        hsa.merge(**shared_triple, output=folder / name, sync=False, **given)
    return {name: folder / name for name in parameters}


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], names: list[str]) -> float:
    change = sum(float((second[name].double() - first[name].double()).pow(2).sum()) for name in names)
    return float((change / sum(float(first[name].double().pow(2).sum()) for name in names)) ** 0.5)


def test_equal_outputs(outputs: dict[str, Path]) -> None:
    found = compare(outputs["a"], outputs["same"])
    assert found.identical
    assert set(found.files.values()) == {"same"}
    assert set(found.files) == {path.name for path in outputs["a"].iterdir()}
    assert (found.parameters, found.program) == ({}, {})
    assert all(source["same_targets"] and source["same_headers"] for source in found.sources.values())
    assert (found.agreeing_tensors, found.jaccard) == (10, 1.0)
    assert {each.score_difference for each in found.heads.values()} == {0.0}
    weights = found.weights
    assert weights is not None
    assert (weights.whole.relative, weights.whole.equal) == (0.0, weights.whole.tensors)
    assert weights.whole.tensors == len(read_tensors(outputs["a"]))


def test_a_parameter_that_one_output_lacks_is_a_dash(
    outputs: dict[str, Path], shared_triple: Triple, tmp_path: Path
) -> None:
    base, *models = shared_triple.values()
    other = tmp_path / "tsv"
    hsa.merge(method="tsv_m", base=base, models=models, output=other, sync=False)
    done = run_hsa("inspect", "--diff", outputs["a"], other)
    assert done.returncode == 0 and "None" not in done.stdout, done.stderr
    assert [line.split() for line in done.stdout.splitlines() if line.startswith(" k ")] == [["k", "0.6", "-"]]
    verified = run_hsa("verify", other)
    assert "lambda 1" in verified.stdout and "None" not in verified.stdout and "share" not in verified.stdout


def test_another_k(outputs: dict[str, Path]) -> None:
    found = compare(outputs["a"], outputs["k"])
    assert found.parameters == {"k": (0.6, 0.25)}
    assert {n for n, state in found.files.items() if state == "different"} == {
        "README.md",
        PROVENANCE,
        "model.safetensors",
    }
    a, b = hsa.inspect(outputs["a"]), hsa.inspect(outputs["k"])
    for name, each in found.heads.items():
        one, other = set(a.tensors[name].selected), set(b.tensors[name].selected)
        assert (set(each.first), set(each.second)) == (one, other)
        assert each.jaccard == len(one & other) / len(one | other) == 0.5
    assert (found.agreeing_tensors, found.jaccard) == (0, 0.5)


@pytest.mark.parametrize("other", ["k", "lambda", "half"])
def test_distances_are_those_of_float64(other: str, outputs: dict[str, Path]) -> None:
    found = compare(outputs["a"], outputs[other])
    first, second = read_tensors(outputs["a"]), read_tensors(outputs[other])
    assert (found.jaccard == 1.0) == (other != "k")
    weights = found.weights
    assert weights is not None
    targets = list(found.heads)
    groups = {
        "whole": (weights.whole, list(first)),
        "targets": (weights.targets, targets),
        "others": (weights.others, [name for name in first if name not in targets]),
        "encoder": (weights.stacks["encoder"], [name for name in first if ".encoder." in name]),
        "decoder": (weights.stacks["decoder"], [name for name in first if ".decoder." in name]),
        "fed": (weights.kinds["encoder feed-forward"], [n for n in first if ".encoder." in n and ".fc" in n]),
    }
    for label, (ours, names) in groups.items():
        assert ours.relative == pytest.approx(distance(first, second, names), rel=1e-12), label
        assert ours.tensors == len(names)
        equal = sum(first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in names)
        assert ours.equal == equal
    assert sum(each.tensors for each in weights.kinds.values()) == len(first)
    assert not any(name.endswith("other") for name in weights.kinds)
    assert (weights.others.relative == 0.0) == (other != "half")


def test_other_targets_and_other_sources(outputs: dict[str, Path], shared_triple: Triple, tmp_path: Path) -> None:
    found = compare(outputs["a"], outputs["wide"])
    assert (len(found.heads), len(found.only_first), len(found.only_second)) == (10, 0, 20)
    hsa.merge(**{**shared_triple, "secondary": shared_triple["base"]}, output=tmp_path / "out", sync=False)
    other = compare(outputs["a"], tmp_path / "out")
    assert [source["same_targets"] for source in other.sources.values()] == [True, True, False]
    assert other.sources["secondary"]["b"]["id"] == "base"
    assert all(each.score_difference and each.score_difference > 0.01 for each in other.heads.values())


def test_bytes_that_are_there_count_not_those_recorded(outputs: dict[str, Path], tmp_path: Path) -> None:
    changed = Path(shutil.copytree(outputs["a"], tmp_path / "changed"))
    tensors = read_tensors(changed)
    name = "model.decoder.layers.0.fc1.weight"
    tensors[name][0, 0] += 1.0
    write_tensors(changed, tensors)
    (changed / "vocab.json").unlink(missing_ok=True)
    (changed / "config.json").write_bytes((changed / "config.json").read_bytes() + b"\n")
    found = compare(outputs["a"], changed)
    assert not found.identical
    assert found.files["config.json"] == "different"
    assert found.files["model.safetensors"] == "different"
    assert {state for file, state in found.files.items() if file == "vocab.json"} <= {"only a"}
    weights = found.weights
    assert weights is not None
    assert {kind for kind, each in weights.kinds.items() if each.relative} == {"decoder feed-forward"}
    assert weights.whole.tensors - weights.whole.equal == 1


def test_tensors_that_have_no_distance(outputs: dict[str, Path], tmp_path: Path) -> None:
    pair = [Path(shutil.copytree(outputs["a"], tmp_path / name)) for name in ("one", "two")]
    for number, path in enumerate(pair):
        tensors = read_tensors(path)
        tensors["model.encoder.conv1.bias"][0] = float("nan")
        tensors["model.encoder.conv2.bias"][0] = (float("nan"), 0.0)[number]
        tensors["model.extra.same"] = torch.arange(5)
        tensors["model.extra.other"] = torch.arange(5) + number
        tensors["model.extra.shape"] = torch.zeros(3 + number)
        tensors[f"model.extra.alone{number}"] = torch.zeros(3)
        write_tensors(path, tensors)
    weights = compare(*pair).weights
    assert weights is not None
    assert sorted(weights.incomparable) == ["model.encoder.conv2.bias", "model.extra.other", "model.extra.shape"]
    assert (weights.only_first, weights.only_second) == (("model.extra.alone0",), ("model.extra.alone1",))
    assert weights.whole.relative == 0.0
    assert json.loads(json.dumps(weights.as_dict(), allow_nan=False))["whole"]["relative"] == 0.0


def test_provenance_alone(outputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(outputs["a"] / PROVENANCE, tmp_path)
    found = compare(tmp_path, outputs["k"])
    assert found.weights is None
    assert any("holds no weights" in note for note in found.notes)
    assert found.files["model.safetensors"] == "only b"
    assert found.jaccard == 0.5


def test_names_that_lead_out_of_the_directory_are_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("../secret", "/etc/hostname", "a/b", ".."):
        shutil.copy(outputs["a"] / PROVENANCE, tmp_path)
        forge(tmp_path, files={name: {}})
        with pytest.raises(hsa.ProvenanceError, match="expected plain names"):
            compare(tmp_path, outputs["a"])


def test_damaged_weights_are_named_by_their_side(outputs: dict[str, Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(outputs["a"], tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes((outputs["a"] / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(hsa.SourceError, match=r"^b: .*damaged/model\.safetensors"):
        compare(outputs["a"], damaged)


def test_memory_does_not_grow_with_the_weights(outputs: dict[str, Path], tmp_path: Path) -> None:
    pair = [Path(shutil.copytree(outputs["a"], tmp_path / name)) for name in ("one", "two")]
    for number, path in enumerate(pair):
        write_tensors(path, {**read_tensors(path), "model.big": torch.full((12_000_000,), 1.0 + number)})
    compare(outputs["a"], outputs["same"])
    steps: list[tuple[int, int]] = []
    bound = 24 << 20  # of 96 MB
    found, peak = with_peak(lambda: compare(*pair, progress=lambda *step: steps.append(step)), bound)
    assert found.weights is not None
    assert found.weights.kinds["output other"].relative == pytest.approx(1.0, rel=1e-12)
    assert peak < bound
    assert steps[-1][0] <= steps[-1][1]


def test_the_command(outputs: dict[str, Path]) -> None:
    before = {name: snapshot(path) for name, path in outputs.items()}
    done = run_hsa("inspect", "--diff", outputs["a"], outputs["k"], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(compare(outputs["a"], outputs["k"]).as_dict()))
    text = run_hsa("inspect", "--diff", outputs["a"], outputs["k"])
    assert text.returncode == 0, text.stderr
    assert ["k", "0.6", "0.25"] in [line.split() for line in text.stdout.splitlines()]
    assert "the same in 0 of 10 tensors, Jaccard 0.500" in text.stdout
    assert "files different: README.md, hsa_merge.json, model.safetensors" in text.stdout
    same = run_hsa("inspect", "--diff", outputs["a"], outputs["same"])
    assert "every file is the same, byte for byte" in same.stdout
    assert {name: snapshot(path) for name, path in outputs.items()} == before
