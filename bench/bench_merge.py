"""Time and memory of `hsa merge` against `cp -r` of primary, a full load with transformers, and mergekit.

    python bench/bench_merge.py [--full] [--shape large-v3 ...] [--dtype float32 ...] [--folder DIR] [--keep]

For each case it makes three checkpoints, runs the programs in alternating order, and removes the checkpoints again
(with --keep they stay in DIR and are used again). Every program is checked before it is timed, on a small triple tensor
by tensor, and after every run on a few tensors of the output that was timed; no figures without that.

Warm: what a program reads is in the page cache, and nothing else of the sources. Cold: nothing of them is. Nothing is
left to be written back from before. Prints a table and appends rows to bench/results/merge.csv. Programs that hold
whole models run fewer times; mergekit gets a virtual environment of its own, in the folder bench/data.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import rows
from cases import FULL, ITEM_SIZE, QUICK, SHARD_BYTES, SIZES, MergeCase
from gates import ROLES, Gate
from programs import Program, Run, compile_package, measure

from hsa.testing.whisper_checkpoints import SHAPES, write_triple

HERE = Path(__file__).resolve().parent
MERGEKIT = "mergekit==0.1.5"
PACKAGES = ("numpy", "torch", "transformers", "safetensors", "blake3")
READ_BYTES = 8 << 20


def mergekit_python(folder: Path) -> str | None:
    """The Python of an environment that holds mergekit, made when it is missing; None where that fails, and why."""
    place = folder / MERGEKIT.replace("==", "-")
    python = place / "bin" / "python"
    ready = place / "ready"
    if not ready.exists():
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pins = str(rows.ROOT / "constraints.txt")
        done = subprocess.run([*pip, "-c", pins, "torch", MERGEKIT], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"mergekit is left out, it cannot be installed: {done.stderr.strip()[-500:]}", file=sys.stderr)
            return None
        ready.touch()
    return str(python)


def programs(triple: Path, dtype: str, gate: Gate, mergekit: str | None) -> list[Program]:
    """Every program on one triple, those that are compared side by side next to each other."""
    sources = [str(triple / role) for role in ROLES]
    options = [f"--{role}={source}" for role, source in zip(ROLES, sources, strict=True)]
    merging = (sys.executable, "-m", "hsa", "merge", *options, "--output={out}", "--json")
    copying = ("cp", "-r", sources[1], "{out}")
    full = (sys.executable, str(HERE / "full_load.py"), *sources, "{out}")
    found = [
        Program("cp -r, then sync", copying, sync=True),
        Program("hsa merge", merging, check=gate.hsa),
        Program("cp -r", copying),
        Program("hsa merge --no-hash --no-sync", (*merging, "--no-hash", "--no-sync"), check=gate.hsa),
        Program('python -c "import torch"', (sys.executable, "-c", "import torch")),
        Program("full load (transformers)", full, whole=True, slow=True, check=gate.full_load),
    ]
    if mergekit is not None:
        script = str(HERE / "mergekit_merge.py")
        command = (mergekit, script, "task_arithmetic", "{out}", *sources, f"--dtype={dtype}")
        kit = Program("mergekit task_arithmetic", command, whole=True, slow=True, check=gate.task_arithmetic)
        found.append(kit)
    return found


def fill_cache(triple: Path, gate: Gate, program: Program, *, cold: bool) -> None:
    """Leave in the page cache what a program reads of the sources, or with `cold` nothing of them."""
    whole = () if cold else (ROLES if program.whole else ("primary",))
    for role in ROLES:
        for path in sorted((triple / role).iterdir()):
            with path.open("rb", buffering=0) as file:
                if role not in whole:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(READ_BYTES):
                        pass
    if not cold and not program.whole:
        read_targets(triple, gate)


def read_targets(triple: Path, gate: Gate) -> None:
    """Base's and secondary's target tensors, so that the cache holds them."""
    for role in ("base", "secondary"):
        files = gate.sources[ROLES.index(role)].files
        descriptors = {path: os.open(path, os.O_RDONLY) for path in set(files.values())}
        for name, task in gate.targets.items():
            ref = task.sources[role]
            os.pread(descriptors[files[name]], ref.nbytes, ref.offset)
        for descriptor in descriptors.values():
            os.close(descriptor)


def small_gate(folder: Path, dtype: str, mergekit: str | None) -> None:
    """Run every program on a small triple and compare every tensor."""
    triple = folder / f"gate-{dtype}"
    write_triple(triple, SHAPES["test"], dtype=dtype)
    for program in programs(triple, dtype, Gate(triple, every=True), mergekit):
        measure(program, triple / "out", lambda: None)


def measure_case(
    case: MergeCase, triple: Path, out: Path, mergekit: str | None, said: Callable[[str], None]
) -> list[Program]:
    """All rounds of one case: warm in alternating order, then cold ones of the quick programs that touch a disk."""
    gate = Gate(triple, every=False)
    every = programs(triple, case.dtype, gate, mergekit)
    copies = ("cp -r, then sync", "hsa merge")
    for cache, rounds in (("warm", case.rounds), ("cold", case.cold_rounds)):
        for number in range(rounds):
            for program in every if number % 2 == 0 else reversed(every):
                if (program.slow and number >= case.slow_rounds) or (cache == "cold" and program.name not in copies):
                    continue
                run = measure(program, out, partial(fill_cache, triple, gate, program, cold=cache == "cold"))
                program.runs.setdefault(cache, []).append(run)
                said(f"{case.name}, {cache}, {program.name}: {run.seconds:.2f} s")
    shutil.rmtree(out, ignore_errors=True)
    return every


def rows_of(case: MergeCase, measured: Sequence[Program]) -> Iterator[dict[str, object]]:
    """A row for each program and state of the page cache; of slow ones also one until their output is on disk."""
    for cache in ("warm", "cold"):
        for program in measured:
            runs = program.runs.get(cache)
            if not runs:
                continue
            yield _row(case, cache, program.name, runs, [run.seconds for run in runs])
            if program.slow:
                yield _row(case, cache, f"{program.name}, then sync", runs, [run.synced for run in runs])


def _row(case: MergeCase, cache: str, program: str, runs: Sequence[Run], seconds: Sequence[float]) -> dict[str, object]:
    last = runs[-1]
    read_by = last.report.get("bytes_read_by_source", {})
    return {
        "shape": case.shape,
        "dtype": case.dtype,
        "model_bytes": case.model_bytes,
        "program": program,
        "cache": cache,
        "rounds": len(runs),
        "median_s": f"{statistics.median(seconds):.3f}",
        "min_s": f"{min(seconds):.3f}",
        "max_s": f"{max(seconds):.3f}",
        "cpu_s": f"{statistics.median(run.cpu for run in runs):.3f}",
        "peak_bytes": max(run.peak for run in runs),
        "peak_rss_bytes": max(run.peak_rss for run in runs),
        "bytes_read": last.report.get("bytes_read", ""),
        "bytes_read_base": read_by.get("base", ""),
        "bytes_read_secondary": read_by.get("secondary", ""),
        "bytes_written": last.report.get("bytes_written", ""),
        **{name: _median_io(runs, name) for name in IO},
    }


IO = ("syscall_read", "syscall_written", "disk_read", "disk_written")


def _median_io(runs: Sequence[Run], name: str) -> object:
    return round(statistics.median(run.io[name] for run in runs)) if all(name in run.io for run in runs) else ""


def table(lines: Sequence[dict[str, object]]) -> str:
    head = ("case", "cache", "program", "rounds", "median s", "min to max s", "CPU s", "peak MiB", "RSS MiB")
    return rows.markdown(
        head,
        (
            (
                f"{row['shape']} {row['dtype']}", row["cache"], row["program"], row["rounds"], row["median_s"],
                f"{row['min_s']} to {row['max_s']}", row["cpu_s"],
                f"{int(str(row['peak_bytes'])) / 2**20:.0f}", f"{int(str(row['peak_rss_bytes'])) / 2**20:.0f}",
            )
            for row in lines
        ),
    )  # fmt: skip


def check_space(cases: Sequence[MergeCase], folder: Path) -> None:
    """Three checkpoints and an output of the largest case, one triple at a time."""
    needed = round(4.1 * max(case.model_bytes for case in cases)) + (1 << 30)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free; give --folder")


def chosen_cases(options: argparse.Namespace) -> list[MergeCase]:
    if options.shape or options.dtype:
        shapes, dtypes = options.shape or ["large-v3"], options.dtype or ["float32"]
        known = {case.name: case for case in (*FULL, *QUICK)}
        cases = [known.get(f"{shape}-{dtype}", MergeCase(shape, dtype)) for shape in shapes for dtype in dtypes]
    else:
        cases = list(FULL if options.full else QUICK)
    if options.rounds is not None:
        cases = [
            MergeCase(c.shape, c.dtype, options.rounds, min(c.slow_rounds, options.rounds), c.cold_rounds)
            for c in cases
        ]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every size in float16 and float32, however long it takes")
    parser.add_argument("--shape", choices=SIZES, action="append", help="only this size (large-v3)")
    parser.add_argument("--dtype", choices=sorted(ITEM_SIZE), action="append", help="only this element type (float32)")
    parser.add_argument("--rounds", type=int, help="of the quick programs, instead of the case's own")
    parser.add_argument("--folder", type=Path, default=HERE / "data", help="where there is space (default bench/data)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in the folder, or use them there")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of merge.csv")
    options = parser.parse_args()
    cases = chosen_cases(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    check_space(cases, options.folder)
    compile_package()
    known = rows.about(PACKAGES)
    mergekit = mergekit_python(HERE / "data")
    scratch = Path(tempfile.mkdtemp(prefix="merge-", dir=options.folder))
    measured: list[dict[str, object]] = []
    try:
        for dtype in sorted({case.dtype for case in cases}):
            small_gate(scratch, dtype, mergekit)
        for case in cases:
            triple = (options.folder if options.keep else scratch) / case.name
            if not all((triple / role / "config.json").exists() for role in ROLES):
                write_triple(triple, SHAPES[case.shape], dtype=case.dtype, max_shard_bytes=SHARD_BYTES)
            said = partial(print, file=sys.stderr, flush=True)
            found = list(rows_of(case, measure_case(case, triple, scratch / "out", mergekit, said)))
            rows.append("merge", [{**known, **row} for row in found], options.results)
            measured += found
            if not options.keep:
                shutil.rmtree(triple)
        print(table(measured))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
