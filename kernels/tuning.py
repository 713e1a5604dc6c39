"""Block sizes, warps, registers and programs per multiprocessor, by the widest source dtype.

The trade-offs:

- A slab loads `rows` * 64 elements of each of three sources at once. Registers hold these, and `held` merged slabs that
  wait for a decision. The loads in flight on a multiprocessor must hide the latency of memory.
- The fused kernel reads every source once if its programs hold more slabs than a projection has. With fewer it leaves
  slabs, and one program for each projection reads them again, which is slow.
- `fused_registers` and `registers` limit a thread's registers, because NVIDIA's assembler otherwise aims at more
  programs and spills. `python -m hsa.kernels.compile_check` verifies that nothing spills, in the mixes that it compiles
  and with the Triton of constraints.txt.
- Without alignment, every element takes a load and an address of its own; small slabs keep those in registers.
- `stages` is 1: the kernels have no inner loop over memory that could be pipelined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE = 64
"""How often the fused kernel looks for a decision before it leaves a slab for later; a decider looks that squared."""

MOST_DECIDERS = 4


@dataclass(frozen=True)
class Tuning:
    """How a launch is divided into slabs and programs.

    Attributes:
        rows: tile rows (of 64 elements) of a slab; a power of two, at least 16.
        warps: warps of a program.
        stages: Triton's num_stages.
        registers: the most registers of a thread (NVIDIA only) in the two kernels of the merge in two launches.
        fused_registers: the same in the fused kernel.
        per_processor: programs of the fused kernel that are started for each multiprocessor.
        held: merged slabs that a program of the fused kernel keeps in registers until they are decided, 1 or 2.
    """

    rows: int
    warps: int
    stages: int
    registers: int
    fused_registers: int
    per_processor: int
    held: int

    def __post_init__(self) -> None:
        if self.rows < 16 or self.rows & (self.rows - 1):
            raise ValueError(f"rows must be a power of two of at least 16, got {self.rows}")
        for name in ("warps", "stages", "registers", "fused_registers", "per_processor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.held not in (1, 2):
            raise ValueError(f"held must be 1 or 2, got {self.held}")


NARROW = Tuning(rows=64, warps=4, stages=1, registers=128, fused_registers=200, per_processor=2, held=2)
"""Sources and output have 2 bytes per element. Measured only on an H200, see `BY_DEVICE`."""

WIDE = Tuning(rows=64, warps=4, stages=1, registers=168, fused_registers=255, per_processor=2, held=2)
"""A source or the output has 4 bytes per element. Measured only on an H200, see `BY_DEVICE`."""

UNALIGNED = Tuning(rows=16, warps=4, stages=1, registers=128, fused_registers=168, per_processor=3, held=2)
"""Addresses or shapes that vector loads cannot use. Not measured."""

BY_DEVICE: dict[str, dict[int, Tuning]] = {
    "H200": {
        4: Tuning(rows=64, warps=8, stages=1, registers=128, fused_registers=128, per_processor=2, held=2),
        2: Tuning(rows=64, warps=4, stages=1, registers=128, fused_registers=168, per_processor=3, held=2),
    }
}
"""Measured: part of the GPU's name -> bytes per element -> tuning, for heads of one run and sources of one size.

H200, 96 weights of 1280 by 1280, one pass in place, against a copy's bandwidth in the same run (2026-11-27, Triton
3.6.0; medians of ten, spread below 2 %). Spilled bytes per thread are those of Triton 3.7.1, then of 3.6.0:

    float32   64 rows,  8 warps, 128 registers, 2 programs, 2 held   0.656 ms  0.81  spills  0, 16
              64 rows,  4 warps, 255 registers, 2 programs, 2 held   0.763 ms  0.70          0,  0
    float16   64 rows,  4 warps, 168 registers, 3 programs, 2 held   0.381 ms  0.70          0,  0
              64 rows,  4 warps, 200 registers, 2 programs, 2 held   0.513 ms  0.52          0,  0
             128 rows,  8 warps, 128 registers, 2 programs, 2 held   0.337 ms  0.79         16, 24
              64 rows,  4 warps, 128 registers, 4 programs, 2 held   0.332 ms  0.80          8, 56

`compile_check` refuses kernels that spill with the Triton of constraints.txt: the last two, by a handful of registers.
No slab was left in any of these runs. Two deciders instead of four took 1 % less in float32, eight 1 % more.
"""


def choose(itemsizes: Sequence[int], aligned: bool, one_run: bool, device_name: str) -> Tuning:
    """The tuning for base, primary, secondary and output with these bytes per element, on a GPU of that name."""
    if not aligned:
        return UNALIGNED
    sources = itemsizes[:3]
    if one_run and min(sources) == max(itemsizes):
        for part, measured in BY_DEVICE.items():
            if part in device_name and sources[0] in measured:
                return measured[sources[0]]
    return WIDE if max(itemsizes) > 2 else NARROW


def deciders(programs: int) -> int:
    """The number of the fused kernel's programs that begin by selecting heads."""
    return min(MOST_DECIDERS, programs // 16)


def compiler_options(tuned: Tuning, registers: int, *, amd: bool) -> dict[str, object]:
    """The compiler options of every launch. Fused multiply-adds would change the last bit of a result."""
    options: dict[str, object] = {
        "num_warps": tuned.warps,
        "num_stages": tuned.stages,
        "enable_fp_fusion": False,
    }
    return options if amd else {**options, "maxnreg": registers}
