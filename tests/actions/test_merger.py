"""`hsa.Merger`: many merges of resident sources, each with the bytes that `hsa.merge` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merged, raw_bytes, read_tensors
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.reference import head_scores

Triple = dict[str, Path]
GRID = [(0.6, 0.5, 0.2), (0.0, 0.5, 0.2), (1.0, 0.0, 0.7), (50, 0.9, 0.0), (0.3, 1.0, 3.0)]


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """Names whose bytes or dtypes differ."""
    return [
        name
        for name, tensor in ours.items()
        if tensor.dtype != theirs[name].dtype or raw_bytes(tensor) != raw_bytes(theirs[name])
    ]


@pytest.mark.parametrize("preset", ["encoder-qkv", "attention-qkv", "attention-all"])
def test_merge_gives_the_bytes_of_hsa_merge(typed_triple: Triple, tmp_path: Path, preset: str) -> None:
    merger = hsa.Merger(**typed_triple, targets=preset)
    for k, lam, alpha in GRID:
        files = merged(typed_triple, tmp_path / "out", k=k, lam=lam, alpha=alpha, targets=preset)
        ours = merger.merge(k=k, lam=lam, alpha=alpha)
        assert len(ours) == {"encoder-qkv": 10, "attention-qkv": 30, "attention-all": 36}[preset]
        assert same(ours, files) == []


def test_attention_scale_and_heads_are_passed_on(shared_triple: Triple, tmp_path: Path) -> None:
    merger = hsa.Merger(**shared_triple, attention_scale=-0.5, num_heads=2, num_layers=7)
    files = merged(shared_triple, tmp_path / "out", attention_scale=-0.5, num_heads=2, num_layers=7)
    assert same(merger.merge(), files) == []
    assert all(score.shape == (2,) for score in merger.scores.values())


def test_scores_and_selection(shared_triple: Triple, tmp_path: Path) -> None:
    merger = hsa.Merger(**shared_triple)
    report = hsa.merge(output=tmp_path / "out", **shared_triple)
    base, primary, secondary = (read_tensors(path) for path in shared_triple.values())
    assert merger.scores.keys() == report.tensors.keys()
    for name, score in merger.scores.items():
        exact = head_scores(base[name], primary[name], secondary[name], heads=4, dtype=torch.float64).sqrt()
        assert score.dtype == torch.float32
        torch.testing.assert_close(score.double(), exact, rtol=1e-6, atol=0)
    assert merger.selected(0.6) == {name: tensor.selected for name, tensor in report.tensors.items()}
    assert set(merger.selected(0).values()) == {()}


def load(path: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(path, local_files_only=True)


def test_apply_again_and_again_to_the_model_that_is_primary(typed_triple: Triple, tmp_path: Path) -> None:
    """The sources are loaded models and the model written to is one of them: each result is from the sources."""
    model = load(typed_triple["primary"])
    merger = hsa.Merger(load(typed_triple["base"]), model, load(typed_triple["secondary"]))
    for k, lam, alpha in [*GRID, GRID[0]]:
        assert merger.apply_(model, k=k, lam=lam, alpha=alpha) is model
        files = merged(typed_triple, tmp_path / "out", k=k, lam=lam, alpha=alpha)
        assert same(files, model.state_dict()) == []


def test_state_dicts_with_and_without_the_prefix(shared_triple: Triple, tmp_path: Path) -> None:
    base, primary, secondary = (read_tensors(path) for path in shared_triple.values())
    bare = {name.removeprefix("model."): tensor for name, tensor in secondary.items()}
    with pytest.raises(hsa.RequestError, match="state dicts say nothing of heads"):
        hsa.Merger(base, primary, bare)
    merger = hsa.Merger(base, primary, bare, num_heads=4, num_layers=2)
    kept = {name: tensor.clone() for name, tensor in primary.items()}
    files = merged(shared_triple, tmp_path / "out")
    result = merger.apply_(primary)
    assert result is primary
    assert same(files, primary) == []
    assert same(merger.merge(), files) == []
    assert any(raw_bytes(kept[name]) != raw_bytes(files[name]) for name in merger.merge())


def test_a_directory_lends_its_config(shared_triple: Triple, tmp_path: Path) -> None:
    merger = hsa.Merger(shared_triple["base"], read_tensors(shared_triple["primary"]), str(shared_triple["secondary"]))
    assert same(merger.merge(), merged(shared_triple, tmp_path / "out")) == []


@pytest.mark.parametrize("lender", ["base", "secondary"])
@pytest.mark.parametrize("loaded", [False, True], ids=["directory", "model"])
@pytest.mark.parametrize(
    "name", ["model.decoder.embed_tokens.weight", "model.encoder.conv1.bias", "model.decoder.layers.1.fc1.weight"]
)
def test_a_state_dict_of_other_shapes_than_the_config_lent_to_it_is_refused(
    shared_triple: Triple, name: str, lender: str, loaded: bool
) -> None:
    """Only a source with a config of its own was checked, so that a cut embedding went unnoticed."""
    sources: dict[str, Any] = {role: read_tensors(path) for role, path in shared_triple.items()}
    sources[lender] = load(shared_triple[lender]) if loaded else shared_triple[lender]
    assert hsa.Merger(**sources).merge()
    sources["primary"][name] = sources["primary"][name][:5].clone()
    with pytest.raises(hsa.MismatchError) as caught:
        hsa.Merger(**sources)
    message = str(caught.value)
    assert message.startswith(f"primary state dict: tensor {name} has shape [5")
    assert f"that is the config of {lender}, as a state dict has none; give primary as a directory" in message


def test_a_state_dict_of_targets_alone_needs_no_other_tensor(shared_triple: Triple, tmp_path: Path) -> None:
    targets = hsa.Merger(**shared_triple).merge()
    held = {name: tensor for name, tensor in read_tensors(shared_triple["primary"]).items() if name in targets}
    merger = hsa.Merger(shared_triple["base"], held, shared_triple["secondary"])
    assert same(merger.merge(), merged(shared_triple, tmp_path / "out")) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_another_dtype_is_rounded_once(shared_triple: Triple, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(shared_triple["primary"]).to(dtype)
    hsa.Merger(**shared_triple).apply_(model, lam=0.1)
    files = merged(shared_triple, tmp_path / "out", lam=0.1, dtype=str(dtype).removeprefix("torch."))
    assert same(files, model.state_dict()) == []


def test_tensors_that_are_not_contiguous(shared_triple: Triple) -> None:
    merger = hsa.Merger(**shared_triple)
    expected = merger.merge()
    held = {n: (torch.full((*t.shape[::-1],), torch.nan).T if t.ndim == 2 else t * 0) for n, t in expected.items()}
    strides = {name: tensor.stride() for name, tensor in held.items()}
    merger.apply_(held)
    assert {name: tensor.stride() for name, tensor in held.items()} == strides
    assert same({name: tensor.contiguous() for name, tensor in held.items()}, expected) == []


def test_parameters_per_tensor(shared_triple: Triple, tmp_path: Path) -> None:
    merger = hsa.Merger(**shared_triple)
    names = list(merger.scores)
    k = {name: (number % 5) / 4 for number, name in enumerate(names)}
    lam = {name.removeprefix("model."): number / len(names) for number, name in enumerate(names)}
    files = merged(shared_triple, tmp_path / "out", k=k, lam=lam)  # type: ignore[arg-type]
    assert same(merger.merge(k=k, lam=lam), files) == []
    del k[names[3]]
    with pytest.raises(hsa.RequestError, match="has no value for target tensor"):
        merger.merge(k=k)


@pytest.mark.parametrize("role", ["base", "secondary"])
@pytest.mark.parametrize(("change", "kind"), [("numpy", "numpy.ndarray"), ("tolist", "builtins.list")])
def test_a_state_dict_of_no_torch_tensors_is_refused_by_name(
    shared_triple: Triple, role: str, change: str, kind: str
) -> None:
    given: dict[str, object] = dict(shared_triple)
    given[role] = {name: getattr(tensor, change)() for name, tensor in read_tensors(shared_triple[role]).items()}
    with pytest.raises(
        hsa.RequestError, match=rf"{role}: target tensor model\.encoder\S+ is a {kind}, expected a torch tensor"
    ):
        hsa.Merger(**given)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(shared_triple: Triple, threads: int) -> None:
    assert same(hsa.Merger(**shared_triple, threads=threads).merge(), hsa.Merger(**shared_triple).merge()) == []


def test_what_is_refused(shared_triple: Triple) -> None:
    merger = hsa.Merger(**shared_triple)
    name = next(iter(merger.scores))
    held = merger.merge()
    before = raw_bytes(held[name])
    with pytest.raises(hsa.MismatchError, match="the model holds nothing"):
        merger.apply_({other: tensor for other, tensor in held.items() if other != name})
    with pytest.raises(hsa.MismatchError, match=r"the model holds \[3, 4\]"):
        merger.apply_({**held, name: torch.zeros(3, 4)})
    with pytest.raises(hsa.RequestError, match=r"is a Tensor of torch\.float64, expected a plain tensor"):
        merger.apply_({**held, name: held[name].double()})
    with pytest.raises(hsa.RequestError, match="lam must be in"):
        merger.apply_(held, lam=1.5)
    assert raw_bytes(held[name]) == before
    with pytest.raises(hsa.BackendUnavailable, match="cuda"):
        hsa.Merger(**shared_triple, device="cuda")
    with pytest.raises(hsa.RequestError, match="expected a loaded model or a state dict, got list"):
        merger.apply_([])  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_not_finite_sources_are_named(shared_triple: Triple, role: str) -> None:
    sources = {of: read_tensors(path) for of, path in shared_triple.items()}
    name = "model.encoder.layers.1.self_attn.v_proj.weight"
    sources[role][name][17, 3] = torch.inf
    with pytest.raises(hsa.NonFiniteError, match=rf"{name}, head 1: {role} holds NaN or Inf"):
        hsa.Merger(**sources, num_heads=4, num_layers=2)


def test_overflow_in_the_models_dtype_is_named(shared_triple: Triple) -> None:
    sources = {of: read_tensors(path) for of, path in shared_triple.items()}
    name = "model.encoder.layers.0.self_attn.q_proj.bias"
    sources["primary"][name][:] = 1e6
    merger = hsa.Merger(**sources, num_heads=4, num_layers=2)
    model = {stored: tensor.half() for stored, tensor in merger.merge().items()}
    with pytest.raises(hsa.NonFiniteError, match=rf"{name}, head \d: the result overflows"):
        merger.apply_(model)
