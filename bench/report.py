"""Write the measured rows into the documentation as tables, and draw them.

    python bench/report.py [--results DIR] [--docs DIR] [--check]

Each page of PAGES has blocks between <!-- report:NAME --> and <!-- /report:NAME -->, whose text is replaced. The
pictures merge.png, kernels.png and wer.png go to the folder `images` beside the pages. Every figure comes from rows of
the newest run of its case; what no row holds reads "not yet measured". --check writes nothing, and exits 1 if a page
is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from cases import CAVEATS
from figures import (
    LARGE,
    NOT_YET,
    Image,
    divided,
    measured_on,
    number,
    of_shape,
    plain,
    rows_of,
    show,
    size,
    span,
    table,
)
from report_merge import FULL_SYNC, HSA, MERGEKIT_SYNC, merge_block, merges
from report_methods import methods_block, parity_block, wer_methods_block
from report_search import search_block
from rows import RESULTS, ROOT, Row, newest

from hsa.testing.whisper_config import SHAPES

IMAGES = "images"
"""The folder of the pictures, beside the pages."""

ON_GPU = "hsa merge --backend triton"

APPLIED = "hsa.Merger.apply_, one candidate in place"
ONE_PATCH, SWEEP = "hsa merge --patch, one point", "hsa sweep, eleven points"
TEN = "bytes of ten patches written, through the page cache"
SWEEP_LIMIT = 1.3

WHOLE, APPLY = "one pass, in place", "apply only, scores cached, in place"
CPU_WHOLE, CPU_APPLY = "CPU backend, merge", "CPU backend, apply only, scores cached"
GPU_CASES = (WHOLE, "one pass, new buffer", "two launches, in place", APPLY)
GPU_DTYPES = ("float16", "float32", "bfloat16")


# Sweeps ------------------------------------------------------------------------------------------------------


def sweep_block(folder: Path, image: Image) -> list[str]:
    every = newest(rows_of("sweep", folder), of_shape)
    if not every:
        return [f"Sweeps are {NOT_YET}."]
    lines = [
        [of_shape(row), row["case"], row.get("points"), row.get("rounds"), show(number(row, "median_s"), form),
         span(row, "min_s", "max_s", form), size(number(row, "bytes")), row.get("note")]
        for row in every
        for form in (".2f" if (number(row, "median_s") or 1) >= 0.01 else ".5f",)
    ]  # fmt: skip
    head = ["model", "case", "points", "rounds", "median s", "min to max s", "bytes", "note"]
    return [measured_on(every, of_shape), table(head, lines), *sweep_verdicts(every)]


def sweep_verdicts(every: Sequence[Row]) -> list[str]:
    """How each sweep compares with its limit, by the medians."""
    found = []
    for model in dict.fromkeys(map(of_shape, every)):
        medians = {row["case"]: number(row, "median_s") for row in every if of_shape(row) == model}
        one, many, ten = (medians.get(case) for case in (ONE_PATCH, SWEEP, TEN))
        if one is None or many is None or not ten:
            continue
        times = (many - one) / ten
        verdict = "met" if times <= SWEEP_LIMIT else "**missed**"
        found.append(
            f"- {model}: eleven points took one patch and {times:.2f} times the writing of the other ten through the "
            f"page cache, at most {SWEEP_LIMIT}: {verdict}."
        )
    return ["\n".join(found)] if found else []


# Kernels -----------------------------------------------------------------------------------------------------


def kernels(folder: Path, device: str) -> list[Row]:
    every = [row for row in rows_of("kernels", folder) if row["device"] == device]
    return newest(every, lambda row: (row.get("gpu"), row["shape"], row["dtype"]))


def fastest(every: Iterable[Row], case: str, dtype: str) -> Row | None:
    """The row of a case of large-v3 with the least median, if there is one."""
    fitting = [row for row in every if (row["shape"], row["dtype"], row["case"]) == (LARGE, dtype, case)]
    timed = [row for row in fitting if number(row, "median_ms") is not None]
    return min(timed, key=lambda row: number(row, "median_ms") or 0, default=None)


def candidate(folder: Path, dtype: str) -> str:
    """How long a caller of `hsa.Merger.apply_` waits for one more candidate of the large model."""
    held = [row for row in rows_of("sweep", folder) if (row["shape"], row["dtype"]) == (LARGE, dtype)]
    for row in newest(held, of_shape):
        if row["case"] == APPLIED:
            return f"{show(number(row, 'median_s'), '.3g')} s"
    return NOT_YET


def milliseconds(row: Row | None) -> str:
    if row is None:
        return NOT_YET
    where = f"{row['threads']} threads" if row.get("threads") else row.get("gpu")
    return ", ".join(filter(None, (f"{show(number(row, 'median_ms'), '.3g')} ms", where)))


def gpu_table(every: Sequence[Row]) -> str:
    """The cases that have a floor."""
    columns = (("median_ms", ".4f"), ("floor_ms", ".4f"), ("times_eager", ".1f"), ("times_compile", ".1f"))
    lines = []
    for dtype in GPU_DTYPES:
        for case in GPU_CASES:
            row = fastest(every, case, dtype)
            median, floor, eager, compiled = (show(number(row, column), form) for column, form in columns)
            over = show(divided(number(row, "median_ms"), number(row, "floor_ms")))
            counted = size(number(row, "bytes"))
            lines.append([case, dtype, median or NOT_YET, floor, over, counted, eager, compiled])
    weights = 3 * SHAPES[LARGE].encoder_layers
    head = [f"case ({LARGE}, {weights} q/k/v weights)", "dtype", "median ms", "floor ms", "times the floor"]
    return table([*head, "bytes counted", "speed over eager torch", "over torch.compile"], lines)


def kernel_table(every: Sequence[Row]) -> str:
    columns = (("gb_s", ".1f"), ("of_copy", ".2f"), ("times_eager", ".2f"))
    lines = []
    for row in every:
        times = [show(number(row, "median_ms"), ".3f") or NOT_YET, span(row, "min_ms", "max_ms", ".3f")]
        shares = [show(number(row, column), form) for column, form in columns]
        lines.append([of_shape(row), row["case"], row.get("threads"), *times, *shares])
    head = ["model", "case", "threads", "median ms", "min to max ms", "GB/s", "of copy bandwidth"]
    return table([*head, "speed over eager torch"], lines)


def when_a_gpu_helps(folder: Path) -> list[str]:
    """The same work on a CPU and on a GPU, as far as rows hold it."""
    on_cpu, on_gpu, warm = kernels(folder, "cpu"), kernels(folder, "cuda"), merges(folder, "warm")
    lines, said = [], []
    for dtype in GPU_DTYPES[:2]:
        whole, apply = (fastest(on_cpu, case, dtype) for case in (CPU_WHOLE, CPU_APPLY))
        for what, resident, case in (("one merge", whole, WHOLE), ("one more candidate of a sweep", apply, APPLY)):
            cells = [milliseconds(resident), milliseconds(fastest(on_gpu, case, dtype))]
            lines.append([f"models resident, the kernels alone: {what}", dtype, *cells])
        waits = "one more candidate, all that a caller of hsa.Merger.apply_ waits"
        lines.append([waits, dtype, candidate(folder, dtype), NOT_YET])
        programs = warm.get((LARGE, dtype), {})
        walls = [number(programs.get(name), "median_s") for name in (HSA, ON_GPU)]
        files = [NOT_YET if wall is None else f"{wall:.2f} s" for wall in walls]
        lines.append([f"from files, in the page cache: {HSA}", dtype, *files])
        merged = programs.get(HSA)
        if whole and merged and walls[0] and all(whole.get(of) == merged.get(of) for of in ("machine", "cpu")):
            said.append(
                f"Of the {files[0]} that one merge from files takes in {dtype}, the formula is about "
                f"{milliseconds(whole)} (models resident, same machine, another run): a GPU can save no more."
            )
    return [table([f"work, {LARGE}", "dtype", "on a CPU", "on a GPU"], lines), *said]


def gpu_block(folder: Path, image: Image) -> list[str]:
    every = kernels(folder, "cuda")
    parts = [] if every else [f"On a GPU the kernels are {NOT_YET}.", gpu_table([])]
    for gpu in sorted({row.get("gpu") or "" for row in every}):
        held = [row for row in every if (row.get("gpu") or "") == gpu]
        parts += [measured_on(held, of_shape), gpu_table(held)]
        shown = [fastest(held, case, dtype) for dtype in GPU_DTYPES for case in GPU_CASES]
        others = [row for row in held if row not in shown]
        if others:
            parts += ["<details><summary>everything else</summary>", kernel_table(others), "</details>"]
    if every:
        parts.append("The floor is the bytes that the formula must move, at the copy bandwidth measured in that run.")
        parts.append(image("kernels", "Rooflines of the kernels"))
    return [*parts, *when_a_gpu_helps(folder)]


def cpu_block(folder: Path, image: Image) -> list[str]:
    every = kernels(folder, "cpu")
    if not every:
        return [f"On a CPU the kernels are {NOT_YET}."]
    parts = [measured_on(every, of_shape), kernel_table(every)]
    return parts if kernels(folder, "cuda") else [*parts, image("kernels", "Rooflines of the kernels")]


# Word error rates --------------------------------------------------------------------------------------------


def wers(folder: Path) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in newest(rows_of("wer", folder), lambda row: row["model"]):
        found.setdefault(row["model"], []).append(row)
    return found


def with_interval(row: Row, value: str, low: str, high: str, sign: str = "") -> str:
    """A figure in percent, with its interval where there is one."""
    held = [number(row, column) for column in (value, low, high)]
    shown = [show(of, f"{sign}.2f") for of in held if of is not None]
    if held[0] is None:
        return ""
    return f"{shown[0]} ({shown[1]} to {shown[2]})" if len(shown) == 3 else shown[0]


def wer_block(folder: Path, image: Image) -> list[str]:
    models = wers(folder)
    if not models:
        return [f"Word error rates are {NOT_YET}."]
    parts = [measured_on([row for held in models.values() for row in held], lambda row: row["model"])]
    head = ["variant", "targets", "k", "lambda", "alpha", "WER % (95 % interval)", "minus primary's (95 % interval)"]
    for model, held in models.items():
        lines = [
            [*(row.get(column) for column in ("variant", "targets", "k", "lam", "alpha")),
             with_interval(row, "wer", "wer_low", "wer_high"),
             with_interval(row, "against_primary", "against_low", "against_high", "+")]
            for row in held
        ]  # fmt: skip
        parts += [f"**{plain(model)}**, {plain(held[0].get('clips'))} clips, {plain(held[0].get('words'))} words:"]
        parts.append(table(head, lines))
    parts.append("Intervals are bootstraps over clips, paired for differences. One that holds 0 shows no difference.")
    parts.append(CAVEATS)
    return [*parts, image("wer", "Word error rates with their intervals")]


# The pages and the pictures --------------------------------------------------------------------------------


BLOCKS: dict[str, Callable[[Path, Image], list[str]]] = {
    "merge": merge_block,
    "sweep": sweep_block,
    "kernels-gpu": gpu_block,
    "kernels-cpu": cpu_block,
    "wer": wer_block,
}


PAGES: dict[str, Mapping[str, Callable[[Path, Image], list[str]]]] = {
    "benchmarks.md": BLOCKS,
    "methods.md": {"methods": methods_block, "parity": parity_block, "wer-methods": wer_methods_block},
    "search.md": {"search": search_block},
}
"""The pages that have blocks, and what writes each block."""


def rewrite(
    page: Path, folder: Path, blocks: Mapping[str, Callable[[Path, Image], list[str]]]
) -> tuple[str, list[str]]:
    """A page's new text, and the names of the blocks that differ from the old."""

    def image(name: str, what: str) -> str:
        return f"![{what}]({IMAGES}/{name}.png)"

    text = page.read_text(encoding="utf-8")
    stale = []
    for name, block in blocks.items():
        begins, ends = f"<!-- report:{name} -->", f"<!-- /report:{name} -->"
        if (text.count(begins), text.count(ends)) != (1, 1) or text.index(begins) > text.index(ends):
            raise SystemExit(f"{page}: expected {begins} once and {ends} once after it; put in what is missing")
        before, rest = text.split(begins)
        held, after = rest.split(ends)
        wanted = "\n" + "\n\n".join(block(folder, image)) + "\n"
        if held != wanted:
            stale.append(name)
        text = f"{before}{begins}{wanted}{ends}{after}"
    return text, stale


