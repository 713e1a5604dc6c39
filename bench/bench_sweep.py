"""Eleven lambdas from one resident `Merger`, against the time that writing their merged rows alone takes.

    python bench/bench_sweep.py [--shape large-v3] [--dtype float32] [--rounds 3] [--folder DIR] [--keep]

A sweep reads its sources once and scores once, so eleven points should cost one of them written to disk and at most
1.3 times what it takes to write the bytes of the other ten. Merged rows are the rows of the selected heads; they are
written through the page cache, a file a point, and fsynced. Sources are in the page cache. The merger is checked first,
every tensor of a small triple bit for bit, and some tensors of the measured one after each round; no figures without.
Prints a table and appends rows to bench/results/sweep.csv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import rows
import torch
from cases import ALPHA, ITEM_SIZE, LAM, SHARD_BYTES, SIZES, K, model_bytes
from gates import ROLES, Gate

import hsa
from hsa.synthetic import SHAPES, write_triple

LAMBDAS = tuple(number / 10 for number in range(11))
LIMIT = 1.3
"""How many times the bytes of the other ten points may be written in the time that they take."""

Tensors = Mapping[str, torch.Tensor]
CASES = {
    "merger": "Merger built",
    "apply": "apply_, one candidate",
    "point": "one point: built, applied, its rows written",
    "bytes": "rows of the other ten written, nothing else",
    "sweep": "sweep in place: built, applied eleven times",
    "written": "sweep to files: built, applied and written eleven times",
}
PACKAGES = ("numpy", "torch")


def build(triple: Path) -> hsa.Merger:
    return hsa.Merger(*(triple / role for role in ROLES), backend="cpu")


def rows_to_write(
    state: Tensors, selected: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]
) -> list[memoryview]:
    """The memory of the rows of every selected head, one run of bytes each."""
    views = []
    for name, chosen in selected.items():
        per_head = state[name].view(heads[name], -1).view(torch.uint8).numpy()
        views += [per_head[head].data for head in chosen]
    return views


def write(path: Path, views: list[memoryview]) -> int:
    """Write the runs one after another, and wait for the disk. Returns their bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for view in views:
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sum(map(len, views))


def gate(folder: Path, dtype: str) -> None:
    """`apply_` on a small triple against the oracle, bit for bit."""
    triple = folder / "gate"
    write_triple(triple, SHAPES["test"], dtype=dtype)
    merger = build(triple)
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in merger.merge().items()}
    check(Gate(triple, every=True), merger, state)


def check(known: Gate, merger: hsa.Merger, state: Tensors) -> None:
    """Merge with the gate's parameters and compare the targets with the oracle."""
    merger.apply_(state, k=K, lam=LAM, alpha=ALPHA)
    known.compare_targets(state)


def once(merger_of: Callable[[], hsa.Merger], folder: Path, known: Gate) -> tuple[dict[str, float], int]:
    """Seconds of every case, in one round, and the bytes of a point."""
    taken: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        started = time.perf_counter()
        call()
        taken[name] = time.perf_counter() - started

    held: list[hsa.Merger] = []
    timed("merger", lambda: held.append(merger_of()))
    merger = held[0]
    state = merger.merge()
    heads = {name: len(scores) for name, scores in merger.scores.items()}
    views = rows_to_write(state, merger.selected(K), heads)
    nbytes = sum(map(len, views))

    def apply(lam: float) -> None:
        merger.apply_(state, k=K, lam=lam, alpha=ALPHA)

    def settle() -> None:
        for path in folder.glob("point-*"):
            path.unlink()
        os.sync()

    def sweep_to_files() -> None:
        for lam in LAMBDAS:
            apply(lam)
            write(folder / f"point-{lam}", views)

    candidates = []
    for lam in LAMBDAS:
        timed("apply", lambda lam=lam: apply(lam))  # type: ignore[misc]
        candidates.append(taken["apply"])
    taken["apply"] = statistics.median(candidates)
    taken["sweep"] = taken["merger"] + sum(candidates)
    settle()
    timed("point", lambda: (apply(LAMBDAS[0]), write(folder / "point-first", views)))
    taken["point"] += taken["merger"]
    settle()
    timed("bytes", lambda: [write(folder / f"point-{lam}", views) for lam in LAMBDAS[1:]])
    settle()
    timed("written", sweep_to_files)
    taken["written"] += taken["merger"]
    settle()
    check(known, merger, state)
    return taken, nbytes


def report(shape: str, dtype: str, every: list[dict[str, float]], nbytes: int) -> list[dict[str, object]]:
    """A row for each case; the sweeps say how many times the ten's bytes could be written in the time of ten points."""
    found = []
    for case, text in CASES.items():
        seconds = [taken[case] for taken in every]
        note = ""
        if case in ("sweep", "written"):
            times = statistics.median((taken[case] - taken["point"]) / taken["bytes"] for taken in every)
            note = f"one point and {times:.2f} times the writing of ten; at most {LIMIT}"
        points = {"merger": 0, "bytes": 10, "sweep": 11, "written": 11}.get(case, 1)
        written = {"point": 1, "bytes": 10, "written": 11}.get(case, 0) * nbytes
        found.append(
            {
                "shape": shape,
                "dtype": dtype,
                "case": text,
                "points": points,
                "rounds": len(every),
                "median_s": f"{statistics.median(seconds):.3f}",
                "min_s": f"{min(seconds):.3f}",
                "max_s": f"{max(seconds):.3f}",
                "bytes": written,
                "note": note,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="large-v3")
    parser.add_argument("--dtype", choices=sorted(ITEM_SIZE), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent / "data")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in the folder, or use them there")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of sweep.csv")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    needed = 4 * model_bytes(options.shape, options.dtype)
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.1f} GB are needed in {options.folder}, {free / 1e9:.1f} GB are free")
    known = rows.about(PACKAGES)
    scratch = Path(tempfile.mkdtemp(prefix="sweep-", dir=options.folder))
    try:
        gate(scratch, options.dtype)
        triple = (options.folder if options.keep else scratch) / f"{options.shape}-{options.dtype}"
        if not all((triple / role / "config.json").exists() for role in ROLES):
            write_triple(triple, SHAPES[options.shape], dtype=options.dtype, max_shard_bytes=SHARD_BYTES)
        judge = Gate(triple, every=False)
        build(triple)  # the sources' targets are in the page cache after it
        every, nbytes = [], 0
        for number in range(options.rounds):
            taken, nbytes = once(lambda: build(triple), scratch, judge)
            every.append(taken)
            said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items())
            print(f"round {number + 1}: {said}", file=sys.stderr, flush=True)
        found = report(options.shape, options.dtype, every, nbytes)
        rows.append("sweep", [{**known, **row} for row in found], options.results)
        shown = ("case", "points", "median_s", "min_s", "max_s", "bytes", "note")
        print(rows.markdown(shown, ([row[name] for name in shown] for row in found)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
