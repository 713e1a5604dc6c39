"""Mistakes of meaning are told: sources that hardly belong together, merges without effect, names that say nothing.

Both sides of every threshold: what must be told, and what must not be.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merge_arguments, read_tensors, run_hsa, snapshot, write_adapter, write_openai, write_tensors

import hsa
from hsa.outputs import merge_warnings
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_triple

Triple = Mapping[str, Path]
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

EXCHANGED = "nearer to {other} than to base.*are base and {other} exchanged"
UNRELATED = "hardly trained from this base"
TWICE = "equal on all .* target tensors"
NO_CHANGE = "changes next to nothing"
MISTAKES = "|".join((r"exchanged", UNRELATED, TWICE, NO_CHANGE, "changes nothing", "adapter was trained on"))
BEGINS = r"(?:^|\| )"
"""Where a warning begins in the text of all."""

EVERY = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


@pytest.fixture(scope="module")
def real_weights(real: Triple, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """The real models without their tokenizers, which are large and have no say here."""
    folder = tmp_path_factory.mktemp("real")
    for model in real["base"].parent.iterdir():
        if (model / "config.json").is_file():
            (folder / model.name).mkdir()
            for file in (model / "config.json", *model.glob("*.safetensors*")):
                shutil.copyfile(file, folder / model.name / file.name)
    return {role: folder / path.name for role, path in real.items()}


@pytest.fixture(scope="module", params=["made-up", "real"])
def triple(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """A made-up triple, and the real one where there is one."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real_weights"))


@pytest.fixture(scope="module", params=["made-up", "real"])
def whole_triple(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """The same with the small files of real models."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real"))


def warnings_of(sources: Triple, output: Path, **parameters: Any) -> str:
    """All warnings of a merge, in one text."""
    return " | ".join(hsa.merge(**sources, output=output, sync=False, **parameters).warnings)


def rewritten(source: Path, directory: Path, change: Change) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    directory.chmod(0o755)
    write_tensors(directory, change(read_tensors(source)))
    return directory


def cast(dtype: torch.dtype) -> Change:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def random_like(seed: int, std: float | None = None) -> Change:
    """Random tensors of equal shapes: each of its own standard deviation, or all of one."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (torch.randn(t.shape, generator=generator) * (std or float(t.float().std()))).to(t.dtype)
            for name, t in tensors.items()
        }

    return change


# --- sources that hardly belong together -------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["primary", "secondary"])
def test_base_exchanged_with_a_fine_tune_is_told(triple: Triple, other: str, tmp_path: Path) -> None:
    swapped = {**triple, "base": triple[other], other: triple["base"]}
    found = warnings_of(swapped, tmp_path / "out")
    assert re.search(EXCHANGED.format(other=other), found), found
    assert UNRELATED not in found


@pytest.mark.parametrize("preset", ["encoder-qkv", "attention-qkv", "attention-all"])
@pytest.mark.parametrize("other", ["primary", "secondary", "tertiary"])
def test_every_exchange_of_the_real_fine_tunes_is_told(
    real_weights: Triple, other: str, preset: str, tmp_path: Path
) -> None:
    """Each fine-tune in base's place, with base in the place of either of the two others' roles."""
    tuned = {name: real_weights["base"].parent / name for name in ("primary", "secondary", "tertiary")}
    if not (tuned["tertiary"] / "config.json").is_file():
        pytest.skip("the real triple has no tertiary")
    for second in tuned.keys() - {other}:
        for roles in (("primary", "secondary"), ("secondary", "primary")):
            sources = {"base": tuned[other], roles[0]: real_weights["base"], roles[1]: tuned[second]}
            assert "exchanged" in warnings_of(sources, tmp_path / "out", targets=preset, overwrite=True), (
                second,
                roles,
            )


