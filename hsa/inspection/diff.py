"""`hsa inspect --diff A B`: in what two outputs differ, from their provenance and, where they hold any, their weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from hsa import provenance, whisper
from hsa._version import __version__
from hsa.checkpoint import INDEX, ROLES, WEIGHTS, Checkpoint, Role, open_checkpoint
from hsa.dtypes import ARITHMETIC, BITS, STORAGE, Array, size, widen
from hsa.errors import ProvenanceError
from hsa.fsio import Source, Tally
from hsa.inspection.measure import Buffers
from hsa.inspection.model import FORMAT, jaccard
from hsa.output import PROVENANCE
from hsa.provenance import Provenance, TargetRecord

STEP = 1 << 20
"""Bytes of each file, or elements of each tensor, that are compared at a time."""

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeadsDiff:
    """One tensor that both outputs merged: the heads of each, and the largest relative difference of their scores."""

    name: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    score_difference: float | None

    @property
    def same(self) -> bool:
        return self.first == self.second

    @property
    def jaccard(self) -> float | None:
        """Intersection over union; None where neither selects a head."""
        return jaccard(self.first, self.second)

    def as_dict(self) -> dict[str, Any]:
        return {
            "a": list(self.first),
            "b": list(self.second),
            "only_a": sorted(set(self.first) - set(self.second)),
            "only_b": sorted(set(self.second) - set(self.first)),
            "jaccard": self.jaccard,
            "score_difference": self.score_difference,
        }


@dataclass(frozen=True)
class Distance:
    """Squared L2 norms over a group of tensors, in float64: of B - A and of A; tensors with equal bytes, and all."""

    change: float
    whole: float
    equal: int
    tensors: int

    @property
    def relative(self) -> float | None:
        """|B - A| / |A|; None where A is zero and B is not."""
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
class Weights:
    """The weights of two outputs: distances by stack, by stack and kind, and of targets and the rest.

    `incomparable` are tensors of both without a distance (other shapes, no floating numbers, NaN or Inf) and other bytes.
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


@dataclass(frozen=True)
class Comparison:
    """Two outputs, A and B.

    `parameters` and `program` hold the values that differ, as pairs. `sources` says per role whether both were made from
    the same target bytes and under which ids. `files` is one of same, different, only a, only b, missing, for each file
    that either provenance lists, by the bytes that are there now. `weights` is None where one of the two has none.
    """

    first: str
    second: str
    parameters: Mapping[str, tuple[Any, Any]]
    program: Mapping[str, tuple[Any, Any]]
    sources: Mapping[Role, Mapping[str, Any]]
    heads: Mapping[str, HeadsDiff]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    files: Mapping[str, str]
    weights: Weights | None
    bytes_read: int
    notes: tuple[str, ...]

    @property
    def agreeing_tensors(self) -> int:
        """How many tensors have the same heads in both."""
        return sum(each.same for each in self.heads.values())

    @property
    def jaccard(self) -> float | None:
        """Heads that both merged over heads that either did, tensors of both only; None where there is none."""
        both = sum(len(set(each.first) & set(each.second)) for each in self.heads.values())
        either = sum(len(set(each.first) | set(each.second)) for each in self.heads.values())
        return both / either if either else None

    @property
    def identical(self) -> bool:
        """Whether every file of both, provenance included, holds the same bytes."""
        return set(self.files.values()) == {"same"}

    def as_dict(self) -> dict[str, Any]:
        """What `hsa inspect --diff --json` prints."""
        return {
            "format": FORMAT,
            "version": __version__,
            "a": self.first,
            "b": self.second,
            "identical": self.identical,
            "parameters": {name: {"a": a, "b": b} for name, (a, b) in self.parameters.items()},
            "program": {name: {"a": a, "b": b} for name, (a, b) in self.program.items()},
            "sources": {role: dict(each) for role, each in self.sources.items()},
            "agreeing_tensors": self.agreeing_tensors,
            "common_tensors": len(self.heads),
            "jaccard": self.jaccard,
            "tensors": {name: each.as_dict() for name, each in self.heads.items()},
            "only_a": list(self.only_first),
            "only_b": list(self.only_second),
            "files": dict(self.files),
            "weights": None if self.weights is None else self.weights.as_dict(),
            "bytes_read": self.bytes_read,
            "notes": list(self.notes),
        }


