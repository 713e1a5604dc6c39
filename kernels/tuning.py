"""Block sizes, warps and programs per multiprocessor, by the widest source dtype.

NOT YET MEASURED: no figure of time stands here, because none was taken. The values rest on what the compiler says
(`python -m hsa.kernels.compile_check` prints it) and on this reasoning:

- A slab brings `rows` * 64 elements of each of three sources on the way at once. `rows` is chosen so that this is
  about 48 KiB whatever the dtype: with two programs on a multiprocessor, enough to hide a trip to memory.
- Two programs of 8 warps fit a multiprocessor of 65536 registers while a thread takes at most 128. `registers` says
  so to NVIDIA's assembler, which otherwise aims at more programs and spills; it then takes 88 to 128
  in the fused kernel.
- Without alignment every element is a load of its own with an address of its own; small slabs keep those in
  registers.
- More programs than fit are harmless and useless: the work is drawn from a queue, nobody waits for a program that
  has not started.
- `stages` is 1: the kernels have no inner loop over memory that could be pipelined.
- `lag` is how many projections the merge follows the scores by. With 1, the second read finds the most in the
  second-level cache; a larger one leaves the last slabs of a projection more time before its merge needs them.

A row that is measured later names the GPU, the case and the time next to the value it justifies.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """How a launch is cut.

    Attributes:
        rows: tile rows (of 64 elements) of a slab; a power of two, at least 16.
        warps: warps of a program.
        stages: what Triton calls num_stages.
        registers: the most registers of a thread (NVIDIA alone).
        per_processor: programs of the fused kernel that are started for each multiprocessor.
        lag: projections by which the merge follows the scores in the fused queue, at least 1.
    """

    rows: int
    warps: int
    stages: int
    registers: int
    per_processor: int
    lag: int

    def __post_init__(self) -> None:
        if self.rows < 16 or self.rows & (self.rows - 1):
            raise ValueError(f"rows must be a power of two of at least 16, got {self.rows}")
        for name in ("warps", "stages", "registers", "per_processor", "lag"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


NARROW = Tuning(rows=128, warps=8, stages=1, registers=128, per_processor=2, lag=1)
"""All sources have 2 bytes an element. Not yet measured."""

WIDE = Tuning(rows=64, warps=8, stages=1, registers=128, per_processor=2, lag=1)
"""A source has 4 bytes an element. Not yet measured."""

UNALIGNED = Tuning(rows=32, warps=8, stages=1, registers=128, per_processor=2, lag=1)
"""Addresses or shapes that vector loads cannot take. Not yet measured."""

BY_DEVICE: dict[str, dict[int, Tuning]] = {}
"""Measured exceptions: a part of the GPU's name -> bytes of the widest source -> tuning. None was measured yet."""


def choose(itemsize: int, aligned: bool, device_name: str) -> Tuning:
    """The tuning for sources of at most `itemsize` bytes an element on a GPU of that name."""
    if not aligned:
        return UNALIGNED
    for part, measured in BY_DEVICE.items():
        if part in device_name and itemsize in measured:
            return measured[itemsize]
    return WIDE if itemsize > 2 else NARROW


def compiler_options(tuned: Tuning, *, amd: bool) -> dict[str, object]:
    """What the compiler is told at every launch. Fused multiply-adds would change the last bit of a result."""
    options: dict[str, object] = {
        "num_warps": tuned.warps,
        "num_stages": tuned.stages,
        "enable_fp_fusion": False,
    }
    return options if amd else {**options, "maxnreg": tuned.registers}
