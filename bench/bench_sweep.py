"""Eleven lambdas as patches, by `hsa sweep`, against one patch and the time that writing the other ten's bytes takes.

    python bench/bench_sweep.py [--shape large-v3] [--dtype float32] [--rounds 3] [--folder DIR] [--keep] [--python]

A sweep reads its sources once and scores once, so eleven points should cost one patch and at most 1.3 times what it
takes to write the bytes of the other ten. Those bytes are written by one thread in the same process, in both ways that
there are: through the page cache, as any program does, and past it; each a file a point, fsynced. Programs are whole
processes, with their memory; sources are in the page cache. `hsa.Merger` is measured as well: built, and one more
candidate in place; and in a model with the tensors and heads of large-v3 in miniature, the Python of a candidate before
anything is computed. Everything is checked first on a small triple, every tensor bit for bit, and some tensors of the
measured one after each round; no figures without. Prints a table and appends rows to bench/results/sweep.csv.
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
from typing import Any

import rows
import torch
from cases import ALPHA, ITEM_SIZE, LAM, SHARD_BYTES, SIZES, K, model_bytes
from gates import ROLES, Gate
from programs import Program, compile_package, measure
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.methods.hsa import Hsa
from hsa.system.huge_pages import allocate
from hsa.testing.whisper_checkpoints import SHAPES, write_triple
from hsa.testing.whisper_config import MINIATURE

POINTS = 11
LIMIT = 1.3
"""How many times the bytes of the other ten points may be written in the time that they take."""

MEMORY_LIMIT = 64 << 20
"""Bytes of peak memory that a sweep may take beyond one patch."""

PIECE = 4 << 20
CANDIDATES = 201
"""Candidates of the model in miniature, of which the first meets the model and is left out."""

Tensors = Mapping[str, torch.Tensor]
CASES = {
    "patch": "hsa merge --patch, one point",
    "sweep": "hsa sweep, eleven points",
    "cached": "bytes of ten patches written, through the page cache",
    "direct": "bytes of ten patches written, past the page cache",
    "merger": "hsa.Merger built",
    "apply": "hsa.Merger.apply_, one candidate in place",
    "python": "Python of one candidate before the first block, large-v3 in miniature",
}
PACKAGES = ("numpy", "torch")


def command(triple: Path, *more: str) -> list[str]:
    sources = [part for role in ROLES for part in (f"--{role}", str(triple / role))]
    return [sys.executable, "-m", "hsa", *more, *sources, "--k", str(K), "--alpha", str(ALPHA), "--json"]


def programs(triple: Path, check: Callable[[Path], None]) -> dict[str, Program]:
    """The two programs; `check` is given the patch of the gate's parameters."""
    name = f"encoder-qkv_k{K}_lambda{LAM}_alpha{ALPHA}.safetensors"
    patch = Program(
        CASES["patch"],
        command(triple, "merge", "--patch", "--lambda", str(LAM), "--output", "{out}/p.safetensors"),
        check=lambda out: check(out / "p.safetensors"),
    )
    sweep = Program(
        CASES["sweep"],
        command(triple, "sweep", "--lambda", "0:1:0.1", "--output", "{out}"),
        check=lambda out: check(out / name),
    )
    return {"patch": patch, "sweep": sweep}


def warm(triple: Path) -> None:
    """Read what a sweep reads, so that it is in the page cache whatever was written since it was last read."""
    hsa.Merger(*(triple / role for role in ROLES), backend="cpu")


def write_files(folder: Path, sizes: list[int], *, direct: bool) -> float:
    """Seconds to write files of these sizes one after another, each fsynced; they are removed again."""
    piece = allocate(PIECE)
    piece[:] = os.urandom(PIECE)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    paths = [folder / f"bytes-{number}" for number in range(len(sizes))]
    started = time.perf_counter()
    for path, size in zip(paths, sizes, strict=True):
        descriptor = os.open(path, flags)
        try:
            for offset in range(0, size, PIECE):
                count = min(PIECE, size - offset)
                os.write(descriptor, piece[: count - count % 4096 if direct else count])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    taken = time.perf_counter() - started
    for path in paths:
        path.unlink()
    os.sync()
    return taken


def gate(folder: Path, dtype: str) -> None:
    """Patches, a sweep's patch applied, and `apply_`, on a small triple against the oracle, bit for bit."""
    triple = folder / "gate"
    paths = write_triple(triple, SHAPES["test"], dtype=dtype)
    judge = Gate(triple, every=True)

    def check(patch: Path) -> None:
        judge.patch(patch)
        hsa.apply(paths["primary"], patch, output=folder / "applied", sync=False)
        judge.hsa(folder / "applied")
        shutil.rmtree(folder / "applied")

    for program in programs(triple, check).values():
        measure(program, folder / "out", lambda: None)
    shutil.rmtree(folder / "out")
    check_merger(judge, hsa.Merger(*(triple / role for role in ROLES), backend="cpu"))


def check_merger(judge: Gate, merger: hsa.Merger) -> None:
    """Merge with the gate's parameters into tensors of NaN, and compare the targets with the oracle."""
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in merger.merge().items()}
    merger.apply_(state, k=K, lam=LAM, alpha=ALPHA)
    judge.compare_targets(state)


