"""Methods that merge whole models, against mergekit: time, memory and bytes, side by side in one run.

    python bench/bench_methods.py [--shape large-v3] [--dtype float16] [--method ties] [--rounds 3] [--folder DIR]

Three fine-tunes of one base, of which slerp takes one. Every program is a whole process; sources are read into the page
cache before it as far as memory allows. For comparison the sources are read and one of them is copied and synced, which
no merge of whole models can do without. First all methods are run on a small model in float32, where every tensor of
ours must be mergekit's up to 3e-7 of its norm; of the measured outputs some tensors are compared, up to the rounding of
their element type. mergekit runs once a case, for it takes minutes. Prints a table and appends rows to
bench/results/methods.csv.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import rows
import torch
from bench_merge import HERE, mergekit_python
from cases import ITEM_SIZE, SHARD_BYTES, SIZES, model_bytes
from gates import Checkpoint
from mergekit_merge import DENSITY, WEIGHT, T
from programs import Program, Run, compile_package, measure

from hsa.testing.whisper_checkpoints import SHAPES, write_triple

METHODS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "task_arithmetic": (f"--weight={WEIGHT}",) * 3,
    "model_stock": (),
    "slerp": (f"--t={T}",),
    "ties": (f"--density={DENSITY}",),
}
"""What is measured, and the options of ours that say what mergekit's configuration says."""

FINE_TUNES = ("primary", "secondary", "tertiary")
PACKAGES = ("numpy", "torch", "blake3")
READ_ALL = "all sources read, one copied and synced"
PARITY = 3e-7
"""Of a tensor's norm: how far ours may be from mergekit's in float32."""

LONG = {"slerp": 3e-5}
"""The same where tensors are long: mergekit adds up their norms in float32. On one of 573,440 elements its slerp is
2e-6 from that in float64, and ours 6e-8."""

ROUNDINGS = 8
"""Of an element type: how far the outputs in it may differ, relative to the largest value."""

OTHERS = {"ties": 0.05}
"""Share of elements that may differ by more: task vectors of 16-bit models have few values, so many elements tie at the
threshold. All of them are taken here; mergekit takes as many as were asked for, in the order of its sort."""


def models_of(method: str, folder: Path) -> list[Path]:
    count = 1 if method == "slerp" else 3
    return [folder / role for role in FINE_TUNES[:count]]


def ours(method: str, folder: Path) -> Program:
    base = [] if method == "linear" else [f"--base={folder / 'base'}"]
    models = [f"--model={path}" for path in models_of(method, folder)]
    command = [sys.executable, "-m", "hsa", "merge", f"--method={method}", *base, *models, *METHODS[method]]
    return Program(f"hsa merge, {method}", [*command, "--output={out}", "--json"], sync=True)


def theirs(method: str, folder: Path, dtype: str, mergekit: str) -> Program:
    sources = [str(folder / "base"), *map(str, models_of(method, folder))]
    script = str(HERE / "mergekit_merge.py")
    return Program(
        f"mergekit, {method}", [mergekit, script, method, "{out}", *sources, f"--dtype={dtype}"], sync=True, slow=True
    )


def floor(method: str, folder: Path) -> Program:
    """Reading the sources that a method needs, and writing an output of their size."""
    sources = [*([] if method == "linear" else [folder / "base"]), *models_of(method, folder)]
    read = " ".join(f"{path}/*.safetensors" for path in sources)
    return Program(
        f"{READ_ALL}, {method}", ["sh", "-c", f"cat {read} >/dev/null && cp -r {sources[-1]} {{out}}"], sync=True
    )


