"""The page of `hsa inspect --html` in headless Chromium: from a file, with nothing else in reach."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forger import HOSTILE, forge
from helpers import read_tensors, write_tensors

import hsa
from hsa.inspection.inspect import Inspection
from hsa.methods.hsa_formula import keep_count, layer_coefficient
from hsa.methods.selection import select
from hsa.outputs import provenance
from hsa.system.manifest import PROVENANCE
from hsa.views import page as view

Triple = dict[str, Path]
Heads = dict[str, tuple[int, ...]]
GRID = (*(step / 20 for step in range(21)), 0.125, 0.375, 0.3751, 0.875, 0.01, 0.99, 2, 37.5, 62.5, 100)


class Page:
    """A page that was opened from a file, offline; `complaints` are console messages, errors and requests beside it."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.context.set_offline(True)
        self.complaints: list[str] = []
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda request: self._requested(request.url, path))
        self.page.goto(path.as_uri())

    def _requested(self, url: str, path: Path) -> None:
        if url not in (path.as_uri(), "data:,"):
            self.complaints.append(f"request: {url}")

    def set(self, name: str, value: float) -> None:
        """Move a slider where it reaches, else write into the field beside it."""
        limit = 2 if name == "alpha" else 1
        steps = round(value * 100)
        if value <= limit and steps / 100 == value:
            self.page.locator(f"#{name}").fill(repr(value))
        else:
            self.page.locator(f"#{name}-number").fill(repr(value))

    def heads(self) -> Heads:
        """The framed heads by tensor name; what is framed and what is announced must agree."""
        rows = self.page.evaluate(
            """() => [...document.querySelectorAll("tr[data-tensor]")].map((row) => [row.dataset.tensor,
                ["td.on", "td[aria-selected=true]"].map((what) =>
                    [...row.querySelectorAll(what)].map((cell) => Number(cell.dataset.head)))])"""
        )
        assert all(framed == announced for _, (framed, announced) in rows)
        assert len(rows) == len(dict(rows))
        return {name: tuple(framed) for name, (framed, _) in rows}

    def column(self, name: str) -> dict[str, str]:
        rows = self.page.evaluate(
            """(name) => [...document.querySelectorAll("tr[data-tensor]")].map((row) =>
                [row.dataset.tensor, row.querySelector(`td.${name}`).textContent])""",
            name,
        )
        return dict(rows)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the page of an inspection; at the end it must not have complained of anything."""
    pages: list[Page] = []

    def open_page(found: Inspection, **context: Any) -> Page:
        path = tmp_path / f"page {len(pages)}.html"
        path.write_bytes(view.render(found))
        pages.append(Page(browser, path, **context))
        return pages[-1]

    yield open_page
    for each in pages:
        assert each.complaints == []
        each.context.close()


def selected(found: Inspection) -> Heads:
    return {name: tensor.selected for name, tensor in found.tensors.items()}


@pytest.fixture(scope="module")
def triple_with_ties(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """Two heads of one tensor are the same in all three sources, so that they tie."""
    folder = tmp_path_factory.mktemp("ties")
    triple = {role: Path(shutil.copytree(path, folder / role)) for role, path in shared_triple.items()}
    for path in triple.values():
        tensors = read_tensors(path)
        tied = tensors["model.encoder.layers.0.self_attn.q_proj.weight"]
        tied[32:48] = tied[16:32]
        write_tensors(path, tensors)
    return triple


@pytest.fixture(scope="module")
def merged(triple_with_ties: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "out"
    hsa.merge(**triple_with_ties, output=output, sync=False)
    return output


# --- the heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["output", "sources", "both"])
def test_the_page_shows_the_heads_of_the_provenance_and_those_of_another_k(
    way: str, merged: Path, triple_with_ties: Triple, opened: Any, tmp_path: Path
) -> None:
    found = {
        "output": lambda: hsa.inspect(merged),
        "sources": lambda: hsa.inspect(**triple_with_ties),
        "both": lambda: hsa.inspect(merged, **triple_with_ties),
    }[way]()
    shown = opened(found)
    recorded = {target.name: target.selected for target in provenance.load(merged).record.targets}
    assert shown.heads() == recorded
    report = hsa.merge(**triple_with_ties, output=tmp_path / "other", k=0.2, sync=False)
    shown.page.locator("#k").fill("0.2")
    other = {name: tensor.selected for name, tensor in report.tensors.items()}
    assert other != recorded
    assert shown.heads() == other
    shown.page.click("#reset")
    assert shown.heads() == recorded
    assert shown.page.input_value("#k-number") == "0.6"


def test_every_k_of_a_grid(triple_with_ties: Triple, opened: Any) -> None:
    found = hsa.inspect(**triple_with_ties, targets="attention-all", energy=False)
    shown = opened(found)
    different = set()
    for k in GRID:
        shown.set("k", k)
        expected = {}
        for name, tensor in found.tensors.items():
            assert tensor.squared is not None
            expected[name] = select(tensor.squared, keep_count(k, tensor.heads))
        assert shown.heads() == {name: selection.selected for name, selection in expected.items()}, k
        count = sum(len(selection.selected) for selection in expected.values())
        assert f"{count} of {found.total_heads} heads merged" in shown.text("#summary")
        different.add(count)
        for name, text in shown.column("margin").items():
            margin = expected[name].margin
            assert text == "-" if margin is None else float(text) == pytest.approx(margin, rel=0.06)
    assert len(different) == 5  # none to all of four heads
    tied = "model.encoder.layers.0.self_attn.q_proj.weight"
    assert {1, 2} <= set(shown.heads()[tied])


@pytest.mark.parametrize("heads", [3, 5, 6, 8, 12, 16, 20])
def test_the_pages_rule_rounds_as_pythons(heads: int, merged: Path, opened: Any, tmp_path: Path) -> None:
    """All shares of a hundredth and of halves of a head, at numbers of heads that this model does not have."""
    shutil.copy(merged / PROVENANCE, tmp_path)
    scores = [float((head * 7) % heads) + 1.0 for head in range(heads)]
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    shape = [64 * heads, 64]  # any that so many heads divide
    decision = {"keep": 0, "lambda_i": 1.0, "selected": [], "margin": None, "scores": scores}
    entry = {"shape": shape, "groups": heads, "decision": decision}
    forge(tmp_path, **{f"targets__{name}__{key}": value for key, value in entry.items()})
    shown = opened(hsa.inspect(tmp_path))
    ks = sorted({*(step / 100 for step in range(1, 101)), *((2 * n + 1) / (2 * heads) for n in range(heads))})
    framed = shown.page.evaluate(
        """([name, ks]) => ks.map((k) => {
            const field = document.getElementById("k-number");
            field.value = String(k);
            field.dispatchEvent(new Event("input", { bubbles: true }));
            const row = document.querySelector(`tr[data-tensor="${name}"]`);
            return [...row.querySelectorAll("td.on")].map((cell) => Number(cell.dataset.head));
        })""",
        [name, ks],
    )
    assert framed == [list(select(scores, keep_count(k, heads)).selected) for k in ks]
    assert {len(each) for each in framed} == set(range(1, heads + 1))


def test_lambda_and_alpha_are_shown_by_layer(triple_with_ties: Triple, opened: Any) -> None:
    found = hsa.inspect(**triple_with_ties, targets="attention-all", energy=False)
    shown = opened(found)
    before = shown.heads()
    for lam, alpha in ((0.5, 0.2), (0.0, 0.2), (0.0, 0.0), (1.0, 2.0), (0.37, 1.25), (0.01, 7.5)):
        shown.set("lambda", lam)
        shown.set("alpha", alpha)
        for name, text in shown.column("lambda").items():
            layer = found.tensors[name].projection.layer
            assert text == f"{layer_coefficient(lam, alpha, layer, 2):.4f}", (lam, alpha)
    assert shown.heads() == before
    assert "lambda 0.01, alpha 7.5" in shown.text("#summary")


def test_parameters_per_tensor(triple_with_ties: Triple, opened: Any) -> None:
    names = list(hsa.inspect(**triple_with_ties, energy=False).tensors)
    found = hsa.inspect(**triple_with_ties, k={name: 0.25 * (i % 5) for i, name in enumerate(names)}, energy=False)
    shown = opened(found)
    assert shown.heads() == selected(found)
    assert len({len(heads) for heads in shown.heads().values()}) == 5
    assert "k per tensor" in shown.text("#summary")
    shown.set("k", 0.5)
    assert {len(heads) for name, heads in shown.heads().items() if "layers.1" in name} == {2}
    shown.page.click("#reset")
    assert shown.heads() == selected(found)


def test_reference_numerics_keep_their_own_choice(merged: Path, opened: Any, tmp_path: Path) -> None:
    """Recorded heads are shown at the recorded k, even where the recorded scores would give others."""
    shutil.copy(merged / PROVENANCE, tmp_path)
    name = "model.encoder.layers.1.self_attn.k_proj.weight"
    keep = len(hsa.inspect(merged).tensors[name].selected)
    own = hsa.inspect(merged).tensors[name].selected
    swapped = [head for head in range(4) if head not in own] + list(own[1:])
    forge(
        tmp_path,
        method={"name": "hsa_script", "version": 1},
        parameters__numerics="reference",
        **{f"targets__{name}__decision__selected": sorted(swapped)[:keep]},
    )
    shown = opened(hsa.inspect(tmp_path))
    assert shown.heads()[name] == tuple(sorted(swapped)[:keep]) != own
    shown.set("k", 1)
    shown.set("k", 0.6)
    assert shown.heads()[name] == tuple(sorted(swapped)[:keep])


def test_numbers_out_of_range_change_nothing(merged: Path, opened: Any) -> None:
    shown = opened(hsa.inspect(merged))
    before, summary = shown.heads(), shown.text("#summary")
    assert not shown.page.is_visible("#range")
    limits = {"k": "from 0 to 100", "lambda": "from 0 to 1", "alpha": "of at least 0"}
    for field, value in (("k", "101"), ("k", "-1"), ("lambda", "1.5"), ("alpha", "-0.1"), ("k", "")):
        shown.page.locator(f"#{field}-number").fill(value)
        assert shown.page.get_attribute(f"#{field}-number", "aria-invalid") == "true"
        assert f"{field} must be a number {limits[field]}; the maps still show" in shown.text("#range")
        assert (shown.heads(), shown.text("#summary")) == (before, summary)
    shown.page.locator("#k-number").fill("0.5")
    assert "k must" not in shown.text("#range") and "lambda must" in shown.text("#range")
    shown.page.click("#reset")
    assert shown.page.get_attribute("#k-number", "aria-invalid") == "false"
    assert not shown.page.is_visible("#range")


def test_selected_cells_are_as_large_as_the_others(triple_with_ties: Triple, opened: Any) -> None:
    """The coloured part of a cell is what lies within its border; a frame must not take any of it away."""
    shown = opened(hsa.inspect(**triple_with_ties, k=0.5))
    sizes = shown.page.evaluate(
        """() => [...document.querySelectorAll("table.map")].map((map) => ["true", "false"].map((on) =>
            [...map.querySelectorAll(`[aria-selected=${on}]`)].map((c) => [c.clientWidth, c.clientHeight].join())))"""
    )
    assert sizes
    for framed, others in sizes:
        assert framed and others
        assert set(framed) == set(others)
    assert shown.page.evaluate(
        """() => [...document.querySelectorAll("[role=gridcell]")].every((c) => {
            const style = getComputedStyle(c);
            return style.backgroundClip === "padding-box" && style.boxShadow === "none";
        })"""
    )


def test_how_to_read_it_comes_first(merged: Path, opened: Any) -> None:
    shown = opened(hsa.inspect(merged))
    assert shown.page.locator("h2").first.inner_text() == "How to read this"
    top, maps = (shown.page.locator(what).first.bounding_box()["y"] for what in ("#how", "table.map"))
    assert top < maps


def test_every_block_has_one_scale_of_its_own(triple_with_ties: Triple, opened: Any) -> None:
    found = hsa.inspect(**triple_with_ties, targets="attention-all")
    shown = opened(found)
    sections = shown.page.evaluate(
        """() => [...document.querySelectorAll("#maps section")].map((section) => {
            const legends = section.querySelectorAll(".legend");
            return [section.getAttribute("aria-label"), legends.length, legends[0].innerText];
        })"""
    )
    assert len(sections) == len(
        {(t.projection.stack, t.projection.block, t.projection.part) for t in found.tensors.values()}
    )
    for label, count, text in sections:
        assert count == 1 and "one scale for all maps of this block" in text, label


def test_tables_use_the_width_and_do_not_break_on_a_telephone(
    merged: Path, triple_with_ties: Triple, opened: Any
) -> None:
    found = hsa.inspect(merged, **triple_with_ties)
    wide = opened(found, viewport={"width": 1280, "height": 900})
    narrow = opened(found, viewport={"width": 390, "height": 844})
    widths = """() => [...document.querySelectorAll("table.plain")].map((t) =>
        [t.offsetWidth, t.parentElement.clientWidth, t.parentElement.scrollWidth])"""
    for shown in (wide, narrow):
        for table, room, needed in shown.page.evaluate(widths):
            assert table == room == needed  # as wide as the page, and nothing to scroll to


# --- the page -----------------------------------------------------------------------------------------------------


def test_agreement_energy_and_sources_are_on_the_page(merged: Path, triple_with_ties: Triple, opened: Any) -> None:
    found = hsa.inspect(merged, **triple_with_ties)
    shown = opened(found)
    rows = shown.page.locator("#agreement tbody tr").all_inner_texts()
    assert len(rows) == len(found.agreement)
    for row, each in zip(rows, found.agreement, strict=True):
        cells = row.split("\t")
        union = set().union(*each.selected.values())
        assert cells[0] == f"{each.stack} {each.layer}"
        assert cells[3] == (", ".join(map(str, each.common)) or "-")
        assert cells[4] == f"{len(each.common)} of {len(union)}"
        assert cells[5] == f"{each.expected_common:.2f}"
        assert each.jaccard is not None
        assert cells[6] == f"{each.jaccard:.2f}"
    assert found.energy is not None
    inside = [each.share(each.inside) for each in found.energy]
    assert all(share is not None and f"{100 * share:.1f} %" in shown.text("#energy") for share in inside)
    for source in found.sources.values():
        assert str(source["id"]) in shown.text("#sources")
    alone = opened(hsa.inspect(merged))
    assert not alone.page.is_visible("#energy-section")
    assert provenance.load(merged).record.sources["primary"].targets in alone.text("#sources")
    assert "need the sources" in alone.text("#notes")


def test_colours_follow_what_is_asked_for(triple_with_ties: Triple, merged: Path, opened: Any) -> None:
    shown = opened(hsa.inspect(**triple_with_ties))
    background = (
        "() => [...document.querySelectorAll('[role=gridcell]')].map((c) => getComputedStyle(c).backgroundColor)"
    )
    choices = shown.page.locator("#colour option").evaluate_all("(options) => options.map((o) => o.value)")
    assert choices == ["score", "within", "cosine", "tv1_relative", "tv2_relative"]
    seen = []
    for choice in choices:
        shown.page.select_option("#colour", choice)
        seen.append(tuple(shown.page.evaluate(background)))
        assert len(set(seen[-1])) > 10
    assert len(set(seen)) == len(choices)
    alone = opened(hsa.inspect(merged))
    assert alone.page.locator("#colour option").count() == 2  # a provenance holds scores alone


def test_the_keyboard_reaches_every_head_and_reads_it(triple_with_ties: Triple, opened: Any) -> None:
    found = hsa.inspect(**triple_with_ties, energy=False)
    shown = opened(found)
    cells = shown.page.locator("table.map").first.locator("[role=gridcell]")
    cells.first.focus()
    for key in ("ArrowRight", "ArrowDown", "End", "ArrowRight", "ArrowUp", "Home", "ArrowDown"):
        shown.page.keyboard.press(key)
    place = shown.page.evaluate(
        "() => [document.activeElement.closest('tr').dataset.tensor, Number(document.activeElement.dataset.head)]"
    )
    name = "model.encoder.layers.1.self_attn.q_proj.weight"
    assert place == [name, 0]
    tensor = found.tensors[name]
    detail = shown.text("#detail")
    assert f"{name}, head 0" in detail
    assert f"rank {tensor.ranks[0]} of 4" in detail
    assert f"score {float(f'{tensor.scores[0]:.6g}')}" in detail
    assert shown.page.locator("table.map").first.locator("[tabindex='0']").count() == 1
    shown.page.locator("#k").focus()
    shown.page.keyboard.press("ArrowRight")
    assert shown.page.input_value("#k-number") == "0.61"
    unnamed = shown.page.evaluate(
        """() => [...document.querySelectorAll("input, select, button")].filter((control) =>
            !(control.labels?.length || control.getAttribute("aria-label") || control.textContent.trim())).length"""
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_and_can_be_read(scheme: str, triple_with_ties: Triple, opened: Any) -> None:
    found = hsa.inspect(**triple_with_ties, targets="attention-all")
    shown = opened(found, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert shown.page.evaluate("() => document.documentElement.scrollWidth") == 390
    contrast = shown.page.evaluate(
        """() => {
            const light = (text) => {
                const [r, g, b] = text.match(/[\\d.]+/g).map((v) => v / 255)
                    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const paper = light(getComputedStyle(document.body).backgroundColor);
            const worst = (chosen) => Math.min(...[...document.querySelectorAll(chosen)].map((element) => {
                const ink = light(getComputedStyle(element).color);
                return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
            }));
            return worst("h1, h2, p, label, .hint, th, td.number, .legend span");
        }"""
    )
    assert contrast > 4.5  # WCAG 2.2, level AA


def test_it_prints(triple_with_ties: Triple, opened: Any) -> None:
    shown = opened(hsa.inspect(**triple_with_ties))
    pdf = shown.page.pdf()
    assert pdf[:5] == b"%PDF-"
    assert len(pdf) > 10_000


def test_hostile_names_run_nothing(merged: Path, opened: Any, tmp_path: Path) -> None:
    shutil.copy(merged / PROVENANCE, tmp_path)
    script = "</script><script>window.hit = 1</script><!--" + HOSTILE
    forge(tmp_path, sources__base__id=script, parameters__card={"notes": HOSTILE}, program__name=script)
    shown = opened(hsa.inspect(tmp_path))
    assert shown.page.evaluate("() => window.hit") is None
    assert "</script><script>window.hit = 1</script><!--" in shown.text("#sources")
    assert "<img src=x onerror=hit()>" in shown.text("#parameters")
    assert shown.page.locator("img").count() == 0
    assert len(shown.heads()) == 10


def test_the_policy_stops_any_other_script_and_any_request(merged: Path, browser: Any, tmp_path: Path) -> None:
    html = view.render(hsa.inspect(merged)).decode("utf-8")
    added = '<script>window.hit = 1</script><img src="file:///nowhere.png"></body>'
    (tmp_path / "page.html").write_text(html.replace("</body>", added), encoding="utf-8")
    shown = Page(browser, tmp_path / "page.html")
    assert shown.page.evaluate("() => window.hit") is None
    assert sum("Content Security Policy" in complaint for complaint in shown.complaints) >= 2
    assert len(shown.heads()) == 10
    shown.context.close()


def test_the_real_triple(real: Triple, opened: Any, tmp_path: Path) -> None:
    reports = {k: hsa.merge(**real, output=tmp_path / str(k), k=k, sync=False) for k in (0.6, 0.2)}
    shown = opened(hsa.inspect(tmp_path / "0.6"))
    recorded = {target.name: target.selected for target in provenance.load(tmp_path / "0.6").record.targets}
    assert shown.heads() == recorded
    shown.page.locator("#k").fill("0.2")
    assert shown.heads() == {name: tensor.selected for name, tensor in reports[0.2].tensors.items()}