def draw(folder: Path, images: Path) -> None:
    """Draw everything that has rows into the folder `images`."""
    import plots

    images.mkdir(exist_ok=True)

    warm = [row for programs in merges(folder, "warm").values() for row in programs.values()]
    warm = [row for row in warm if row["program"] not in (FULL_SYNC, MERGEKIT_SYNC)]  # beside the same without
    if warm:
        plots.draw_merge(images / "merge.png", warm)
    measured = [*kernels(folder, "cuda"), *kernels(folder, "cpu")]
    if measured:
        plots.draw_kernels(images / "kernels.png", measured)
    models = wers(folder)
    if models:
        plots.draw_wer(images / "wer.png", models)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    options = parser.parse_args(arguments)
    documents = [(options.docs / name, blocks) for name, blocks in PAGES.items()]
    rewritten = [(path, *rewrite(path, options.results, blocks)) for path, blocks in documents]
    if options.check:
        for path, _, stale in rewritten:
            if stale:
                print(f"{path}: stale: {', '.join(stale)}; run make report", file=sys.stderr)
        return int(any(stale for _, _, stale in rewritten))
    draw(options.results, options.docs / IMAGES)
    for path, text, stale in rewritten:
        if stale:
            path.write_text(text, encoding="utf-8")
        print(f"{path}: {'rewrote ' + ', '.join(stale) if stale else 'nothing to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
