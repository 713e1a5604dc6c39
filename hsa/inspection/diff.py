"""`hsa inspect --diff A B`: the differences between two outputs in provenance, files and weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa._version import __version__
from hsa.architectures.base import TensorPlace
from hsa.errors import ProvenanceError, shown
from hsa.inspection.distance import WeightDistances, compare_weights
from hsa.inspection.report import FORMAT, jaccard
from hsa.methods.tensors import TensorRecord
from hsa.outputs import provenance
from hsa.outputs.provenance import Provenance
from hsa.outputs.source_record import SourceRecord
from hsa.sources.checkpoint import INDEX, WEIGHTS
from hsa.sources.roles import Role
from hsa.system.fsio import SourceFile, Tally
from hsa.system.manifest import PROVENANCE

STEP = 1 << 20
"""The number of bytes of each file that are compared at a time."""

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeadsDiff:
    """A tensor that both outputs merged: the selected heads of each, and the largest relative difference of scores."""

    name: str
    place: TensorPlace
    heads: int
    first: tuple[int, ...]
    second: tuple[int, ...]
    score_difference: float | None

    @property
    def same(self) -> bool:
        return self.first == self.second

    @property
    def jaccard(self) -> float | None:
        """Intersection over union of the selected heads; None if neither output selects a head."""
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
class Comparison:
    """The comparison of two outputs, A and B.

    `parameters` and `program` hold the values that differ, as pairs. `sources` holds for each role the two ids, and
    whether both outputs were made from the same target bytes; an id is None if its output has no source of that role.
    `heads` is None unless both outputs were made by a method that selects heads. `files` maps each file that either
    provenance lists to one of same, different, only a, only b, missing, by the bytes on disk. `weights` is None if one
    of the outputs has no weights.
    """

    first: str
    second: str
    parameters: Mapping[str, tuple[Any, Any]]
    program: Mapping[str, tuple[Any, Any]]
    sources: Mapping[Role, Mapping[str, Any]]
    heads: Mapping[str, HeadsDiff] | None
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    files: Mapping[str, str]
    weights: WeightDistances | None
    bytes_read: int
    notes: tuple[str, ...]

    @property
    def _heads(self) -> Sequence[HeadsDiff]:
        return [] if self.heads is None else list(self.heads.values())

    @property
    def agreeing_tensors(self) -> int:
        """The number of tensors with the same selected heads in both."""
        return sum(each.same for each in self._heads)

    @property
    def jaccard(self) -> float | None:
        """Intersection over union of the selected heads, over the tensors that both merged; None if there are none."""
        both = sum(len(set(each.first) & set(each.second)) for each in self._heads)
        either = sum(len(set(each.first) | set(each.second)) for each in self._heads)
        return both / either if either else None

    @property
    def identical(self) -> bool:
        """Whether every file, including the provenance, has the same bytes in both."""
        return set(self.files.values()) == {"same"}

    def as_dict(self) -> dict[str, Any]:
        """The comparison as `hsa inspect --diff --json` prints it."""
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
            "common_tensors": len(self._heads),
            "jaccard": self.jaccard,
            "tensors": {each.name: each.as_dict() for each in self._heads},
            "only_a": list(self.only_first),
            "only_b": list(self.only_second),
            "files": dict(self.files),
            "weights": None if self.weights is None else self.weights.as_dict(),
            "bytes_read": self.bytes_read,
            "notes": list(self.notes),
        }


def compare(first: PathLike, second: PathLike, progress: Progress | None = None) -> Comparison:
    """Compare two outputs of `hsa.merge`, A and B, in bounded memory.

    `progress` is called now and then with the bytes done and the total bytes. Raises ProvenanceError if one of them is
    no output of hsa or its provenance is damaged, SourceError and its subclasses if its weights are malformed,
    MachineError.
    """
    folders = (Path(first).expanduser(), Path(second).expanduser())
    a, b = (provenance.load(folder) for folder in folders)
    tally, notes = Tally(), list[str]()
    total = sum(
        _size(folder / name) for folder, output in zip(folders, (a, b), strict=True) for name in _files(output, folder)
    )
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, 2 * total)  # each byte is read twice: as a file, and as a tensor

    files = _compare_files(folders, a, b, tally, step)
    without_heads = [output.record.method.name for output in (a, b) if not output.record.method.selects_heads]
    if without_heads:
        notes.append(
            f"no heads are compared, for method {' and method '.join(dict.fromkeys(without_heads))} selects none"
        )
    has_weights = [any((folder / name).is_file() for name in (WEIGHTS, INDEX)) for folder in folders]
    weights = None
    if all(has_weights):
        weights = compare_weights(folders, {target.canonical for target in a.record.targets}, tally, step)
    else:
        without = [str(folder) for folder, has in zip(folders, has_weights, strict=True) if not has]
        notes.append(f"no distances: {' and '.join(without)} holds no weights ({WEIGHTS} or {INDEX})")
    names_by_output = [{target.canonical: target.name for target in output.record.targets} for output in (a, b)]
    return Comparison(
        first=str(first),
        second=str(second),
        parameters=_unequal(_parameters(a, b), _parameters(b, a)),
        program=_unequal(
            {**a.record.program, **a.record.libraries},
            {**b.record.program, **b.record.libraries},
        ),
        sources={role: _compare_source(a, b, role) for role in dict.fromkeys([*a.record.sources, *b.record.sources])},
        heads=None if without_heads else _compare_heads(a, b),
        only_first=tuple(name for bare, name in names_by_output[0].items() if bare not in names_by_output[1]),
        only_second=tuple(name for bare, name in names_by_output[1].items() if bare not in names_by_output[0]),
        files=files,
        weights=weights,
        bytes_read=tally.read,
        notes=tuple(notes),
    )


def _parameters(one: Provenance, other: Provenance) -> dict[str, Any]:
    """The parameters of an output, with its method unless both methods select heads."""
    told = one.record.method.selects_heads and other.record.method.selects_heads
    return {**({} if told else {"method": one.record.method.name}), **one.record.parameters}


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _compare_source(a: Provenance, b: Provenance, role: Role) -> dict[str, Any]:
    one, other = a.record.sources.get(role), b.record.sources.get(role)
    return {
        "a": _identity(one),
        "b": _identity(other),
        "same_targets": bool(one and other and one.targets == other.targets),
        "same_headers": bool(one and other and dict(one.files) == dict(other.files)),
    }


def _identity(source: SourceRecord | None) -> dict[str, Any] | None:
    return None if source is None else {"id": source.identity.id, "revision": source.identity.revision}


def _compare_heads(a: Provenance, b: Provenance) -> dict[str, HeadsDiff]:
    other = {target.canonical: target for target in b.record.targets}
    return {
        one.name: HeadsDiff(
            one.name,
            one.projection,
            max(one.heads, other[bare].heads),
            one.selected,
            other[bare].selected,
            _score_difference(one, other[bare]),
        )
        for one in a.record.targets
        if (bare := one.canonical) in other
    }


def _score_difference(one: TensorRecord, other: TensorRecord) -> float | None:
    """The largest relative difference between two scores of the same head; None if the numbers of heads differ."""
    if one.heads != other.heads:
        return None
    pairs = zip(one.scores, other.scores, strict=True)
    return max((abs(x - y) / max(x, y) for x, y in pairs if x != y), default=0.0)


# --- files ------------------------------------------------------------------------------------------------------------


def _files(provenance: Provenance, folder: Path) -> Iterator[str]:
    """The files that a provenance lists, and the provenance itself. Names that would lead out of the directory are
    refused, because they come from a file."""
    for name in provenance.files:
        if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
            raise ProvenanceError(
                f"{folder / PROVENANCE} lists the file {shown(name)}; expected plain names of one directory"
            )
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
    exist = (first.is_file(), second.is_file())
    if exist != (True, True):
        return {(True, False): "only a", (False, True): "only b"}.get(exist, "missing")
    with ExitStack() as stack:
        files = []
        for path, label in ((first, "a"), (second, "b")):
            file = SourceFile(path, label, tally)
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
