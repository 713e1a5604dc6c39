"""Inspections of whole models as text, as CSV, and as a page in headless Chromium, with nothing else in reach."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import run_hsa
from masking_models import MIXED, chosen, write_family

import hsa
from hsa.inspection.inspect import ModelInspection
from hsa.views import model_csv
from hsa.views import page as view
from hsa.views.table import render

Family = dict[str, Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("family"), MIXED, 8)


@pytest.fixture(scope="module")
def found(family: Family) -> ModelInspection:
    return look(family, 3, density=0.5)


def look(family: Family, count: int, method: str = "ties", **settings: Any) -> ModelInspection:
    base, *models = chosen(family, count).values()
    inspection = hsa.inspect(method=method, base=base, models=models, **settings)
    assert isinstance(inspection, ModelInspection)
    return inspection


# --- text and CSV -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("method", "settings"), [("ties", {"density": 0.3}), ("task_arithmetic", {}), ("tsv_m", {})])
def test_the_text_fits_a_terminal(
    family: Family, count: int, method: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = look(family, count, method, **settings)
    lines = render(shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.strip()]) <= 20 + 2 * count
    text = "\n".join(lines)
    assert text.startswith(f"{method} of {count} model") and f"model{count}" in text
    assert ("signs conflict in" in text) == (count > 1)
    sums = shown.whole.vectors
    assert sums is not None and f"{sums.squares[0] ** 0.5:.4g}" in text
    assert "encoder outside layers" in render(shown, wide=True)


def test_without_a_base_the_distances_of_models_are_shown(family: Family) -> None:
    """Their cosines are 1.000 to three digits."""
    _, *models = chosen(family, 3).values()
    shown = hsa.inspect(method="linear", models=models)
    assert isinstance(shown, ModelInspection)
    text = render(shown)
    sums = shown.whole.vectors
    assert sums is not None
    difference = sums.squares[0] + sums.squares[1] - 2 * sums.product(0, 1)
    assert f"{100 * (difference / sums.squares[0]) ** 0.5:.3f} %" in text
    assert "apart 1" in text and "apart 2" in text and "+1.000" not in text and "cos" not in text
    assert "relative to the norm of the second" in text


def test_a_row_for_each_tensor(found: ModelInspection) -> None:
    rows = list(csv.DictReader(io.StringIO(model_csv.render(found).decode("utf-8"))))
    assert [row["tensor"] for row in rows] == list(found.tensors)
    for row, tensor in zip(rows, found.tensors.values(), strict=True):
        sums, kept = tensor.vectors, tensor.kept
        assert sums is not None and kept is not None
        assert (int(row["elements"]), int(row["disagreeing"])) == (tensor.elements, sums.disagreeing)
        assert int(row["model2_kept"]) == kept.kept[1]
        cosine = sums.cosine(0, 2)
        assert row["cosine_model1_model3"] == ("" if cosine is None else repr(cosine))


def test_the_command_line(family: Family, found: ModelInspection, tmp_path: Path) -> None:
    base, *models = chosen(family, 3).values()
    sources = (f"--base={base}", *(f"--model={path}" for path in models))
    files = (f"--csv={tmp_path / 'm.csv'}", f"--html={tmp_path / 'm.html'}")
    done = run_hsa("inspect", "--method=ties", "--density=0.5", *sources, *files, "--threads=2", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert sorted(printed.pop("written")) == ["csv", "html"]
    assert printed == found.as_dict()
    assert (tmp_path / "m.csv").read_bytes() == model_csv.render(found)
    assert (tmp_path / "m.html").read_bytes() == view.render(found)
    for arguments, message in (
        (("--method=ties", *sources, f"--png={tmp_path / 'm.png'}"), "--png draws heads, and this method selects none"),
        (("--method=linear", "--density=0.5", *sources), "method linear has no --density; its settings are --weight"),
        (("--method=ties", *sources[1:]), "--base not given; --base and --model are needed together"),
    ):
        done = run_hsa("inspect", *arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "m.png").exists()


def test_an_output_is_shown_and_verified(family: Family, tmp_path: Path) -> None:
    base, *models = chosen(family, 2).values()
    out = tmp_path / "out"
    hsa.merge(method="ties", density=0.5, base=base, models=models, output=out, sync=False)
    done = run_hsa("inspect", out)
    assert done.returncode == 0 and "bytes: still what was written" in done.stdout, done.stderr
    assert "kept" in done.stdout and "need the sources: give base, model1 and model2 too" in done.stderr


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the page of an inspection, offline; at the end it must not have complained of anything."""
    complaints: list[str] = []
    contexts = []

    def open_page(inspection: ModelInspection) -> Any:
        path = tmp_path / f"page {len(contexts)}.html"
        path.write_bytes(view.render(inspection))
        context = browser.new_context()
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


