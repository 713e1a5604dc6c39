"""The distance between two outputs' weights, streamed in slices: bytes are compared, and norms are in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hsa.inspection.measure import Buffers
from hsa.sources.checkpoint import Checkpoint, open_checkpoint
from hsa.system.dtypes import ARITHMETIC, BITS, STORAGE, Array, size, widen
from hsa.system.fsio import Tally

STEP = 1 << 18
"""The number of elements of each tensor that are compared at a time."""


@dataclass(frozen=True)
class Distance:
    """Squared L2 norms of B - A and of A over a group of tensors, in float64, with the number of tensors with equal
    bytes and of all."""

    change: float
    whole: float
    equal: int
    tensors: int

    @property
    def relative(self) -> float | None:
        """|B - A| / |A|; None if A is zero and B is not."""
        if self.change == 0.0:
            return 0.0
        return math.sqrt(self.change / self.whole) if self.whole > 0.0 else None

    def plus(self, other: Distance) -> Distance:
        return Distance(
            self.change + other.change,
            self.whole + other.whole,
            self.equal + other.equal,
            self.tensors + other.tensors,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "relative": self.relative,
            "change_norm": math.sqrt(self.change),
            "norm": math.sqrt(self.whole),
            "equal_tensors": self.equal,
            "tensors": self.tensors,
        }


@dataclass(frozen=True)
class WeightDistances:
    """The distances between the weights of two outputs: by stack, by stack and kind, and for targets and the rest.

    `incomparable` are tensors of both whose bytes differ and that have no distance (different shapes, not numeric, or
    with NaN or Inf).
    """

    whole: Distance
    stacks: Mapping[str, Distance]
    kinds: Mapping[str, Distance]
    targets: Distance
    others: Distance
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    incomparable: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "whole": self.whole.as_dict(),
            "stacks": {name: each.as_dict() for name, each in self.stacks.items()},
            "kinds": {name: each.as_dict() for name, each in self.kinds.items()},
            "targets": self.targets.as_dict(),
            "others": self.others.as_dict(),
            "only_a": list(self.only_first),
            "only_b": list(self.only_second),
            "incomparable": list(self.incomparable),
        }


def compare_weights(
    folders: tuple[Path, Path], targets: set[str], tally: Tally, step: Callable[[int], None]
) -> WeightDistances:
    """Compare every tensor of both outputs. `targets` are canonical names. Raises SourceError, MachineError."""
    with ExitStack() as stack:
        # roles are only labels in messages and tallies here
        a, b = (
            stack.enter_context(open_checkpoint(label, folder, tally))
            for label, folder in zip(("a", "b"), folders, strict=True)
        )
        buffers = Buffers()
        stacks: dict[str, Distance] = {}
        kinds: dict[str, Distance] = {}
        split = {True: Distance(0.0, 0.0, 0, 0), False: Distance(0.0, 0.0, 0, 0)}
        incomparable = []
        for name in a.tensors:
            if name not in b.tensors:
                continue
            distance = _distance(a, b, name, buffers, step)
            if distance is None:
                incomparable.append(a.tensors[name].name)
                continue
            of_stack, kind = a.architecture.group_of(name)
            for table, key in ((stacks, of_stack), (kinds, f"{of_stack} {kind}")):
                table[key] = table[key].plus(distance) if key in table else distance
            split[name in targets] = split[name in targets].plus(distance)
        a.check_unchanged()
        b.check_unchanged()
        return WeightDistances(
            whole=split[True].plus(split[False]),
            stacks=stacks,
            kinds=kinds,
            targets=split[True],
            others=split[False],
            only_first=tuple(ref.name for name, ref in a.tensors.items() if name not in b.tensors),
            only_second=tuple(ref.name for name, ref in b.tensors.items() if name not in a.tensors),
            incomparable=tuple(incomparable),
        )


def _distance(
    a: Checkpoint, b: Checkpoint, name: str, buffers: Buffers, step: Callable[[int], None]
) -> Distance | None:
    """The distance of one tensor; None if it has no distance and its bytes differ."""
    one, other = a.tensors[name], b.tensors[name]
    if one.shape != other.shape:
        return None
    numbers = {one.code, other.code} <= set(ARITHMETIC)
    if one.code != other.code and not numbers:
        return None
    total = math.prod(one.shape)
    equal, change, whole = one.code == other.code, list[float](), list[float]()
    for first in range(0, total, STEP):
        count = min(STEP, total - first)
        raw = []
        for checkpoint, ref in ((a, one), (b, other)):
            start, length = first * BITS[ref.code] // 8, -(-count * BITS[ref.code] // 8)
            buffer = buffers.take(checkpoint.role, length)
            checkpoint.read_into(ref, buffer.data, start)
            step(length)
            raw.append(buffer)
        same = one.code == other.code and bool(np.array_equal(raw[0], raw[1]))
        equal = equal and same
        if numbers:
            x, y = (_float64(ref.code, buffer) for ref, buffer in zip((one, other), raw, strict=True))
            with np.errstate(invalid="ignore", over="ignore"):
                whole.append(float(np.add.reduce(x * x)))
                if not same:
                    np.subtract(y, x, out=y)
                    change.append(float(np.add.reduce(np.multiply(y, y, out=y))))
        elif not equal:
            return None
    if equal and not all(map(math.isfinite, whole)):
        return Distance(0.0, 0.0, 1, 1)  # NaN and Inf have no norm, but equal bytes have distance 0
    if not all(map(math.isfinite, (*whole, *change))):
        return None
    return Distance(math.fsum(change), math.fsum(whole), int(equal), 1)


def _float64(code: str, raw: Array) -> Array:
    values = raw.view(STORAGE[code])
    wide: Array = widen(code, values, np.empty(raw.size // size(code), np.float32)).astype(np.float64)
    return wide
