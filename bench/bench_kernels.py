"""Time of a merge in memory against a copy: the kernels, eager torch and torch.compile on a GPU; on a CPU its backend.

    python bench/bench_kernels.py [--device auto|cuda|cpu] [--shape large-v3 ...] [--dtype float32 ...] [--all]
                                  [--repetitions N] [--results FOLDER] [--commit NAME] [--dry-run [--bandwidth TB/S]]

Works on the encoder's q, k and v weights (large-v3: 96 tensors of 1280 by 1280, random), 60 % of the heads kept. Every
way to merge is first compared with the oracle, ours bit for bit (no figures without that). On a GPU times are the
device's own (events around a call that was queued while the device was busy, so that the host's share is hidden as far
as it is short); on a CPU they are wall time, both sides with a thread for every usable core. Medians with their spread.
Copies of the sources rotate, and other memory is read between two calls, so that the last-level cache holds nothing of
the last one; primary is put back before each call, outside the time. GB/s are the bytes that the formula must move
(`kernel_shapes.TRAFFIC`), set against those of a copy in the same run, both directions counted. --dry-run prints bytes,
and the least times at a given bandwidth; it needs no GPU.
By default a GPU measures large-v3, a CPU three shapes; --all takes every shape and dtype that is not chosen.
Prints a Markdown table and appends rows to bench/results/kernels.csv.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from kernel_cases import CASES, WHOLE, Case, CpuProblem, GpuProblem, K, Problem
from kernel_shapes import MIXES, SHAPES, TRAFFIC, Mix, Shape
from kernel_shapes import volume as volume_of
from rows import RESULTS, about, append, markdown

from hsa import reference

Times = Mapping[str, Sequence[float]]
"""Milliseconds of every call, by case."""

SHAPES_MEASURED = {"cuda": ("large-v3",), "cpu": ("tiny", "small", "large-v3")}
DTYPES_MEASURED = {
    "cuda": ("float32", "float16", "bfloat16", "float16-base", "float32-secondary"),
    "cpu": ("float32", "float16", "float16-base"),
}
REPETITIONS = {"cuda": 30, "cpu": 5}
LEAST_REPETITIONS = {"cuda": 20, "cpu": 3}
WARM_UPS = {"cuda": 5, "cpu": 1}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
BANDWIDTH = {"cuda": 4.3, "cpu": 0.02}
"""TB/s of the floors that --dry-run prints."""

TIMES_CACHE = 4
"""How many times the size of the last-level cache is read between two calls on the same memory."""

LEAST_SETS = {"cuda": 3, "cpu": 1}
UNKNOWN_CACHE = 64 << 20
BUSY_CYCLES = 4_000_000
"""A few milliseconds: longer than the host needs to queue a call of the kernels."""

SETTLED = 0.01
"""Seconds until torch's threads have stopped to spin for more work, and leave the cores to others."""

BUSY_LOAD = 0.5

HEAD = {
    "shape": "shape",
    "dtype": "dtype",
    "case": "case",
    "median_ms": "median ms",
    "spread": "min to max ms",
    "floor_ms": "floor ms",
    "gb_s": "GB/s",
    "of_copy": "of copy",
    "times_eager": "x eager",
    "times_compile": "x compile",
}
"""Columns of the printed table: names of the rows', and what stands above them."""


def usable_cores() -> int:
    """Cores that this process may use: as many threads has either side."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def cache_bytes(device: str) -> int:
    """Bytes of a device's last-level cache: a GPU's second, a CPU's last ones together."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    found: dict[int, dict[str, int]] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        level, cores, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        found.setdefault(int(level), {})[cores] = int(size.removesuffix("K")) << 10
    return sum(found[max(found)].values()) if found else UNKNOWN_CACHE


