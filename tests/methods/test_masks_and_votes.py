"""Settings, plans, records and findings of the methods that mask and vote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import read_tensors
from masking_models import MASKING, METHODS, RANDOM, chosen, write_family

import hsa
from hsa.architectures.base import Partition, TensorInfo
from hsa.backends.base import TaskBuffers
from hsa.backends.cpu import CpuWorker
from hsa.errors import RequestError
from hsa.methods.base import Method
from hsa.methods.registry import method_named
from hsa.methods.tensors import TensorTask
from hsa.methods.votes import Blend, subsets
from hsa.reference import masks_and_votes as oracle

TRIMMING = ("ties", "breadcrumbs", "breadcrumbs_ties")
REQUIRED: dict[str, dict[str, Any]] = {"nearswap": {"t": 0.1}}


def settings_of(method: str, **options: Any) -> Any:
    return method_named(method).Settings(**REQUIRED.get(method, {}), **options)


def task_of(
    method: Method[Any, Any], settings: Any, shape: tuple[int, ...], models: int, code: str = "F32"
) -> TensorTask:
    info = TensorInfo("x.weight", code, shape)
    treatment = method.treatment(info, None, settings)
    return TensorTask(
        name=info.name,
        place=None,
        layers=0,
        shape=shape,
        partition=Partition(),
        sources=dict.fromkeys(("base", *(f"model{n + 1}" for n in range(models))), info),
        anchor="model1",
        out_code="F32",
        output_name=info.name,
        passes=treatment.passes,
        layout=treatment.layout,
        numbers=tuple(range(models)),
        models_given=models,
    )


def decided(name: str, base: torch.Tensor, models: list[torch.Tensor], **options: Any) -> tuple[Any, torch.Tensor]:
    """The decision and the result for one float32 tensor."""
    method, settings = method_named(name), settings_of(name, **options)
    task = task_of(method, settings, tuple(base.shape), len(models))
    roles = ("base", *(f"model{n + 1}" for n in range(len(models))))
    buffers = {
        role: tensor.reshape(-1).numpy().view(np.uint8) for role, tensor in zip(roles, [base, *models], strict=True)
    }
    out = np.full(base.numel() * 4, 0xA5, np.uint8)
    merged = CpuWorker(method, settings).merge(TaskBuffers(task, buffers, out))
    return merged.decision, torch.from_numpy(out.view(np.float32)).reshape(base.shape)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *((method, {"density": 1.5}, "density must be in [0, 1], got 1.5") for method in MASKING),
        ("ties", {"density": -0.1}, "density must be in [0, 1], got -0.1"),
        ("ties", {"density": [0.5, 2.0]}, "density of model 2 must be in [0, 1], got 2.0"),
        ("ties", {"rescale": "l2"}, "rescale must be one of none, l1, density, or True or False, got 'l2'"),
        ("ties", {"rescale": 1}, "rescale must be one of none, l1, density, or True or False, got 1"),
        ("breadcrumbs", {"gamma": 1.5}, "gamma must be in [0, 1], got 1.5"),
        ("dare_linear", {"seed": -1}, "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        ("dare_ties", {"seed": 0.5}, "seed must be a whole number"),
        ("sce", {"select_topk": 2}, "select_topk must be in [0, 1], got 2"),
        ("ram", {"epsilon": -1e-5}, "epsilon must be finite and at least 0, got -1e-05"),
        ("ties", {"lam": math.inf}, "lam must be finite, got inf"),
        (
            "della",
            {"density": 0.9},
            "density 0.9 and epsilon 0.15 give probabilities from 0.75 to 1.05, expected numbers between 0 and 1; give "
            "a smaller epsilon",
        ),
        ("della_linear", {"density": 0.1}, "density 0.1 and epsilon 0.15 give probabilities from -0.05 to 0.25"),
        ("della_linear", {"density": 0.5, "epsilon": 0.5}, "give probabilities from 0 to 1, expected"),
    ],
)
def test_settings_out_of_range_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        settings_of(method, **options)
    assert message in str(caught.value)


def test_rescale_takes_mergekits_words() -> None:
    assert [settings_of("ties", rescale=value).rescale for value in (True, False, "density")] == [
        "l1",
        "none",
        "density",
    ]
    assert settings_of("dare_ties").rescale == "l1" and settings_of("della").normalize is True


def test_density_0_and_1_need_no_epsilon() -> None:
    for density in (0, 1):
        assert settings_of("della", density=density, epsilon=0.9).density == density


PASSES = [
    ("ties", {}, 0),
    ("ties", {"density": 0.5}, 2),
    ("ties", {"density": 0.5, "rescale": True}, 3),
    ("ties", {"density": 1.0, "rescale": True}, 0),
    ("ties", {"density": [1, 0.9]}, 2),
    ("ties", {"density": [{"filter": "fc", "value": 0.5}, 1]}, 2),
    ("ties", {"density": {"a": 1, "b": 1}}, 0),
    ("breadcrumbs", {"density": 0.5}, 2),
    ("dare_linear", {"density": 0.5}, 2),
    ("dare_linear", {"density": 0.5, "rescale": "density"}, 0),
    ("della", {"density": 0.5, "rescale": False}, 0),
    ("sce", {}, 1),
    ("sce", {"select_topk": 0.5}, 3),
    ("ram", {}, 0),
    ("nearswap", {}, 0),
]


@pytest.mark.parametrize(("method", "options", "passes"), PASSES)
def test_a_tensor_is_measured_as_often_as_the_settings_need(method: str, options: dict[str, Any], passes: int) -> None:
    settings = settings_of(method, **options)
    assert task_of(method_named(method), settings, (4, 4), 2).passes == passes
    everyone = settings.for_all_candidates()
    assert everyone.serves(settings)
    assert task_of(method_named(method), everyone, (4, 4), 2).passes >= passes


def test_plans_are_shared_by_settings_with_as_many_passes() -> None:
    half, third, full = (settings_of("ties", density=density) for density in (0.5, 0.3, 1.0))
    assert half.structure() == third.structure() != full.structure()
    assert half.serves(third) and half.serves(full) and not full.serves(half)
    assert not half.serves(settings_of("ties", density=0.5, dtype="float16"))
    assert not half.serves(settings_of("breadcrumbs", density=0.5))
    assert not settings_of("sce").serves(settings_of("sce", select_topk=0.5))


# --- decisions -------------------------------------------------------------------------------------------------------


def test_ties_records_thresholds_and_how_many_elements_were_kept() -> None:
    base = torch.zeros(8)
    one, two = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, 8]), torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 0.5])
    decision, _ = decided("ties", base, [one, two], density=0.5, weights=[1, 2])
    assert method_named("ties").as_dict(decision) == {
        "weights": [1.0, 2.0],
        "rescale": [1.0, 1.0],
        "lambda": 1.0,
        "thresholds": [5.0, 1.0],
        "kept": [4, 7],
    }
    decision, result = decided("ties", base, [one, two], density=[0.1, 1.0])
    assert (decision.thresholds, decision.kept) == ((None, 0.0), (0, 8))
    assert result.equal(two)


def test_breadcrumbs_records_both_ends() -> None:
    model = torch.arange(1.0, 11.0)
    decision, _ = decided("breadcrumbs", torch.zeros(10), [model], density=0.5, gamma=0.2, rescale=True)
    entry = method_named("breadcrumbs").as_dict(decision)
    assert (entry["thresholds"], entry["limits"], entry["kept"]) == ([4.0], [8.0], [5])
    assert entry["rescale"] == [55 / 30]


def test_random_methods_record_seed_and_probability() -> None:
    base, model = torch.zeros(64), torch.ones(64)
    decision, result = decided("dare_linear", base, [model], density=0.25, seed=7)
    entry = method_named("dare_linear").as_dict(decision)
    assert (entry["seed"], entry["probabilities"]) == (7, [0.25])
    kept = int(result.count_nonzero())
    assert entry["rescale"] == [64 / kept]
    decision, _ = decided("della", base, [model], density=0.25, epsilon=0.1)
    assert method_named("della").as_dict(decision)["spreads"] == [0.1]


def test_sce_records_what_is_selected() -> None:
    one, two = torch.tensor([3.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, -3.0, 0.0, 2.0])
    decision, _ = decided("sce", torch.zeros(4), [one, two], select_topk=0.5)
    assert method_named("sce").as_dict(decision) == {"threshold": 4.0, "kept": 1, "shares": [0.1, 0.9]}


@pytest.mark.parametrize("method", METHODS)
def test_a_record_gives_the_decision_back(method: str) -> None:
    options: dict[str, Any] = {"density": 0.5, "rescale": True} if method in MASKING else {}
    models = [torch.randn(40, 30) for _ in range(1 if method == "nearswap" else 3)]
    decision, _ = decided(method, torch.randn(40, 30), models, **options)
    own, settings = method_named(method), settings_of(method, **options)
    entry = json.loads(json.dumps(own.as_dict(decision)))
    assert own.as_dict(own.from_dict(entry, 1, settings)) == entry
    task = task_of(own, settings, (40, 30), len(models))
    longest = own.as_dict(own.longest(task, -1.2345678901234567e-308))
    assert longest.keys() == entry.keys()
    assert len(json.dumps(longest)) >= len(json.dumps(entry))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ties", {"thresholds": [0.5]}),
        ("ties", {"thresholds": [-0.5, 0.5]}),
        ("ties", {"thresholds": [True, 0.5]}),
        ("ties", {"kept": [1]}),
        ("ties", {"kept": [-1, 2]}),
        ("ties", {"weights": []}),
        ("ties", {"weights": [1.0] * 60, "rescale": [1.0] * 60, "thresholds": [0.0] * 60, "kept": [1] * 60}),
        ("sce", {"shares": [0.01] * 60}),
        ("ties", {"weights": ["1", 1]}),
        ("ties", {"rescale": [1.0]}),
        ("ties", {"rescale": [0.0, 1.0]}),
        ("ties", {"rescale": [-1.0, 1.0]}),
        ("ties", {"lambda": None}),
        ("ties", {"lambda": 1e300}),
        ("breadcrumbs", {"limits": [1.0]}),
        ("breadcrumbs", {"limits": ["a", 1.0]}),
        ("dare_ties", {"seed": -1}),
        ("dare_ties", {"seed": 1.5}),
        ("dare_ties", {"probabilities": [0.5, 1.5]}),
        ("dare_ties", {"probabilities": [0.5]}),
        ("della", {"spreads": [0.1]}),
        ("della", {"spreads": None}),
        ("sce", {"shares": []}),
        ("sce", {"shares": [0.5, 1.5]}),
        ("sce", {"threshold": -1.0}),
        ("sce", {"kept": 0.5}),
        ("ram", {"epsilon": -1.0}),
        ("nearswap", {"t": 1e39}),
    ],
)
def test_what_cannot_be_a_decision_is_refused(method: str, changes: dict[str, Any]) -> None:
    options: dict[str, Any] = {"density": 0.5} if method in MASKING else {}
    models = [torch.randn(64) for _ in range(1 if method == "nearswap" else 2)]
    decision, _ = decided(method, torch.zeros(64), models, **options)
    own, settings = method_named(method), settings_of(method, **options)
    entry = own.as_dict(decision)
    own.from_dict(entry, 1, settings)
    with pytest.raises((KeyError, TypeError, ValueError)):
        own.from_dict({**entry, **changes}, 1, settings)
    for key in entry:
        with pytest.raises((KeyError, TypeError, ValueError)):
            own.from_dict({name: value for name, value in entry.items() if name != key}, 1, settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lam", [1.0, -3.0])
def test_merged_values_are_within_the_bound(method: str, lam: float) -> None:
    options: dict[str, Any] = {"density": 0.5, "lam": lam, "rescale": "density"} if method in MASKING else {}
    random = torch.Generator().manual_seed(3)
    base = torch.randn(500, generator=random)
    models = [10 * torch.randn(500, generator=random) for _ in range(1 if method == "nearswap" else 3)]
    _, result = decided(method, base, models, **options)
    own, settings = method_named(method), settings_of(method, **options)
    task = task_of(own, settings, (500,), len(models))
    roles = ("base", "model1", "model2", "model3")
    largest = {role: float(tensor.abs().max()) for role, tensor in zip(roles, [base, *models], strict=False)}
    bound = own.largest_result(task, None, settings, largest)
    assert bound is not None
    assert float(result.abs().max()) <= bound * (1 + 1e-6)


# --- votes -----------------------------------------------------------------------------------------------------------


def test_shares_are_those_of_every_set_of_models() -> None:
    blend = Blend(weights=(1.0, 2.0), factors=(1.0, 1.0), lam=3.0, normalize=True)
    assert list(subsets(blend.weights)) == [(), (2.0,), (1.0,), (1.0, 2.0)]
    assert blend.shares == (3.0, 1.5, 3.0, 1.0)
    assert Blend((1.0, -1.0), (1.0, 1.0), 3.0, True).shares[-1] == 3.0  # they cancel
    assert Blend((0.1, 0.2, -0.3), (1.0, 1.0, 1.0), 1.0, True).shares[-1] == 1.0
    assert Blend((1.0, 2.0), (4.0, 5.0), 3.0, False).shares == (3.0,)


def test_eight_models_vote() -> None:
    random = torch.Generator().manual_seed(1)
    base = torch.randn(3000, generator=random)
    models = [base + torch.randn(3000, generator=random) for _ in range(8)]
    weights = [0.3, 1, -2, 0.7, 1.1, 0, 1e-3, 5]
    _, result = decided("ties", base, models, density=0.7, weights=weights)
    assert result.equal(oracle.ties(base, models, density=0.7, weights=weights))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (), (3, 0), (1, 1), (1, 7), (7, 1), (2, 3, 5)], ids=str)
def test_small_shapes(method: str, shape: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"density": 0.5, "rescale": True} if method in MASKING else {}
    options |= {"select_topk": 0.5} if method == "sce" else {}
    random = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(shape, generator=random) for _ in range(2 if method == "nearswap" else 4))
    if not base.numel():
        models = [base.clone() for _ in models]
    _, result = decided(method, base, models, **options)
    names = {"name": "x.weight"} if method in RANDOM else {}
    expected = getattr(oracle, method)(base, models, **names, **REQUIRED.get(method, {}), **options)
    assert result.view(torch.int32).equal(expected.view(torch.int32)) if shape else result.equal(expected)


# --- through the public edge ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_family(tmp_path_factory.mktemp("family"), ["float32"], 3)


def merge(method: str, sources: dict[str, Path], output: Path, **options: Any) -> hsa.MergeReport:
    base, *models = sources.values()
    return hsa.merge(method=method, base=base, models=models, output=output, sync=False, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_base_and_enough_models_are_needed(method: str, family: dict[str, Path], tmp_path: Path) -> None:
    models = list(family.values())[1:]
    with pytest.raises(RequestError, match=f"method {method} needs base, the model that the others were trained from"):
        hsa.merge(method=method, models=models[:1], output=tmp_path / "out", **REQUIRED.get(method, {}))
    count, span = (2, "1 model, got 2") if method == "nearswap" else (1, "2 to 8 models, got 1")
    if method_named(method).contract.least > 1 or method == "nearswap":
        with pytest.raises(RequestError, match=f"method {method} merges {span}"):
            merge(method, chosen(family, count), tmp_path / "out", **REQUIRED.get(method, {}))
    assert not (tmp_path / "out").exists()


def test_nearswap_needs_t(family: dict[str, Path], tmp_path: Path) -> None:
    expected = "method nearswap needs t; give it: How far base's values may move"
    with pytest.raises(RequestError, match=expected):
        merge("nearswap", chosen(family, 1), tmp_path / "out")
    base, *models = chosen(family, 1).values()
    merger = hsa.Merger(method="nearswap", base=base, models=models)
    with pytest.raises(RequestError, match=expected):
        merger.merge()
    assert merger.merge(t=0.0).keys() == read_tensors(base).keys()


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_a_density_by_layers_must_fit_epsilon_everywhere(method: str, family: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"of tensor .*fc1.* give probabilities from 0\.75"):
        merge(method, family, tmp_path / "out", density=[{"filter": "fc1", "value": 0.9}, 0.5])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", TRIMMING)
def test_a_density_that_keeps_nothing_of_a_tensor_is_noted(
    method: str, family: dict[str, Path], tmp_path: Path
) -> None:
    report = merge(method, family, tmp_path / "out", density=0.01)  # of vectors with 64 elements
    (note,) = (note for note in report.notes if "density" in note)
    assert note.startswith("int(density * n) is 0 for a model of ") and " and " in note
    entry = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["targets"]["model.encoder.layer_norm.bias"]
    assert entry["decision"]["kept"] == [0, 0, 0]
    bias = read_tensors(tmp_path / "out")["model.encoder.layer_norm.bias"]
    assert bias.equal(read_tensors(family["base"])["model.encoder.layer_norm.bias"])
    assert not any("density" in note for note in merge(method, family, tmp_path / "all", density=0.5).notes)


def test_values_by_layer_pattern_and_model(family: dict[str, Path], tmp_path: Path) -> None:
    """What a tensor is merged with is what the settings say for it, by name, and for each model."""
    density = [[{"filter": "fc1", "value": 0.25}, 0.5], 1.0, {**dict.fromkeys(read_tensors(family["base"]), 0.75)}]
    merge("ties", family, tmp_path / "out", density=density, weights=[1, 2, 0.5], normalize=False)
    found = read_tensors(tmp_path / "out")
    base, *models = (read_tensors(path) for path in family.values())
    for name in ("model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc2.weight"):
        shares = [0.25 if "fc1" in name else 0.5, 1.0, 0.75]
        expected = oracle.ties(
            base[name], [model[name] for model in models], density=shares, weights=[1, 2, 0.5], normalize=False
        )
        assert found[name].equal(expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_card_says_how_and_after_whom(method: str, family: dict[str, Path], tmp_path: Path) -> None:
    own = method_named(method)
    merge(method, chosen(family, 1 if method == "nearswap" else 3), tmp_path / "out", **REQUIRED.get(method, {}))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert own.title in card and own.formula in card and own.source in card


def test_a_card_has_the_formula_of_its_settings(family: dict[str, Path], tmp_path: Path) -> None:
    merge("ties", family, tmp_path / "out", density=0.5, normalize=False, rescale="density")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        "`B + lambda * sum(w_i * f_i * trim(M_i - B)), the sum over the models that have the elected sign, "
        "which is that of sum(w_i * f_i * trim(M_i - B)) over all models, "
        "trim keeps the int(density * n) largest of n elements, f_i = 1 / density`"
    ) in card


def test_models_that_cancel_leave_base(family: dict[str, Path], tmp_path: Path) -> None:
    base, model = family["base"], family["model1"]
    for method in ("dare_linear", "breadcrumbs", "della_linear"):
        output = tmp_path / method
        hsa.merge(method=method, base=base, models=[model, model], weights=[1, -1], output=output, sync=False)
        found, start = read_tensors(output), read_tensors(base)
        assert all(torch.equal(found[name], start[name]) for name in start)
