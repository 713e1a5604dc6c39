"""The report's tables of searches: figures by hand from sample rows, limits met and missed, and honest gaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import report
import rows
from report_rows import Row, about, cells, no_image
from search_setup import row

SHARED: Row = {"set": "noisy", "clips": 60, "workers": 1, "threads": 2, "rounds": 1}


def measured(case: str, way: str, seconds: float, **values: object) -> Row:
    times = {"seconds": seconds, "min_s": seconds, "max_s": seconds}
    return {**about(), "model": "tiny.en", **row(case, way, **{**SHARED, "candidates": 40, **times, **values})}


def search_rows(seconds: float = 200.0, wer: float = 9.0, decoding: float = 180.0) -> list[Row]:
    found = {"best": "trial 30: ties lam 1.5", "wer": wer, "wer_low": 6.5, "wer_high": 12.25}
    cost = {"trials_s": 185.0, "decoding_s": decoding, "peak_bytes": 2**30, "decoded": 1200, "raced": 1150, "equal": 50}
    loop = {"trials_s": 480.0, "decoding_s": 400.0, "peak_bytes": 2**29, "decoded": 2400, "raced": 0, "equal": 0}
    return [
        measured("search", "hsa search", seconds, **found, **cost, note="0 of 1200 transcripts differ from the loop's"),
        measured("search", "the loop", 500.0, **{**found, "wer": 9.0}, **loop, note="50.0 s of writing"),
    ]


def block(results: Path) -> str:
    return "\n\n".join(report.PAGES["search.md"]["search"](results, no_image))


def test_nothing_measured(tmp_path: Path) -> None:
    assert block(tmp_path) == "Searches are not yet measured."


def test_a_search_beside_the_loop(tmp_path: Path) -> None:
    rows.append("search", search_rows(), tmp_path)
    text = block(tmp_path)
    assert cells(text, "hsa search") == [
        "hsa search", "1", "200.0", "200.0 to 200.0", "2.7 %", "10.0 %", "1024", "trial 30: ties lam 1.5",
        "9.00 (6.50 to 12.25)", "1200", "1150", "0 of 1200 transcripts differ from the loop's",
    ]  # fmt: skip
    assert cells(text, "the loop")[4:7] == ["16.7 %", "20.0 %", "512"]
    assert "**40 candidates, 60 clips of noisy, tiny.en:**" in text
    assert "the search's time is 0.40 of the loop's (limit 0.5): met." in text
    assert "its best has 9.00 % (limit 12.25 %, the end of the interval of the loop's best): met." in text
    assert "2.7 % of the time of its trials (10.0 % of the whole program's, start and writing included)" in text
    assert "is neither decoding nor scoring (limit 5.0 %): met." in text
    assert "missed" not in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seconds": 251.0}, "the search's time is 0.50 of the loop's (limit 0.5): **missed**."),
        (
            {"wer": 12.3},
            "its best has 12.30 % (limit 12.25 %, the end of the interval of the loop's best): **missed**.",
        ),
        ({"decoding": 175.0}, "(limit 5.0 %): **missed**"),
    ],
)
def test_each_limit_is_a_limit(changed: dict[str, float], said: str, tmp_path: Path) -> None:
    rows.append("search", search_rows(**changed), tmp_path)
    text = block(tmp_path)
    assert said in text
    assert text.count("missed") == 1


@pytest.mark.parametrize(
    ("other", "said"), [(7, "the same winner as decoding everything: met."), (8, "another winner than")]
)
def test_racing_with_and_without(other: int, said: str, tmp_path: Path) -> None:
    found = {"wer": 9.0, "wer_low": 6.5, "wer_high": 12.25, "equal": 0}
    ways = [
        measured("racing", "with racing", 100.0, best="setting 7: ties", decoded=900, raced=1500, decoding_s=97.5,
                 note="in 100 other orders", **found),
        measured("racing", "without racing", 250.0, best=f"setting {other}: ties", decoded=2400, raced=0,
                 decoding_s=245.0, **found),
    ]  # fmt: skip
    rows.append("search", ways, tmp_path)
    text = block(tmp_path)
    assert cells(text, "with racing") == [
        "with racing", "100.0", "2.5 %", "900", "1500", "setting 7: ties", "9.00 (6.50 to 12.25)",
        "in 100 other orders",
    ]  # fmt: skip
    assert f"racing took 0.40 of the time and found {said}" in text
    assert ("missed" in text) == (other == 8)


def test_workers(tmp_path: Path) -> None:
    ways = [
        measured("workers", "one process", 400.0, threads=1),
        measured("workers", "two workers", 240.0, threads=1, workers=2),
        measured("workers", "two Ray actors", 260.0, threads=1, workers=2),
    ]
    rows.append("search", ways, tmp_path)
    text = block(tmp_path)
    assert cells(text, "one process")[1:] == ["1", "1", "1", "400.0", "6.00", "1.00"]
    assert cells(text, "two workers")[1:] == ["2", "1", "1", "240.0", "10.00", "1.67"]
    assert "- two workers: 1.67 times the trials per minute of one process (at least 1.6): met." in text
    assert "- two Ray actors: 1.54 times the trials per minute of one process (at least 1.6): **missed**." in text


def test_each_case_has_its_own_newest_run(tmp_path: Path) -> None:
    old = {"run": "2026-11-01T10:00:00Z"}
    rows.append("search", [{**each, **old} for each in search_rows(seconds=100.0)], tmp_path)
    rows.append("search", [{**measured("workers", "one process", 400.0), **old}], tmp_path)
    rows.append("search", search_rows(), tmp_path)
    text = block(tmp_path)
    assert cells(text, "hsa search")[2] == "200.0"
    assert cells(text, "one process")[4] == "400.0"
    assert "2026-11-01" in text and "2026-11-20" in text