@pytest.mark.parametrize("preset", ["encoder-qkv", "attention-qkv"])
@pytest.mark.parametrize("base", ["primary", "secondary", "tertiary"])
def test_every_real_fine_tune_in_the_place_of_base_is_told(
    real_weights: Triple, base: str, preset: str, tmp_path: Path
) -> None:
    """The base of a merge is the pretrained model; a third fine-tune in its place is no ancestor of the other two."""
    tuned = {name: real_weights["base"].parent / name for name in ("primary", "secondary", "tertiary")}
    if not (tuned["tertiary"] / "config.json").is_file():
        pytest.skip("the real triple has no tertiary")
    first, second = sorted(tuned.keys() - {base})
    sources = {"base": tuned[base], "primary": tuned[first], "secondary": tuned[second]}
    assert "is base itself a fine-tune" in warnings_of(sources, tmp_path / "out", targets=preset)


@pytest.mark.parametrize("std", [None, 0.02, 0.5], ids=["its own std", "0.02", "0.5"])
def test_a_base_that_is_no_ancestor_is_told(triple: Triple, std: float | None, tmp_path: Path) -> None:
    stranger = rewritten(triple["base"], tmp_path / "stranger", random_like(1, std))
    found = warnings_of({**triple, "base": stranger}, tmp_path / "out")
    assert re.search(f"primary and secondary were {UNRELATED}", found), found
    assert "exchanged" not in found


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_fine_tune_of_another_base_is_told(triple: Triple, role: str, tmp_path: Path) -> None:
    stranger = rewritten(triple[role], tmp_path / "stranger", random_like(2))
    found = warnings_of({**triple, role: stranger}, tmp_path / "out")
    assert re.search(rf"{BEGINS}{role} was {UNRELATED}", found), found


