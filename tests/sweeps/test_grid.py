"""Grids: decimal ranges with their ends, and names that belong to a point whatever grid it is in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hsa import RequestError
from hsa.methods.hsa import HsaSettings
from hsa.option_names import command_line, spelled
from hsa.outputs.grid_point import GridPoint, decimal_text
from hsa.sweeps import grid


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.6", (0.6,)),
        ("0.1,0.3", (0.1, 0.3)),
        ("0:1:0.1", tuple(n / 10 for n in range(11))),
        ("0:1:0.25", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("0:0.9:0.3", (0.0, 0.3, 0.6, 0.9)),
        ("0:1.00:0.5", (0.0, 0.5, 1.0)),
        ("0.5:0.5:1", (0.5,)),
        (" 0.2 , 0.4:0.6:0.1 ", (0.2, 0.4, 0.5, 0.6)),
        ("1e-3", (0.001,)),
        ("20,60", (20.0, 60.0)),
    ],
)
def test_numbers(text: str, expected: tuple[float, ...]) -> None:
    """Every value is the float of its decimal: no sum of rounded steps."""
    assert grid.numbers("lam", text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "0:1",
        "0:1:0",
        "0:1:-0.1",
        "1:0:0.1",
        "0:1:0.1:2",
        "nan",
        "inf",
        "0,,1",
        "1e9999",
        "0_1",
        "٣",
        "0x1",
        "1e",
        ".",
    ],
)
def test_bad_numbers_are_refused_by_name(text: str) -> None:
    with pytest.raises(RequestError, match=r"^alpha takes numbers such as 0.1,0.3 or start:stop:step"):
        grid.numbers("alpha", text)


@pytest.mark.parametrize(
    ("text", "met", "remedy"),
    [
        ("0:1:0.3", "do not meet 1, but 0.9 and 1.2", "0:0.9:0.3"),
        ("0.1,0:1:0.4", "do not meet 1, but 0.8 and 1.2", "0:0.8:0.4"),
        ("0.2:0.25:0.1", "do not meet 0.25, but 0.2 and 0.3", "0.2:0.2:0.1"),
        ("20:60:30", "do not meet 60, but 50 and 80", "20:50:30"),
    ],
)
def test_a_range_whose_steps_do_not_meet_its_end_is_refused(text: str, met: str, remedy: str) -> None:
    """Its end used to be left out without a word."""
    with pytest.raises(RequestError, match=rf"^alpha '{text}': steps of .* {met}; give {remedy}, or"):
        grid.numbers("alpha", text)
    with spelled(command_line), pytest.raises(RequestError, match=r"^--lambda '"):
        grid.numbers("lam", text)


def test_a_mistyped_step_does_not_fill_the_memory() -> None:
    with pytest.raises(RequestError, match="has over 10000 values"):
        grid.numbers("k", "0:1:0.000000001")
    with pytest.raises(RequestError, match="has over 10000 values"):
        grid.numbers("k", "0:1e19:1e-19")


def test_many_ranges_count_together() -> None:
    """Each alone is let through; all of them, in one text, would take gigabytes."""
    with pytest.raises(RequestError, match="has over 10000 values"):
        grid.numbers("k", ",".join(["0:9998:1"] * 10_000))


def test_points_are_every_combination_once_in_order() -> None:
    found = grid.points(HsaSettings, {"k": [0.2, 0.6], "lam": [0.1, 0.5, 0.1]}, {"num_heads": 4})
    assert {p.settings.num_heads for p in found} == {4}
    assert [(p.settings.k, p.settings.lam) for p in found] == [(0.2, 0.1), (0.2, 0.5), (0.6, 0.1), (0.6, 0.5)]


def test_too_many_or_no_points_are_refused() -> None:
    class Many(list[float]):
        def __len__(self) -> int:
            return 10**9

        def __iter__(self) -> Iterator[float]:
            raise AssertionError("the grid is counted before it is made")

    with pytest.raises(RequestError, match="1000000000 points"):
        grid.points(HsaSettings, {"k": Many(), "lam": [0.1]})
    with pytest.raises(RequestError, match="0 points"):
        grid.points(HsaSettings, {"k": []})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (0.25, "0.25"), (60.0, "60"), (1e-7, "0.0000001"), (100.0, "100"), (0.1, "0.1")],
)
def test_names_have_no_exponent_and_no_trailing_zeros(value: float, text: str) -> None:
    assert decimal_text(value) == text
    assert GridPoint(HsaSettings(k=value)).name == f"encoder-qkv_k{text}_lambda0.5_alpha0.2"


@pytest.mark.parametrize("text", ["1e-300", "1e30", "0:1e99:1"])
def test_numbers_that_no_name_could_hold_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="at most 20 digits before and after the point"):
        grid.numbers("k", text)


def test_a_minus_before_a_zero_is_no_other_point() -> None:
    assert str(grid.numbers("lambda", "-0,0")) == "(0.0, 0.0)"
    with pytest.raises(RequestError, match=r"has a name of 3[0-9]{2} letters"):
        grid.points(HsaSettings, {"k": [1e-300]})


def test_different_points_have_different_names() -> None:
    values = [0.1, 0.10000000000000002, 0.1 + 1e-12, 1e-12, 0.3, 0.30000000000000004]
    assert len({GridPoint(HsaSettings(lam=value)).name for value in values}) == len(values)