def problem_of(shape: Shape, mix: Mix, device: str) -> Problem:
    """The problem, in as many copies of its sources as exceed the cache."""
    enough = math.ceil(TIMES_CACHE * cache_bytes(device) / volume_of(shape, mix).sources)
    sets = max(LEAST_SETS[device], enough)
    return GpuProblem(shape, mix, sets) if device == "cuda" else CpuProblem(shape, mix, sets, usable_cores())


class Clock:
    """Times calls on a device, each from a cache that holds none of its data."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cpu":
            torch.set_num_threads(usable_cores())
        self._other = torch.ones(TIMES_CACHE * cache_bytes(device) // 4, dtype=torch.int32, device=device)

    def clear(self) -> None:
        """Fill the cache with other memory."""
        self._other.max()
        if self.device == "cpu":
            time.sleep(SETTLED)

    def milliseconds(self, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        before()
        self.clear()
        if self.device == "cpu":
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e3
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended))


def measure(problem: Problem, cases: Sequence[Case], repetitions: int, clock: Clock) -> Times:
    """Warm up, then time the cases in turn, so that a drift of clocks meets all alike."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for number in range(-WARM_UPS[clock.device], repetitions):
        i = number % len(problem.sets)
        for case in cases if number % 2 == 0 else reversed(cases):
            taken = clock.milliseconds(partial(case.call, i), problem.sets[i].restore)
            if case.exact:
                problem.check(case, i)
            if number >= 0:
                times[case.name].append(taken)
    return times


