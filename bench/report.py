"""Writes the measured rows into the README as tables, and draws them.

    python bench/report.py [--results DIR] [--readme FILE] [--check]

Replaces what stands in the README between <!-- report:NAME --> and <!-- /report:NAME --> for every NAME of BLOCKS, and
writes merge.png, kernels.png and wer.png beside the rows they show. Every figure comes from rows of the newest run of
its case; what no row holds reads "not yet measured". --check writes nothing, and exits 1 if the README is stale.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import CAVEATS
from rows import RESULTS, ROOT, Row, markdown, newest, read

from hsa.synthetic_config import SHAPES

NOT_YET = "not yet measured"
GB = 1e9
MIB = 2**20

COPY_SYNC, COPY = "cp -r, then sync", "cp -r"
HSA, FAST = "hsa merge", "hsa merge --no-hash --no-sync"
FULL, FULL_SYNC = "full load (transformers)", "full load (transformers), then sync"
MERGEKIT, MERGEKIT_SYNC = "mergekit task_arithmetic", "mergekit task_arithmetic, then sync"
ON_GPU = "hsa merge --backend triton"
BARE = 'python -c "import torch"'
AGAINST = {HSA: COPY_SYNC, FAST: COPY}
"""What a merge is compared with: the copy that gives the same guarantees."""

LOADS = {FULL: FAST, FULL_SYNC: HSA, MERGEKIT: FAST, MERGEKIT_SYNC: HSA}
"""What a program that holds whole models is compared with: the merge that leaves its output in the same state."""

ONE_PATCH, SWEEP = "hsa merge --patch, one point", "hsa sweep, eleven points"
TEN = "bytes of ten patches written, through the page cache"
SWEEP_LIMIT = 1.3

LARGE = "large-v3"
WHOLE, APPLY = "one pass, in place", "apply only, scores cached, in place"
CPU_WHOLE, CPU_APPLY = "CPU backend, merge", "CPU backend, apply only, scores cached"
GPU_CASES = (WHOLE, "one pass, new buffer", "two launches, in place", APPLY)
GPU_DTYPES = ("float16", "float32", "bfloat16")

KEYS = {
    "merge": ("run", "shape", "dtype", "program"),
    "sweep": ("run", "shape", "dtype", "case"),
    "kernels": ("run", "device", "shape", "dtype", "case"),
    "wer": ("run", "model", "variant"),
}
"""Columns that rows are found by; any other may be missing or blank."""

Image = Callable[[str, str], str]
"""The link to a PNG, from its name and what it shows."""

Programs = dict[str, Row]
"""Rows of one shape, element type and cache state by program, all of one run."""


# Values ------------------------------------------------------------------------------------------------------


def rows_of(name: str, folder: Path) -> list[Row]:
    found = read(name, folder)
    missing = [column for column in KEYS[name] if found and column not in found[0]]
    if missing:
        raise SystemExit(f"{folder / name}.csv: expected the columns {', '.join(missing)}, which are missing")
    return found


def number(row: Row | None, column: str) -> float | None:
    """The value of a column, or None where the row or the value is missing."""
    text = ((row or {}).get(column) or "").strip()
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise SystemExit(f"run {(row or {}).get('run')}: column {column} holds {text!r}, expected a number")
    return value


def divided(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def show(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def span(row: Row, low: str, high: str, form: str = ".2f") -> str:
    """`low to high`, or nothing where either is missing."""
    ends = number(row, low), number(row, high)
    return "" if None in ends else f"{show(ends[0], form)} to {show(ends[1], form)}"


def size(nbytes: float | None) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB / 10 else f"{nbytes / 1e6:.2f} MB"


def plain(value: object) -> str:
    """Text that stays within its cell and within its marker, whatever a row holds."""
    text = " ".join(str("" if value is None else value).split())
    return re.sub(r"([\\|`*])", r"\\\1", text).replace("<", "&lt;")


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    return markdown(head, [[plain(value) for value in line] for line in lines])


def measured_on(every: Sequence[Row], label: Callable[[Row], str]) -> str:
    """One sentence on the machine; where rows come from several, one for each, with the label of its rows."""
    found: dict[str, dict[str, None]] = {}
    for row in every:
        known = {column: plain(row.get(column)) for column in ("machine", "cpu", "gpu", "driver", "versions", "commit")}
        parts = [known["machine"], known["cpu"], known["gpu"]]
        parts += [f"{column} {known[column]}" for column in ("driver", "commit") if known[column]]
        parts.insert(-1, known["versions"])
        where = f"{', '.join(filter(None, parts))}, {plain(row['run'])[:10]}"
        found.setdefault(where, {})[plain(label(row))] = None
    if len(found) == 1:
        return f"Measured on {next(iter(found))}."
    return "\n".join(f"- {', '.join(labels)}: measured on {where}." for where, labels in found.items())


def of_shape(row: Row) -> str:
    return f"{row['shape']} {row['dtype']}"


# Merges ------------------------------------------------------------------------------------------------------


def merges(folder: Path, cache: str) -> dict[tuple[str, str], Programs]:
    """The newest run of every shape and element type in a state of the cache, the largest model first."""
    held = [row for row in rows_of("merge", folder) if (row.get("cache") or "warm") == cache]
    found: dict[tuple[str, str], Programs] = {}
    for row in sorted(newest(held, of_shape), key=lambda row: (-(number(row, "model_bytes") or 0), of_shape(row))):
        found.setdefault((row["shape"], row["dtype"]), {})[row["program"]] = row
    return found


def quotient(programs: Programs, one: str, other: str, column: str = "median_s") -> float | None:
    return divided(*(number(programs.get(name), column) for name in (one, other)))


def above_torch(programs: Programs, program: str = HSA) -> float | None:
    """Peak memory in MiB beyond what importing torch takes in the same run."""
    peak, bare = (number(programs.get(name), "peak_bytes") for name in (program, BARE))
    return None if peak is None or bare is None else (peak - bare) / MIB


@dataclass(frozen=True)
class Target:
    """A limit of PERFORMANCE.md section 1: the figure must not be above `must`, and aims at `aim`."""

    what: str
    figure: Callable[[Programs], float | None]
    must: float
    aim: float | None = None
    shape: str = LARGE
    form: Callable[[float], str] = "{:.3g}".format


def one_over(value: float) -> str:
    return f"1/{1 / value:.3g}" if value > 0 else "0"


TARGETS = (
    Target("wall with digests and fsync, over `cp -r`, then `sync`", lambda p: quotient(p, HSA, COPY_SYNC), 1.15, 0.9),
    Target("wall, `--no-hash --no-sync` over `cp -r`", lambda p: quotient(p, FAST, COPY), 1.1, 0.85),
    Target("wall over a full load, then `sync`", lambda p: quotient(p, HSA, FULL_SYNC), 1 / 8, 1 / 12, form=one_over),
    Target("`--no-hash --no-sync` over a full load", lambda p: quotient(p, FAST, FULL), 1 / 8, 1 / 12, form=one_over),
    Target("wall over a full load without `sync`", lambda p: quotient(p, HSA, FULL), 1 / 8, 1 / 12, form=one_over),
    Target("peak memory over a full load's", lambda p: quotient(p, HSA, FULL, "peak_bytes"), 1 / 40, form=one_over),
    Target("peak memory above a bare `import torch`", above_torch, 192, 96, form="{:.1f} MiB".format),
    Target("wall, whole process, over a bare `import torch`", lambda p: quotient(p, HSA, BARE), 1.5, 1.2, shape="tiny"),
)  # fmt: skip


def verdict(target: Target, value: float | None) -> str:
    if value is None:
        return NOT_YET
    if value > target.must:
        return "**missed**"
    if target.aim is None:
        return "met"
    return "met, aim met" if value <= target.aim else "met, aim missed"


def targets(warm: dict[tuple[str, str], Programs]) -> str:
    lines = []
    for target in TARGETS:
        value = target.figure(warm.get((target.shape, "float32"), {}))
        limits = [target.form(limit) if limit is not None else "" for limit in (target.must, target.aim)]
        measured = target.form(value) if value is not None else ""
        lines.append([f"{target.shape} float32: {target.what}", measured, *limits, verdict(target, value)])
    return markdown(["target of `hsa merge`", "measured", "must be at most", "aim", ""], lines)


def every_run(folder: Path) -> list[str]:
    """The ratios of large-v3 in every run there are rows of: how far one run can be trusted."""
    runs: dict[str, Programs] = {}
    for row in rows_of("merge", folder):
        if (row["shape"], row["dtype"], row.get("cache") or "warm") == (LARGE, "float32", "warm"):
            runs.setdefault(row["run"], {})[row["program"]] = row
    if len(runs) < 2:
        return []
    lines = []
    for run, programs in sorted(runs.items()):
        against = [quotient(programs, *pair) for pair in ((HSA, COPY_SYNC), (FAST, COPY))]
        loads = [quotient(programs, *pair) for pair in ((HSA, FULL_SYNC), (HSA, FULL), (FAST, FULL))]
        seconds = [number(programs.get(name), "median_s") for name in (HSA, COPY_SYNC)]
        about = next(iter(programs.values()))
        lines.append([
            run, about.get("commit"), *(show(value) for value in (*seconds, *against)),
            *(one_over(value) if value else "" for value in loads),
        ])  # fmt: skip
    head = [
        "run",
        "commit",
        f"{HSA}, s",
        f"{COPY_SYNC}, s",
        "over it",
        "fast over cp -r",
        "over full load, sync",
        "over full load",
        "fast over it",
    ]
    said = "Every run of large-v3 float32 in the rows (fast: `--no-hash --no-sync`); the disk of the machine varies:"
    return [said, table(head, lines)]


def ratio(programs: Programs, program: str) -> str:
    if program in AGAINST:
        value = quotient(programs, program, AGAINST[program])
        return f"{value:.2f} of {AGAINST[program]}" if value is not None else ""
    value = quotient(programs, program, LOADS[program]) if program in LOADS else None
    return f"{value:.1f} times {LOADS[program]}" if value is not None else ""


def warm_table(programs: Programs) -> str:
    lines = []
    for name, row in programs.items():
        peak, resident = number(row, "peak_bytes"), number(row, "peak_rss_bytes")
        copies = name.startswith("cp ") or name == BARE
        lines.append([
            name, row.get("rounds"), show(number(row, "median_s")), span(row, "min_s", "max_s"), ratio(programs, name),
            show(number(row, "cpu_s")), show(peak and peak / MIB, ".1f"),
            "" if copies else show(above_torch(programs, name), "+.1f"), show(resident and resident / MIB, ".1f"),
        ])  # fmt: skip
    head = ["program", "rounds", "median s", "min to max s", "ratio", "CPU s"]
    return table([*head, "peak MiB", "above bare torch MiB", "RSS MiB"], lines)


def bytes_read(programs: Programs) -> str:
    """What `hsa merge` read of each source, against the size of one model."""
    row = programs.get(HSA)
    whole, base, secondary = (number(row, f"bytes_read{of}") for of in ("", "_base", "_secondary"))
    model, counted = number(row, "model_bytes"), number(row, "syscall_read")
    if whole is None or not model:
        return f"Bytes that `{HSA}` reads: {NOT_YET}."
    said = f"`{HSA}` read {size(whole)}, of three models of {size(model)} each"
    if base is not None and secondary is not None:
        parts = {"primary": whole - base - secondary, "base": base, "secondary": secondary}
        said += ": " + ", ".join(f"{size(of)} of {role} ({of / model:.1%})" for role, of in parts.items())
    else:
        said += f"; by source {NOT_YET}"
    return said + (f". The kernel counted {size(counted)} in its read calls." if counted is not None else ".")


def merge_block(folder: Path, image: Image) -> list[str]:
    warm, cold = merges(folder, "warm"), merges(folder, "cold")
    every = [row for programs in (*warm.values(), *cold.values()) for row in programs.values()]
    if not every:
        return [f"Merges are {NOT_YET}.", targets(warm)]
    parts = [measured_on(every, of_shape)]
    if warm:
        parts.append(image("merge", "Wall time and peak memory against model size"))
    parts.append(
        "Each table is of one run, in which the programs took turns, with what they read in the page cache as far "
        "as it fits. Memory and CPU are of the whole process tree: peak is RssAnon + RssShmem, RSS counts mapped "
        "files too, CPU is user and system."
    )
    first = (LARGE, "float32") if (LARGE, "float32") in warm else next(iter(warm), None)
    for key in sorted(warm, key=lambda key: key != first):
        programs = warm[key]
        model = number(next(iter(programs.values())), "model_bytes")
        title = plain(" ".join(key)) + (f", {size(model)}" if model else "")
        if key == first:
            parts += [f"**{title}**", warm_table(programs), bytes_read(programs)]
        else:
            parts += [f"<details><summary>{title}</summary>", warm_table(programs), bytes_read(programs), "</details>"]
    parts += [targets(warm), *every_run(folder)]
    if cold:
        lines = [
            [*key, name, show(number(row, "median_s")), span(row, "min_s", "max_s"), ratio(programs, name),
             row.get("rounds"), size(number(row, "disk_read"))]
            for key, programs in cold.items() for name, row in programs.items()
        ]  # fmt: skip
        head = ["shape", "dtype", "program", "median s", "min to max s", "ratio", "rounds", "read from disk"]
        parts += ["With sources that are not in the page cache:", table(head, lines)]
    return parts


# Sweeps ------------------------------------------------------------------------------------------------------


def sweep_block(folder: Path, image: Image) -> list[str]:
    every = newest(rows_of("sweep", folder), of_shape)
    if not every:
        return [f"Sweeps are {NOT_YET}."]
    lines = [
        [of_shape(row), row["case"], row.get("points"), row.get("rounds"), show(number(row, "median_s")),
         span(row, "min_s", "max_s"), size(number(row, "bytes")), row.get("note")]
        for row in every
    ]  # fmt: skip
    head = ["model", "case", "points", "rounds", "median s", "min to max s", "bytes", "note"]
    return [measured_on(every, of_shape), table(head, lines), *sweep_verdicts(every)]


def sweep_verdicts(every: Sequence[Row]) -> list[str]:
    """How each sweep stands to what PERFORMANCE.md allows, by the medians."""
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


def milliseconds(row: Row | None) -> str:
    if row is None:
        return NOT_YET
    where = f"{row['threads']} threads" if row.get("threads") else row.get("gpu")
    return ", ".join(filter(None, (f"{show(number(row, 'median_ms'), '.3g')} ms", where)))


def gpu_table(every: Sequence[Row]) -> str:
    """The cases that PERFORMANCE.md section 2 gives floors for."""
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
            lines.append([f"models resident: {what}", dtype, *cells])
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


# The README and the pictures --------------------------------------------------------------------------------


BLOCKS: dict[str, Callable[[Path, Image], list[str]]] = {
    "merge": merge_block,
    "sweep": sweep_block,
    "kernels-gpu": gpu_block,
    "kernels-cpu": cpu_block,
    "wer": wer_block,
}


def rewrite(readme: Path, folder: Path) -> tuple[str, list[str]]:
    """The README's new text, and the names of the blocks that differ from the old."""

    def image(name: str, what: str) -> str:
        relative = Path(os.path.relpath(folder.resolve() / f"{name}.png", readme.resolve().parent))
        return f"![{what}]({relative.as_posix()})"

    text = readme.read_text(encoding="utf-8")
    stale = []
    for name, block in BLOCKS.items():
        begins, ends = f"<!-- report:{name} -->", f"<!-- /report:{name} -->"
        if (text.count(begins), text.count(ends)) != (1, 1) or text.index(begins) > text.index(ends):
            raise SystemExit(f"{readme}: expected {begins} once and {ends} once after it; put in what is missing")
        before, rest = text.split(begins)
        held, after = rest.split(ends)
        wanted = "\n" + "\n\n".join(block(folder, image)) + "\n"
        if held != wanted:
            stale.append(name)
        text = f"{before}{begins}{wanted}{ends}{after}"
    return text, stale


def draw(folder: Path) -> None:
    """The PNGs of everything that has rows."""
    import plots

    warm = [row for programs in merges(folder, "warm").values() for row in programs.values()]
    warm = [row for row in warm if row["program"] not in (FULL_SYNC, MERGEKIT_SYNC)]  # beside the same without
    if warm:
        plots.draw_merge(folder / "merge.png", warm)
    measured = [*kernels(folder, "cuda"), *kernels(folder, "cpu")]
    if measured:
        plots.draw_kernels(folder / "kernels.png", measured)
    models = wers(folder)
    if models:
        plots.draw_wer(folder / "wer.png", models)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files and the PNGs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file that holds the markers")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is stale")
    options = parser.parse_args(arguments)
    text, stale = rewrite(options.readme, options.results)
    if options.check:
        if stale:
            print(f"{options.readme}: stale: {', '.join(stale)}; run make report", file=sys.stderr)
        return int(bool(stale))
    draw(options.results)
    if stale:
        options.readme.write_text(text, encoding="utf-8")
    print(f"{options.readme}: {'rewrote ' + ', '.join(stale) if stale else 'nothing to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
