"""Parameters: their ranges, how many heads they keep, and the coefficient of a layer."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsa.errors import RequestError
from hsa.methods.hsa import HsaSettings
from hsa.methods.hsa_formula import keep_count, layer_coefficient
from hsa.planning.tasks import refuse_unknown_names

NAME = "encoder.layers.0.self_attn.q_proj.weight"
NOT_NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, True, "0.5", None, [0.5], 1j)


def test_the_defaults_are_the_papers() -> None:
    assert HsaSettings().as_dict() == {
        "k": 0.6,
        "lambda": 0.5,
        "alpha": 0.2,
        "targets": "encoder-qkv",
        "attention_scale": 1.0,
        "non_attention_scale": 1.0,
        "num_heads": None,
        "num_layers": None,
        "numerics": "exact",
        "load_dtype": None,
        "dtype": "auto",
    }


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        HsaSettings().k = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "values", "limits"),
    [
        ("k", (-0.01, -1, 100.01, 1000), r"in \[0, 100\]"),
        ("lam", (-0.01, 1.01, 2), r"in \[0, 1\]"),
        ("alpha", (-0.01, -5), "finite and at least 0"),
        ("attention_scale", (), "finite"),
        ("non_attention_scale", (), "finite"),
    ],
)
def test_numbers_out_of_range(name: str, values: tuple[Any, ...], limits: str) -> None:
    for value in (*values, *NOT_NUMBERS):
        with pytest.raises(RequestError, match=rf"^{name} must be (a number )?{limits}, got "):
            HsaSettings(**{name: value})
        if name in ("k", "lam", "alpha"):
            with pytest.raises(RequestError, match=rf"^{name} of '{NAME}' must be (a number )?{limits}, got "):
                HsaSettings(**{name: {NAME: value}})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("k", (0, 0.0, -0.0, 1, 1.5, 60, 100, 100.0, 5e-324)),
        ("lam", (0, 1, 0.5)),
        ("alpha", (0, 0.2, 3, 1e300)),
        ("attention_scale", (0, -1, 2.5)),
        ("non_attention_scale", (0, -1, 2.5)),
        ("num_heads", (None, 1, 20)),
        ("num_layers", (None, 1, 32)),
        ("targets", ("encoder-qkv", "attention-qkv", "attention-all")),
        ("numerics", ("exact", "reference")),
        ("dtype", ("auto", "float32", "float16", "bfloat16")),
    ],
)
def test_values_in_range(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        shown = {"lam": "lambda"}.get(name, name)
        assert HsaSettings(**{name: value}).as_dict()[shown] == value


@pytest.mark.parametrize("name", ["num_heads", "num_layers"])
@pytest.mark.parametrize("value", [0, -1, 4.0, True, "4", math.nan])
def test_counts(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be a whole number from 1 to 10000, got "):
        HsaSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("targets", "encoder-qkv, attention-qkv, attention-all"),
        ("numerics", "exact, reference"),
        ("dtype", "auto, float32, float16, bfloat16"),
        ("load_dtype", "auto, float32"),
    ],
)
@pytest.mark.parametrize("value", ["", "Exact", "float64", 1, ["exact"], {}])
def test_choices(name: str, choices: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be one of {choices}, got "):
        HsaSettings(**{name: value, **({"numerics": "reference"} if name == "load_dtype" else {})})


def test_load_dtype_means_nothing_in_exact_numerics() -> None:
    with pytest.raises(RequestError, match=r"load_dtype .*numerics 'reference' alone"):
        HsaSettings(load_dtype="float32")
    assert HsaSettings(load_dtype="auto").as_dict()["load_dtype"] is None
    assert HsaSettings(numerics="reference", load_dtype="float32").as_dict()["load_dtype"] == "float32"
    assert HsaSettings(numerics="reference").as_dict()["load_dtype"] == "auto"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reference_numerics_write_bases_dtype(dtype: Any) -> None:
    with pytest.raises(RequestError, match=f"dtype must be 'auto', got '{dtype}'"):
        HsaSettings(numerics="reference", dtype=dtype)


# Per tensor ------------------------------------------------------------------------------------------------


def test_a_number_holds_for_every_tensor() -> None:
    config = HsaSettings(k=60, lam=1, alpha=0)
    assert (config.of("k", NAME), config.of("lam", NAME), config.of("alpha", NAME)) == (60.0, 1.0, 0.0)


@pytest.mark.parametrize("key", [NAME, f"model.{NAME}"])
def test_a_mapping_is_read_under_both_name_forms(key: str) -> None:
    config = HsaSettings(k={key: 0.25}, lam={key: 0.5}, alpha={key: 2})
    assert (config.of("k", NAME), config.of("lam", NAME), config.of("alpha", NAME)) == (0.25, 0.5, 2.0)
    refuse_unknown_names(config, {NAME})
    assert config.as_dict()["alpha"] == {key: 2.0}


def test_a_mapping_must_name_every_target_and_no_other() -> None:
    config = HsaSettings(lam={NAME: 0.5})
    with pytest.raises(RequestError, match=r"lam is given per tensor .* target tensor encoder\.layers\.1"):
        config.of("lam", "encoder.layers.1.self_attn.q_proj.weight")
    with pytest.raises(RequestError, match=f"lam is given for '{NAME}', which is no target of 'encoder-qkv'"):
        refuse_unknown_names(config, {"encoder.layers.1.self_attn.q_proj.weight"})


# Heads kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "heads", "keep"),
    [
        (0.6, 6, 4),
        (0.6, 8, 5),
        (0.6, 12, 7),
        (0.6, 16, 10),
        (0.6, 20, 12),
        (60, 8, 5),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.5, 1, 1),
        (0.25, 6, 2),
        (0.25, 10, 2),
        (0.01, 20, 1),
        (5e-324, 20, 1),
        (0, 20, 0),
        (-0.0, 20, 0),
        (1, 20, 20),
        (1.0, 20, 20),
        (1.5, 20, 1),
        (99, 20, 20),
        (100, 20, 20),
        (math.nextafter(1, 0), 3, 3),
        (math.nextafter(1, 2), 20, 1),
    ],
)
def test_keep_count(k: float, heads: int, keep: int) -> None:
    assert keep_count(k, heads) == keep


@settings(deadline=None)
@given(k=st.floats(0, 100), heads=st.integers(1, 64))
def test_keep_count_is_within_one_half_of_the_share(k: float, heads: int) -> None:
    keep = keep_count(k, heads)
    assert isinstance(keep, int)
    assert (keep == 0) == (k == 0 or (k > 1 and k / 100 == 0))
    share = Fraction(k) / (100 if k > 1 else 1)
    assert keep == 1 or abs(keep - share * heads) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert 0 <= keep <= heads


@settings(deadline=None)
@given(ks=st.tuples(st.floats(0, 1), st.floats(0, 1)), heads=st.integers(1, 64))
def test_a_larger_share_never_keeps_fewer(ks: tuple[float, float], heads: int) -> None:
    assert keep_count(min(ks), heads) <= keep_count(max(ks), heads)


# The coefficient of a layer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "alpha", "layer", "layers", "expected"),
    [
        (0.5, 0.2, 5, 6, 0.5**0.2),
        (0.5, 0.2, 0, 6, 0.5 ** (0.2 * (1 / 6))),
        (0.5, 1.0, 1, 4, math.sqrt(0.5)),
        (0.25, 0.5, 3, 4, 0.5),
        (1.0, 0.7, 2, 4, 1.0),
        (0.3, 0.0, 2, 4, 1.0),
        (0.0, 0.0, 2, 4, 1.0),
        (0.0, 0.2, 0, 4, 0.0),
        (0.5, 1e300, 0, 4, 0.0),
    ],
)
def test_layer_coefficient(lam: float, alpha: float, layer: int, layers: int, expected: float) -> None:
    assert layer_coefficient(lam, alpha, layer, layers) == expected


@settings(deadline=None)
@given(lam=st.floats(0, 1), alpha=st.floats(0, 10), layers=st.integers(1, 40))
def test_the_coefficient_stays_in_range_and_falls_with_depth(lam: float, alpha: float, layers: int) -> None:
    found = [layer_coefficient(lam, alpha, layer, layers) for layer in range(layers)]
    assert all(0.0 <= value <= 1.0 for value in found)
    assert found == sorted(found, reverse=True)