def once(triple: Path, folder: Path, judge: Gate) -> tuple[dict[str, float], dict[str, int], int]:
    """Seconds of every case and peak bytes of the programs, in one round, and the bytes of a point."""
    taken: dict[str, float] = {}
    peaks: dict[str, int] = {}
    out = folder / "out"
    for case, program in programs(triple, judge.patch).items():
        run = measure(program, out, lambda: warm(triple))
        taken[case], peaks[case] = run.seconds, run.peak
    sizes = [path.stat().st_size for path in sorted(out.glob("*.safetensors"))]
    shutil.rmtree(out)
    os.sync()
    taken["cached"] = write_files(folder, sizes[1:], direct=False)
    taken["direct"] = write_files(folder, sizes[1:], direct=True)
    warm(triple)
    started = time.perf_counter()
    merger = hsa.Merger(*(triple / role for role in ROLES), backend="cpu")
    taken["merger"] = time.perf_counter() - started
    state = merger.merge()
    candidates = []
    for number in range(POINTS):
        started = time.perf_counter()
        merger.apply_(state, k=K, lam=number / 10, alpha=ALPHA)
        candidates.append(time.perf_counter() - started)
    taken["apply"] = statistics.median(candidates)
    taken["python"] = python_seconds(folder)
    check_merger(judge, merger)
    return taken, peaks, sizes[0]


def python_seconds(folder: Path) -> float:
    """What a caller of `apply_` waits before anything is computed: median seconds from the call until the method is
    applied to the first block. The model has the tensors and heads of large-v3, each as small as can be."""
    triple = folder / "miniature"
    write_triple(triple, MINIATURE)
    merger = hsa.Merger(*(triple / role for role in ROLES), backend="cpu", threads=1)
    model = WhisperForConditionalGeneration.from_pretrained(triple / "primary")
    begun: list[float] = []
    really = Hsa.apply

    def applied(*arguments: Any) -> None:
        begun.append(time.perf_counter())
        Hsa.apply = really  # type: ignore[method-assign]
        really(*arguments)

    taken = []
    for number in range(CANDIDATES):
        Hsa.apply = applied  # type: ignore[assignment, method-assign]
        started = time.perf_counter()
        merger.apply_(model, k=K, lam=number / CANDIDATES, alpha=ALPHA)
        taken.append(begun.pop() - started)
    shutil.rmtree(triple)
    return statistics.median(taken[1:])


def report(
    shape: str, dtype: str, every: list[dict[str, float]], peaks: list[dict[str, int]], nbytes: int
) -> list[dict[str, object]]:
    """A row for each case; the sweep's note says how it stands to its limits."""
    found: list[dict[str, object]] = []
    for case, text in CASES.items():
        seconds = [taken[case] for taken in every if case in taken]
        if not seconds:
            continue
        note = ""
        if case == "sweep":
            times = {
                way: statistics.median((taken["sweep"] - taken["patch"]) / taken[way] for taken in every)
                for way in ("cached", "direct")
            }
            more = statistics.median(peak["sweep"] - peak["patch"] for peak in peaks)
            note = (
                f"one patch and {times['cached']:.2f} times the writing of ten through the page cache "
                f"({times['direct']:.2f} times past it), at most {LIMIT}; peak memory {more / 2**20:+.0f} MiB over "
                f"one patch's {statistics.median(p['patch'] for p in peaks) / 2**20:.0f}, at most "
                f"{MEMORY_LIMIT / 2**20:+.0f}"
            )
        points = {"sweep": POINTS, "cached": POINTS - 1, "direct": POINTS - 1, "merger": 0}.get(case, 1)
        written = 0 if case in ("merger", "apply", "python") else points * nbytes
        digits = ".6f" if case == "python" else ".3f"
        found.append(
            {
                "shape": shape,
                "dtype": dtype,
                "case": text,
                "points": points,
                "rounds": len(every),
                "median_s": f"{statistics.median(seconds):{digits}}",
                "min_s": f"{min(seconds):{digits}}",
                "max_s": f"{max(seconds):{digits}}",
                "bytes": written,
                "note": note,
            }
        )
    return found


def measure_python(options: argparse.Namespace) -> None:
    """Measure and record the Python of a candidate before the first block alone, after the gate."""
    known = rows.about(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="python-", dir=options.folder) as scratch:
        gate(Path(scratch), "float32")
        taken = [{"python": python_seconds(Path(scratch))} for _ in range(options.rounds)]
    (found,) = report("large-v3 in miniature", "float32", taken, [], 0)
    rows.append("sweep", [{**known, **found}], options.results)
    print(rows.markdown(tuple(found), [list(found.values())]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="large-v3")
    parser.add_argument("--dtype", choices=sorted(ITEM_SIZE), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent / "data")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in the folder, or use them there")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of sweep.csv")
    parser.add_argument("--python", action="store_true", help="measure the Python before the first block alone")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    compile_package()
    if options.python:
        measure_python(options)
        return
    needed = 5 * model_bytes(options.shape, options.dtype)
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
        every, peaks, nbytes = [], [], 0
        for number in range(options.rounds):
            taken, peak, nbytes = once(triple, scratch, judge)
            every.append(taken)
            peaks.append(peak)
            said = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items())
            print(f"round {number + 1}: {said}", file=sys.stderr, flush=True)
        found = report(options.shape, options.dtype, every, peaks, nbytes)
        rows.append("sweep", [{**known, **row} for row in found], options.results)
        shown = ("case", "points", "median_s", "min_s", "max_s", "bytes", "note")
        print(rows.markdown(shown, ([row[name] for name in shown] for row in found)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