def test_a_base_of_zeros_is_told(shared_triple: Triple, tmp_path: Path) -> None:
    zeros = rewritten(
        shared_triple["base"], tmp_path / "zeros", lambda held: {n: torch.zeros_like(t) for n, t in held.items()}
    )
    report = hsa.merge(**{**shared_triple, "base": zeros}, output=tmp_path / "out", sync=False)
    assert report.extent.primary is None, "there is no ratio to a norm of zero"
    assert any("base's target tensors are all zero" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    "same", [("base", "primary"), ("base", "secondary"), ("primary", "secondary")], ids=" and ".join
)
def test_the_same_model_given_twice_is_told(triple: Triple, same: tuple[str, str], tmp_path: Path) -> None:
    found = warnings_of({**triple, same[1]: triple[same[0]]}, tmp_path / "out")
    assert re.search(rf"{BEGINS}{same[0]} and {same[1]} are {TWICE}", found), found
    assert found.count(TWICE.partition(" on")[0]) == 1
    assert "exchanged" not in found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "same", [("base", "primary"), ("base", "secondary"), ("primary", "secondary")], ids=" and ".join
)
def test_the_same_model_in_another_element_type_is_told(
    shared_triple: Triple, same: tuple[str, str], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Rounded to a narrower type, or widened again: no byte is equal, and it is the same model."""
    copy = rewritten(shared_triple[same[0]], tmp_path / "copy", cast(dtype))
    found = warnings_of({**shared_triple, same[1]: copy}, tmp_path / "out")
    assert re.search(rf"{BEGINS}{same[0]} and {same[1]} are {TWICE}", found), found


def test_the_same_model_in_other_files_is_told(shared_triple: Triple, tmp_path: Path) -> None:
    """Digests are of tensors, so shards and formats make no difference."""
    shutil.copytree(shared_triple["primary"], tmp_path / "sharded")
    write_tensors(tmp_path / "sharded", read_tensors(shared_triple["primary"]), shards=3)
    write_openai(tmp_path / "same.pt", shared_triple["primary"])
    for number, copy in enumerate((tmp_path / "sharded", tmp_path / "same.pt")):
        found = warnings_of({**shared_triple, "secondary": copy}, tmp_path / str(number))
        assert re.search(f"^primary and secondary are {TWICE}", found), found


def test_equal_targets_of_models_that_differ_in_one_element_are_not_called_equal(
    shared_triple: Triple, tmp_path: Path
) -> None:
    def touch(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.encoder.layers.1.self_attn.v_proj.weight"][-1, -1] += 0.25
        return tensors

    copy = rewritten(shared_triple["primary"], tmp_path / "copy", touch)
    assert TWICE.partition(" on")[0] not in warnings_of({**shared_triple, "secondary": copy}, tmp_path / "out")


# --- sound sources -------------------------------------------------------------------------------------------------


def test_sound_sources_are_not_warned_of(triple: Triple, tmp_path: Path) -> None:
    for preset in ("encoder-qkv", "attention-qkv", "attention-all"):
        found = warnings_of(triple, tmp_path / "out", targets=preset, overwrite=True)
        assert not re.search(MISTAKES, found), found


@pytest.mark.parametrize("first", ["primary", "secondary", "tertiary"])
@pytest.mark.parametrize("second", ["primary", "secondary", "tertiary"])
def test_no_two_real_fine_tunes_are_warned_of(real_weights: Triple, first: str, second: str, tmp_path: Path) -> None:
    folder = real_weights["base"].parent
    if first == second:
        return
    if not (folder / "tertiary" / "config.json").is_file():
        pytest.skip("the real triple has no tertiary")
    sources = {"base": real_weights["base"], "primary": folder / first, "secondary": folder / second}
    assert not re.search(MISTAKES, warnings_of(sources, tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("role", ["base", "primary", "secondary", "all"])
def test_copies_in_a_narrower_type_are_not_warned_of(
    triple: Triple, role: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    roles = tuple(triple) if role == "all" else (role,)
    copies = {each: rewritten(triple[each], tmp_path / each, cast(dtype)) for each in roles}
    for preset in ("encoder-qkv", "attention-all"):
        found = warnings_of({**triple, **copies}, tmp_path / "out", targets=preset, overwrite=True)
        assert not re.search(MISTAKES, found), found


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_an_adapter_beside_a_whole_fine_tune_is_not_warned_of(
    triple: Triple, role: str, rank: int, tmp_path: Path
) -> None:
    """A small fine-tune is near to a large one, whatever their angle: distances alone would be misread."""
    adapter = low_rank(triple, role, tmp_path / "adapter", rank)
    found = warnings_of({**triple, role: adapter}, tmp_path / "out")
    assert not re.search(MISTAKES, found), found


Decomposition = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@cache
def decomposed(base: Path, tuned: Path) -> dict[str, tuple[torch.Tensor, Decomposition]]:
    """The weight of every q and v projection of base, and the singular value decomposition of its task vector."""
    ours, theirs = read_tensors(base), read_tensors(tuned)
    return {
        name: (weight, torch.linalg.svd(theirs[name].float() - weight.float(), full_matrices=False))
        for name, weight in ours.items()
        if name.endswith(("q_proj.weight", "v_proj.weight"))
    }


def low_rank(triple: Triple, role: str, directory: Path, rank: int) -> Path:
    """An adapter of the best rank-r approximation of a fine-tune's q and v projections."""
    parts = decomposed(triple["base"], triple[role])
    weights = {name: weight for name, (weight, _) in parts.items()}
    tensors = write_adapter(directory, weights, rank=rank, lora_alpha=rank)
    for name, (_, (u, s, vh)) in parts.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = vh[:rank].contiguous()
        tensors[f"{module}.lora_B.weight"] = (u[:, :rank] * s[:rank]).contiguous()
    from safetensors.torch import save_file

    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("delta", [1e-5, 1e-3, 4e-3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_made_up_triples_of_the_benchmarks_are_not_warned_of(delta: float, dtype: Any, tmp_path: Path) -> None:
    """Small, usual and large task vectors: 0.0005, 0.05 and 0.2 of base."""
    if dtype == "float16" and delta < 1e-4:
        pytest.skip("float16 rounds such task vectors away")
    sources = write_triple(tmp_path / "sources", SHAPES["test"], dtype=dtype, delta=delta, processor=False)
    assert not re.search(MISTAKES, warnings_of(sources, tmp_path / "out"))


def test_a_triple_with_the_tensors_of_large_v3_is_not_warned_of(tmp_path: Path) -> None:
    """One layer of large-v3's width and heads; the bytes of the others would say the same."""
    shape = vars(SHAPES["large-v3"]) | {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "vocab_size": 51866 // 64,
        "ffn_dim": 8,
    }
    shape |= {"max_source_positions": 8, "max_target_positions": 8}
    sources = write_triple(tmp_path / "sources", WhisperShape(**shape), dtype="float16", processor=False)
    report = hsa.merge(**sources, output=tmp_path / "out", sync=False)
    assert not re.search(MISTAKES, " ".join(report.warnings))
    assert report.extent.primary == pytest.approx(0.052, rel=0.05)
    swapped = {**sources, "base": sources["primary"], "primary": sources["base"]}
    assert "exchanged" in warnings_of(swapped, tmp_path / "swapped")


def test_the_thresholds_lie_between_what_was_measured(triple: Triple, tmp_path: Path) -> None:
    """With room on both sides: a factor in sizes, a distance in cosines."""
    sound = hsa.merge(**triple, output=tmp_path / "sound", sync=False).extent
    swapped = {**triple, "base": triple["primary"], "primary": triple["base"]}
    exchanged = hsa.merge(**swapped, output=tmp_path / "swapped", sync=False).extent
    stranger = rewritten(triple["base"], tmp_path / "stranger", random_like(3))
    unrelated = hsa.merge(**{**triple, "base": stranger}, output=tmp_path / "unrelated", sync=False).extent
    assert sound.primary is not None and unrelated.primary is not None
    assert sound.primary * 5 < merge_warnings.UNRELATED < unrelated.primary / 2
    assert sound.cosine is not None and exchanged.cosine is not None
    assert sound.cosine + 0.1 < merge_warnings.SHARED_COSINE < exchanged.cosine - 0.1
    assert sound.change is not None
    assert sound.change > merge_warnings.NO_CHANGE * 100


# --- merges that change next to nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"lam": 1.0}, "lambda is 1 or alpha is 0"),
        ({"alpha": 0.0}, "lambda is 1 or alpha is 0"),
        ({"lam": 0.9999, "alpha": 0.01}, "lower lam"),
        ({"k": 0.0}, "k selects no head"),
        ({"lam": 1.0, "numerics": "reference"}, "lambda is 1 or alpha is 0"),
    ],
    ids=str,
)
def test_a_merge_that_changes_next_to_nothing_is_told(
    triple: Triple, parameters: dict[str, Any], why: str, tmp_path: Path
) -> None:
    found = warnings_of(triple, tmp_path / "out", **parameters)
    assert re.search(f"{NO_CHANGE}.*{why}", found), found


@pytest.mark.parametrize(
    "parameters", [{"lam": 0.99}, {"alpha": 0.01}, {"k": 0.01}, {"lam": 1.0, "attention_scale": 0.5}], ids=str
)
def test_a_merge_that_changes_a_little_is_not_warned_of(
    triple: Triple, parameters: dict[str, Any], tmp_path: Path
) -> None:
    assert not re.search(MISTAKES, warnings_of(triple, tmp_path / "out", **parameters))


# --- merges that are merged again -------------------------------------------------------------------------------------

BASE_IS_A_MERGE = "base is an output of hsa"
AGAIN = "was merged from"


def merged(triple: Triple, output: Path, **parameters: Any) -> Path:
    return hsa.merge(**triple, output=output, sync=False, **parameters).output


@pytest.mark.parametrize("way", ["merge", "patch", "sweep", "full sweep", "merger"])
@pytest.mark.parametrize(
    ("again", "expected"),
    [
        ({"primary": "r1o"}, r"primary was merged from secondary already: .* names secondary's model as the secondary"),
        ({"secondary": "r1o"}, r"secondary was merged from primary already: .* names primary's model as the primary"),
        (
            {"primary": "secondary", "secondary": "r1o"},
            r"secondary was merged from primary already: .* names primary's model as the secondary",
        ),
        (
            {"base": "primary", "primary": "r1o", "secondary": "base"},
            r"primary was merged from base already: .* as the primary of that merge; give the pretrained model as base",
        ),
        ({"base": "r1o"}, BASE_IS_A_MERGE),
    ],
    ids=["primary", "secondary", "exchanged", "base a fine-tune", "base"],
)
def test_a_merge_that_is_merged_again_is_told(
    triple: Triple, again: Mapping[str, str], expected: str, way: str, tmp_path: Path
) -> None:
    known = {**triple, "r1o": merged(triple, tmp_path / "r1o")}
    sources = {role: known[again.get(role, role)] for role in triple}
    if way == "merger":
        with pytest.warns(hsa.HsaWarning, match=expected):
            told = hsa.Merger(**sources).warnings
    elif way == "merge":
        told = list(hsa.merge(**sources, output=tmp_path / "out", sync=False).warnings)
    elif way == "patch":
        told = list(hsa.merge_patch(**sources, output=tmp_path / "out.safetensors", sync=False).warnings)
    else:
        full = way == "full sweep"
        told = list(hsa.sweep(**sources, output=tmp_path / "out", lam=[0.2, 0.5], full=full, sync=False).warnings)
    assert sum(bool(re.search(expected, text)) for text in told) == 1, told


def test_a_merge_of_merges_with_a_further_fine_tune_is_not_told(triple: Triple, tmp_path: Path) -> None:
    """Chained merges, on either side, whatever the presets."""
    third = rewritten(
        triple["secondary"], tmp_path / "third", lambda held: third_of(held, read_tensors(triple["base"]))
    )
    first = merged(triple, tmp_path / "first")
    other = merged(triple, tmp_path / "other", targets="attention-all")
    for made in (first, other):
        for sources in ({"primary": made, "secondary": third}, {"primary": third, "secondary": made}):
            found = warnings_of({**triple, **sources}, tmp_path / "out", overwrite=True)
            assert AGAIN not in found and BASE_IS_A_MERGE not in found, found
            told = hsa.Merger(**{**triple, **sources}).warnings
            assert not any(AGAIN in text or BASE_IS_A_MERGE in text for text in told), told


def third_of(held: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Another fine-tune: the task vectors with their columns reversed."""
    return {
        name: (base[name].float() + (tensor.float() - base[name].float()).flip(-1)).to(tensor.dtype)
        if name.endswith(EVERY)
        else tensor
        for name, tensor in held.items()
    }


@pytest.mark.parametrize(
    ("first_id", "second_id", "told"),
    [
        ("org/children", "org/children", True),
        ("org/children@a", "org/children@a", True),
        ("org/children@a", "org/children@b", False),
        ("org/children", "org/adults", False),
        (None, None, False),
    ],
)
def test_merges_of_other_presets_are_compared_by_ids_on_the_hub(
    shared_triple: Triple, first_id: str | None, second_id: str | None, told: bool, tmp_path: Path
) -> None:
    made = merged(shared_triple, tmp_path / "r1o", targets="attention-all", secondary_id=first_id)
    found = warnings_of({**shared_triple, "primary": made}, tmp_path / "out", secondary_id=second_id)
    assert ("primary was merged from secondary already" in found) == told, found


def test_a_damaged_record_of_a_source_tells_nothing(shared_triple: Triple, tmp_path: Path) -> None:
    made = merged(shared_triple, tmp_path / "r1o")
    place = made / "hsa_merge.json"
    whole = place.read_text()
    for damaged in ("", "[]", "{" * 100_000, whole.replace('"keep"', '"kept"', 1), whole[:-9]):
        place.write_text(damaged)
        for role in ("base", "primary"):
            found = warnings_of({**shared_triple, role: made}, tmp_path / "out", overwrite=True)
            assert AGAIN not in found and BASE_IS_A_MERGE not in found, found


def test_strict_refuses_a_base_that_is_a_merge_before_it_merges(shared_triple: Triple, tmp_path: Path) -> None:
    made = merged(shared_triple, tmp_path / "r1o")
    arguments = merge_arguments({**shared_triple, "base": made}, tmp_path / "out", "--strict", "--dry-run")
    done = run_hsa(*arguments)
    assert done.returncode == 2 and BASE_IS_A_MERGE in done.stderr, done.stderr
    with pytest.raises(hsa.StrictError, match=AGAIN):
        hsa.merge(**{**shared_triple, "primary": made}, output=tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_no_hint_contradicts_a_warning_of_the_sources(whole_triple: Triple, tmp_path: Path) -> None:
    made = merged(whole_triple, tmp_path / "r1o")
    stranger = rewritten(whole_triple["secondary"], tmp_path / "stranger", random_like(4))
    for changed in (
        {"secondary": whole_triple["primary"]},
        {"base": whole_triple["primary"], "primary": whole_triple["base"]},
        {"secondary": stranger},
        {"primary": made},
        {"base": made},
    ):
        report = hsa.merge(**{**whole_triple, **changed}, output=tmp_path / "out", sync=False, overwrite=True)
        assert report.warnings and report.hint is None and report.as_dict()["hint"] is None, changed
        patch = hsa.merge_patch(
            **{**whole_triple, **changed}, output=tmp_path / "p.safetensors", sync=False, overwrite=True
        )
        assert patch.hint is None, changed
    assert hsa.merge(**whole_triple, output=tmp_path / "out", sync=False, overwrite=True).hint is not None


# --- adapters of another base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained_on", "base_id", "told"),
    [
        ("openai/whisper-small", "openai/whisper-base", True),
        ("openai/whisper-small", "other/whisper-small@v1", True),
        ("openai/whisper-small", "openai/whisper-small@v1", False),
        ("OpenAI/whisper-small", "openai/whisper-small", False),
        ("whisper-small", "openai/whisper-base", False),
        ("/home/somebody/whisper-small", "openai/whisper-base", False),
        ("openai/whisper-small", None, False),
        (None, "openai/whisper-base", False),
        (17, "openai/whisper-base", False),
    ],
)
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_an_adapter_made_for_another_base_is_told(
    shared_triple: Triple, role: str, trained_on: Any, base_id: str | None, told: bool, tmp_path: Path
) -> None:
    weights = {n: t for n, t in read_tensors(shared_triple["base"]).items() if n.endswith(EVERY)}
    write_adapter(tmp_path / "adapter", weights, base_model_name_or_path=trained_on)
    found = warnings_of({**shared_triple, role: tmp_path / "adapter"}, tmp_path / "out", base_id=base_id)
    assert ("adapter was trained on" in found) == told, found
    if told:
        assert re.search(
            f"{role}'s adapter was trained on '{trained_on}'.*base is '{base_id.partition('@')[0]}'", found
        )


# --- names that say nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoint-1000", "best", "final", "output", "model", "Checkpoint_20", "ckpt"])
def test_two_runs_of_one_name_are_told_apart_on_the_card(shared_triple: Triple, name: str, tmp_path: Path) -> None:
    sources = dict(shared_triple)
    for role, run in (("primary", "run-a"), ("secondary", "run-b")):
        sources[role] = tmp_path / run / name
        shutil.copytree(shared_triple[role], sources[role])
    report = hsa.merge(**sources, output=tmp_path / "merged", sync=False)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    plain = card.replace("\\", "")
    assert f"# HSA merge of {name} in run-a and {name} in run-b\n" in plain
    assert "run-" not in card.split("---")[1], "a directory's name is no model on the Hub"
    recorded = json.loads((tmp_path / "merged" / "hsa_merge.json").read_text())["sources"]
    assert [recorded[role]["id"] for role in sources] == ["base", f"{name} in run-a", f"{name} in run-b"]
    assert not report.warnings
    assert any("call primary" in note and f"{name} in run-a" in note for note in report.notes)
    assert hsa.verify(tmp_path / "merged", **sources).ok


def test_names_that_say_something_stay_as_they_are(shared_triple: Triple, tmp_path: Path) -> None:
    for name in ("whisper-children", "checkpointed-model", "model-of-dialects", "best-of-three", "2024-06"):
        shutil.copytree(shared_triple["primary"], tmp_path / name)
        report = hsa.merge(**{**shared_triple, "primary": tmp_path / name}, output=tmp_path / "out", overwrite=True)
        recorded = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["sources"]["primary"]["id"]
        assert recorded == name
        assert not report.warnings


def test_parents_that_say_nothing_either_are_passed_over(shared_triple: Triple, tmp_path: Path) -> None:
    deep = tmp_path / "dialects" / "output" / "checkpoint-5"
    shutil.copytree(shared_triple["secondary"], deep)
    hsa.merge(**{**shared_triple, "secondary": deep}, output=tmp_path / "out", sync=False)
    recorded = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["sources"]["secondary"]["id"]
    assert recorded == "checkpoint-5 in dialects"


def test_a_name_that_says_nothing_and_has_no_parent_that_does_is_told(shared_triple: Triple, tmp_path: Path) -> None:
    deep = tmp_path / "output" / "model" / "best"
    shutil.copytree(shared_triple["secondary"], deep)
    sources = {**shared_triple, "secondary": deep}
    found = warnings_of(sources, tmp_path / "out")
    assert "the card calls secondary 'best', which says nothing; give secondary_id" in found
    assert "says nothing" not in warnings_of(sources, tmp_path / "named", secondary_id="org/name")


def test_the_home_directory_is_no_name(shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would put the user's name on a public card."""
    home = tmp_path / "somebody"
    shutil.copytree(shared_triple["secondary"], home / "best")
    monkeypatch.setenv("HOME", str(home))
    hsa.merge(**{**shared_triple, "secondary": home / "best"}, output=tmp_path / "out", sync=False)
    assert "somebody" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "somebody" not in (tmp_path / "out" / "hsa_merge.json").read_text()


def test_directories_of_one_name_are_told_apart_on_the_card(shared_triple: Triple, tmp_path: Path) -> None:
    """Names that say something, but the same."""
    sources = dict(shared_triple)
    for role, run in (("primary", "children"), ("secondary", "dialects")):
        sources[role] = tmp_path / run / "whisper-tiny-tuned"
        shutil.copytree(shared_triple[role], sources[role])
    hsa.merge(**sources, output=tmp_path / "out", sync=False)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert "# HSA merge of whisper-tiny-tuned in children and whisper-tiny-tuned in dialects\n" in card


# --- strict ----------------------------------------------------------------------------------------------------------


def test_strict_makes_warnings_errors(shared_triple: Triple, tmp_path: Path) -> None:
    doubled = {**shared_triple, "secondary": shared_triple["primary"]}
    before = snapshot(tmp_path)
    with pytest.raises(hsa.StrictError, match="equal on all"):
        hsa.merge(**doubled, output=tmp_path / "out", strict=True)
    with pytest.raises(hsa.StrictError, match="equal on all"):
        hsa.merge_patch(**doubled, output=tmp_path / "out.safetensors", strict=True)
    with pytest.raises(hsa.StrictError, match="equal on all"):
        hsa.sweep(**doubled, output=tmp_path / "sweep", lam=[0.2, 0.5], strict=True)
    with pytest.raises(hsa.StrictError, match="equal on all"):
        hsa.sweep(**doubled, output=tmp_path / "sweep", lam=[0.2, 0.5], strict=True, full=True)
    assert snapshot(tmp_path) == before
    assert issubclass(hsa.StrictError, hsa.HsaError)


def test_strict_keeps_an_earlier_output(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**shared_triple, output=tmp_path / "out", sync=False)
    before = snapshot(tmp_path)
    swapped = {**shared_triple, "base": shared_triple["secondary"], "secondary": shared_triple["base"]}
    with pytest.raises(hsa.StrictError, match="exchanged"):
        hsa.merge(**swapped, output=tmp_path / "out", overwrite=True, strict=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["merge", "dry run", "patch", "sweep", "full sweep"])
def test_strict_is_exit_code_2_in_one_line_with_nothing_written(
    shared_triple: Triple, command: str, tmp_path: Path
) -> None:
    more = {
        "merge": [],
        "dry run": ["--dry-run"],
        "patch": ["--patch"],
        "sweep": [],
        "full sweep": ["--full"],
    }[command]
    arguments = list(merge_arguments(shared_triple, tmp_path / "out.safetensors", "--lambda=1", "--strict", *more))
    arguments[0] = "sweep" if "sweep" in command else "merge"
    done = run_hsa(*arguments)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match("hsa: error: .*strict.*(next to|changes) nothing", line)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_strict_names_every_warning(shared_triple: Triple, tmp_path: Path) -> None:
    """An exchange, and a lambda without effect."""
    swapped = {**shared_triple, "base": shared_triple["primary"], "primary": shared_triple["base"]}
    with pytest.raises(hsa.StrictError, match=r"2 warnings are errors.*exchanged.*next to nothing"):
        hsa.merge(**swapped, output=tmp_path / "out", lam=0.9999, alpha=0.01, strict=True)
    assert list(tmp_path.iterdir()) == []


def test_strict_lets_a_sound_merge_through(whole_triple: Triple, tmp_path: Path) -> None:
    assert hsa.merge(**whole_triple, output=tmp_path / "out", strict=True, sync=False).warnings == ()
    assert hsa.sweep(**whole_triple, output=tmp_path / "sweep", lam=[0.2, 0.5], strict=True, sync=False).warnings == ()


def recipe(path: Path, sources: Triple, *merges: str) -> Path:
    listed = "".join(f"  - {{{merge}}}\n" for merge in merges)
    defaults = "".join(f"  {role}: {place}\n" for role, place in sources.items())
    path.write_text(f"defaults:\n{defaults}merges:\n{listed}", encoding="utf-8")
    return path


def test_strict_releases_refuse_entries_that_warn(shared_triple: Triple, tmp_path: Path) -> None:
    path = recipe(
        tmp_path / "recipe.yaml",
        shared_triple,
        "group: g, name: sound",
        f"group: g, name: doubled, secondary: {shared_triple['primary']}",
    )
    done = run_hsa("release", path, f"--output={tmp_path / 'tree'}", "--strict", "--no-sync")
    assert done.returncode == 2, done.stderr
    assert re.search("hsa: error: g/doubled: .*strict.*primary and secondary are equal", done.stderr)
    assert (tmp_path / "tree" / "g" / "sound" / "hsa_merge.json").is_file()
    assert not (tmp_path / "tree" / "g" / "doubled").exists()
    told = run_hsa("release", path, f"--output={tmp_path / 'other'}", "--no-sync")
    assert told.returncode == 0
    assert "hsa: warning: g/doubled: primary and secondary are equal" in told.stderr
    assert "secondary weighs" in told.stderr


def test_what_headers_tell_stops_a_strict_release_before_the_first_byte(shared_triple: Triple, tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yaml", shared_triple, "group: g, name: sound", "group: g, name: still, alpha: 0")
    done = run_hsa("release", path, f"--output={tmp_path / 'tree'}", "--strict", "--no-sync")
    assert done.returncode == 2, done.stderr
    assert "g/still" in done.stderr and "changes nothing" in done.stderr
    assert not (tmp_path / "tree").exists()
