"""Linear combinations on the CPU are their oracles, bit for bit, however a tensor is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import raw_bytes
from model_cases import ModelCase, fine_tunes, merged_in_slices, merged_whole, with_dtypes
from torch import Tensor

from hsa.backends import array_block, cpu
from hsa.backends.base import NotFinite
from hsa.errors import RequestError
from hsa.methods import gram
from hsa.methods.gram_combination import GroupCoefficients
from hsa.methods.registry import method_named
from hsa.methods.sums import block_sums, total
from hsa.reference import linear_combinations as oracle

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = ([SINGLE], [HALF], [BRAIN], [BRAIN, HALF, SINGLE])
SHAPES = [(), (1,), (1023,), (2050,), (5, 3), (7, 1), (1, 9), (33, 130), (6, 2500), (4, 3, 3), (9, 80, 3), (40, 1024)]
WEIGHTS = [0.7, -0.2, 1.3, 0.4, 0.05]

# Method, settings, numbers of models, bases.
MERGES: list[tuple[str, dict[str, Any], Sequence[int], Sequence[bool]]] = [
    ("linear", {}, (1, 2, 3, 4, 5), (False,)),
    ("linear", {"weights": WEIGHTS}, (1, 2, 3, 4, 5), (False,)),
    ("linear", {"weights": WEIGHTS, "normalize": False}, (1, 2, 5), (False,)),
    ("task_arithmetic", {"lam": 0.3}, (1, 2, 3, 4, 5), (True,)),
    ("task_arithmetic", {"weights": WEIGHTS, "lam": 1.5, "normalize": True}, (1, 2, 3, 5), (True,)),
    *[("slerp", {"t": t}, (1,), (True,)) for t in (0.0, 0.3, 1.0)],
    ("nuslerp", {}, (2,), (True, False)),
    ("nuslerp", {"weights": WEIGHTS}, (2,), (True, False)),
    ("nuslerp", {"weights": WEIGHTS, "flatten": False}, (2,), (True, False)),
    ("nuslerp", {"weights": WEIGHTS, "flatten": False, "row_wise": True}, (2,), (True, False)),
    ("multislerp", {}, (2, 3, 4, 5), (True, False)),
    ("multislerp", {"weights": WEIGHTS, "normalize_weights": False, "eps": 1e-3}, (2, 3, 5), (True, False)),
    ("karcher", {}, (2, 3, 4, 5), (False,)),
    ("karcher", {"max_iter": 2, "tol": 0.0}, (3,), (False,)),
    ("model_stock", {}, (2, 3, 4, 5), (True,)),
    ("model_stock", {"filter_wise": True}, (2, 3, 5), (True,)),
]
CASES = [
    pytest.param(name, settings, count, based, id=f"{name}-{settings}-{count}-{'base' if based else 'bare'}")
    for name, settings, counts, bases in MERGES
    for count in counts
    for based in bases
]


def settings_for(settings: dict[str, Any], count: int) -> dict[str, Any]:
    return {**settings, "weights": settings["weights"][:count]} if "weights" in settings else settings


def expected(case: ModelCase) -> Tensor:
    merged: Tensor = getattr(oracle, case.method)(case.base, case.models, **case.settings, out_dtype=case.out_dtype)
    return merged


@pytest.fixture
def small_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1,024 elements or a few rows, and products of few blocks at a time."""
    for module in (array_block, cpu):
        monkeypatch.setattr(module, "TILE", 1024)
    monkeypatch.setattr(gram, "CHUNK", 5000)


@pytest.mark.parametrize(("method", "settings", "count", "based"), CASES)
def test_the_bytes_are_the_oracles(
    method: str, settings: dict[str, Any], count: int, based: bool, small_tile: None
) -> None:
    for number, shape in enumerate(SHAPES):
        dtypes = DTYPES[(number + count) % len(DTYPES)]
        base, models = fine_tunes(shape, count, number, 0.3 if number % 2 else 0.01)
        case = ModelCase(method, base if based else None, models, settings_for(settings, count))
        case = with_dtypes(case, dtypes)
        result = raw_bytes(expected(case))
        whole, decision = merged_whole(case)
        assert whole == result, shape
        assert merged_whole(case, in_place=case.out_dtype == case.models[0].dtype)[0] == result, shape
        slices, same = merged_in_slices(case, number)
        assert (slices, same) == (result, decision), shape


@pytest.mark.parametrize(("method", "settings", "count", "based"), CASES)
def test_large_blocks_and_other_element_types_of_the_output(
    method: str, settings: dict[str, Any], count: int, based: bool
) -> None:
    for out, shape in ((SINGLE, (130, 1037)), (HALF, (17, 333)), (BRAIN, (17, 333))):
        base, models = fine_tunes(shape, count, 5)
        case = ModelCase(method, base if based else None, models, settings_for(settings, count), out)
        assert merged_whole(case)[0] == raw_bytes(expected(case))


# --- tensors that decide by special rules -----------------------------------------------------------------------------

