"""Primary's tensors against its own config.json: what is refused, and that every command agrees."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from broken_primaries import EMBEDDING, Breakage, Config, Tensors, breakages, why_not_whole
from helpers import edit_json, merge_arguments, raw_bytes, read_tensors, run_hsa
from structures import LAYER, merge, refusal, renamed

import hsa

Triple = dict[str, Path]
COUNT = 50
FC1 = "model.decoder.layers.0.fc1.weight"
NORM = "model.decoder.layers.0.final_layer_norm.bias"


@pytest.fixture(scope="module")
def names(shared_triple: Triple) -> list[str]:
    return list(read_tensors(shared_triple["primary"]))


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