def cells(page: Any) -> dict[tuple[str, int | None, str], str]:
    """The text of every cell by stack, layer and kind."""
    found = page.evaluate(
        "() => [...document.querySelectorAll('td[data-key]')].map((cell) => [cell.dataset.key, cell.textContent])"
    )
    return {tuple(json.loads(key)): text for key, text in found}


def test_the_maps_show_what_is_chosen(found: ModelInspection, opened: Any) -> None:
    page = opened(found)
    groups = found.groups(lambda spot: (spot.stack, spot.layer, spot.kind))

    def shown_as(label: str, value: Any, digits: int) -> None:
        page.select_option("#measure", label=label)
        texts = cells(page)
        for key, group in groups.items():
            expected = value(group)
            if expected is None:
                assert texts[key] == ("=" if group.copied == group.tensors else ""), (label, key)
            else:
                assert float(texts[key]) == pytest.approx(expected, abs=0.51 * 10**-digits), (label, key)

    shown_as("Sign conflicts", lambda g: None if g.vectors.conflict is None else 100 * g.vectors.conflict, 0)
    shown_as("Cosine of model1 and model3", lambda g: g.vectors.cosine(0, 2), 2)
    shown_as("Kept of model2", lambda g: None if g.kept is None else 100 * g.kept.share(1), 0)
    assert set(cells(page)) >= set(groups)
    page.hover("td[data-key*='fc1']")
    assert "signs conflict in" in page.inner_text("#detail") and "feed-forward fc1" in page.inner_text("#detail")
    page.locator("td[tabindex='0']").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("() => document.activeElement.dataset.key.includes('embedding')")
    assert "model3" in page.inner_text("#models") and page.locator("#cosines td").count() == 9


@pytest.mark.parametrize(
    ("method", "count", "settings", "label"),
    [
        ("model_stock", 2, {}, "Coefficient of model2"),
        ("slerp", 1, {"t": 0.5}, "Angle between base and the model"),
        ("linear", 2, {}, "Size of model1"),
        ("ram", 2, {}, "Epsilon"),
    ],
)
def test_a_page_of_every_kind_of_method(
    family: Family, opened: Any, method: str, count: int, settings: dict[str, Any], label: str
) -> None:
    page = opened(look(family, count, method, **settings))
    page.select_option("#measure", label=label)
    assert any(text not in ("", "=") for text in cells(page).values())
    assert method in page.inner_text("#origin")


def test_a_page_of_a_record_alone(family: Family, opened: Any, tmp_path: Path) -> None:
    base, *models = chosen(family, 2).values()
    for method, settings in (("dare_ties", {"density": 0.5}), ("tsv_m", {})):
        hsa.merge(method=method, base=base, models=models, output=tmp_path / method, sync=False, **settings)
        page = opened(hsa.inspect(tmp_path / method))
        labels = page.locator("#measure option").all_inner_texts()
        assert {"dare_ties": "Probabilities of model1", "tsv_m": "Directions of model2"}[method] in labels
        assert "need the sources" in page.inner_text("#notes")