def fill_cache(folder: Path, method: str) -> None:
    """Read what a program will read."""
    for path in [folder / "base", *models_of(method, folder)]:
        for file in sorted(path.glob("*.safetensors")):
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def compare(method: str, one: Path, two: Path, *, every: bool) -> None:
    """SystemExit where two outputs differ by more than they may."""
    first, second = Checkpoint(one), Checkpoint(two)
    names = sorted(first.files)
    if first.files.keys() != second.files.keys():
        raise SystemExit(f"correctness gate: {method} wrote other tensors than mergekit")
    for name in names if every else names[:: max(1, len(names) // 20)]:
        a, b = first[name].double(), second[name].double()
        distance = float((a - b).norm() / b.norm().clamp_min(1e-30))
        allowed = PARITY if every else LONG.get(method, PARITY)
        if not every and distance > allowed:  # rounded to 16 bits, or a method that leaves elements out
            rounding = ROUNDINGS * torch.finfo(second[name].dtype).eps * float(b.abs().max())
            distance, allowed = float(((a - b).abs() > rounding).double().mean()), OTHERS.get(method, 0.0)
        if not distance <= allowed:
            raise SystemExit(
                f"correctness gate: {name} of {method} is {distance:.2g} from mergekit's, allowed {allowed:.2g}"
            )


def gate(folder: Path, methods: Sequence[str], mergekit: str) -> None:
    """Every method on a small model in float32, every tensor."""
    place = folder / "gate"
    write_triple(place, SHAPES["test"], more=FINE_TUNES[2:])
    for method in methods:
        measure(ours(method, place), place / "ours", lambda: None)
        measure(theirs(method, place, "float32", mergekit), place / "theirs", lambda: None)
        compare(method, place / "ours", place / "theirs", every=True)
    shutil.rmtree(place)


def measure_method(
    method: str, folder: Path, dtype: str, rounds: int, mergekit: str, scratch: Path
) -> Iterator[Program]:
    """Ours and the floor in every round, mergekit in the first."""
    mine, kit, least = ours(method, folder), theirs(method, folder, dtype, mergekit), floor(method, folder)
    outs = {mine.name: scratch / "ours", kit.name: scratch / "theirs", least.name: scratch / "copy"}
    for number in range(rounds):
        order = [least, mine, *([kit] if number == 0 else [])]
        for program in order if number % 2 == 0 else reversed(order):
            run = measure(program, outs[program.name], partial(fill_cache, folder, method))
            program.runs.setdefault("warm", []).append(run)
            print(f"{dtype}, {program.name}: {run.seconds:.2f} s", file=sys.stderr, flush=True)
            if program is least:
                shutil.rmtree(outs[program.name])
        if number == 0:
            compare(method, outs[mine.name], outs[kit.name], every=False)
            shutil.rmtree(outs[kit.name])
    shutil.rmtree(outs[mine.name])
    yield from (mine, kit, least)


def row_of(shape: str, dtype: str, method: str, program: Program) -> dict[str, object]:
    runs: list[Run] = program.runs["warm"]
    seconds = [run.seconds for run in runs]
    last = runs[-1].report
    return {
        "shape": shape,
        "dtype": dtype,
        "method": method,
        "models": 1 if method == "slerp" else 3,
        "program": program.name.partition(",")[0] if program.name.startswith(("hsa", "mergekit")) else READ_ALL,
        "rounds": len(runs),
        "median_s": f"{statistics.median(seconds):.3f}",
        "min_s": f"{min(seconds):.3f}",
        "max_s": f"{max(seconds):.3f}",
        "cpu_s": f"{statistics.median(run.cpu for run in runs):.3f}",
        "peak_bytes": max(run.peak for run in runs),
        "model_bytes": model_bytes(shape, dtype),
        "bytes_read": last.get("bytes_read", ""),
        "bytes_read_of_one": last.get("bytes_read_by_source", {}).get("model1", ""),
        "bytes_written": last.get("bytes_written", ""),
    }


def table(lines: Sequence[Mapping[str, object]]) -> str:
    head = ("case", "method", "program", "rounds", "median s", "min to max s", "CPU s", "peak MiB", "read GB")
    return rows.markdown(
        head,
        (
            (
                f"{row['shape']} {row['dtype']}", row["method"], row["program"], row["rounds"], row["median_s"],
                f"{row['min_s']} to {row['max_s']}", row["cpu_s"], f"{int(str(row['peak_bytes'])) / 2**20:.0f}",
                f"{int(str(row['bytes_read'])) / 1e9:.2f}" if row["bytes_read"] else "",
            )
            for row in lines
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="large-v3")
    parser.add_argument("--dtype", choices=sorted(ITEM_SIZE), action="append", help="float16 and float32 by default")
    parser.add_argument("--method", choices=list(METHODS), action="append", help="all by default")
    parser.add_argument("--rounds", type=int, default=3, help="of ours")
    parser.add_argument("--folder", type=Path, default=HERE / "data", help="where there is space (default bench/data)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in the folder, or use them there")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of methods.csv")
    options = parser.parse_args()
    dtypes, methods = options.dtype or ["float16", "float32"], options.method or list(METHODS)
    options.folder.mkdir(parents=True, exist_ok=True)
    needed = 6.1 * max(model_bytes(options.shape, dtype) for dtype in dtypes)
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.1f} GB are needed in {options.folder}, {free / 1e9:.1f} GB are free")
    mergekit = mergekit_python(HERE / "data")
    if mergekit is None:
        raise SystemExit("mergekit cannot be installed, and without it there is nothing to compare with")
    compile_package()
    known = rows.about(PACKAGES)
    scratch = Path(tempfile.mkdtemp(prefix="methods-", dir=options.folder))
    measured: list[dict[str, object]] = []
    try:
        gate(scratch, methods, mergekit)
        for dtype in dtypes:
            folder = (options.folder if options.keep else scratch) / f"four-{options.shape}-{dtype}"
            if not (folder / FINE_TUNES[-1] / "config.json").exists():
                write_triple(
                    folder, SHAPES[options.shape], dtype=dtype, max_shard_bytes=SHARD_BYTES, more=FINE_TUNES[2:]
                )
            for method in methods:
                programs = measure_method(method, folder, dtype, options.rounds, mergekit, scratch)
                found = [row_of(options.shape, dtype, method, program) for program in programs]
                rows.append("methods", [{**known, **row} for row in found], options.results)
                measured += found
            if not options.keep:
                shutil.rmtree(folder)
        print(table(measured))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
