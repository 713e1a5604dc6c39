"""The page report.html in headless Chromium, from a file, with nothing else in reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from speech_sets import write_ctc, write_set

import hsa
from hsa.evaluation.page import document, worst
from hsa.evaluation.page import render as render_page
from hsa.evaluation.report import Evaluation
from hsa.evaluation.scores import alignment
from hsa.evaluation.word_pairs import MOST_WORDS

LENGTHS = [0.3 + 0.05 * number for number in range(30)]
SPEAKERS = ["anna", "bert", "cleo"] * 10
DOMAINS = ["home", "road"] * 15
HOSTILE = "<img src=x onerror=document.title='owned'></script><b>bad"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("page")
    models = [write_ctc(folder / name, seed=seed) for seed, name in enumerate(("one", "two", "three"))]
    clean = write_set(folder / "clean", LENGTHS, 1, speaker=SPEAKERS, domain=DOMAINS)
    noisy = write_set(folder / "noisy", LENGTHS[:5], 2, speaker=[HOSTILE] * 5, domain=DOMAINS[:5])
    lines = noisy.read_text().splitlines()
    noisy.write_text("\n".join([*lines[:-1], lines[-1].replace("\t", "\tzebra ", 1)]))
    hostile = hsa.data(noisy, name=HOSTILE.replace("/", ""))
    return hsa.evaluate(models, [hsa.data(clean), hostile], baseline=models[0], device="cpu")


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page of an evaluation, offline; at the end it must not have complained of anything."""
    complaints: list[str] = []
    contexts = []

    def open_page(report: Evaluation, **context_options: Any) -> Any:
        path = tmp_path / f"page {len(contexts)}.html"
        path.write_bytes(render_page(report))
        context = browser.new_context(**context_options)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_page
    assert complaints == []
    for context in contexts:
        context.close()