V = torch.linspace(-3, 4, 37)
W = torch.cos(torch.arange(37.0))
ZERO = torch.zeros(37)
SPECIAL: list[tuple[str, Tensor | None, list[Tensor], dict[str, Any]]] = [
    ("slerp", V, [V * 1.001], {"t": 0.3}),
    ("slerp", V, [-V], {"t": 0.3}),
    ("slerp", ZERO, [V], {"t": 0.3}),
    ("slerp", ZERO, [-ZERO], {"t": 0.3}),
    ("nuslerp", None, [V, -V], {}),
    ("nuslerp", None, [V, -3 * V], {"weights": [3, 1]}),
    ("nuslerp", V, [V, W], {}),
    ("nuslerp", None, [ZERO, -ZERO], {}),
    ("nuslerp", None, [V * 1e-9, W * 1e-10], {}),
    ("nuslerp", None, [V, W], {"weights": [1, -1]}),
    ("multislerp", V, [2 * V, ZERO], {}),
    ("multislerp", V, [V, V, V], {}),
    ("multislerp", None, [V, ZERO, -ZERO], {"eps": 0.0}),
    ("karcher", None, [V, -V], {}),
    ("karcher", None, [ZERO, -ZERO], {}),
    ("karcher", None, [V, ZERO, W], {"tol": 1.0}),
    ("karcher", None, [V, -3 * V, W], {"max_iter": 0}),
    ("karcher", None, [V, V, V], {"tol": 0.0}),
    ("model_stock", V, [V + W, V - W], {}),
    ("model_stock", V, [V, V], {}),
    ("model_stock", ZERO, [V * 1e-6, W * 1e-6], {}),
    ("model_stock", V, [V, W], {"filter_wise": True}),
    ("task_arithmetic", V, [W, ZERO], {"weights": [1, -1], "normalize": True}),
    ("linear", None, [V, W], {"weights": [0, 1]}),
]


@pytest.mark.parametrize("shape", [(37,), (37, 1), (1, 37)], ids=str)
@pytest.mark.parametrize(
    ("method", "base", "models", "settings"),
    SPECIAL,
    ids=[f"{number}-{each[0]}" for number, each in enumerate(SPECIAL)],
)
def test_special_tensors(
    method: str, base: Tensor | None, models: list[Tensor], settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    start = None if base is None else base.reshape(shape)
    case = ModelCase(method, start, [model.reshape(shape) for model in models], settings)
    result = expected(case)
    assert bool(result.isfinite().all())
    assert merged_whole(case)[0] == raw_bytes(result)


def test_signed_zeros_are_kept_as_the_formula_gives_them() -> None:
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0])
    for method, base, models in (
        ("linear", None, [zeros, -zeros]),
        ("model_stock", zeros, [-zeros, torch.tensor([1.0, -1.0, 0.0, 0.0])]),
        ("nuslerp", zeros, [zeros, torch.tensor([1.0, -1.0, 0.0, 0.0])]),
    ):
        case = ModelCase(method, base, models)
        assert merged_whole(case)[0] == raw_bytes(expected(case))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["slerp", "nuslerp", "model_stock", "karcher"])
def test_a_source_that_is_not_finite_is_named(method: str, value: float) -> None:
    base, models = fine_tunes((5, 7), 1 if method == "slerp" else 2, 1)
    models[-1][3, 2] = value
    case = ModelCase(method, None if method == "karcher" else base, models, {"t": 0.5} if method == "slerp" else {})
    with pytest.raises(NotFinite) as caught:
        merged_whole(case)
    assert caught.value.role == f"model{len(models)}"


