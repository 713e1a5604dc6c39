"""Primary's tensors against its own config.json: what is refused, what is forgiven, and that every command agrees."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from broken_primaries import EMBEDDING, Breakage, Config, Tensors, breakages, why_not_whole
from helpers import edit_json, merge_arguments, raw_bytes, read_tensors, run_hsa, same_tensors, write_tensors

import hsa
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]
COUNT = 50
LAYER = "model.decoder.layers.1."
FC1 = "model.decoder.layers.0.fc1.weight"
NORM = "model.decoder.layers.0.final_layer_norm.bias"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def names(shared_triple: Triple) -> list[str]:
    return list(read_tensors(shared_triple["primary"]))


def merge(triple: Mapping[str, Path], output: Path, **options: Any) -> hsa.MergeReport:
    return hsa.merge(**triple, output=output, **{"sync": False, **options})


def refusal(run: Callable[[], object]) -> str | None:
    """The line with which a request is refused; None where it is carried out."""
    try:
        run()
    except hsa.HsaError as error:
        assert error.exit_code == 2
        assert str(error).isprintable()
        return str(error)
    return None


def broken_triple(shared_triple: Triple, place: Path, breakage: Breakage) -> Triple:
    """The triple with a copy of primary that is broken."""
    primary = Path(shutil.copytree(shared_triple["primary"], place))
    breakage.apply(primary)
    return {**shared_triple, "primary": primary}


# --- fifty broken primaries ----------------------------------------------------------------------------------------


def test_no_broken_primary_is_merged_into_an_output_that_does_not_load(
    shared_triple: Triple, names: list[str], tmp_path: Path
) -> None:
    """An output that was written loads whole, and verify agrees; a primary that loads whole is not refused, but for
    its number of heads, which no tensor's shape tells, and for integers in the place of weights."""
    merged, refused, wrong = 0, 0, []
    for number, breakage in enumerate(breakages(COUNT, names)):
        triple = broken_triple(shared_triple, tmp_path / f"primary{number}", breakage)
        output = tmp_path / f"out{number}"
        said = refusal(lambda triple=triple, output=output: merge(triple, output))  # type: ignore[misc]
        if said is None:
            merged += 1
            lacking = why_not_whole(output)
            found = hsa.verify(output, **triple)
            if lacking is not None or not found.ok:
                wrong.append(f"{breakage.label}: {lacking}, verify: {found.problems}")
        else:
            refused += 1
            if output.exists() or "primary" not in said:
                wrong.append(f"{breakage.label}: {said}")
            if why_not_whole(triple["primary"]) is None and "heads" not in said and "I8" not in said:
                wrong.append(f"{breakage.label}: loads whole, and is refused: {said}")
    assert wrong == []
    assert merged >= 4 and refused >= 30


