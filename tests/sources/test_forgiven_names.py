"""Names of tensors that are forgiven: what a wrapper added, and an embedding under its tied name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_primaries import EMBEDDING, Breakage, why_not_whole
from helpers import edit_json, raw_bytes, read_tensors, same_tensors, write_tensors
from structures import LAYER, merge, refusal, renamed

import hsa
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]
INDEX = "model.safetensors.index.json"


# --- names that a wrapper left behind ------------------------------------------------------------------------------

WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "FSDP in layers": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "checkpointing in layers": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "a layer of the decoder": lambda name: name.replace(LAYER, f"{LAYER}_orig_module."),
    "a trainer's module": lambda name: f"asr.net.{name}",
    "a trainer's model": lambda name: f"model.{name}",
    "without model": lambda name: f"_orig_mod.{name.removeprefix('model.')}",
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_wrapper_in_names_is_read_without_it(triple: Triple, wrapped: str, role: str, tmp_path: Path) -> None:
    merge(triple, tmp_path / "expected")
    tensors = {WRAPPED[wrapped](name): tensor for name, tensor in read_tensors(triple[role]).items()}
    write_tensors(triple[role], tensors, shards=2)
    report = merge(triple, tmp_path / "out")
    assert any(f"tensor names of {role} are read without what a wrapper added" in note for note in report.notes)
    found = read_tensors(tmp_path / "out")
    if wrapped == "without model" and role == "primary":
        found = {f"model.{name}": tensor for name, tensor in found.items()}
    same_tensors(found, tmp_path / "expected")
    assert why_not_whole(tmp_path / "out") is None
    assert hsa.verify(tmp_path / "out", **triple).ok


def test_patches_and_merger_read_wrapped_names_too(triple: Triple, tmp_path: Path) -> None:
    merge(triple, tmp_path / "expected")
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in read_tensors(triple["primary"]).items()}
    write_tensors(triple["primary"], wrapped)
    report = hsa.merge_patch(**triple, output=tmp_path / "p.safetensors", sync=False)
    assert any("read without what a wrapper added" in note for note in report.notes)
    assert any("read without what a wrapper added" in note for note in hsa.Merger(**triple).notes)
    hsa.apply(triple["primary"], tmp_path / "p.safetensors", output=tmp_path / "out", sync=False)
    same_tensors(tmp_path / "out", tmp_path / "expected")
    merger = hsa.Merger(triple["base"], wrapped, triple["secondary"])
    assert merger.apply_(dict(wrapped)).keys() == wrapped.keys()
    merged = merger.merge()
    assert merged and all(raw_bytes(t) == raw_bytes(read_tensors(tmp_path / "out")[n[10:]]) for n, t in merged.items())
    wrapped_by_another = {f"asr.{name.removeprefix('_orig_mod.')}": tensor for name, tensor in wrapped.items()}
    merger.apply_(wrapped_by_another)
    assert all(raw_bytes(wrapped_by_another[f"asr.{n[10:]}"]) == raw_bytes(t) for n, t in merged.items())


def test_two_models_in_one_checkpoint_are_refused_by_both_names(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["primary"])
    write_tensors(triple["primary"], {**tensors, **{f"module.{n}": t.clone() for n, t in tensors.items()}})
    said = refusal(lambda: merge(triple, tmp_path / "out"))
    assert said is not None and said.startswith(f"primary: {triple['primary']}")
    name = said.partition(" and module.")[2].split()[0]
    assert name in tensors and f"tensors {name} and module.{name} are one tensor" in said


def test_a_teacher_beside_the_model_has_no_place(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["primary"])
    write_tensors(triple["primary"], {**tensors, **{f"teacher.{n}": t.clone() for n, t in tensors.items()}})
    said = refusal(lambda: merge(triple, tmp_path / "out"))
    assert said is not None and "tensor teacher.model." in said and "has no place" in said


def test_a_wrapped_output_is_a_problem_of_verify(shared_triple: Triple, tmp_path: Path) -> None:
    merge(shared_triple, tmp_path / "out")
    tensors = read_tensors(tmp_path / "out")
    write_tensors(tmp_path / "out", {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    assert "names that no loader finds" in str(hsa.verify(tmp_path / "out").problems)


def test_names_of_any_length_are_read_in_time(triple: Triple, tmp_path: Path) -> None:
    extra = {f"{n}{'.a' * 100_000}": torch.ones(1) for n in range(20)}
    write_tensors(triple["base"], {**read_tensors(triple["base"]), **extra})
    started = time.process_time()
    merge(triple, tmp_path / "out")
    assert time.process_time() - started < 20


# --- what transformers forgives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_an_embedding_under_its_tied_name_is_the_embedding(triple: Triple, role: str, tmp_path: Path) -> None:
    merge(triple, tmp_path / "expected", non_attention_scale=0.5)
    Breakage("", renamed(EMBEDDING, "proj_out.weight")).apply(triple[role])
    report = merge(triple, tmp_path / "out", non_attention_scale=0.5)
    assert any(f"{role} stores its embedding as proj_out.weight alone" in note for note in report.notes)
    found = read_tensors(tmp_path / "out")
    if role == "primary":
        found[EMBEDDING] = found.pop("proj_out.weight")
    same_tensors(found, tmp_path / "expected")
    assert why_not_whole(tmp_path / "out") is None
    assert hsa.verify(tmp_path / "out", **triple).ok


def test_reference_numerics_write_an_embedding_under_its_own_name(triple: Triple, tmp_path: Path) -> None:
    merge(triple, tmp_path / "expected", numerics="reference")
    for path in triple.values():
        Breakage("", renamed(EMBEDDING, "proj_out.weight")).apply(path)
    merge(triple, tmp_path / "out", numerics="reference")
    same_tensors(tmp_path / "out", tmp_path / "expected")


@pytest.fixture
def sharded(tmp_path: Path) -> Triple:
    return write_triple(tmp_path / "sources", SHAPES["test"], max_shard_bytes=300_000, processor=False)


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_an_index_that_lists_the_tied_output_is_written_without_it(sharded: Triple, role: str, tmp_path: Path) -> None:
    merge(sharded, tmp_path / "expected")
    path = sharded[role] / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["proj_out.weight"] = index["weight_map"][EMBEDDING]
    path.write_text(json.dumps(index))
    report = merge(sharded, tmp_path / "out")
    assert any(f"{role}'s {INDEX} lists proj_out.weight, which no shard holds" in note for note in report.notes)
    written = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert written.keys() == read_tensors(tmp_path / "out").keys()
    same_tensors(tmp_path / "out", tmp_path / "expected")
    assert why_not_whole(tmp_path / "out") is None
    assert hsa.verify(tmp_path / "out", **sharded).ok


def test_a_wrapped_embedding_under_its_tied_name_in_shards_is_the_embedding(triple: Triple, tmp_path: Path) -> None:
    merge(triple, tmp_path / "expected")
    tensors = read_tensors(triple["primary"])
    tensors["proj_out.weight"] = tensors.pop(EMBEDDING)
    write_tensors(triple["primary"], {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, shards=2)
    report = merge(triple, tmp_path / "out")
    assert any("stores its embedding as proj_out.weight alone" in note for note in report.notes)
    assert not any("no shard holds" in note for note in report.notes)
    found = read_tensors(tmp_path / "out")
    found[EMBEDDING] = found.pop("proj_out.weight")
    same_tensors(found, tmp_path / "expected")


def test_an_index_that_lists_an_output_which_is_not_tied_is_refused(sharded: Triple, tmp_path: Path) -> None:
    path = sharded["primary"] / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["proj_out.weight"] = index["weight_map"][EMBEDDING]
    path.write_text(json.dumps(index))
    edit_json(sharded["primary"] / "config.json", tie_word_embeddings=False)
    said = refusal(lambda: merge(sharded, tmp_path / "out"))
    assert said is not None and "places tensor proj_out.weight" in said and "nor does another shard" in said
