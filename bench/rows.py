"""Measured rows: what machine, versions, commit and command they come from, and the files that keep them.

`bench/results/NAME.csv` is append-only: a benchmark adds rows, all with the same `run`, and nothing changes old ones.
Needs the standard library alone, so that every benchmark can use it on every machine.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, str]


def about(packages: Sequence[str], *, gpu: str = "", commit: str | None = None) -> Row:
    """The columns that every row begins with.

    `packages` are the distributions whose versions matter, `gpu` the device that was measured, if one was, and `commit`
    what is written where there is no git.
    """
    driver = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else ""
    return {
        "run": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": f"{os.cpu_count()} cores, {_memory_gib()} GiB, Linux {platform.release().split('-')[0]}",
        "cpu": _cpu(),
        "gpu": gpu,
        "driver": driver,
        "versions": ", ".join([f"python {platform.python_version()}", *map(_version, packages)]),
        "commit": commit or _commit(),
        "command": " ".join(map(_plain, sys.argv)),
    }


def append(name: str, rows: Iterable[Mapping[str, object]], folder: Path = RESULTS) -> None:
    """Add rows to `NAME.csv`; their columns must be those of the file."""
    rows = list(rows)
    path = folder / f"{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    if path.exists():
        with path.open(newline="") as file:
            held = next(csv.reader(file))
        if held != columns:
            raise SystemExit(f"{path} has the columns {held}, the new rows have {columns}; nothing was added")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def read(name: str, folder: Path = RESULTS) -> list[Row]:
    """Every row of `NAME.csv`, oldest first; none where there is no file."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: Iterable[Row], group: Callable[[Row], object]) -> list[Row]:
    """Of each group the rows of its newest run: ratios must come from one run."""
    rows = list(rows)
    last: dict[object, str] = {}
    for row in rows:
        last[group(row)] = max(last.get(group(row), ""), row["run"])
    return [row for row in rows if row["run"] == last[group(row)]]


def markdown(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in every)


def answer(*command: str) -> str:
    """The first line that a program prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def _commit() -> str:
    """The commit, marked where files differ from it that are not themselves made of rows."""
    found = answer("git", "rev-parse", "--short", "HEAD")
    changed = answer("git", "status", "--porcelain", "--", ".", ":!bench/results", ":!docs")
    return f"{found}{'-dirty' if changed else ''}" if found else "unknown"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} none"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def _plain(argument: str) -> str:
    """An argument without the directories of the machine it ran on."""
    before, equals, value = argument.rpartition("=")
    return before + equals + (Path(value).name if os.path.isabs(value) else value)