@pytest.fixture(scope="module")
def patch(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("patch") / "patch.safetensors"
    return hsa.merge_patch(**shared_triple, output=output, sync=False).output


def release(triple: Triple, folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    sources = {role: str(path) for role, path in triple.items()}
    recipe.write_text(yaml.safe_dump({"defaults": {"group": "g", **sources}, "merges": [{"name": "a"}]}))
    hsa.release(recipe, folder / "out", sync=False)


ROUTES: dict[str, Callable[[Triple, Path], object]] = {
    "patch": lambda triple, folder: hsa.merge_patch(**triple, output=folder / "out.safetensors", sync=False),
    "sweep": lambda triple, folder: hsa.sweep(**triple, output=folder / "out", k=(0.2, 0.6), sync=False),
    "full sweep": lambda triple, folder: hsa.sweep(**triple, output=folder / "out", full=True, sync=False),
    "release": release,
    "Merger": lambda triple, folder: hsa.Merger(**triple),
    "reference numerics": lambda triple, folder: merge(triple, folder / "out", numerics="reference"),
    "a cast": lambda triple, folder: merge(triple, folder / "out", dtype="float16"),
    "new shards": lambda triple, folder: merge(triple, folder / "out", max_shard_size="100KB"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_other_way_to_merge_refuses_what_a_merge_refuses(
    shared_triple: Triple, names: list[str], route: str, tmp_path: Path
) -> None:
    compared = 0
    for number, breakage in enumerate(list(breakages(COUNT, names))[:: 5 if route != "Merger" else 2]):
        folder = tmp_path / str(number)
        folder.mkdir()
        triple = broken_triple(shared_triple, folder / "primary", breakage)
        expected = refusal(lambda triple=triple, folder=folder: merge(triple, folder / "plain"))  # type: ignore[misc]
        if expected is None:
            continue
        said = refusal(lambda triple=triple, folder=folder: ROUTES[route](triple, folder))  # type: ignore[misc]
        assert said is not None and expected in said, breakage.label
        compared += 1
        assert not any(path.name.startswith("out") and any(path.glob("g/*/model*")) for path in folder.iterdir())
    assert compared >= 7


def test_a_dry_run_and_the_command_line_refuse_in_one_line(triple: Triple, tmp_path: Path) -> None:
    Breakage("", lambda tensors, _: tensors.pop(FC1)).apply(triple["primary"])
    for more in ((), ("--dry-run",), ("--patch",)):
        output = tmp_path / ("out.safetensors" if more == ("--patch",) else "out")
        done = run_hsa(*merge_arguments(triple, output, *more))
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"hsa: error: primary {triple['primary']}: tensor {FC1} is missing, and config.json")
        assert not output.exists()


def test_apply_checks_primary_against_its_config(triple: Triple, patch: Path, tmp_path: Path) -> None:
    edit_json(triple["primary"] / "config.json", vocab_size=116)
    said = refusal(lambda: hsa.apply(triple["primary"], patch, output=tmp_path / "out", sync=False))
    assert said is not None and f"tensor {EMBEDDING} has shape [268, 64]" in said and "vocab_size 116" in said
    assert not (tmp_path / "out").exists()


def test_verify_says_of_an_output_what_merge_says_of_a_primary(
    shared_triple: Triple, names: list[str], tmp_path: Path
) -> None:
    agreed = 0
    for number, breakage in enumerate(list(breakages(COUNT, names, seed=1))[::2]):
        triple = broken_triple(shared_triple, tmp_path / f"primary{number}", breakage)
        said = refusal(lambda triple=triple: merge(triple, tmp_path / "out"))  # type: ignore[misc]
        if said is None:
            shutil.rmtree(tmp_path / "out")
        elif said.startswith(f"primary {triple['primary']}: "):
            (found, *_) = [each.what for each in hsa.verify(triple["primary"]).problems if each.file == "config.json"]
            assert found in said, breakage.label
            agreed += 1
    assert agreed >= 10


# --- what was reported, and its siblings ---------------------------------------------------------------------------


def without(part: str) -> Callable[[Tensors, Config], object]:
    return lambda tensors, _: [tensors.pop(name) for name in [*tensors] if part in name]


def with_scales(tensors: Tensors, _: Config) -> None:
    for name in [name for name in tensors if name.startswith(LAYER) and "fc" in name and name.endswith("weight")]:
        tensors[name] = (tensors[name] * 100).to(torch.int8)
        tensors[f"{name}_scale"] = torch.ones(len(tensors[name]), 1)


def renamed(old: str, new: str) -> Callable[[Tensors, Config], object]:
    return lambda tensors, _: [tensors.update({n.replace(old, new): tensors.pop(n)}) for n in [*tensors] if old in n]


BROKEN: dict[str, tuple[Callable[[Tensors, Config], object], tuple[str, ...]]] = {
    "half a decoder": (without(LAYER), (f"tensor {LAYER}", "is missing", "decoder_layers 2", "24 tensors")),
    "no embedding": (without("embed_tokens"), (EMBEDDING, "which every such model has")),
    "no layer norms": (without("layer_norm"), ("layer_norm.weight is missing",)),
    "half a norm": (without(NORM), (NORM, "is missing")),
    "no fc1": (without("fc1"), ("fc1.weight is missing", "encoder_layers 2")),
    "no conv1": (without("conv1"), ("model.encoder.conv1.weight is missing",)),
    "no positions": (without("encoder.embed_positions"), ("model.encoder.embed_positions.weight is missing",)),
    "vocabulary": (
        lambda _, config: config.update(vocab_size=116),
        (f"{EMBEDDING} has shape [268, 64]", "[116, 64]", "vocab_size 116"),
    ),
    "target positions": (
        lambda _, config: config.update(max_target_positions=40),
        ("model.decoder.embed_positions.weight has shape [32, 64]", "max_target_positions 40"),
    ),
    "feed-forward": (
        lambda _, config: config.update(decoder_ffn_dim=96),
        ("decoder.layers.0.fc1.weight has shape [128, 64]", "decoder_ffn_dim 96"),
    ),
    "no size given": (lambda _, config: config.pop("decoder_ffn_dim"), ("decoder_ffn_dim 1536",)),
    "decoder heads": (
        lambda _, config: config.update(decoder_attention_heads=8),
        ("decoder_attention_heads 8", "has 4", "base"),
    ),
    "decoder heads that divide nothing": (
        lambda _, config: config.update(decoder_attention_heads=5),
        ("decoder_attention_heads 5", "d_model 64"),
    ),
    "fewer layers": (
        lambda _, config: config.update(decoder_layers=1),
        (f"tensor {LAYER}", "has no place", "decoder_layers 1", "24 tensors"),
    ),
    "a second name of a size": (
        lambda _, config: config.update(num_hidden_layers=3),
        ("encoder_layers 2", "num_hidden_layers 3", "remove num_hidden_layers"),
    ),
    "untied without an output": (
        lambda _, config: config.update(tie_word_embeddings=False),
        ("proj_out.weight is missing", "tie_word_embeddings False"),
    ),
    "tied by null": (lambda _, config: config.update(tie_word_embeddings=None), ("tie_word_embeddings None",)),
    "an empty tensor": (
        lambda tensors, _: tensors.update({NORM: torch.zeros(0)}),
        (f"{NORM} has shape [0], config.json makes it [64]",),
    ),
    "a matrix without columns": (
        lambda tensors, _: tensors.update({FC1: torch.zeros(128, 0)}),
        (f"{FC1} has shape [128, 0]",),
    ),
    "integers with scales": (with_scales, ("fc1.weight_scale has no place", "before it was quantized")),
    "integers alone": (
        lambda tensors, _: tensors.update({FC1: tensors[FC1].to(torch.int8)}),
        (f"{FC1} has dtype I8", "before it was quantized"),
    ),
    "an adapter's layers": (
        renamed("1.fc1.weight", "1.fc1.base_layer.weight"),
        ("layers.1.fc1.weight is missing", "in its place is model.encoder.layers.1.fc1.base_layer.weight"),
    ),
    "an unknown part of a name": (
        renamed(LAYER, f"{LAYER}shard."),
        (f"tensor {LAYER}", "in its place is", f"{LAYER}shard."),
    ),
    "another model's name": (renamed("fc1", "lin1"), ("fc1.weight is missing", "without a place", "lin1")),
    "a tensor of no model": (
        lambda tensors, _: tensors.update({"model.decoder.version": torch.ones(1)}),
        ("tensor model.decoder.version has no place",),
    ),
    "an output of another size": (
        lambda tensors, _: tensors.update({"proj_out.weight": torch.ones(3, 64)}),
        ("proj_out.weight has shape [3, 64]", "vocab_size 268"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_primary_that_is_not_what_its_config_promises_is_refused(triple: Triple, name: str, tmp_path: Path) -> None:
    change, words = BROKEN[name]
    Breakage(name, change).apply(triple["primary"])
    said = refusal(lambda: merge(triple, tmp_path / "out"))
    assert said is not None
    assert all(word in said for word in (f"primary {triple['primary']}: ", *words)), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["base", "secondary"])
def test_base_and_secondary_need_their_targets_alone(triple: Triple, role: str, tmp_path: Path) -> None:
    Breakage("", without("decoder.")).apply(triple[role])
    edit_json(triple[role] / "config.json", vocab_size=99, decoder_ffn_dim=7)
    assert any("are missing from" in note for note in merge(triple, tmp_path / "out").notes)
    assert hsa.verify(tmp_path / "out", **triple).ok


def test_base_is_checked_where_the_output_takes_its_config(triple: Triple, tmp_path: Path) -> None:
    edit_json(triple["base"] / "config.json", vocab_size=116)
    merge(triple, tmp_path / "exact")
    said = refusal(lambda: merge(triple, tmp_path / "out", numerics="reference"))
    assert said is not None and f"base {triple['base']}: tensor {EMBEDDING}" in said and "vocab_size 116" in said


def test_other_heads_are_for_the_request_to_give(triple: Triple, tmp_path: Path) -> None:
    for path in triple.values():
        edit_json(path / "config.json", encoder_attention_heads=2, decoder_attention_heads=2)
    edit_json(triple["base"] / "config.json", encoder_attention_heads=4, decoder_attention_heads=4)
    assert refusal(lambda: merge(triple, tmp_path / "out")) is not None
    assert merge(triple, tmp_path / "out", num_heads=4).total_heads == 40


def test_merger_names_the_odd_prefix_over_its_targets(triple: Triple) -> None:
    Breakage("", renamed("encoder.layers", "encoder.shard.layers")).apply(triple["primary"])
    said = refusal(lambda: hsa.Merger(**triple))
    assert said is not None
    assert "is missing from primary" in said and "primary holds model.encoder.shard.layers.0." in said


def test_merger_takes_a_state_dict_of_targets_alone(shared_triple: Triple) -> None:
    whole = read_tensors(shared_triple["primary"])
    targets = {name: tensor for name, tensor in whole.items() if "encoder.layers" in name and "self_attn." in name}
    merger = hsa.Merger(shared_triple["base"], targets, shared_triple["secondary"])
    expected = hsa.Merger(**shared_triple).merge()
    assert all(raw_bytes(tensor) == raw_bytes(expected[name]) for name, tensor in merger.merge().items())


def test_merger_refuses_a_model_that_is_not_what_its_config_says(shared_triple: Triple) -> None:
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(shared_triple["primary"], local_files_only=True)
    model.config.vocab_size = 116
    said = refusal(lambda: hsa.Merger(shared_triple["base"], model, shared_triple["secondary"]))
    assert said is not None and f"tensor {EMBEDDING} has shape [268, 64]" in said and "vocab_size 116" in said


def test_an_adapted_primary_is_checked_as_the_base_it_stands_on(triple: Triple, tmp_path: Path) -> None:
    from helpers import write_adapter

    weights = {FC1: read_tensors(triple["base"])[FC1]}
    write_adapter(tmp_path / "adapter", weights)
    adapted = {**triple, "primary": tmp_path / "adapter"}
    merge(adapted, tmp_path / "sound")
    Breakage("", lambda tensors, _: tensors.pop(NORM)).apply(triple["base"])
    said = refusal(lambda: merge(adapted, tmp_path / "out"))
    assert said is not None and f"primary {tmp_path / 'adapter'}: tensor {NORM} is missing" in said


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


# --- audio classification ------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(triple: Triple) -> Triple:
    """The triple with a WhisperForAudioClassification of three labels in primary's place."""
    from transformers import WhisperConfig, WhisperForAudioClassification

    config = WhisperConfig.from_pretrained(triple["primary"])
    config.num_labels, config.use_weighted_layer_sum = 3, True
    model = WhisperForAudioClassification(config)
    encoder = {name: tensor for name, tensor in read_tensors(triple["primary"]).items() if ".encoder." in name}
    model.load_state_dict({name.removeprefix("model."): t for name, t in encoder.items()}, strict=False)
    shutil.rmtree(triple["primary"])
    model.save_pretrained(triple["primary"])
    return triple


def test_a_model_for_audio_classification_is_described_as_one(classifier: Triple, tmp_path: Path) -> None:
    from transformers import WhisperForAudioClassification

    merge(classifier, tmp_path / "out")
    _, info = WhisperForAudioClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values())
    assert hsa.verify(tmp_path / "out", **classifier).ok
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: audio-classification" in card
    assert "WhisperForAudioClassification.from_pretrained(path)" in card
    assert "ConditionalGeneration" not in card and "peech recognition" not in card.partition("## Citation")[0]
    merge(classifier, tmp_path / "wide", targets="encoder-qkv", dtype="float16")
    assert hsa.verify(tmp_path / "wide").ok


def test_patches_of_a_model_for_audio_classification_are_its_merge(classifier: Triple, tmp_path: Path) -> None:
    merge(classifier, tmp_path / "merged")
    hsa.merge_patch(**classifier, output=tmp_path / "p.safetensors", sync=False)
    base = [classifier["base"]]  # where the small files come from that primary does not have
    hsa.apply(classifier["primary"], tmp_path / "p.safetensors", output=tmp_path / "out", assets=base, sync=False)
    for path in (tmp_path / "merged").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("classifier.bias"), ("classifier.bias is missing", "architectures")),
        (without("layer_weights"), ("layer_weights is missing", "use_weighted_layer_sum True")),
        (lambda _, config: config.update(num_labels=4), ("classifier.weight has shape [3, 256]", "[4, 256]")),
        (lambda _, config: config.update(classifier_proj_size=64), ("projector.weight", "classifier_proj_size 64")),
        (lambda _, config: config.pop("architectures"), ("decoder.embed_positions.weight is missing",)),
        (
            lambda tensors, _: tensors.update({"decoder.layer_norm.bias": torch.ones(64)}),
            ("decoder.layer_norm.bias has no place", "WhisperForAudioClassification"),
        ),
    ],
    ids=["no bias", "no layer weights", "labels", "projection", "called recognition", "a decoder's tensor"],
)
def test_a_broken_model_for_audio_classification_is_refused(
    classifier: Triple, change: Any, words: tuple[str, ...], tmp_path: Path
) -> None:
    Breakage("", change).apply(classifier["primary"])
    said = refusal(lambda: merge(classifier, tmp_path / "out"))
    assert said is not None and all(word in said for word in words), said
