"""The report: figures by hand from sample rows, one run in each ratio, honest gaps, and pages that can be stale."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import plots
import pytest
import report
import report_merge
import rows
from report_rows import Row, about, cells, no_image

from hsa.actions.mergekit_config.merge_methods import METHODS
from hsa.methods.registry import methods
from hsa.methods.subspace_method import SubspaceMethod

BEFORE, AFTER = "# Title\n\nkept before\n", "\nkept after\n"
MIB = 2**20
PROGRAMS = {  # median seconds, peak MiB
    "cp -r, then sync": (8.0, 0.25),
    "hsa merge": (5.0, 80),
    "cp -r": (4.0, 0.25),
    "hsa merge --no-hash --no-sync": (6.0, 60),
    "full load (transformers)": (60.0, 4000),
    "full load (transformers), then sync": (64.0, 4000),
    "mergekit task_arithmetic": (42.5, 3000),
    "mergekit task_arithmetic, then sync": (45.0, 3000),
    'python -c "import torch"': (2.0, 140),
}


def merge_row(program: str, median: float, peak: float, **changes: object) -> Row:
    of_hsa = program.startswith("hsa")
    return {
        **about(), "shape": "large-v3", "dtype": "float32", "model_bytes": 6_000_000_000, "program": program,
        "cache": "warm", "rounds": 5, "median_s": median, "min_s": median / 2, "max_s": median * 2, "cpu_s": 1.25,
        "peak_bytes": round(peak * MIB), "peak_rss_bytes": round(peak * 1.5 * MIB),
        "bytes_read": 7_200_000_000 if of_hsa else "", "bytes_read_base": 600_000_000 if of_hsa else "",
        "bytes_read_secondary": 540_000_000 if of_hsa else "", "bytes_written": "", "syscall_read": 7_250_000_000,
        "syscall_written": "", "disk_read": 5_500_000_000, "disk_written": "", **changes,
    }  # fmt: skip


def merge_run(**changes: object) -> list[Row]:
    return [merge_row(program, *figures, **changes) for program, figures in PROGRAMS.items()]


def kernel_row(case: str, median: float, device: str = "cuda", dtype: str = "float16", **changes: object) -> Row:
    on_gpu = {"gpu": "Some GPU", "driver": "550.1"} if device == "cuda" else {}
    return {
        **about(), **on_gpu, "device": device, "threads": "" if on_gpu else 2, "shape": "large-v3", "dtype": dtype,
        "case": case, "repetitions": 30, "median_ms": median, "min_ms": median / 2, "max_ms": median * 2,
        "share_selected": 0.6, "bytes": 1_132_462_080, "gb_s": 2264.9, "copy_gb_s": 2831.2, "of_copy": 0.8,
        "floor_ms": 0.4, "times_eager": 12.5, "times_compile": "", **changes,
    }  # fmt: skip


def wer_row(variant: str, wer: float, **changes: object) -> Row:
    return {
        **about(), "model": "whisper-x", "variant": variant, "targets": "encoder-qkv", "k": 0.6, "lam": 0.5,
        "alpha": 0.2, "clips": 40, "words": 800, "errors": round(8 * wer), "wer": wer, "wer_low": wer - 1,
        "wer_high": wer + 2, "against_primary": "", "against_low": "", "against_high": "", "seconds": 9, **changes,
    }  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page of benchmarks, beside the others."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, blocks in report.PAGES.items():
        marked = "".join(f"\n<!-- report:{block} -->\nold\n<!-- /report:{block} -->\n" for block in blocks)
        (docs / name).write_text(BEFORE + marked + AFTER, encoding="utf-8")
    return docs / "benchmarks.md"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def call(page: Path, results: Path) -> Callable[..., int]:
    def run(*options: str) -> int:
        return report.main([f"--results={results}", f"--docs={page.parent}", *options])

    return run


def block(name: str, results: Path) -> str:
    return "\n\n".join(report.BLOCKS[name](results, lambda png, _: f"![]({png}.png)"))


# Merges ------------------------------------------------------------------------------------------------------


def test_figures_of_a_merge(results: Path) -> None:
    rows.append("merge", merge_run(), results)
    text = block("merge", results)
    assert cells(text, "hsa merge |")[1:] == [
        "5", "5.00", "2.50 to 10.00", "0.62 of cp -r, then sync", "1.25", "80.0", "-60.0", "120.0",
    ]  # fmt: skip
    assert cells(text, "hsa merge --no")[4] == "1.50 of cp -r"
    full = cells(text, "full load (transformers) |")
    assert (full[4], full[7]) == ("10.0 times hsa merge --no-hash --no-sync", "+3860.0")
    assert cells(text, "full load (transformers), then sync")[4] == "12.8 times hsa merge"
    assert cells(text, "mergekit task_arithmetic |")[4] == "7.1 times hsa merge --no-hash --no-sync"
    assert cells(text, "mergekit task_arithmetic, then sync")[4] == "9.0 times hsa merge"
    assert cells(text, "cp -r |")[4:] == ["", "1.25", "0.2", "", "0.4"]
    assert "read 7.20 GB, of three models of 6.00 GB each: 6.06 GB of primary (101.0%), 0.60 GB of base (10.0%)" in text
    assert "0.54 GB of secondary (9.0%). The kernel counted 7.25 GB in its read calls." in text
    wanted = (
        "Measured on 2 cores, 24 GiB, Linux 6.18, Some CPU, python 3.11.7, numpy 2.4.6, commit abc1234, 2026-11-20."
    )
    assert wanted in text


def test_the_newest_run_wins_and_runs_are_not_mixed(results: Path) -> None:
    old = merge_run()
    new = [
        merge_row(program, median, 50, run="2026-11-21T10:00:00Z")
        for program, median in (("cp -r, then sync", 10.0), ("hsa merge", 9.0))
    ]
    for every in (new, old):
        rows.append("merge", every, results)
    text = block("merge", results)
    assert cells(text, "hsa merge |")[2:5] == ["9.00", "4.50 to 18.00", "0.90 of cp -r, then sync"]
    assert cells(text, "hsa merge |")[7] == "", "bare torch was not measured in the newest run"
    assert "full load (transformers)" not in text
    assert cells(text, "large-v3 float32: peak memory above")[1:] == ["", "192.0 MiB", "96.0 MiB", "not yet measured"]
    assert "2026-11-20" not in text.split("Every run of")[0]


def test_shapes_and_element_types_have_their_own_newest_run(results: Path) -> None:
    rows.append("merge", merge_run(), results)
    other = {"run": "2026-11-22T10:00:00Z", "commit": "fffffff"}
    rows.append("merge", merge_run(shape="base", model_bytes=290_000_000, **other), results)
    rows.append("merge", merge_run(dtype="float16", model_bytes=3_000_000_000, **other), results)
    text = block("merge", results)
    titles = ("**large-v3 float32, 6.00 GB", "large-v3 float16, 3.00 GB", "base float32, 0.29 GB")
    assert [text.count(title) for title in titles] == [1, 1, 1]
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    assert "- large-v3 float32: measured on 2 cores" in text
    assert "commit fffffff, 2026-11-22" in text


def test_targets_met_and_missed(results: Path) -> None:
    rows.append("merge", merge_run(), results)
    tiny = {"shape": "tiny", "model_bytes": 150_000_000}
    rows.append(
        "merge", [merge_row("hsa merge", 2.6, 80, **tiny), merge_row(report_merge.BARE, 2.0, 140, **tiny)], results
    )
    text = block("merge", results)
    # 5 / 8, 6 / 4, 5 / 64, 6 / 60, 5 / 60, 80 / 4000, 80 - 140, 2.6 / 2
    assert [cells(text, f"{first}")[1:] for first in (
        "large-v3 float32: wall with", "large-v3 float32: wall, ", "large-v3 float32: wall over a full load, then",
        "large-v3 float32: `--no-hash", "large-v3 float32: wall over a full load without",
        "large-v3 float32: peak memory over", "large-v3 float32: peak memory above", "tiny float32",
    )] == [
        ["0.625", "1.15", "0.9", "met, aim met"],
        ["1.5", "1.1", "0.85", "**missed**"],
        ["1/12.8", "1/8", "1/12", "met, aim met"],
        ["1/10", "1/8", "1/12", "met, aim missed"],
        ["1/12", "1/8", "1/12", "met, aim met"],
        ["1/50", "1/40", "", "met"],
        ["-60.0 MiB", "192.0 MiB", "96.0 MiB", "met, aim met"],
        ["1.3", "1.5", "1.2", "met, aim missed"],
    ]  # fmt: skip


@pytest.mark.parametrize("target", report_merge.TARGETS, ids=lambda target: target.what)
def test_every_limit_is_a_limit(target: report_merge.Target) -> None:
    above = abs(target.must) * 1e-9
    assert report_merge.verdict(target, target.must) in ("met", "met, aim missed")
    assert report_merge.verdict(target, target.must + above) == "**missed**"
    assert report_merge.verdict(target, None) == "not yet measured"
    if target.aim is not None:
        assert report_merge.verdict(target, target.aim) == "met, aim met"
        assert report_merge.verdict(target, target.aim + above) == "met, aim missed"


def test_cold_rows_stand_apart(results: Path) -> None:
    cold = [merge_row("cp -r, then sync", 20.0, 1), merge_row("hsa merge", 30.0, 90)]
    rows.append("merge", [{**row, "cache": "cold", "rounds": 3} for row in cold], results)
    rows.append("merge", [{**row, "cache": ""} for row in merge_run(run="2026-11-19")], results)
    text = block("merge", results)
    assert cells(text, "hsa merge |")[4] == "0.62 of cp -r, then sync"
    apart = text.split("not in the page cache:")[1]
    wanted = "| large-v3 | float32 | hsa merge | 30.00 | 15.00 to 60.00 | 1.50 of cp -r, then sync | 3 | 5.50 GB |"
    assert wanted in apart


def test_rows_of_the_narrow_header_and_blanks(results: Path) -> None:
    narrow = ("run", "machine", "versions", "commit", "shape", "dtype", "model_bytes", "program", "median_s")
    rows.append("merge", [{column: row[column] for column in narrow} for row in merge_run()], results)
    text = block("merge", results)
    assert cells(text, "hsa merge |")[1:] == ["", "5.00", "", "0.62 of cp -r, then sync", "", "", "", ""]
    assert f"Bytes that `hsa merge` reads: {report.NOT_YET}." in text


def test_every_run_of_the_large_model_is_shown(results: Path) -> None:
    """A single run may be a lucky one, so that all are there, whichever the verdicts rest on."""
    first = merge_run()
    rows.append("merge", first, results)
    assert "Every run of" not in block("merge", results)
    slower = [{**row, "run": "2030-01-01T00:00:00Z", "commit": "beef"} for row in merge_run()]
    for row in slower:
        if row["program"] == report_merge.HSA:
            row["median_s"] = 2 * float(str(row["median_s"]))
    rows.append("merge", slower, results)
    text = block("merge", results).split("Every run of")[1]
    one, two = (float(cells(text, str(run))[4]) for run in (first[0]["run"], "2030-01-01T00:00:00Z"))
    assert two == pytest.approx(2 * one, abs=0.02)


# Methods -----------------------------------------------------------------------------------------------------


def parity_row(comparison: str, case: str, between: float, **changes: object) -> Row:
    return {
        **about(), "comparison": comparison, "method": "ties", "case": case, "between": between, "ours": "",
        "theirs": "", "formulas": "", "most": 3e-7, "reason": "", **changes,
    }  # fmt: skip


def test_distances_from_mergekit(results: Path) -> None:
    assert report.PAGES["methods.md"]["parity"](results, no_image) == ["Distances from mergekit are not yet measured."]
    files = [parity_row("files", "whispers", 2e-8), parity_row("files", "llamas", 3e-8)]
    wide = {"method": "nuslerp", "ours": 2e-8, "theirs": 3.1e-6, "formulas": 0, "most": 6e-6, "reason": "rounding"}
    functions = [parity_row("functions", "3 models", 1.25e-7), parity_row("functions", "2 models", 3e-6, **wide)]
    rows.append("parity", [*files, *functions], results)
    rows.append("parity", [parity_row("files", "whispers", 9e-8, run="2026-11-01T10:00:00Z")], results)
    text = "\n\n".join(report.PAGES["methods.md"]["parity"](results, no_image))
    assert "| method | whispers | llamas | at most |" in text
    assert "| ties | 2.0e-08 | 3.0e-08 | 3.0e-07 |" in text
    assert "| ties | 3 models | 1.2e-07 | 3.0e-07 |  |  |  |" in text
    assert "| nuslerp | 2 models | 3.0e-06 | 6.0e-06 | 2.0e-08 | 3.1e-06 | 0.0e+00 |" in text
    assert text.endswith("this is why:\n\n- `nuslerp`, 2 models: rounding.")


def test_the_rows_of_distances_keep_their_limits_and_leave_no_method_out() -> None:
    held = rows.newest(rows.read("parity"), lambda row: (row["comparison"], row["method"]))
    assert {row["method"] for row in held if row["comparison"] == "files"} == METHODS.keys() - {"hsa"}
    assert {row["method"] for row in held if row["comparison"] == "functions"} == METHODS.keys() - {"hsa"}
    subspaces = {name for name, method in methods().items() if isinstance(method, SubspaceMethod)}
    assert {row["method"] for row in held if row["comparison"] == "formulas"} == subspaces
    for row in held:
        assert 0 <= float(row["between"]) <= float(row["most"])
        assert float(row["most"]) <= 3e-7 or row["reason"]


# Sweeps, kernels, word error rates ---------------------------------------------------------------------------


def test_sweep(results: Path) -> None:
    row = {**about(), "shape": "tiny", "dtype": "float16", "case": "11 patches", "points": 11, "rounds": 3,
           "median_s": 1.5, "min_s": 1.25, "max_s": 2.75, "bytes": 7_250_000, "note": "per point"}  # fmt: skip
    rows.append("sweep", [row, {**row, "run": "2026-11-01", "case": "old"}], results)
    text = block("sweep", results)
    assert cells(text, "tiny float16") == [
        "tiny float16", "11 patches", "11", "3", "1.50", "1.25 to 2.75", "7.25 MB", "per point",
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "said"), [(8.4, "1.60 times"), (6.0, "1.00 times")])
def test_a_sweep_has_a_verdict(results: Path, seconds: float, said: str) -> None:
    def row(case: str, median: float) -> dict[str, object]:
        return {**about(), "shape": "large-v3", "dtype": "float32", "case": case, "points": 1, "rounds": 3,
                "median_s": median, "min_s": 1, "max_s": 9, "bytes": 1, "note": ""}  # fmt: skip

    cases = ((report.ONE_PATCH, 2.0), (report.SWEEP, seconds), (report.TEN, 4.0))
    rows.append("sweep", [row(case, median) for case, median in cases], results)
    text = block("sweep", results)
    assert f"large-v3 float32: eleven points took one patch and {said}" in text
    assert ("**missed**" in text) == (seconds > 7.2)


def test_gpu_cases_without_rows_are_not_yet_measured(results: Path) -> None:
    empty = block("kernels-gpu", results)
    assert "On a GPU the kernels are not yet measured." in empty
    assert [line.split(" | ")[2] for line in empty.splitlines() if line.startswith("| ") and "float" in line][:12] == [
        "not yet measured"
    ] * 12
    cpu = kernel_row("one pass, in place", 99.0, device="cpu")
    rows.append("kernels", [kernel_row("one pass, in place", 0.5), cpu], results)
    text = block("kernels-gpu", results)
    assert cells(text, "one pass, in place | float16")[2:] == ["0.5000", "0.4000", "1.25", "1.13 GB", "12.5", ""]
    assert cells(text, "one pass, in place | float32")[2:] == ["not yet measured", "", "", "", "", ""]
    assert text.count("| not yet measured |") >= 11
    assert "Some GPU, driver 550.1, python" in text


def test_a_gpu_row_of_a_failed_case_is_not_yet_measured(results: Path) -> None:
    rows.append("kernels", [kernel_row("one pass, in place", 0.5) | {"median_ms": ""}], results)
    assert cells(block("kernels-gpu", results), "one pass, in place | float16")[2] == "not yet measured"


def test_when_a_gpu_helps(results: Path) -> None:
    every = [
        kernel_row(report.CPU_WHOLE, 200, "cpu", "float32"), kernel_row(report.CPU_APPLY, 150, "cpu", "float32"),
        kernel_row(report.WHOLE, 1.25, "cuda", "float32"),
    ]  # fmt: skip
    rows.append("kernels", every, results)
    rows.append("merge", merge_run(), results)
    text = block("kernels-gpu", results)
    applied = {**about(), "shape": "large-v3", "dtype": "float32", "case": report.APPLIED, "median_s": "0.25"}
    rows.append("sweep", [applied], results)
    text = block("kernels-gpu", results)
    kernels = "models resident, the kernels alone"
    assert cells(text, f"{kernels}: one merge | float32")[2:] == ["200 ms, 2 threads", "1.25 ms, Some GPU"]
    assert cells(text, f"{kernels}: one more candidate of a sweep | float32")[2:] == [
        "150 ms, 2 threads", "not yet measured",
    ]  # fmt: skip
    waits = "one more candidate, all that a caller of hsa.Merger.apply_ waits"
    assert cells(text, f"{waits} | float32")[2:] == ["0.25 s", "not yet measured"]
    assert cells(text, f"{waits} | float16")[2:] == ["not yet measured", "not yet measured"]
    assert cells(text, "from files, in the page cache: hsa merge | float32")[2:] == ["5.00 s", "not yet measured"]
    assert "Of the 5.00 s that one merge from files takes in float32, the formula is about 200 ms" in text
    rows.append("merge", merge_run(run="2026-11-25", cpu="Another CPU"), results)
    assert "the formula is about" not in block("kernels-gpu", results)


def test_cpu_kernels(results: Path) -> None:
    assert block("kernels-cpu", results) == "On a CPU the kernels are not yet measured."
    rows.append("kernels", [kernel_row(report.CPU_WHOLE, 88, "cpu", gb_s=12.34, of_copy=0.876)], results)
    text = block("kernels-cpu", results)
    assert cells(text, "large-v3 float16") == [
        "large-v3 float16", report.CPU_WHOLE, "2", "88.000", "44.000 to 176.000", "12.3", "0.88", "12.50",
    ]  # fmt: skip
    assert "![](kernels.png)" in text


def test_operations_of_the_formula() -> None:
    elements = 96 * 1280 * 1280
    cases = ("one pass, in place", report.CPU_WHOLE, report.APPLY, report.CPU_APPLY)
    done = [plots.operations({"case": case, "shape": "large-v3", "share_selected": "0.6"}) for case in cases]
    assert done == pytest.approx([8.6 * elements, 8.6 * elements, 3.6 * elements, 3.6 * elements])


def test_word_error_rates(results: Path) -> None:
    against = {"against_primary": -0.5, "against_low": -1.25, "against_high": 0.25}
    rows.append("wer", [wer_row("primary", 12.5), wer_row("merged", 12, **against)], results)
    rows.append("wer", [wer_row("dropped", 90, run="2026-11-01"), wer_row("other", 20, model="y")], results)
    text = block("wer", results)
    assert "**whisper-x**, 40 clips, 800 words:" in text
    assert cells(text, "primary")[5:] == ["12.50 (11.50 to 14.50)", ""]
    assert cells(text, "merged")[1:] == [
        "encoder-qkv", "0.6", "0.5", "0.2", "12.00 (11.00 to 14.00)", "-0.50 (-1.25 to +0.25)",
    ]  # fmt: skip
    assert cells(text, "other")[5] == "20.00 (19.00 to 22.00)"
    assert "dropped" not in text


def test_an_interval_that_begins_at_zero_is_drawn_from_there(tmp_path: Path) -> None:
    for name, low in (("zero", "0"), ("missing", "")):
        row = {"variant": "v", "wer": "10", "wer_low": low, "wer_high": "20"}
        plots.draw_wer(tmp_path / name, {"model": [row]})
    assert (tmp_path / "zero").read_bytes() != (tmp_path / "missing").read_bytes()


# The pages and the pictures ---------------------------------------------------------------------------------


def size_of(png: Path) -> tuple[int, int]:
    """Pixels of a PNG that can be decoded, and shows more than one colour."""
    from matplotlib.image import imread

    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(png)
    assert pixels.std() > 0.01
    return pixels.shape[1], pixels.shape[0]


def everything(results: Path) -> None:
    rows.append("merge", [*merge_run(), *merge_run(dtype="float16", model_bytes=3_000_000_000)], results)
    cases = ("one pass, in place", "apply only, scores cached, in place")
    rows.append(
        "kernels",
        [kernel_row(case, 0.5 + n, device, dtype) for device in ("cuda", "cpu") for n, case in enumerate(cases)
         for dtype in ("float16", "float32", "float16-tunes")],
        results,
    )  # fmt: skip
    rows.append("wer", [wer_row("primary", 12.5), wer_row(r"merged $\bad$", 1)], results)


def test_a_second_run_changes_nothing(
    call: Callable[..., int], page: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything(results)
    assert call("--check") == 1
    assert "stale: merge, sweep, kernels-gpu, kernels-cpu, wer" in capsys.readouterr().err
    assert call() == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(BEFORE) and text.endswith(AFTER) and "old\n" not in text
    for name in ("merge", "kernels", "wer"):
        assert text.count(f"](images/{name}.png)") == 1
        width, height = size_of(page.parent / "images" / f"{name}.png")
        assert width == 1600 and 300 < height < 1000
    drawn = {path: path.read_bytes() for path in page.parent.glob("**/*.png")}
    assert len(drawn) == 3
    assert call() == 0
    assert page.read_text(encoding="utf-8") == text
    assert {path: path.read_bytes() for path in page.parent.glob("**/*.png")} == drawn
    assert call("--check") == 0


def test_new_rows_make_stale_only_what_shows_them(
    call: Callable[..., int], page: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 0
    rows.append("wer", [wer_row("primary", 12.5)], results)
    text = page.read_text(encoding="utf-8")
    capsys.readouterr()
    assert call("--check") == 1
    assert capsys.readouterr().err == f"{page}: stale: wer; run make report\n"
    assert page.read_text(encoding="utf-8") == text
    assert list(page.parent.glob("**/*.png")) == []


@pytest.mark.parametrize("marker", ["<!-- report:sweep -->", "<!-- /report:kernels-cpu -->"])
def test_a_missing_marker_is_named(call: Callable[..., int], page: Path, results: Path, marker: str) -> None:
    rows.append("merge", merge_run(), results)
    text = page.read_text(encoding="utf-8").replace(marker, "")
    page.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(marker)) as raised:
        call()
    assert raised.value.code not in (0, None)
    assert page.read_text(encoding="utf-8") == text
    assert list(page.parent.glob("**/*.png")) == []


def test_hostile_text_stays_in_its_cell(call: Callable[..., int], page: Path, results: Path) -> None:
    name = "a|b\nc\\|d <!-- /report:merge --> `e`"
    rows.append("merge", [merge_row(name, 5, 80, machine=name)], results)
    assert call() == 0
    escaped = r"a\|b c\\\|d &lt;!-- /report:merge --> \`e\`"
    text = page.read_text(encoding="utf-8")
    assert f"| {escaped} | 5 | 5.00 |" in text
    assert f"Measured on {escaped}, Some CPU" in text
    assert call("--check") == 0


def test_what_is_no_number_is_refused(results: Path) -> None:
    rows.append("merge", [merge_row("hsa merge", 5, 80, cpu_s="fast")], results)
    with pytest.raises(SystemExit, match="column cpu_s holds 'fast'"):
        block("merge", results)


def test_a_file_without_runs_is_refused(results: Path) -> None:
    (results / "merge.csv").write_text("date,shape,dtype,program\n2026-11-23,tiny,float32,cp -r\n")
    with pytest.raises(SystemExit, match=r"merge\.csv: expected the columns run"):
        block("merge", results)


def test_the_pages_are_what_the_rows_say() -> None:
    """Whoever adds rows or edits a table by hand must run `make report`."""
    done = subprocess.run([sys.executable, report.__file__, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
