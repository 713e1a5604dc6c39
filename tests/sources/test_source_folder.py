"""What lies in a source's folder: Git LFS pointers, training checkpoints, and weights beside the ones that are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import (
    edit_json,
    merge_arguments,
    read_tensors,
    run_hsa,
    same_tensors,
    snapshot,
    write_adapter,
    write_openai,
    write_pickle,
    write_tensors,
)

import hsa

Triple = dict[str, Path]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 151061672\n"


def refusal(triple: Triple, output: Path, *more: str) -> str:
    """The one line with which the command line refuses; nothing is written."""
    before = snapshot(output.parent)
    done = run_hsa(*merge_arguments(triple, output, "--no-sync", *more))
    assert done.returncode == 2, done.stderr
    assert snapshot(output.parent) == before
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hsa: error: ")]
    return line


def notes(triple: Triple, output: Path) -> list[str]:
    return [note for note in hsa.merge(**triple, output=output, sync=False).notes if " also " in note]


# --- Git LFS pointers --------------------------------------------------------------------------------------------


def _weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def _shard(directory: Path) -> Path:
    write_tensors(directory, read_tensors(directory), shards=2)
    return directory / "model-00002-of-00002.safetensors"


def _index(directory: Path) -> Path:
    _shard(directory)
    return directory / "model.safetensors.index.json"


def _pickle(directory: Path) -> Path:
    write_pickle(directory, read_tensors(directory))
    return directory / "pytorch_model.bin"


def _adapter(directory: Path) -> Path:
    tensors = read_tensors(directory)
    shutil.rmtree(directory)
    write_adapter(directory, {name: tensors[name] for name in tensors if name.endswith("layers.0.fc1.weight")})
    return directory / "adapter_model.safetensors"


def _adapter_pickle(directory: Path) -> Path:
    _adapter(directory).unlink()
    return directory / "adapter_model.bin"


def _adapter_config(directory: Path) -> Path:
    _adapter(directory)
    return directory / "adapter_config.json"


def _config(directory: Path) -> Path:
    return directory / "config.json"


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize(
    "spoil", [_weights, _shard, _index, _pickle, _adapter, _adapter_pickle, _adapter_config, _config]
)
def test_a_git_lfs_pointer_is_refused_as_that(
    triple: Triple, spoil: Callable[[Path], Path], role: str, tmp_path: Path
) -> None:
    path = spoil(triple[role])
    path.write_text(POINTER)
    line = refusal(triple, tmp_path / "out")
    assert f"{role}: {path} is a Git LFS pointer" in line
    assert "git lfs pull" in line


def test_a_git_lfs_pointer_for_openais_file_is_refused_as_that(triple: Triple, tmp_path: Path) -> None:
    path = write_openai(tmp_path / "whisper.pt", triple["secondary"])
    path.write_text(POINTER)
    assert "is a Git LFS pointer" in refusal({**triple, "secondary": path}, tmp_path / "out")


def test_verify_names_a_git_lfs_pointer_in_a_published_output(triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**triple, output=tmp_path / "out", sync=False)
    (tmp_path / "out" / "model.safetensors").write_text(POINTER)
    problems = hsa.verify(tmp_path / "out").problems
    assert any("is a Git LFS pointer" in problem.what for problem in problems)


def test_a_git_lfs_pointer_for_a_patch_is_refused_as_that(triple: Triple, tmp_path: Path) -> None:
    (tmp_path / "patch.safetensors").write_text(POINTER)
    with pytest.raises(hsa.SourceError, match="Git LFS pointer"):
        hsa.apply(triple["primary"], tmp_path / "patch.safetensors", output=tmp_path / "out")


# --- JSON that Python reads and others do not -------------------------------------------------------------------


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_nan_in_a_config_is_named_with_its_key(triple: Triple, word: str, tmp_path: Path) -> None:
    path = triple["primary"] / "config.json"
    path.write_text(path.read_text().replace('"dropout": 0.0', f'"dropout": {word}'))
    line = refusal(triple, tmp_path / "out")
    assert str(path) in line and f"holds {word} under 'dropout'" in line
    assert "null" in line and "damaged" not in line


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("role", ["base", "primary"])
def test_a_byte_order_mark_is_named(triple: Triple, role: str, encoding: str, tmp_path: Path) -> None:
    path = triple[role] / "config.json"
    path.write_text(path.read_text(), encoding=encoding)
    line = refusal(triple, tmp_path / "out")
    assert str(path) in line and "byte-order mark" in line
    assert "without" in line and "damaged" not in line


# --- no weights --------------------------------------------------------------------------------------------------


def test_a_training_folder_is_refused_with_its_newest_checkpoint(triple: Triple, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (900, 1000, 50):  # 1000 comes last by number alone
        shutil.copytree(triple["primary"], run / f"checkpoint-{step}")
    (run / "checkpoint-2000").mkdir()  # interrupted before it held anything
    (run / "checkpoint-best").mkdir()
    line = refusal({**triple, "primary": run}, tmp_path / "out")
    assert "primary" in line and f"{run / 'checkpoint-1000'}" in line
    assert "checkpoint-900" not in line and "checkpoint-2000" not in line


def test_a_training_folder_of_adapters_is_refused_with_its_newest_checkpoint(triple: Triple, tmp_path: Path) -> None:
    _adapter(triple["primary"])
    for step in (2, 10):
        shutil.copytree(triple["primary"], tmp_path / "run" / f"checkpoint-{step}")
    line = refusal({**triple, "primary": tmp_path / "run"}, tmp_path / "out")
    assert f"{tmp_path / 'run' / 'checkpoint-10'}" in line


def test_a_folder_with_a_config_alone_is_refused_with_what_it_holds(triple: Triple, tmp_path: Path) -> None:
    for path in triple["primary"].iterdir():
        if path.name != "config.json":
            path.unlink()
    line = refusal(triple, tmp_path / "out")
    assert "holds no weights" in line and "there are 'config.json'" in line


def test_shards_without_their_index_are_refused_as_that(triple: Triple, tmp_path: Path) -> None:
    _index(triple["primary"]).unlink()
    line = refusal(triple, tmp_path / "out")
    assert "model-00001-of-00002.safetensors, but not their index" in line


# --- weights beside those that are read -------------------------------------------------------------------------


def test_an_adapter_beside_a_whole_model_is_noted(triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**triple, output=tmp_path / "before", sync=False)
    tensors = read_tensors(triple["primary"])
    write_adapter(triple["primary"], {n: t for n, t in tensors.items() if n.endswith("layers.0.fc1.weight")})
    (note,) = notes(triple, tmp_path / "out")
    assert note.startswith("primary holds a whole model and also an adapter (adapter_config.json)")
    same_tensors(tmp_path / "out", tmp_path / "before")


def test_an_adapter_beside_pickled_weights_is_noted(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["secondary"])
    write_pickle(triple["secondary"], tensors)
    write_adapter(triple["secondary"], {n: t for n, t in tensors.items() if n.endswith("layers.0.fc1.weight")})
    assert [note.partition(" and ")[0] for note in notes(triple, tmp_path / "out")] == ["secondary holds a whole model"]


def _stray_shards(directory: Path) -> None:
    single = (directory / "model.safetensors").read_bytes()
    write_tensors(directory, {name: t * 2 for name, t in read_tensors(directory).items()}, shards=2)
    (directory / "model.safetensors").write_bytes(single)


def test_shards_beside_a_single_file_are_noted(triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**triple, output=tmp_path / "before", sync=False)
    _stray_shards(triple["primary"])
    (note,) = notes(triple, tmp_path / "out")
    assert note.startswith("primary holds model.safetensors and also shards with their index")
    same_tensors(tmp_path / "out", tmp_path / "before")


def test_pickled_shards_beside_a_single_pickle_are_noted(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["base"])
    write_pickle(triple["base"], tensors, shards=2)
    write_pickle(triple["base"], tensors)
    (note,) = notes(triple, tmp_path / "out")
    assert note.startswith("base holds pytorch_model.bin and also shards with their index")


def test_pickles_beside_safetensors_need_no_word(triple: Triple, tmp_path: Path) -> None:
    single = (triple["primary"] / "model.safetensors").read_bytes()
    write_pickle(triple["primary"], read_tensors(triple["primary"]))
    (triple["primary"] / "model.safetensors").write_bytes(single)
    assert notes(triple, tmp_path / "out") == []


@pytest.mark.parametrize("way", ["dry-run", "patch", "apply", "sweep"])
def test_every_way_to_an_output_has_the_note(triple: Triple, way: str, tmp_path: Path) -> None:
    _stray_shards(triple["primary"])
    place = tmp_path / "out"
    if way == "apply":
        hsa.merge_patch(**triple, output=tmp_path / "p.safetensors", sync=False)
        found = hsa.apply(triple["primary"], tmp_path / "p.safetensors", output=place, sync=False).notes
    elif way == "patch":
        found = hsa.merge_patch(**triple, output=tmp_path / "p.safetensors", sync=False).notes
    elif way == "sweep":
        found = hsa.sweep(**triple, output=place, lam=[0.3], full=True, sync=False).notes
    else:
        done = run_hsa(*merge_arguments(triple, place, "--dry-run", "--json"))
        found = tuple(json.loads(done.stdout)["notes"])
    assert sum("also shards with their index" in note for note in found) == 1


def test_an_output_config_is_not_touched_by_what_lies_beside(triple: Triple, tmp_path: Path) -> None:
    """A folder full of training state gives no note at all."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (triple["primary"] / name).write_bytes(b"state")
    edit_json(triple["primary"] / "config.json", note="kept")
    assert notes(triple, tmp_path / "out") == []
