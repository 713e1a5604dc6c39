"""Time of the kernels on a GPU against a device copy, eager torch and torch.compile, side by side in one run.

    python bench/bench_kernels.py [--dtype float32 ...] [--repetitions 30] [--results FILE] [--dry-run]

Works on the encoder's q, k and v weights of large-v3 (96 tensors of 1280 by 1280, random, made on the device), 60 % of
the heads kept. Every way to merge is first compared with the oracle, bit for bit (no figures without that). Times are
the device's own (events around a call that was queued while the device was busy, so that the host's share is hidden as
far as it is short), medians with their spread. Sources rotate, and memory of another kind is read between two calls, so
that the second-level cache holds nothing of the last one; primary is put back before each call, outside the time.
Bytes counted are those that the formula must move: with q the bytes of the 96 weights of one model and s the share of
selected heads, 3q + sq for one pass in place, 3q + q into a new buffer, 3q + 3sq + sq for two launches, 3sq + sq for
the merge alone. --dry-run prints them, and the least times at a given bandwidth, without a GPU.
Prints a Markdown table and appends rows to bench/results/kernels.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

# A checkout that is not installed has hsa beside this folder, and hsa.kernels in the folder kernels/.
if importlib.util.find_spec("hsa") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import hsa
from hsa import reference

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("hsa.kernels") is None:
    hsa.__path__.append(str(ROOT))

Tensor = torch.Tensor
RESULTS = Path(__file__).parent / "results" / "kernels.csv"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
K, LAM, ALPHA = 0.6, 0.5, 0.2
SETS = 3
WARM_UPS = 5
COPY_BYTES = 1 << 30
FLUSH_BYTES = 1 << 29
BUSY_CYCLES = 4_000_000
"""A few milliseconds: longer than the host needs to queue a call of the kernels."""


@dataclass(frozen=True)
class Shape:
    """The targets of an encoder: three weights a layer."""

    layers: int = 32
    width: int = 1280
    heads: int = 20

    @property
    def count(self) -> int:
        return 3 * self.layers

    def model_bytes(self, dtype: torch.dtype) -> int:
        return self.count * self.width * self.width * dtype.itemsize

    @property
    def coefficients(self) -> list[float]:
        """Of every projection, three to a layer."""
        return [reference.layer_coefficient(LAM, ALPHA, g // 3, self.layers) for g in range(self.count)]


TRAFFIC: dict[str, Callable[[float], float]] = {
    "one pass, in place": lambda share: 3 + share,
    "one pass, new buffer": lambda share: 3 + 1,
    "two launches, in place": lambda share: 3 + 3 * share + share,
    "apply only, scores cached, in place": lambda share: 3 * share + share,
    "eager torch, tensor by tensor": lambda share: 3 + share,
    "eager torch, stacked": lambda share: 3 + share,
    "torch.compile, tensor by tensor": lambda share: 3 + share,
    "torch.compile, stacked": lambda share: 3 + share,
}
"""Bytes that a case must move, in units of q, by the share of selected heads."""

OURS = tuple(TRAFFIC)[:4]
WHOLE = OURS[:3]
"""The cases that do all that the formula in torch does."""


@dataclass
class Case:
    """One way to merge, and what was measured of it."""

    name: str
    call: Callable[[int], object]
    milliseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


@dataclass
class Sources:
    """Three models' targets and a new buffer, each one block [G, width, width], and primary as it was."""

    base: Tensor
    primary: Tensor
    secondary: Tensor
    out: Tensor
    kept: Tensor

    def restore(self) -> None:
        self.primary.copy_(self.kept)


