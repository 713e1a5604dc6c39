"""The report on merges from files: tables, ratios, and how they compare with their limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from figures import (
    LARGE,
    MIB,
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
from rows import Row, markdown, newest

COPY_SYNC, COPY = "cp -r, then sync", "cp -r"
HSA, FAST = "hsa merge", "hsa merge --no-hash --no-sync"
FULL, FULL_SYNC = "full load (transformers)", "full load (transformers), then sync"
MERGEKIT, MERGEKIT_SYNC = "mergekit task_arithmetic", "mergekit task_arithmetic, then sync"
BARE = 'python -c "import torch"'
AGAINST = {HSA: COPY_SYNC, FAST: COPY}
"""What a merge is compared with: the copy that gives the same guarantees."""

LOADS = {FULL: FAST, FULL_SYNC: HSA, MERGEKIT: FAST, MERGEKIT_SYNC: HSA}
"""What a program that holds whole models is compared with: the merge that leaves its output in the same state."""

Programs = dict[str, Row]
"""Rows of one shape, element type and cache state by program, all of one run."""


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
    """A limit: the figure must not be above `must`, and aims at `aim`."""

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
