"""HSA of more than two fine-tunes: the oracle's bytes on every way to an output, for 2 to 5 models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raw_bytes, read_tensors, snapshot, write_tensors
from merge_oracle import arguments, check, expected_merge, merge
from several_models import with_more

import hsa

Sources = dict[str, Path]
HALF, BRAIN = torch.float16, torch.bfloat16
WEIGHTS = (1.0, 0.25, 3.0, -0.5)
"""Of the secondaries, in their order."""

PARAMETERS: list[dict[str, Any]] = [
    {},
    {"k": 1.0, "lam": 0.3, "alpha": 1.5, "targets": "attention-qkv"},
    {"k": 0.25, "lam": 0.0, "targets": "attention-all", "attention_scale": -1.5},
    {"k": 30, "lam": 1.0, "non_attention_scale": 0.5},
    {"k": 0.0, "attention_scale": 0.75, "dtype": "bfloat16"},
    {"k": 0.5, "dtype": "float16", "num_heads": 2, "num_layers": 3},
]


@pytest.fixture(scope="module", params=[2, 3, 4, 5])
def sources(
    request: pytest.FixtureRequest, shared_triple: Sources, tmp_path_factory: pytest.TempPathFactory
) -> Sources:
    """Float32 checkpoints by role, for reading alone."""
    return with_more(shared_triple, tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(scope="module")
def three(shared_triple: Sources, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return with_more(shared_triple, tmp_path_factory.mktemp("three"), 3)


def count(sources: Sources) -> int:
    return len(sources) - 2


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_a_merge_is_the_oracles(sources: Sources, tmp_path: Path, parameters: dict[str, Any], weighted: bool) -> None:
    weights = {"weights": list(WEIGHTS[: count(sources)])} if weighted else {}
    report = check(sources, tmp_path / "out", threads=2, **parameters, **weights)
    assert hsa.verify(tmp_path / "out", **arguments(sources)).decisions_follow
    shares = {tensor.shares for tensor in report.tensors.values()}
    assert {len(each) for each in shares} == {count(sources)}


@pytest.mark.parametrize("dtypes", [(HALF, BRAIN, None), (BRAIN, None, HALF)], ids=str)
def test_element_types_may_differ(
    typed_triple: Sources, tmp_path: Path, dtypes: tuple[torch.dtype | None, ...]
) -> None:
    for models in (3, 5):
        sources = with_more(typed_triple, tmp_path / str(models), models, dtypes)
        check(sources, tmp_path / f"out{models}", k=0.5, lam=0.2, weights=list(WEIGHTS[: models - 1]))


def test_every_way_to_an_output_gives_the_same_bytes(sources: Sources, tmp_path: Path) -> None:
    """A merge, a patch applied, points of sweeps, and a Merger; each is verified with its sources."""
    own = {"k": 0.3, "lam": 0.2, "weights": list(WEIGHTS[: count(sources)])}
    given = arguments(sources)
    hsa.merge(**given, output=tmp_path / "merged", sync=False, **own)
    expected = snapshot(tmp_path / "merged")
    hsa.merge_patch(**given, output=tmp_path / "patch.safetensors", sync=False, **own)
    hsa.apply(sources["primary"], tmp_path / "patch.safetensors", output=tmp_path / "applied", sync=False)
    grid = {**own, "k": [0.3, 0.7], "lam": [0.2, 0.9]}
    hsa.sweep(**given, output=tmp_path / "patches", sync=False, **grid)
    (name,) = (path.stem for path in (tmp_path / "patches").glob("*k0.3_lambda0.2*.safetensors"))
    point = tmp_path / "patches" / f"{name}.safetensors"
    hsa.apply(sources["primary"], point, output=tmp_path / "point", sync=False)
    hsa.sweep(**given, output=tmp_path / "full", sync=False, full=True, **grid)
    merger = hsa.Merger(**given, backend="cpu")
    merger.save(tmp_path / "saved", sync=False, **own)
    for place in (tmp_path / "applied", tmp_path / "point", tmp_path / "full" / name, tmp_path / "saved"):
        assert snapshot(place) == expected, place
    tensors, oracles = expected_merge(sources, **own)
    for name, tensor in merger.merge(**own).items():
        assert raw_bytes(tensor) == raw_bytes(tensors[name]), name
        assert merger.selected(0.3)[name] == oracles[name].selected
    for output in ("merged", "patch.safetensors", "patches", "full", "applied"):
        report = hsa.verify(tmp_path / output, **given)
        assert (report.ok, report.bytes_follow, report.decisions_follow) == (True, True, True), report.problems
    assert hsa.sweep(**given, output=tmp_path / "patches", sync=False, **grid).made == ()


def test_a_merger_writes_models_with_the_weights_of_each_candidate(sources: Sources) -> None:
    merger = hsa.Merger(**arguments(sources), backend="cpu", targets="attention-all")
    state = merger.merge(k=1.0)
    for weights in (1.0, [0.5] * count(sources), list(WEIGHTS[: count(sources)]), 1.0):
        tensors, oracles = expected_merge(sources, k=1.0, lam=0.1, targets="attention-all", weights=weights)
        merger.apply_(state, k=1.0, lam=0.1, weights=weights)
        for name in oracles:
            assert raw_bytes(state[name]) == raw_bytes(tensors[name]), (name, weights)


def test_equal_models_and_models_that_are_base(shared_triple: Sources, tmp_path: Path) -> None:
    """Ties in every tensor, and task vectors of zero."""
    base, primary, secondary = shared_triple.values()
    for number, others in enumerate(([base, base], [secondary, base], [secondary, secondary], [primary, primary])):
        roles = {"base": base, "primary": primary, "secondary": others[0], "model3": others[1]}
        check(roles, tmp_path / str(number), k=0.5, lam=0.4)
    roles = {"base": base, "primary": base, "secondary": base, "model3": base}
    check(roles, tmp_path / "all", k=0.5, targets="attention-all")


def test_one_secondary_has_the_whole_whatever_its_weight(shared_triple: Sources, tmp_path: Path) -> None:
    hsa.merge(**shared_triple, output=tmp_path / "plain", sync=False, lam=0.3)
    for weight in (0.1, -7.0, [0.3]):
        report = merge(shared_triple, tmp_path / "weighted", lam=0.3, weights=weight, overwrite=True)
        assert raw(tmp_path / "weighted") == raw(tmp_path / "plain")
        assert not any(
            "shares" in str(tensor.decision) and len(tensor.shares) > 1 for tensor in report.tensors.values()
        )


def raw(output: Path) -> dict[str, bytes]:
    return {name: raw_bytes(tensor) for name, tensor in read_tensors(output).items()}


# --- weights that vary, and other settings ----------------------------------------------------------------------------


def test_weights_may_follow_filters_and_layers(three: Sources, tmp_path: Path) -> None:
    """One list for each secondary; each of its values is a schedule."""
    weights = [[{"filter": "q_proj", "value": 2.0}, 1.0], [0.5, 2.5]]
    report = merge(three, tmp_path / "out", weights=weights, k=1.0, lam=0.2)
    for name, tensor in report.tensors.items():
        layer = int(name.split(".")[3])
        own = [2.0 if "q_proj" in name else 1.0, (0.5, 2.5)[layer]]
        expected, _ = expected_merge(three, weights=own, k=1.0, lam=0.2)
        assert tensor.shares == tuple(weight / sum(own) for weight in own)
        assert raw_bytes(read_tensors(tmp_path / "out")[name]) == raw_bytes(expected[name])
    assert hsa.verify(tmp_path / "out", **arguments(three)).ok
    assert hsa.verify(tmp_path / "out").ok


def test_limits_hold_for_several(three: Sources, tmp_path: Path) -> None:
    report = merge(three, tmp_path / "out", k=1.0, layers="1", exclude="*k_proj*")
    expected, oracles = expected_merge(three, k=1.0)
    inside = {name for name in oracles if ".layers.1." in name and "k_proj" not in name}
    assert report.tensors.keys() == inside
    primary = read_tensors(three["primary"])
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert raw_bytes(tensor) == raw_bytes((expected if name in inside else primary)[name]), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_overflow_of_a_blend_is_refused_and_leaves_a_model_as_it_was(
    three: Sources, tmp_path: Path, dtype: str
) -> None:
    """Weights of both signs reach farther than any of the models: bounds must know that."""
    merger = hsa.Merger(**arguments(three), backend="cpu")
    model = {name: tensor.to(getattr(torch, dtype)) for name, tensor in merger.merge().items()}
    before = {name: raw_bytes(tensor) for name, tensor in model.items()}
    far = {"k": 1.0, "lam": 0.0, "weights": [50.0, -49.999999]}
    if dtype == "float16":
        with pytest.raises(hsa.NonFiniteError, match="overflows"):
            merger.apply_(model, **far)
        assert {name: raw_bytes(tensor) for name, tensor in model.items()} == before
    else:
        merger.apply_(model, **far)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in model.values())


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"weights": [1.0, -1.0]}, "weights 1, -1 of the secondaries sum to 0"),
    ({"weights": 0.0}, "weights 0 of the secondaries sum to 0"),
    ({"weights": [0.1, 0.2, -0.3]}, "weights 0.1, 0.2, -0.3 of the secondaries sum to 0"),
    ({"weights": [[1.0, -1.0], 1.0]}, "weights -1, 1 of the secondaries sum to 0 for tensor encoder.layers.1"),
    ({"weights": [1.0]}, "weights must have as many values as there are secondaries, 2, got 1"),
    ({"weights": [1.0, 1.0, 1.0]}, "weights must have as many values as there are secondaries, 2, got 3"),
    ({"weights": [1.0, 101.0]}, r"weights of secondary 2 must be in \[-100, 100\]"),
    ({"weights": [1.0, float("nan")]}, "weights of secondary 2 must be"),
    ({"weights": []}, "weights is an empty list"),
    ({"numerics": "reference"}, "numerics 'reference' repeats the reference script, which merges 2 models, got 3"),
    ({"numerics": "reference", "weights": 2.0}, "numerics 'reference' merges one secondary, without weights"),
    ({"backend": "triton"}, "a GPU merges 2 models by method hsa, and 3 are given, .*; use backend='cpu'"),
    ({"device": "cuda"}, "a GPU merges 2 models by method hsa"),
    ({"secondary": []}, "secondary is an empty list"),
    ({"secondary": ["a"] * 8}, "method hsa merges 2 to 8 models, got 9"),
    ({"secondary_id": ["a/b"]}, "secondary_id must be as many as secondary models, got 1 for 2"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=str)
def test_what_cannot_be_merged_is_refused(three: Sources, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    given = {**arguments(three), "output": tmp_path / "out", **more}
    with pytest.raises(hsa.HsaError, match=message) as caught:
        hsa.merge(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


CANDIDATES: list[tuple[dict[str, Any], str]] = [
    ({"weights": [1.0, -1.0]}, "sum to 0"),
    ({"weights": [1.0]}, "as there are secondaries, 2, got 1"),
    ({"weights": [[1.0, -1.0], 1.0]}, "sum to 0 for tensor"),
]


@pytest.mark.parametrize(("more", "message"), CANDIDATES, ids=str)
def test_what_cannot_be_merged_is_refused_of_candidates_too(
    three: Sources, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    merger = hsa.Merger(**arguments(three), backend="cpu")
    calls: list[Callable[[], object]] = [
        lambda: merger.merge(**more),
        lambda: hsa.sweep(**arguments(three), output=tmp_path / "sweep", **more),
        lambda: hsa.inspect(**arguments(three), **more),
        lambda: hsa.merge_patch(**arguments(three), output=tmp_path / "p.safetensors", **more),
    ]
    for call in calls:
        with pytest.raises(hsa.RequestError, match=message):
            call()
    with pytest.raises(hsa.RequestError, match="a GPU merges 2 models"):
        hsa.Merger(**arguments(three), device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_lacks_a_target_is_named(three: Sources, tmp_path: Path) -> None:
    sources = with_more(three, tmp_path, 3)
    tensors = read_tensors(sources["model3"])
    del tensors["model.encoder.layers.1.self_attn.v_proj.bias"]
    write_tensors(sources["model3"], tensors)
    with pytest.raises(hsa.MismatchError, match=r"v_proj.bias is missing from model3 .*; the four must be"):
        merge(sources, tmp_path / "out")


def test_a_nan_is_found_in_every_model(three: Sources, tmp_path: Path) -> None:
    sources = with_more(three, tmp_path, 3)
    tensors = read_tensors(sources["model3"])
    tensors["model.encoder.layers.1.self_attn.v_proj.weight"][40, 3] = float("nan")
    write_tensors(sources["model3"], tensors)
    with pytest.raises(hsa.NonFiniteError, match=r"m3.*v_proj.weight, head \d holds NaN or Inf"):
        merge(sources, tmp_path / "out")