def compare(first: PathLike, second: PathLike, progress: Progress | None = None) -> Comparison:
    """Compare two outputs of `hsa.merge`, A and B, in bounded memory.

    `progress` is called now and then with bytes done and bytes in all. Raises ProvenanceError where one is no output of
    hsa or its provenance is damaged, SourceError and its subclasses where its weights are malformed, MachineError.
    """
    folders = (Path(first).expanduser(), Path(second).expanduser())
    a, b = (provenance.load(folder) for folder in folders)
    tally, notes = Tally(), list[str]()
    total = sum(_size(folder / name) for folder, each in zip(folders, (a, b), strict=True) for name in _files(each, folder))
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, 2 * total)  # each byte is read twice: as a file, and as a tensor

    files = _compare_files(folders, a, b, tally, step)
    heads = _compare_heads(a, b)
    held = [any((folder / name).is_file() for name in (WEIGHTS, INDEX)) for folder in folders]
    weights = None
    if all(held):
        weights = _compare_weights(folders, {target.projection.name for target in a.record.targets}, tally, step)
    else:
        without = [str(folder) for folder, holds in zip(folders, held, strict=True) if not holds]
        notes.append(f"no distances: {' and '.join(without)} holds no weights ({WEIGHTS} or {INDEX})")
    theirs = [{target.projection.name: target.name for target in each.record.targets} for each in (a, b)]
    return Comparison(
        first=str(first),
        second=str(second),
        parameters=_unequal(a.record.parameters, b.record.parameters),
        program=_unequal(
            {**a.record.program, **a.record.libraries},
            {**b.record.program, **b.record.libraries},
        ),
        sources={role: _compare_source(a, b, role) for role in ROLES},
        heads=heads,
        only_first=tuple(name for bare, name in theirs[0].items() if bare not in theirs[1]),
        only_second=tuple(name for bare, name in theirs[1].items() if bare not in theirs[0]),
        files=files,
        weights=weights,
        bytes_read=tally.read,
        notes=tuple(notes),
    )


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _compare_source(a: Provenance, b: Provenance, role: Role) -> dict[str, Any]:
    one, other = a.record.sources[role], b.record.sources[role]
    return {
        "a": {"id": one.identity.id, "revision": one.identity.revision},
        "b": {"id": other.identity.id, "revision": other.identity.revision},
        "same_targets": one.targets == other.targets,
        "same_headers": dict(one.files) == dict(other.files),
    }


def _compare_heads(a: Provenance, b: Provenance) -> dict[str, HeadsDiff]:
    other = {target.projection.name: target for target in b.record.targets}
    return {
        one.name: HeadsDiff(one.name, one.selected, other[bare].selected, _score_difference(one, other[bare]))
        for one in a.record.targets
        if (bare := one.projection.name) in other
    }


def _score_difference(one: TargetRecord, other: TargetRecord) -> float | None:
    """The largest relative difference of two heads' scores; None where the numbers of heads differ."""
    if one.heads != other.heads:
        return None
    pairs = zip(one.scores, other.scores, strict=True)
    return max((abs(x - y) / max(x, y) for x, y in pairs if x != y), default=0.0)


# --- files ------------------------------------------------------------------------------------------------------------


def _files(each: Provenance, folder: Path) -> Iterator[str]:
    """What a provenance lists, and itself. The names are a file's: none may lead out of the directory."""
    for name in each.files:
        if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
            raise ProvenanceError(f"{folder / PROVENANCE} lists the file {name!r}; expected plain names of one directory")
        yield name
    yield PROVENANCE


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _compare_files(
    folders: tuple[Path, Path], a: Provenance, b: Provenance, tally: Tally, step: Callable[[int], None]
) -> dict[str, str]:
    names = sorted({*_files(a, folders[0]), *_files(b, folders[1])})
    return {name: _compare_file(folders[0] / name, folders[1] / name, tally, step) for name in names}


def _compare_file(first: Path, second: Path, tally: Tally, step: Callable[[int], None]) -> str:
    there = (first.is_file(), second.is_file())
    if there != (True, True):
        return {(True, False): "only a", (False, True): "only b"}.get(there, "missing")
    with ExitStack() as stack:
        files = []
        for path, label in ((first, "a"), (second, "b")):
            file = Source(path, label, tally)
            stack.callback(file.close)
            files.append(file)
        if files[0].size != files[1].size:
            return "different"
        buffers = [memoryview(bytearray(STEP)) for _ in files]
        for offset in range(0, files[0].size, STEP):
            count = min(STEP, files[0].size - offset)
            for file, buffer in zip(files, buffers, strict=True):
                file.read_into(buffer[:count], offset)
            step(2 * count)
            if buffers[0][:count] != buffers[1][:count]:
                return "different"
    return "same"


# --- weights ----------------------------------------------------------------------------------------------------------


def _compare_weights(
    folders: tuple[Path, Path], targets: set[str], tally: Tally, step: Callable[[int], None]
) -> Weights:
    with ExitStack() as stack:
        # a role is but a label in messages and tallies here
        a, b = (
            stack.enter_context(open_checkpoint(cast(Role, label), folder, tally))
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
            of_stack, kind = whisper.group_of(name)
            for table, key in ((stacks, of_stack), (kinds, f"{of_stack} {kind}")):
                table[key] = table[key].plus(distance) if key in table else distance
            split[name in targets] = split[name in targets].plus(distance)
        a.check_unchanged()
        b.check_unchanged()
        return Weights(
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
    """The distance of one tensor; None where it has none and the bytes differ."""
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
        return Distance(0.0, 0.0, 1, 1)  # NaN and Inf have no norm, yet equal bytes are no distance apart
    if not all(map(math.isfinite, (*whole, *change))):
        return None
    return Distance(math.fsum(change), math.fsum(whole), int(equal), 1)


def _float64(code: str, raw: Array) -> Array:
    values = raw.view(STORAGE[code])
    wide: Array = widen(code, values, np.empty(raw.size // size(code), np.float32)).astype(np.float64)
    return wide
