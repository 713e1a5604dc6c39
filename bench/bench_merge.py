"""Time and memory of `hsa merge` against `cp -r` of primary, side by side in one run.

    python bench/bench_merge.py [--shape large-v3] [--dtype float32] [--rounds 5] [--folder DIR] [--keep]

Makes the triple in a directory of its own (with --keep in DIR, unless it stands there already), merges a small one
first and compares every tensor with the oracle (no figures without that), then runs the programs in turn, each into
a fresh destination with nothing left to write back from before. Prints medians with their spread and appends rows to
bench/results/merge.csv.
Memory is RssAnon + RssShmem of the process and its children, sampled from outside.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from make_triple import model_bytes
from safetensors.torch import load_file

from hsa import merge
from hsa.memory import family, resident
from hsa.reference import merge_tensor
from hsa.synthetic import SHAPES, write_triple

RESULTS = Path(__file__).parent / "results" / "merge.csv"
ROLES = ("base", "primary", "secondary")
HSA = (sys.executable, "-m", "hsa")


@dataclass
class Program:
    """One way to make the output: a shell command with {out}, and what was measured of it."""

    name: str
    command: Sequence[str]
    sync: bool = False
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    report: dict[str, object] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> int:
        return max(self.peaks)


def gate(folder: Path) -> None:
    """Merge a small triple and compare every tensor with the oracle, bit for bit."""
    paths = write_triple(folder / "gate", SHAPES["test"])
    report = merge(output=folder / "gate" / "out", **paths)
    tensors = [load_file(path / "model.safetensors") for path in (*paths.values(), report.output)]
    layers = SHAPES["test"].encoder_layers
    for name in tensors[1]:
        base, primary, secondary, merged = (held[name] for held in tensors)
        row = report.tensors.get(name)
        expected = primary
        if row is not None:
            expected = merge_tensor(
                base, primary, secondary, k=0.6, lam=0.5, alpha=0.2, layer=row.layer, layers=layers, heads=row.heads
            ).value
        if not torch.equal(expected.view(torch.int32), merged.view(torch.int32)):
            raise SystemExit(f"correctness gate: {name} differs from the oracle; no figures are reported")


def run(program: Program, out: Path) -> None:
    """Run a program once, and measure it."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(1)
    command = [part.format(out=out) for part in program.command]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], sum(map(resident, family(process.pid))))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate()
    if program.sync:
        os.sync()
    program.seconds.append(time.perf_counter() - started)
    watcher.join()
    program.peaks.append(peak[0])
    if process.returncode:
        raise SystemExit(f"{program.name} failed with exit code {process.returncode}")
    if printed.startswith("{"):
        program.report = json.loads(printed)


def programs(triple: Path) -> list[Program]:
    sources = [f"--{role}={triple / role}" for role in ROLES]
    merging = (*HSA, "merge", *sources, "--output={out}", "--json")
    copying = ("cp", "-r", str(triple / "primary"), "{out}")
    return [
        Program("cp -r, then sync", copying, sync=True),
        Program("hsa merge", merging),
        Program("cp -r", copying),
        Program("hsa merge --no-hash --no-sync", (*merging, "--no-hash", "--no-sync")),
        Program('python -c "import torch"', (sys.executable, "-c", "import torch")),
    ]


def table(measured: Sequence[Program]) -> str:
    by_name = {program.name: program for program in measured}
    against = {
        "hsa merge": by_name["cp -r, then sync"],
        "hsa merge --no-hash --no-sync": by_name["cp -r"],
    }
    bare = by_name['python -c "import torch"']
    lines = [
        "| program | median s | min to max s | ratio | peak MiB | above bare torch MiB |",
        "|---|---|---|---|---|---|",
    ]
    for program in measured:
        other = against.get(program.name)
        ratio = f"{program.median / other.median:.2f} of {other.name}" if other else ""
        lines.append(
            f"| {program.name} | {program.median:.2f} | {min(program.seconds):.2f} to {max(program.seconds):.2f} | "
            f"{ratio} | {program.peak / 2**20:.0f} | {(program.peak - bare.peak) / 2**20:+.0f} |"
        )
    return "\n".join(lines)


def append_rows(measured: Sequence[Program], shape: str, dtype: str) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    row = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores {platform.machine()}, Linux {platform.release().split('-')[0]}",
        "versions": f"python {platform.python_version()}, numpy {version('numpy')}, torch {torch.__version__}",
        "commit": commit.stdout.strip(),
        "shape": shape,
        "dtype": dtype,
        "model_bytes": model_bytes(shape, dtype),
    }
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        measures = ["program", "rounds", "median_s", "min_s", "max_s", "peak_bytes", "bytes_read", "bytes_written"]
        writer = csv.DictWriter(file, [*row, *measures])
        if new:
            writer.writeheader()
        for program in measured:
            writer.writerow(
                {
                    **row,
                    "program": program.name,
                    "rounds": len(program.seconds),
                    "median_s": f"{program.median:.3f}",
                    "min_s": f"{min(program.seconds):.3f}",
                    "max_s": f"{max(program.seconds):.3f}",
                    "peak_bytes": program.peak,
                    "bytes_read": program.report.get("bytes_read", ""),
                    "bytes_written": program.report.get("bytes_written", ""),
                }
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="large-v3")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where there is space (default: the temporary directory)")
    parser.add_argument("--keep", action="store_true", help="make the triple in the folder, or use it there")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="hsa-bench-", dir=options.folder))
    triple = (options.folder if options.keep and options.folder else scratch) / f"{options.shape}-{options.dtype}"
    try:
        gate(scratch)
        if not all((triple / role / "config.json").exists() for role in ROLES):
            needed = 4 * model_bytes(options.shape, options.dtype)
            free = shutil.disk_usage(scratch).free
            if free < needed * 1.05:
                raise SystemExit(f"the triple and one output need {needed} bytes in {scratch}, {free} are free")
            write_triple(triple, SHAPES[options.shape], dtype=options.dtype, max_shard_bytes=5 * 10**9)
        measured = programs(triple)
        for number in range(options.rounds):
            for program in measured if number % 2 == 0 else reversed(measured):
                run(program, scratch / "out")
                print(f"{program.name}: {program.seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        print(table(measured))
        append_rows(measured, options.shape, options.dtype)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
