"""Mistakes of meaning are told: sources that hardly belong together, and merges without effect.

Both sides of every threshold: what must be told, and what must not be.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors, write_adapter, write_openai, write_tensors
from warned_merges import Change, random_like, rewritten, warnings_of

import hsa
from hsa.methods import source_warnings
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_triple

pytestmark = pytest.mark.long

Triple = Mapping[str, Path]

EXCHANGED = "nearer to {other} than to base.*are base and {other} exchanged"
UNRELATED = "hardly trained from this base"
TWICE = "equal on all .* target tensors"
NO_CHANGE = "changes next to nothing"
MISTAKES = "|".join((r"exchanged", UNRELATED, TWICE, NO_CHANGE, "changes nothing", "adapter was trained on"))
BEGINS = r"(?:^|\| )"
"""Where a warning begins in the text of all."""


@pytest.fixture(scope="module", params=["made-up", "real"])
def triple(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """A made-up triple, and the real one where there is one."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real_weights"))


def cast(dtype: torch.dtype) -> Change:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


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
    assert sound.primary * 5 < source_warnings.UNRELATED < unrelated.primary / 2
    assert sound.cosine is not None and exchanged.cosine is not None
    assert sound.cosine + 0.1 < source_warnings.ATTENTION.cosine < exchanged.cosine - 0.1
    assert sound.change is not None
    assert sound.change > source_warnings.NO_CHANGE * 100


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