def measure_copy(repetitions: int, clock: Clock) -> float:
    """Bytes a second of a copy, both directions counted."""
    nbytes = max(COPY_BYTES[clock.device], TIMES_CACHE * cache_bytes(clock.device))
    source, out = (torch.ones(nbytes // 4, dtype=torch.int32, device=clock.device) for _ in range(2))
    warm_ups = WARM_UPS[clock.device]
    every = [clock.milliseconds(lambda: out.copy_(source)) for _ in range(warm_ups + repetitions)]
    return 2 * source.nbytes / statistics.median(every[warm_ups:]) * 1e3


def rows_of(
    device: str, problem: Problem, dtype: str, times: Times, copy: float, known: Mapping[str, str]
) -> list[dict[str, object]]:
    """A row for each measured case, `copy` in bytes a second."""
    medians = {name: statistics.median(every) for name, every in times.items()}

    def times_faster(way: str, name: str) -> str:
        """Than the faster of the two ways to call the formula in torch."""
        best = min((median for other, median in medians.items() if other.startswith(way)), default=None)
        return f"{best / medians[name]:.2f}" if best and name in WHOLE else ""

    moved = volume_of(problem.shape, problem.mix)
    rows = []
    for name, every in times.items():
        nbytes, median = TRAFFIC[name](moved, problem.share), medians[name]
        rows.append(
            {
                **known,
                "device": device,
                "threads": usable_cores() if device == "cpu" else "",
                "shape": problem.shape.name,
                "dtype": dtype,
                "case": name,
                "repetitions": len(every),
                "median_ms": f"{median:.4f}",
                "min_ms": f"{min(every):.4f}",
                "max_ms": f"{max(every):.4f}",
                "share_selected": f"{problem.share:.4f}",
                "bytes": round(nbytes),
                "gb_s": f"{nbytes / median / 1e6:.1f}",
                "copy_gb_s": f"{copy / 1e9:.1f}",
                "of_copy": f"{nbytes / median * 1e3 / copy:.3f}",
                "floor_ms": f"{nbytes / copy * 1e3:.4f}",
                "times_eager": times_faster("eager torch", name),
                "times_compile": times_faster("torch.compile", name),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, object]]) -> str:
    spread = [{**row, "spread": f"{row['min_ms']} to {row['max_ms']}"} for row in rows]
    return markdown(tuple(HEAD.values()), [[row[column] for column in HEAD] for row in spread])


def dry_run(device: str, shapes: Sequence[str], dtypes: Sequence[str], bandwidth: float) -> str:
    """What would be measured: bytes of every case, and the least time at a bandwidth in bytes a second."""
    lines = []
    for shape in (SHAPES[name] for name in shapes):
        share = reference.keep_count(K, shape.heads) / shape.heads
        for dtype in dtypes:
            for case in CASES[device]:
                moved = TRAFFIC[case](volume_of(shape, MIXES[dtype]), share)
                floor = f"{moved / bandwidth * 1e3:.3f}"
                lines.append((shape.name, dtype, case, f"{share:.1%}", f"{moved:.0f}", floor))
    return f"Floors at {bandwidth / 1e12:g} TB/s (given, not measured), shares of the heads selected\n\n" + markdown(
        ("shape", "dtype", "case", "share", "bytes", "floor ms"), lines
    )


def run(shape: Shape, dtype: str, repetitions: int, copy: float, clock: Clock, known: Mapping[str, str]) -> list[dict]:
    """All rows of one shape and dtype, after the gate."""
    with closing(problem_of(shape, MIXES[dtype], clock.device)) as problem:
        cases = []
        for case in problem.admitted():
            if case.missing:
                print(f"{shape.name}, {dtype}, {case.name}: not measured, {case.missing}", file=sys.stderr)
            else:
                cases.append(case)
        times = measure(problem, cases, repetitions, clock)
        return rows_of(clock.device, problem, dtype, times, copy, known)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what depends on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU where torch finds one")
    add("--shape", choices=tuple(SHAPES), action="append", help="repeatable; by default large-v3, on a CPU three")
    add("--dtype", choices=tuple(MIXES), action="append", help="repeatable; by default the three or one and some mixed")
    add("--all", action="store_true", help="every shape and every dtype, unless they are chosen")
    add("--repetitions", type=int, help="timed calls (30, at least 20; on a CPU 5, at least 3)")
    add("--results", type=Path, default=RESULTS, help="folder of the file kernels.csv that rows are appended to")
    add("--commit", help="what the rows say where there is no git")
    add("--dry-run", action="store_true", help="print bytes and floors, of a GPU unless --device is cpu; needs no GPU")
    add("--bandwidth", type=float, help="TB/s for the floors of --dry-run (4.3; on a CPU 0.02)")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if options.dry_run or torch.cuda.is_available() else "cpu"
    device = options.device
    options.shape = options.shape or (tuple(SHAPES) if options.all else SHAPES_MEASURED[device])
    options.dtype = options.dtype or (tuple(MIXES) if options.all else DTYPES_MEASURED[device])
    options.bandwidth = options.bandwidth or BANDWIDTH[device]
    options.repetitions = REPETITIONS[device] if options.repetitions is None else options.repetitions
    if options.repetitions < LEAST_REPETITIONS[device]:
        parser.error(f"--repetitions: expected at least {LEAST_REPETITIONS[device]}, found {options.repetitions}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = options.device
    if options.dry_run:
        print(dry_run(device, options.shape, options.dtype, options.bandwidth * 1e12))
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"bench_kernels: torch {torch.__version__} finds no GPU; --device cpu measures the CPU backend, --dry-run "
            "prints what would be measured"
        )
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    known = about(("torch", "triton", "numpy"), gpu=gpu, commit=options.commit)
    if device == "cpu" and (load := os.getloadavg()[0]) > BUSY_LOAD:
        print(f"load average {load:.1f}: times suffer from what else runs here", file=sys.stderr)
    clock = Clock(device)
    copy = measure_copy(max(options.repetitions, 10), clock)
    print(", ".join(f"{key} {value}" for key, value in known.items() if value), file=sys.stderr)
    print(f"copy: {copy / 1e9:.1f} GB/s, both directions counted", file=sys.stderr, flush=True)
    every = []
    for name in options.shape:
        for dtype in options.dtype:
            found = run(SHAPES[name], dtype, options.repetitions, copy, clock, known)
            append("kernels", found, options.results)
            every += found
    print(table(every))


if __name__ == "__main__":
    main()
