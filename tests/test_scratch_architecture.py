"""A family of models that a user adds in one file works where Whisper does: `tests/support/murmur_family.py`.

A triple of Murmurs has the values of a triple of Whispers under other names, so its merges have the Whispers' values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merge_arguments, raw_bytes, read_tensors, run_hsa, snapshot
from murmur_checkpoints import murmur_name, write_murmur
from pages import run_page

import hsa
from hsa.architectures import PRESETS
from hsa.system.plugins import VARIABLE

Triple = dict[str, Path]
SUPPORT = Path(__file__).parent / "support"
FAMILY, METHOD = SUPPORT / "murmur_family.py", SUPPORT / "maximum_method.py"


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(FAMILY))


@pytest.fixture(scope="module")
def murmurs(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """The triple under Murmur's names, for reading alone."""
    folder = tmp_path_factory.mktemp("murmurs")
    return {role: write_murmur(path, folder / role) for role, path in shared_triple.items()}


def same_under_other_names(murmur: Mapping[str, torch.Tensor], whisper: Mapping[str, torch.Tensor]) -> None:
    """Names, element types, shapes and bytes: one's are the other's, renamed."""
    assert murmur.keys() == {murmur_name(name) for name in whisper}
    for name, tensor in whisper.items():
        ours = murmur[murmur_name(name)]
        assert (ours.dtype, ours.shape, raw_bytes(ours)) == (tensor.dtype, tensor.shape, raw_bytes(tensor)), name


def record_of(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "hsa_merge.json").read_text(encoding="utf-8"))
    return record


@pytest.mark.parametrize("preset", PRESETS)
def test_a_merge_has_the_values_of_the_whispers(
    preset: Any, murmurs: Triple, shared_triple: Triple, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"targets": preset, "alpha": 1.0, "non_attention_scale": 0.5, "sync": False}
    ours = hsa.merge(**murmurs, output=tmp_path / "murmur", **settings)
    theirs = hsa.merge(**shared_triple, output=tmp_path / "whisper", **settings)
    same_under_other_names(read_tensors(ours.output), read_tensors(theirs.output))
    assert ours.selected_heads == theirs.selected_heads and ours.selected_heads
    ours_said, theirs_said = record_of(ours.output), record_of(theirs.output)
    assert (ours_said["architecture"], theirs_said["architecture"]) == ("murmur", "whisper")
    assert ours_said["method"] == theirs_said["method"] == {"name": "hsa", "version": 1}
    assert ours_said["targets"] == {murmur_name(name): target for name, target in theirs_said["targets"].items()}


def test_the_command_line_writes_what_python_does(murmurs: Triple, tmp_path: Path) -> None:
    shell = tmp_path / "shell" / "out"
    done = run_hsa(*merge_arguments(murmurs, shell, "--k=0.5"))
    assert done.returncode == 0
    assert "in model.speech_encoder.layers." in done.stdout
    hsa.merge(**murmurs, output=tmp_path / "python" / "out", k=0.5)
    assert snapshot(tmp_path / "shell") == snapshot(tmp_path / "python")
    done = run_hsa("inspect", shell)
    assert done.returncode == 0 and "speech_encoder, self_attn" in done.stdout


