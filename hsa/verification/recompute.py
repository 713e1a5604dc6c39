"""Recompute a merge from its sources and compare every byte with the output, instead of writing it.

The parameters come from the output's provenance. The plan and the pipeline are those of a merge, so memory is bounded
in the same way.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from hsa.actions.merge import collect_small_files
from hsa.actions.request import Request
from hsa.backends.choose import resolve
from hsa.engine.compute import Calculator
from hsa.engine.consumers import CACHED_PIECE
from hsa.engine.pipeline import Options, assemble
from hsa.errors import HsaError, SourceChanged, SourceError
from hsa.outputs.metadata_files import CARD, metadata_files
from hsa.outputs.provenance import Provenance, changed_keys
from hsa.outputs.provenance import loads as parse_provenance
from hsa.outputs.record import Record
from hsa.outputs.record_checks import settings_of_record
from hsa.outputs.recording import make_record, target_digest
from hsa.planning.file_layout import Bytes, Computed, OutputFile, Segment
from hsa.planning.plan import make_plan
from hsa.sources.checkpoint import INDEX, read_whole, resolve_inside
from hsa.sources.source_set import Sources
from hsa.system.dtypes import size
from hsa.system.fsio import SourceFile, Tally
from hsa.system.manifest import PROVENANCE
from hsa.system.ranges import Range
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.decisions import Answers, other_decisions, recorded_decisions
from hsa.verification.distances import TensorDistances
from hsa.verification.output_checks import head_text
from hsa.verification.problems import Problems
from hsa.verification.source_checks import (
    MAX_NAMED,
    check_targets,
    comparison_notes,
    open_recorded,
    other_roles,
    other_versions,
)


@dataclass
class _ByteDifference:
    """The bytes of one output tensor that differ from the recomputed ones: their count, and the first of them."""

    segment: Segment
    count: int
    offset: int
    written: int
    expected: int


class ByteComparer:
    """Receives the pieces of a merge in place of a writer, and compares each with the file.

    Each thread holds one piece in memory. Tensors that are computed whole may differ from the recomputed ones by
    `tolerance`, relative to their norms (`Method.tolerance`). `near` holds the distances of the tensors that differ
    within it, by file name and tensor name.
    """

    def __init__(self, directory: Path, tally: Tally, problems: Problems, tolerance: float = 0.0) -> None:
        self._directory, self._tally, self._problems = directory, tally, problems
        self._tolerance, self._distances = tolerance, TensorDistances()
        self.near: dict[str, dict[str, float]] = {}
        self._files: list[OutputFile] = []
        self._sources: list[SourceFile | None] = []
        self._starts: list[list[int]] = []
        self._lock = threading.Lock()
        self._local = threading.local()
        self._differences: list[dict[str, _ByteDifference]] = []
        self._unfit = False

    def begin(self, files: Sequence[OutputFile]) -> int:
        for file in files:
            self._files.append(file)
            self._starts.append([segment.offset for segment in file.segments])
            self._differences.append({})
            self._sources.append(self._open(file))
        return CACHED_PIECE

    def has_copies(self, number: int) -> bool:
        return False

    def store(self, number: int, start: int, view: memoryview, changed: Sequence[Range]) -> None:
        source = self._sources[number]
        count = 0 if source is None else min(len(view), source.size - start)
        if source is None or count <= 0:
            return
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty(CACHED_PIECE, dtype=np.uint8)
        written = self._local.buffer[:count]
        source.read_into(written.data, start)
        expected = np.frombuffer(view[:count], dtype=np.uint8)
        differs = written != expected
        if not differs.any() and not self._tolerance:
            return
        segments, starts = self._files[number].segments, self._starts[number]
        for segment in segments[bisect_right(starts, start) - 1 : bisect_left(starts, start + count)]:
            low, high = max(0, segment.offset - start), min(count, segment.stop - start)
            if self._is_approximate(segment):
                part = slice(low, high)
                self._distances.add(segment, start + low - segment.offset, written[part], expected[part])
            count_in_segment = int(np.count_nonzero(differs[low:high]))
            if count_in_segment:
                at = low + int(differs[low:high].argmax())
                self._add(number, _ByteDifference(segment, count_in_segment, start + at, int(written[at]), view[at]))

    def finish(self) -> None:
        for source in self._sources:
            if source is not None:
                source.check_unchanged()

    def close(self) -> None:
        sources, self._sources = self._sources, []
        for source in sources:
            if source is not None:
                source.close()

    def report(self, *, other_sources: bool) -> bool:
        """Add a problem for each tensor that differs beyond the tolerance, or one per file if the sources are not the
        recorded ones.

        Return whether every file exists with the expected size and no tensor differs beyond the tolerance.
        """
        differing = False
        for file, differences in zip(self._files, self._differences, strict=True):
            ordered = sorted(self._far(file, differences.values()), key=lambda d: d.offset)
            differing = differing or bool(ordered)
            named = 0 if other_sources else MAX_NAMED
            for difference in ordered[:named]:
                self._problems.add(file.name, self._describe(difference))
            if len(ordered) > named:
                more = "" if other_sources else "more "
                self._problems.add(
                    file.name,
                    f"{len(ordered) - named} {more}tensors are not what the sources give, such as "
                    f"{_name(ordered[named].segment)}",
                )
        return not self._unfit and not differing

    def _is_approximate(self, segment: Segment) -> bool:
        content = segment.content
        return self._tolerance > 0.0 and isinstance(content, Computed) and content.task.layout == "whole"

    def _far(self, file: OutputFile, differences: Iterable[_ByteDifference]) -> Iterator[_ByteDifference]:
        """The differences beyond the tolerance; the others are recorded in `near`."""
        for difference in differences:
            if self._is_approximate(difference.segment):
                distance = self._distances.distance(difference.segment)
                if distance <= self._tolerance:
                    self.near.setdefault(file.name, {})[_name(difference.segment)] = distance
                    continue
            yield difference

    def _describe(self, difference: _ByteDifference) -> str:
        text = _describe(difference)
        if not self._is_approximate(difference.segment):
            return text
        distance = self._distances.distance(difference.segment)
        return f"{text}; it lies {distance:.2g} of its norm away, and at most {self._tolerance:g} is rounding"

    def _open(self, file: OutputFile) -> SourceFile | None:
        try:
            source = SourceFile(resolve_inside("output", self._directory, file.name), "output", self._tally)
        except SourceError as error:
            self._problems.add(file.name, f"cannot be compared: {error}")
            self._unfit = True
            return None
        if source.size != file.size:
            self._unfit = True
            self._problems.add(file.name, f"has {source.size} bytes, the sources give {file.size}")
        return source

    def _add(self, number: int, difference: _ByteDifference) -> None:
        name = _name(difference.segment)
        with self._lock:
            earlier = self._differences[number].setdefault(name, difference)
            if earlier is not difference:
                earlier.count += difference.count
                if difference.offset < earlier.offset:
                    earlier.segment, earlier.offset = difference.segment, difference.offset
                    earlier.written, earlier.expected = difference.written, difference.expected


def _name(segment: Segment) -> str:
    content = segment.content
    if isinstance(content, Bytes):
        return "the header"
    if isinstance(content, Computed):
        return f"{'target ' if content.task.passes else ''}tensor {content.task.stored.name}"
    return f"tensor {content.tensor.name}"


def _describe(difference: _ByteDifference) -> str:
    content, head = difference.segment.content, ""
    if isinstance(content, Computed) and content.task.layout == "heads" and content.task.place is not None:
        task, place = content.task, content.task.place
        element = (difference.offset - difference.segment.offset) // size(task.out_code)
        head = head_text(place, task.shape, task.partition.groups, element)
    bytes_are = f"{difference.count} bytes are" if difference.count > 1 else "1 byte is"
    return (
        f"{_name(difference.segment)}{head}: {bytes_are} not what the sources give, first at byte {difference.offset}: "
        f"found 0x{difference.written:02x}, recomputed 0x{difference.expected:02x}"
    )


def recompute(
    directory: Path, provenance: Provenance, source_paths: SourcePaths, context: VerifyContext
) -> Answers | None:
    """Merge the sources again and compare bytes and decisions.

    Bytes are compared with those that follow from the recorded decisions, and decisions with those that follow from
    the sources. Return None if that could not be done.

    Raises SourceError if a source cannot be opened, MachineError, SourceChanged.
    """
    record = provenance.record
    unlike_roles = other_roles(record, source_paths)
    if unlike_roles is not None:
        context.problems.add(PROVENANCE, unlike_roles)
        return None
    try:
        request = _request(directory, provenance, source_paths)
    except (HsaError, KeyError, TypeError, ValueError) as error:
        context.problems.add(PROVENANCE, f"its parameters cannot be merged with: {error}")
        return None
    with ExitStack() as stack:
        sources = open_recorded(request, record, source_paths, context, stack)
        if sources is None:
            return None
        try:
            answers = _compare(directory, provenance, request, sources, context)
        except SourceChanged:
            raise
        except SourceError as error:
            context.problems.add("sources", f"cannot be merged again: {error}")
            return None
    context.notes.extend(comparison_notes(record))
    return answers


def _request(directory: Path, provenance: Provenance, source_paths: SourcePaths) -> Request:
    """The request of the merge, rebuilt from its provenance."""
    parameters = provenance.record.parameters
    return Request(
        sources=source_paths.by_role,
        output=directory,
        settings=cast(Any, settings_of_record(provenance.record)),
        assets_from=parameters["assets_from"],
        max_shard_size=parameters["max_shard_size"],
        ids=source_paths.ids,
        card=dict(parameters["card"]),
        config_from=parameters.get("config_from"),
        digest=any(provenance.files.values()),
        sync=False,
    )


def _compare(
    directory: Path, provenance: Provenance, request: Request, sources: Sources, context: VerifyContext
) -> Answers:
    plan = make_plan(request.settings, sources, request.shard_bytes)
    assets = collect_small_files(request, sources, plan, context.tally)
    comparer = ByteComparer(directory, context.tally, context.problems, plan.method.tolerance)
    total, progress = plan.bytes_to_write, context.progress
    step = None if progress is None else lambda done: progress(done, total)
    recorded = recorded_decisions(provenance.record.targets, plan.targets)
    applied = recorded if plan.method.records_decisions else None
    backend = resolve("auto", "auto", request.settings, request.models)
    calculator = Calculator(sources, backend, request.settings, applied)
    options = Options(context.threads, digest=request.digest, sync=False)
    try:
        digests = assemble(plan.files, sources.by_role, calculator, comparer, options, context.memory, step)
    except SourceError:  # a file that is being written looks damaged: report the change instead
        sources.check_unchanged()
        raise
    sources.check_unchanged()
    outcomes = calculator.ordered(plan.targets)
    target_digests = {role: target_digest(role, outcomes) for role in sources.roles}
    same_sources = check_targets(provenance.record, target_digests, context.problems)
    bytes_follow = comparer.report(other_sources=not same_sources)
    unlike = list(other_decisions(plan.method, recorded, outcomes))
    for what in unlike[:MAX_NAMED] if same_sources else unlike[:1]:
        context.problems.add(PROVENANCE, what)
    record = _as_recorded(
        make_record(plan, sources, outcomes, request.output_settings(provenance.record.parameters["backend"])),
        provenance.record,
        recorded,
    )
    files = dict(assets.files) if plan.index is None else {**assets.files, INDEX: plan.index}
    context.notes.extend(_near_notes(comparer.near, plan.method.tolerance))
    weights = {
        file.name: provenance.files.get(file.name) if file.name in comparer.near else digests.get(file.name)
        for file in plan.files
    }
    for name, data in metadata_files(record, files, weights, digest=request.digest):
        if name == PROVENANCE:
            _compare_provenance(provenance, data, directory, context)
        else:
            _compare_small(directory, name, data, context, _version_hint(provenance.record) if name == CARD else "")
    same_targets = len(recorded) == len(plan.targets) == len(provenance.record.targets)
    return Answers(bytes_follow, same_targets and not unlike)


def _near_notes(near: Mapping[str, Mapping[str, float]], tolerance: float) -> Iterator[str]:
    """Notes on tensors that differ only by rounding."""
    distances = {name: distance for of_file in near.values() for name, distance in of_file.items()}
    if distances:
        farthest = max(distances, key=lambda name: distances[name])
        yield (
            f"{len(distances)} tensors have other bytes than are computed here, and lie no further away than another "
            f"library or processor rounds: at most {distances[farthest]:.2g} of their norms ({farthest}), where "
            f"{tolerance:g} is allowed"
        )


def _as_recorded(record: Record, written: Record, recorded: Mapping[str, Any]) -> Record:
    """The recomputed record, with some fields replaced by those of the written record.

    These are the fields that do not affect the bytes: the program and libraries that wrote it, and its format. The
    decisions are replaced too, because they were compared already.
    """
    targets = tuple(
        replace(target, decision=recorded.get(target.canonical, target.decision)) for target in record.targets
    )
    return replace(
        record,
        program=written.program,
        libraries=written.libraries,
        version=written.version,
        format=written.format,
        targets=targets,
    )


def _version_hint(record: Record) -> str:
    """A hint that the card of another version may differ, and what to do; empty for the same version."""
    versions = other_versions(record)
    if versions is None:
        return ""
    return f"; the record names {versions}, which may word it differently: read it, or verify with that version"


def _compare_small(directory: Path, name: str, data: bytes, context: VerifyContext, hint: str = "") -> None:
    try:
        written = read_whole("output", directory, name, context.tally)
    except SourceError as error:
        context.problems.add(name, f"cannot be compared: {error}")
        return
    where = first_difference(written, data)
    if where is not None:
        context.problems.add(name, f"is not what the sources give: {where}{hint}")


def first_difference(written: bytes, expected: bytes) -> str | None:
    """The first difference between a small file and its expected bytes; None if there is none."""
    if written == expected:
        return None
    pairs = enumerate(zip(written, expected, strict=False))
    first = next((first for first, (a, b) in pairs if a != b), min(len(written), len(expected)))
    return f"{len(written)} bytes, expected {len(expected)}; they differ first at byte {first}"


def _compare_provenance(provenance: Provenance, data: bytes, directory: Path, context: VerifyContext) -> None:
    """Compare the provenance by content, so that problems name the keys that differ."""
    expected = parse_provenance(data, "the provenance made again")
    before, after = provenance.record.as_dict(), expected.record.as_dict()
    unlike_keys = changed_keys(before, after)
    for key in unlike_keys:
        inner = changed_keys(before[key], after[key]) if isinstance(before[key], dict) else []
        what = ", ".join(inner[:MAX_NAMED]) or "in their order"
        context.problems.add(PROVENANCE, f"{key} are not what the sources give: {what}")
    unlike_files = changed_keys(provenance.files, expected.files)
    if unlike_files:
        context.problems.add(PROVENANCE, f"files are not what the sources give: {', '.join(unlike_files[:MAX_NAMED])}")
    if not unlike_keys and not unlike_files:
        _compare_small(directory, PROVENANCE, data, context)