def test_task_vectors_that_overflow_are_refused() -> None:
    case = ModelCase("model_stock", torch.full((3,), -3e38), [torch.full((3,), 3e38), torch.zeros(3)])
    with pytest.raises(NotFinite) as caught:
        merged_whole(case)
    assert caught.value.role is None


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("slerp", {"t": 1.5}, r"t must be in \[0, 1\], got 1.5"),
        ("slerp", {"t": [0.0, math.nan]}, r"entry 2 of t must be in \[0, 1\]"),
        ("nuslerp", {"flatten": 1}, "flatten"),
        ("multislerp", {"eps": -1e-9}, "eps must be finite and at least 0, got -1e-09"),
        ("karcher", {"max_iter": -1}, "max_iter must be a whole number from 0 to 10000, got -1"),
        ("karcher", {"tol": math.inf}, "tol must be finite and at least 0, got inf"),
    ],
)
def test_settings_out_of_range(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        method_named(method).Settings(**settings)


@pytest.mark.parametrize(
    ("method", "base", "models", "message"),
    [
        ("slerp", False, 1, "method slerp needs base"),
        ("slerp", True, 2, "method slerp merges 1 models?, got 2"),
        ("nuslerp", True, 3, "method nuslerp merges 2 models, got 3"),
        ("multislerp", False, 1, "method multislerp merges 2 to 8 models, got 1"),
        ("karcher", True, 3, "method karcher takes no base"),
        ("model_stock", False, 2, "method model_stock needs base"),
        ("model_stock", True, 1, "method model_stock merges 2 to 8 models, got 1"),
        ("linear", True, 2, "method linear takes no base"),
    ],
)
def test_sources_that_a_method_does_not_take(method: str, base: bool, models: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        method_named(method).contract.check(method, base=base, models=models)


@pytest.mark.parametrize("weights", [[1, -1, 0], [0.1, 0.2, -0.3], 0])
@pytest.mark.parametrize(("method", "switch"), [("linear", "normalize"), ("multislerp", "normalize_weights")])
def test_weights_that_cancel_are_refused_where_they_are_normalized(method: str, switch: str, weights: Any) -> None:
    models = [V, W, V + W]
    with pytest.raises(RequestError, match=rf"weights sum to 0 for tensor .*, or {switch}=False"):
        merged_whole(ModelCase(method, None, models, {"weights": weights}))
    merged_whole(ModelCase("linear", None, models, {"weights": weights, "normalize": False}))


def test_directions_that_cancel_are_refused_with_the_tensors_name() -> None:
    with pytest.raises(
        RequestError, match=r"directions of the models cancel in tensor encoder\.layers\.1\.fc1\.weight"
    ):
        merged_whole(ModelCase("multislerp", None, [V, -V, ZERO]))


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "settings", "count", "based"), CASES)
def test_records_give_decisions_back(method: str, settings: dict[str, Any], count: int, based: bool) -> None:
    base, models = fine_tunes((12, 40), count, 3)
    case = ModelCase(method, base if based else None, models, settings_for(settings, count))
    result, decision = merged_in_slices(case, 1)
    own, task = method_named(method), case.task()
    entry = own.as_dict(decision)
    recorded = own.from_dict(entry, 1, case.made_settings())
    assert (recorded, own.as_dict(recorded)) == (decision, entry)
    assert len(str(entry)) <= len(str(own.as_dict(own.longest(task, 1.2345678901234567e-100))))
    assert merged_in_slices(case, 2, recorded)[0] == result
    bound = own.largest_result(
        task,
        case.worker().measure(task, {}) if not task.passes else _measured(case),
        case.made_settings(),
        {role: float(tensor.abs().max()) for role, tensor in case.sources.items()},
    )
    largest = float(expected(replace(case, out=SINGLE)).abs().max())
    assert bound is not None and largest <= bound * (1 + 1e-6)


def _measured(case: ModelCase) -> Any:
    from cpu_cases import buffer

    return case.worker().measure(case.task(), {role: buffer(tensor) for role, tensor in case.sources.items()})


@pytest.mark.parametrize(
    "entry",
    [
        {"groups": 12, "models": 2, "digest": "0" * 63},
        {"groups": 12, "models": 2, "digest": "Z" * 64},
        {"groups": -1, "models": 2, "digest": "0" * 64},
        {"groups": 12, "digest": "0" * 64},
        {"coefficients": [1e39, 0.0]},
        {"coefficients": ["1", 0.0]},
        {},
    ],
    ids=str,
)
def test_records_that_no_merge_wrote(entry: dict[str, Any]) -> None:
    method = method_named("model_stock")
    with pytest.raises((KeyError, TypeError, ValueError)):
        method.from_dict(entry, 1, method.Settings(filter_wise=True))


def test_one_bit_of_a_rows_coefficient_changes_the_digest() -> None:
    values = np.array([[0.25, 0.5], [0.1, 0.2]])
    other = values.copy()
    other[1, 0] += 2.0**-26
    assert GroupCoefficients.of(values) == GroupCoefficients.of(values.copy())
    assert GroupCoefficients.of(values) != GroupCoefficients.of(other)


# --- sums -------------------------------------------------------------------------------------------------------------


def hard(rows: int, columns: int, vectors: int) -> list[Any]:
    """Float32 matrices of very different magnitudes, so that another order of sums gives other bits."""
    generator = np.random.default_rng(rows * columns)
    return [
        (generator.standard_normal((rows, columns)) * 10.0 ** generator.integers(-8, 9, (rows, columns))).astype("f4")
        for _ in range(vectors)
    ]


@pytest.mark.parametrize("chunk", [1, 3000, 1 << 18])
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 512, 513, 1023, 1024, 1025, 3500])
def test_products_are_summed_like_any_other_sums(columns: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "CHUNK", chunk)
    vectors = hard(3, columns, 3)
    found = gram.row_products(vectors)
    assert np.array_equal(gram.totals(found), [[total([row]) for row in pair] for pair in found])
    for pair, (one, two) in zip(found, gram.pairs_of(3), strict=True):
        for row in range(3):
            products = vectors[one][row].astype(np.float64) * vectors[two][row]
            assert np.array_equal(pair[row], block_sums(products))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 11, 64, 100])
def test_runs_of_rows_give_the_same_sums_wherever_they_are_cut(rows: int) -> None:
    vectors = hard(rows, 5, 2)
    whole = gram.merged_runs(gram.column_products(vectors, 0))
    for step in (1, 2, 3, 5, 8, rows):
        runs = [
            run
            for first in range(0, rows, step)
            for run in gram.column_products([vector[first : first + step] for vector in vectors], first)
        ]
        assert np.array_equal(gram.merged_runs(runs), whole)