def make(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Sources:
    """Base of spread 0.02; task vectors that grow from head to head, so that no selection hangs on rounding."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.count, shape.width, shape.width)
    growth = 1 + torch.arange(shape.heads, device=device) / shape.heads
    growth = growth.repeat_interleave(shape.width // shape.heads)[:, None]
    blocks = [torch.empty(size, dtype=dtype, device=device) for _ in range(5)]
    for g in range(shape.count):
        base = torch.randn(size[1:], generator=generator, device=device) * 0.02
        blocks[0][g] = base
        for block in blocks[1:3]:
            block[g] = base + growth * 1e-3 * torch.randn(size[1:], generator=generator, device=device)
    blocks[4].copy_(blocks[1])
    return Sources(*blocks)


def formula(base: Tensor, primary: Tensor, secondary: Tensor, c1: Tensor, keep: int, heads: int) -> Tensor:
    """Weights [G, d, d], merged in plain torch with c1 [G, 1, 1]: scores, selection, result in primary's dtype."""
    wide = base.float()
    tv1, tv2 = primary.float() - wide, secondary.float() - wide
    squared = (tv1.abs() + tv2.abs()).square().view(len(base), heads, -1).sum(dim=2)
    cut = squared.topk(keep, dim=1).values[:, -1:]
    chosen = (squared >= cut).repeat_interleave(base.shape[1] // heads, dim=1)[:, :, None]
    return torch.where(chosen, (wide + (c1 * tv1 + (1 - c1) * tv2)).to(primary.dtype), primary)


class Bench:
    """All cases of one dtype on one device."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        from hsa.kernels import launch
        from hsa.kernels.projections import Projections

        self.shape, self.dtype, self.device = shape, dtype, device
        self.launch = launch
        self.keep = reference.keep_count(K, shape.heads)
        c1 = shape.coefficients
        self.c1 = torch.tensor(c1, dtype=torch.float32, device=device)
        self.c2 = torch.tensor([1.0 - c for c in c1], dtype=torch.float32, device=device)
        self.keeps = torch.full((shape.count,), self.keep, dtype=torch.int32, device=device)
        self.sources = [make(shape, dtype, device, seed) for seed in range(SETS)]

        def plan(of: Sources, out: Tensor) -> Projections:
            roles = (of.base, of.primary, of.secondary, out)
            return Projections(*(list(role) for role in roles), heads=shape.heads)

        self.in_place = [plan(of, of.primary) for of in self.sources]
        self.to_new = [plan(of, of.out) for of in self.sources]
        self.scores = [launch.score_heads(held).clone() for held in self.in_place]

    def fused(self, i: int) -> Tensor:
        return self.launch.fused_merge(self.in_place[i], self.keeps, self.c1, self.c2)[1]

    def fused_new(self, i: int) -> Tensor:
        return self.launch.fused_merge(self.to_new[i], self.keeps, self.c1, self.c2)[1]

    def two(self, i: int) -> Tensor:
        scores = self.launch.score_heads(self.in_place[i])
        return self.launch.apply_heads(self.in_place[i], scores, self.keeps, self.c1, self.c2)

    def apply(self, i: int) -> Tensor:
        return self.launch.apply_heads(self.in_place[i], self.scores[i], self.keeps, self.c1, self.c2)

    def torch_each(self, merge: Callable[..., Tensor]) -> Callable[[int], None]:
        def call(i: int) -> None:
            of = self.sources[i]
            for g in range(self.shape.count):
                one = slice(g, g + 1)
                c1 = self.c1[one, None, None]
                found = merge(of.base[one], of.primary[one], of.secondary[one], c1, self.keep, self.shape.heads)
                of.primary[one].copy_(found)

        return call

    def torch_stacked(self, merge: Callable[..., Tensor]) -> Callable[[int], None]:
        def call(i: int) -> None:
            of = self.sources[i]
            c1 = self.c1[:, None, None]
            of.primary.copy_(merge(of.base, of.primary, of.secondary, c1, self.keep, self.shape.heads))

        return call

    def cases(self, compiled: bool = True) -> list[Case]:
        ours = (self.fused, self.fused_new, self.two, self.apply)
        found = [Case(name, call) for name, call in zip(OURS, ours, strict=True)]
        ways = [("eager torch", formula)]
        if compiled:
            ways.append(("torch.compile", torch.compile(formula, dynamic=False)))
        for way, merge in ways:
            found.append(Case(f"{way}, tensor by tensor", self.torch_each(merge)))
            found.append(Case(f"{way}, stacked", self.torch_stacked(merge)))
        return found

    def gate(self) -> float:
        """Compare every way of the kernels with the oracle, every projection of one set, bit for bit.

        Returns the share of selected heads.
        """
        of, shape = self.sources[0], self.shape
        bits = torch.int32 if self.dtype == torch.float32 else torch.int16
        wanted = []
        for g in range(shape.count):
            merged = reference.merge_tensor(
                of.base[g].cpu(), of.kept[g].cpu(), of.secondary[g].cpu(),
                k=K, lam=LAM, alpha=ALPHA, layer=g // 3, layers=shape.layers, heads=shape.heads,
            )  # fmt: skip
            wanted.append(merged)
        for name, call in zip(OURS, (self.fused, self.fused_new, self.two, self.apply), strict=True):
            of.restore()
            of.out.fill_(torch.nan)
            selected = call(0).cpu()
            self.launch.check(self.to_new[0] if name == "one pass, new buffer" else self.in_place[0])
            result = (of.out if name == "one pass, new buffer" else of.primary).cpu()
            for g, want in enumerate(wanted):
                if tuple(selected[g].nonzero().flatten().tolist()) != want.selected:
                    raise SystemExit(f"correctness gate: {name} selects other heads of projection {g} than the oracle")
                if not torch.equal(result[g].view(bits), want.value.view(bits)):
                    raise SystemExit(f"correctness gate: {name} differs from the oracle in projection {g}")
        of.restore()
        return sum(len(want.selected) for want in wanted) / (shape.count * shape.heads)

    def agrees(self, case: Case) -> bool:
        """Whether the formula in torch gives what the kernels give, up to a rounding of the last bit or two.

        Heads selected otherwise differ by far more somewhere.
        """
        of = self.sources[0]
        of.restore()
        self.fused(0)
        wanted = of.primary.clone()
        of.restore()
        case.call(0)
        close = torch.allclose(of.primary, wanted, rtol=2 * torch.finfo(self.dtype).eps, atol=1e-7)
        of.restore()
        return close


def timed(call: Callable[[], object], before: Callable[[], object], flush: Tensor) -> float:
    """Milliseconds of one call on the device, from a cache that holds none of its data."""
    before()
    flush.max()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    started.record()
    call()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended))


def measure(bench: Bench, cases: Sequence[Case], repetitions: int, flush: Tensor) -> None:
    """Warm up, then time the cases in turn, so that a drift of clocks meets all alike."""
    for number in range(-WARM_UPS, repetitions):
        i = number % SETS
        for case in cases if number % 2 == 0 else reversed(cases):
            taken = timed(partial(case.call, i), bench.sources[i].restore, flush)
            if number >= 0:
                case.milliseconds.append(taken)
    for held in (*bench.in_place, *bench.to_new):
        bench.launch.check(held)


def measure_copy(repetitions: int, flush: Tensor, device: str) -> float:
    """Bytes a second of a device copy, both directions counted."""
    source, out = (torch.ones(COPY_BYTES // 4, dtype=torch.int32, device=device) for _ in range(2))
    every = [timed(lambda: out.copy_(source), lambda: None, flush) for _ in range(WARM_UPS + repetitions)]
    return 2 * COPY_BYTES / statistics.median(every[WARM_UPS:]) * 1e3


def rows_of(measured: Sequence[Case], dtype: str, nbytes: int, share: float, copy: float) -> list[dict[str, object]]:
    def best(way: str) -> float | None:
        return min((case.median for case in measured if case.name.startswith(way)), default=None)

    eager, compiled = best("eager torch"), best("torch.compile")
    rows = []
    for case in measured:
        moved = TRAFFIC[case.name](share) * nbytes
        whole = case.name in WHOLE
        rows.append(
            {
                "dtype": dtype,
                "case": case.name,
                "repetitions": len(case.milliseconds),
                "median_ms": f"{case.median:.4f}",
                "min_ms": f"{min(case.milliseconds):.4f}",
                "max_ms": f"{max(case.milliseconds):.4f}",
                "share_selected": f"{share:.4f}",
                "bytes": round(moved),
                "gb_s": f"{moved / case.median / 1e6:.0f}",
                "copy_gb_s": f"{copy / 1e9:.0f}",
                "of_copy": f"{moved / case.median * 1e3 / copy:.3f}",
                "floor_ms": f"{moved / copy * 1e3:.4f}",
                "times_eager": f"{eager / case.median:.2f}" if whole and eager else "",
                "times_compile": f"{compiled / case.median:.2f}" if whole and compiled else "",
            }
        )
    return rows


def table(rows: Sequence[dict[str, object]]) -> str:
    lines = [
        "| dtype | case | median ms | min to max ms | floor ms | GB/s | of copy | x eager | x compile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            "| {dtype} | {case} | {median_ms} | {min_ms} to {max_ms} | {floor_ms} | {gb_s} | {of_copy} | {times_eager} "
            "| {times_compile} |".format(**row)
        )
    return "\n".join(lines)


def _answer(*command: str) -> str:
    """The first line that a program prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def about(commit: str | None) -> dict[str, object]:
    """The machine and the versions of a row."""
    import triton

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or _answer("git", "rev-parse", "--short", "HEAD") or "unknown",
    }


def append_rows(path: Path, rows: Sequence[dict[str, object]], known: dict[str, object]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*known, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows({**known, **row} for row in rows)


def dry_run(shape: Shape, dtypes: Sequence[str], bandwidth: float) -> str:
    """What would be measured: bytes of every case, and the least time at a bandwidth in bytes a second."""
    share = reference.keep_count(K, shape.heads) / shape.heads
    lines = [
        f"{shape.count} weights of {shape.width} by {shape.width}, {share:.0%} of the heads selected, "
        f"floors at {bandwidth / 1e12:g} TB/s (given, not measured)",
        "",
        "| dtype | case | bytes | floor ms |",
        "|---|---|---|---|",
    ]
    for name in dtypes:
        for case, traffic in TRAFFIC.items():
            moved = traffic(share) * shape.model_bytes(DTYPES[name])
            lines.append(f"| {name} | {case} | {moved:.0f} | {moved / bandwidth * 1e3:.3f} |")
    return "\n".join(lines)


def run(shape: Shape, name: str, repetitions: int, copy: float, flush: Tensor) -> list[dict[str, object]]:
    """All rows of one dtype."""
    torch.compiler.reset()
    bench = Bench(shape, DTYPES[name], flush.device.type)
    share = bench.gate()
    cases = []
    for case in bench.cases():
        try:
            right = case.name in OURS or bench.agrees(case)
        except Exception as error:  # torch.compile fails in many ways, none of which concerns the kernels
            print(f"{name}, {case.name}: not measured, {type(error).__name__}: {error}".split("\n")[0], file=sys.stderr)
            continue
        if not right:
            raise SystemExit(f"correctness gate: {case.name} in {name} is another formula than the kernels'")
        cases.append(case)
    measure(bench, cases, repetitions, flush)
    return rows_of(cases, name, shape.model_bytes(DTYPES[name]), share, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="by default all three")
    parser.add_argument("--repetitions", type=int, default=30, help="timed, at least 20 (default 30)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that rows are appended to")
    parser.add_argument("--commit", help="what the rows say, by default git's HEAD")
    parser.add_argument("--dry-run", action="store_true", help="print bytes and floors; needs no GPU")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s for the floors of --dry-run (default 4.3)")
    options = parser.parse_args()
    if options.repetitions < 20:
        parser.error("--repetitions: expected at least 20")
    dtypes = options.dtype or list(DTYPES)
    shape = Shape()
    if options.dry_run:
        print(dry_run(shape, dtypes, options.bandwidth * 1e12))
        return
    if not torch.cuda.is_available():
        raise SystemExit(f"bench-gpu: torch {torch.__version__} finds no GPU; --dry-run prints what would be measured")
    known = about(options.commit)
    flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    copy = measure_copy(options.repetitions, flush, "cuda")
    print(", ".join(f"{key} {value}" for key, value in known.items()), file=sys.stderr)
    print(f"device copy: {copy / 1e12:.2f} TB/s, both directions counted", file=sys.stderr, flush=True)
    every = []
    for name in dtypes:
        rows = run(shape, name, options.repetitions, copy, flush)
        append_rows(options.results, rows, known)
        every += rows
        torch.cuda.empty_cache()
    print(table(every))


if __name__ == "__main__":
    main()
