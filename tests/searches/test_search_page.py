"""The page report.html of a search in headless Chromium, from a file, with nothing else in reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.evaluation.word_pairs import MOST_WORDS
from hsa.searches.page import document, render

pytestmark = pytest.mark.long

HOSTILE = "<img src=x onerror=document.title='owned'><b>bad"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> hsa.Study:
    """A Pareto search over two sets, of which one has a hostile name, with a test set."""
    folder = tmp_path_factory.mktemp("page")
    sources = write_models(folder / "models")
    one, two = (write_speech(folder / name, sources, 4, seed) for seed, name in enumerate(("one", "two")))
    return hsa.search(
        sources,
        output=folder / "search",
        method=["task_arithmetic", "ties"],
        dev=[hsa.data(one, name="first"), hsa.data(two, name=HOSTILE)],
        test=[hsa.data(two, name="heldout")],
        objective="pareto",
        trials=14,
        normalizer=NORMALIZER,
        batch=4,
    )


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a study, offline; at the end it must not have complained of anything."""
    complaints: list[str] = []
    contexts = []

    def open_page(found: hsa.Study, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((found.output / "report.html").as_uri())
        return page

    yield open_page
    assert complaints == []
    for context in contexts:
        context.close()


def test_every_model_is_in_the_history_and_in_the_table(study: hsa.Study, opened: Any) -> None:
    page = opened(study)
    scored = [trial for trial in study.trials if trial.values]
    assert page.locator("#history .point").count() == len(scored)
    assert page.locator("#history rect").count() == len(study.baselines)
    assert page.locator("#history .best").count() == 1
    page.select_option("#by", "number")
    names = page.locator("#trials tbody th").all_inner_texts()
    assert names == [trial.name for trial in study.trials]
    objectives = page.locator("#trials tbody td:nth-child(3)").all_inner_texts()
    shown = [float(text.removesuffix(" %")) for text in objectives]
    assert shown == pytest.approx([100 * trial.value for trial in scored], abs=0.0051)
    page.select_option("#by", "score")
    assert page.locator("#trials tbody th").first.inner_text() == study.best.name


def test_points_of_the_history_stand_where_their_scores_are(study: hsa.Study, opened: Any) -> None:
    """Of scores within the chart, a smaller one lies lower by as much as it is smaller."""
    page = opened(study)
    places = page.locator("#history circle").evaluate_all(
        "(all) => all.map((c) => [c.querySelector('title').textContent, parseFloat(c.getAttribute('cy'))])"
    )
    by_name = {trial.name: trial.value for trial in study.trials}
    pairs = [(by_name[text.split(": ")[1].split(",")[0]], place) for text, place in places]
    highest = min(place for _, place in pairs)
    inside = sorted({pair for pair in pairs if pair[1] > highest})
    assert len(inside) > 2
    (low, bottom), (high, top) = inside[0], inside[-1]
    for value, place in inside:
        assert place == pytest.approx(bottom + (top - bottom) * (value - low) / (high - low), abs=0.01)


def test_sets_show_their_models_with_intervals(study: hsa.Study, opened: Any) -> None:
    page = opened(study)
    for split, rows in (("test", study.test), ("dev", study.dev)):
        sets = {row.set for row in rows}
        assert page.locator(f"#{split} figure").count() == len(sets)
        for name in sets:
            own = sorted((row for row in rows if row.set == name), key=lambda row: row.score.words.rate)
            figure = page.locator(f"#{split} figure").filter(has=page.locator("figcaption", has_text=name))
            values = [float(text.removesuffix(" →")) for text in figure.locator(".value").all_inner_texts()]
            assert values == pytest.approx([100 * row.score.words.rate for row in own], abs=0.0051)
            assert figure.locator(".whisker").count() == len(own)
            better = figure.locator(".better").count(), figure.locator(".worse").count()
            assert better == tuple(sum(row.verdict == verdict for row in own) for verdict in ("better", "worse"))


def test_settings_and_front_have_their_points(study: hsa.Study, opened: Any) -> None:
    page = opened(study)
    for method in ("task_arithmetic", "ties"):
        drawn = [trial for trial in study.trials if trial.method == method and trial.candidate.kind == "sampled"]
        page.select_option("#method", method)
        names = {name for trial in drawn for name in trial.drawn if name.startswith(f"{method}.")}
        figures = page.locator("#settings figure")
        assert set(figures.evaluate_all("(all) => all.map((f) => f.dataset.setting)")) == names
        assert figures.first.locator(".point").count() == len(drawn)
    assert page.locator("#front svg").count() == 1
    line = page.locator("#front .so-far")
    assert line.count() == (len(study.front) > 1)


def test_the_command_and_the_worst_utterances_stand_as_text(study: hsa.Study, opened: Any) -> None:
    page = opened(study)
    assert page.locator("#command").inner_text() == study.command
    assert page.title() == "Search of merges"
    assert page.locator("main img, main b").count() == 0
    rows = document(study)["worst"]
    assert rows
    assert page.locator("#worst figure").count() == len(rows)
    first = page.locator("#worst figure").first
    wrong = sum(kind != "=" for kind, _, _ in rows[0]["best_pairs"])
    assert (
        first.locator("dd").nth(1).locator(".substitute, .delete, .insert").count() == wrong == rows[0]["best_errors"]
    )


def test_the_page_says_where_a_long_utterance_is_cut(study: hsa.Study, opened: Any, tmp_path: Path) -> None:
    short, long = (replace(study.worst[0], id=str(count), reference="a " * count) for count in (10, MOST_WORDS + 60))
    changed = replace(study, output=tmp_path, worst=(short, long))
    (tmp_path / "report.html").write_bytes(render(changed))
    figures = opened(changed).locator("#worst figure")
    hints = [figures.nth(place).locator("p.hint").all_inner_texts() for place in range(2)]
    assert hints == [[], ["The rest is not shown."]]
    assert figures.nth(1).locator("dd").nth(1).locator(".word").count() == MOST_WORDS


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_the_window(study: hsa.Study, opened: Any, width: int) -> None:
    page = opened(study, viewport={"width": width, "height": 800}, color_scheme="dark")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