def test_the_card_names_the_family_and_its_classes(murmurs: Triple, tmp_path: Path) -> None:
    hsa.merge(**murmurs, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in (
        "tags:\n- murmur\n- merge\n",
        "- Model type: Murmur speech recognition model\n",
        "| speech_encoder self attn | 0 |",
        "from transformers import MurmurForSpeech, MurmurProcessor\n",
    ):
        assert line in card, line
    assert "whisper" not in card.lower()


def test_verify_reads_the_family_from_the_record(murmurs: Triple, tmp_path: Path) -> None:
    output = tmp_path / "out"
    hsa.merge(**murmurs, output=output)
    assert run_hsa("verify", output).returncode == 0
    done = run_hsa("verify", output, "--sources", *(f"--{role}={path}" for role, path in murmurs.items()))
    assert (done.returncode, done.stderr) == (0, "")
    assert "every weight recomputed from the sources" in done.stdout
    done = run_hsa("verify", output, env={VARIABLE: ""})
    assert done.returncode == 2
    assert (
        "its architecture is 'murmur', which is none of generic, whisper (one of a plugin needs the plugin's"
        in done.stderr
    )


def test_a_patch_applied_is_the_merge(murmurs: Triple, tmp_path: Path) -> None:
    patch = tmp_path / "patch.safetensors"
    assert run_hsa(*merge_arguments(murmurs, patch, "--patch")).returncode == 0
    assert hsa.verify(patch, **murmurs).ok
    applied = run_hsa("apply", murmurs["primary"], patch, f"--output={tmp_path / 'applied' / 'out'}")
    assert applied.returncode == 0
    hsa.merge(**murmurs, output=tmp_path / "merged" / "out")
    assert snapshot(tmp_path / "applied") == snapshot(tmp_path / "merged")


def test_a_merger_merges_in_memory_and_saves_the_same_bytes(
    murmurs: Triple, shared_triple: Triple, tmp_path: Path
) -> None:
    merger = hsa.Merger(**murmurs)
    same_under_other_names(merger.merge(k=0.5), hsa.Merger(**shared_triple).merge(k=0.5))
    merger.save(tmp_path / "merger" / "out", k=0.5)
    hsa.merge(**murmurs, output=tmp_path / "merge" / "out", k=0.5)
    assert snapshot(tmp_path / "merger") == snapshot(tmp_path / "merge")


def test_a_sweep_writes_a_checkpoint_for_each_value(murmurs: Triple, shared_triple: Triple, tmp_path: Path) -> None:
    sources = [f"--{role}={path}" for role, path in murmurs.items()]
    done = run_hsa("sweep", *sources, "--k=0.5,1.0", "--full", f"--output={tmp_path / 'ours'}")
    assert (done.returncode, done.stderr) == (0, "")
    hsa.sweep(**shared_triple, k=[0.5, 1.0], output=tmp_path / "theirs", full=True)
    points = sorted(path.name for path in (tmp_path / "theirs").iterdir() if path.is_dir())
    assert len(points) == 2
    for name in points:
        same_under_other_names(read_tensors(tmp_path / "ours" / name), read_tensors(tmp_path / "theirs" / name))
    assert hsa.verify(tmp_path / "ours", **murmurs).ok


def test_the_method_of_one_file_merges_the_family_of_another(
    murmurs: Triple, shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, os.pathsep.join(map(str, (FAMILY, METHOD))))
    options = ["--method=maximum", *(f"--model={path}" for path in murmurs.values()), "--factor=0.5"]
    done = run_hsa("merge", *options, f"--output={tmp_path / 'out'}")
    assert done.returncode == 0
    whispers = [read_tensors(path) for path in shared_triple.values()]
    expected = {name: torch.stack([each[name] for each in whispers]).amax(0) * 0.5 for name in whispers[0]}
    same_under_other_names(read_tensors(tmp_path / "out"), expected)
    record = record_of(tmp_path / "out")
    assert (record["method"]["name"], record["architecture"]) == ("maximum", "murmur")
    assert run_hsa("verify", tmp_path / "out").returncode == 0


def test_two_families_do_not_merge(murmurs: Triple, shared_triple: Triple, tmp_path: Path) -> None:
    mixed = {**murmurs, "secondary": shared_triple["secondary"]}
    done = run_hsa(*merge_arguments(mixed, tmp_path / "out"))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "is a Murmur checkpoint, and secondary" in line and "a Whisper checkpoint" in line
    assert not (tmp_path / "out").exists()


def test_the_page_on_families_is_true(shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("contributing/add-an-architecture.md", [FAMILY], shared_triple, tmp_path, monkeypatch)
    assert snapshot(tmp_path / "applied") == snapshot(tmp_path / "merged")