def test_every_score_stands_on_the_page(found: Evaluation, opened: Any) -> None:
    page = opened(found)
    rows = page.evaluate(
        "() => [...document.querySelectorAll('#scores tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    sets = [each for each in found.models[0].scores if each.group == "set"]
    expected = []
    for group in (*sets, found.models[0].scores[0]):
        for model in found.models:
            score = model.scores[0] if group.group == "all" else model.score("set", group.name)
            words = score.words
            counts = [words.substitutions, words.deletions, words.insertions]
            title = "all sets" if group.group == "all" else group.name
            expected.append([title, model.name, f"{100 * words.rate:.2f}", *map(str, counts), str(words.reference)])
    assert [[row[0], row[1], row[2], *row[6:10]] for row in rows] == expected
    assert page.locator("#sets figure").count() == 3
    assert page.locator("#sets .dot").count() == 9
    assert page.locator("#domains tbody tr").count() == 2 and page.locator("#speakers tbody tr").count() == 4


def test_dots_stand_where_the_scale_says(found: Evaluation, opened: Any) -> None:
    page = opened(found)
    figure = page.locator("#sets figure").first
    rates = [100 * model.score("set", "set").words.rate for model in found.models]
    places = figure.locator(".dot").evaluate_all("(dots) => dots.map((d) => parseFloat(d.style.left))")
    labels = [float(text) for text in figure.locator(".axis span").all_inner_texts()]
    ticks = figure.locator(".axis span").evaluate_all("(all) => all.map((d) => parseFloat(d.style.left))")
    assert ticks[0] == 0 and labels[0] == 0
    for rate, place in zip(rates, places, strict=True):
        assert place == pytest.approx(rate * ticks[-1] / labels[-1], abs=1e-3)


def test_the_words_of_an_alignment_are_coloured(found: Evaluation, opened: Any) -> None:
    page = opened(found)
    by_id = {(each.set, each.id): place for place, each in enumerate(found.models[0].utterances)}
    shown = page.locator(".utterance").first
    identity = shown.get_attribute("data-id")
    place = next(place for (_, id), place in by_id.items() if id == identity and place in worst(found)[:1])
    for row, model in enumerate(found.models):
        score = model.utterances[place]
        pairs = alignment(score.reference, score.hypothesis)
        for kind, css in (("substitute", "substitute"), ("delete", "delete"), ("insert", "insert"), ("equal", "equal")):
            words = [ours if kind == "delete" else theirs for each, ours, theirs in pairs if each == kind]
            marked = shown.locator("table").evaluate_all(
                "(tables, [row, css]) => tables.flatMap((t) =>"
                " [...t.rows[row + 1].querySelectorAll('.word.' + css)].map((w) => w.textContent))",
                [row, css],
            )
            assert marked == words, (model.name, kind)
    reference = shown.locator("table").evaluate_all(
        "(tables) => tables.flatMap((t) => [...t.rows[0].cells].slice(2).map((c) => c.textContent).filter(Boolean))"
    )
    assert reference == found.models[0].utterances[place].reference.split()


def test_filter_order_and_choice_of_models(found: Evaluation, opened: Any) -> None:
    page = opened(found)
    total = len(document(found)["utterances"])
    assert page.locator(".utterance").count() == min(20, total)
    page.click("#more")
    assert page.locator(".utterance").count() == min(40, total)
    page.fill("#filter", "zebra")
    assert page.locator(".utterance").count() == 1
    assert "zebra" in page.inner_text(".utterance") and page.inner_text("#count").startswith("1 utterance")
    page.fill("#filter", "anna")
    ids = page.locator(".utterance").evaluate_all("(all) => all.map((u) => u.dataset.id)")
    assert ids and all(SPEAKERS[int(id[5:8])] == "anna" for id in ids)
    page.fill("#filter", "no such word")
    assert page.locator(".utterance").count() == 0
    page.fill("#filter", "")
    page.select_option("#order", label="most errors of two")
    errors = page.locator(".utterance").evaluate_all(
        "(all) => all.map((u) => parseInt(u.querySelectorAll('tr')[2].querySelector('.errors').textContent))"
    )
    assert errors == sorted(errors, reverse=True) and len(errors) == 20
    page.select_option("#which", label="three and one")
    assert page.locator(".utterance table").first.locator("tr").count() == 3
    page.select_option("#order", label="two better than one")
    wanted = sum(
        ours.words.errors < base.words.errors
        for ours, base in zip(found["two"].utterances, found["one"].utterances, strict=True)
    )
    assert page.inner_text("#count").startswith(f"{wanted} utterance")


def test_what_comes_from_files_is_text_alone(found: Evaluation, opened: Any) -> None:
    page = opened(found)
    assert page.title().startswith("Word error rates of one, two, three")
    assert page.locator("#speakers th", has_text="onerror").count() == 1
    assert page.locator("img").count() == 0 and page.locator("b").count() == 0


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_page_fits_its_window(found: Evaluation, opened: Any, width: int) -> None:
    page = opened(found, viewport={"width": width, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_a_page_of_one_model_and_one_set(found: Evaluation, opened: Any, tmp_path: Path) -> None:
    report = hsa.evaluate(write_ctc(tmp_path / "m"), write_set(tmp_path / "s", LENGTHS[:2]), device="cpu")
    page = opened(report)
    assert page.locator("#sets figure").count() == 1
    assert not page.is_visible("#set-control") and not page.is_visible("#which-control")
    assert not page.is_visible("#domain-section") and not page.is_visible("#notes-section")


def test_a_page_holds_the_worst_and_is_bounded(found: Evaluation) -> None:
    places = worst(found)
    errors = [max(model.utterances[place].words.errors for model in found.models) for place in places]
    assert errors == sorted(errors, reverse=True) and min(errors) > 0
    assert len(places) == len(set(places)) <= len(found.models[0].utterances)
    assert MOST_WORDS * 8 * len(places) < 1_000_000
