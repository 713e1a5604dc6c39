"""Grids: decimal ranges with their ends, and names that belong to a point whatever grid it is in."""

from __future__ import annotations

import pytest

from hsa import RequestError, grid
from hsa.grid import GridPoint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.6", (0.6,)),
        ("0.1,0.3", (0.1, 0.3)),
        ("0:1:0.1", tuple(n / 10 for n in range(11))),
        ("0:1:0.25", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("0:1:0.3", (0.0, 0.3, 0.6, 0.9)),
        ("0.5:0.5:1", (0.5,)),
        (" 0.2 , 0.4:0.6:0.1 ", (0.2, 0.4, 0.5, 0.6)),
        ("1e-3", (0.001,)),
        ("20,60", (20.0, 60.0)),
    ],
)
def test_numbers(text: str, expected: tuple[float, ...]) -> None:
    """Every value is the float of its decimal: no sum of rounded steps."""
    assert grid.numbers("lambda", text) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "0:1", "0:1:0", "0:1:-0.1", "1:0:0.1", "0:1:0.1:2", "nan", "inf", "0,,1", "1e9999"]
)
def test_bad_numbers_are_refused_by_name(text: str) -> None:
    with pytest.raises(RequestError, match=r"^alpha takes numbers such as 0.1,0.3 or start:stop:step"):
        grid.numbers("alpha", text)


def test_a_mistyped_step_does_not_fill_the_memory() -> None:
    with pytest.raises(RequestError, match="1000000001 values, at most 10000"):
        grid.numbers("k", "0:1:0.000000001")


def test_points_are_every_combination_once_in_order() -> None:
    found = grid.points(["encoder-qkv"], [0.2, 0.6], [0.1, 0.5, 0.1], [0.2])
    assert [(p.k, p.lam) for p in found] == [(0.2, 0.1), (0.2, 0.5), (0.6, 0.1), (0.6, 0.5)]


def test_too_many_or_no_points_are_refused() -> None:
    with pytest.raises(RequestError, match="1000000 points"):
        grid.points(["encoder-qkv"], *([n / 100 for n in range(100)],) * 3)
    with pytest.raises(RequestError, match="0 points"):
        grid.points(["encoder-qkv"], [], [0.1], [0.1])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (0.25, "0.25"), (60.0, "60"), (1e-7, "0.0000001"), (100.0, "100"), (0.1, "0.1")],
)
def test_names_have_no_exponent_and_no_trailing_zeros(value: float, text: str) -> None:
    assert grid.plain(value) == text
    assert GridPoint("encoder-qkv", value, 0.5, 0.2).name == f"encoder-qkv_k{text}_lambda0.5_alpha0.2"


def test_different_points_have_different_names() -> None:
    values = [0.1, 0.10000000000000002, 0.1 + 1e-12, 1e-12, 0.3, 0.30000000000000004]
    assert len({GridPoint("encoder-qkv", 0.6, value, 0.2).name for value in values}) == len(values)
