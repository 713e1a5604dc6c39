"""A merge computed again from its sources, and compared with an output byte for byte instead of written.

The parameters come from the output's provenance; plan and pipeline are those of a merge, so that memory stays bounded
the same way.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hsa.actions.merge import collect_small_files
from hsa.actions.request import Request
from hsa.backends.choose import resolve
from hsa.engine.compute import Calculator
from hsa.engine.consumers import CACHED_PIECE
from hsa.engine.pipeline import Options, assemble
from hsa.errors import HsaError, SourceChanged, SourceError
from hsa.outputs import provenance, recording
from hsa.outputs.metadata_files import CARD, metadata_files
from hsa.outputs.provenance import Provenance, Record, changed_keys
from hsa.outputs.record_checks import recorded_config
from hsa.planning.file_layout import Bytes, Merge, OutputFile, Segment
from hsa.planning.plan import make_plan
from hsa.sources.checkpoint import INDEX, read_whole, resolve_inside
from hsa.sources.roles import ROLES
from hsa.sources.source_set import Sources
from hsa.system.dtypes import size
from hsa.system.fsio import SourceFile, Tally
from hsa.system.manifest import PROVENANCE
from hsa.system.ranges import Range
from hsa.verification.output_checks import head_text
from hsa.verification.problems import Problems
from hsa.verification.source_checks import (
    NAMED,
    GivenSources,
    Work,
    cautions,
    check_targets,
    open_recorded,
    other_versions,
)


@dataclass
class _Difference:
    """Where a tensor of the output is not what the sources give: how often, and the first place."""

    segment: Segment
    count: int
    offset: int
    found: int
    expected: int


class Comparison:
    """A sink that compares each piece with a file of the output; thread by thread, one piece in memory for each."""

    def __init__(self, directory: Path, tally: Tally, problems: Problems) -> None:
        self._directory, self._tally, self._problems = directory, tally, problems
        self._files: list[OutputFile] = []
        self._sources: list[SourceFile | None] = []
        self._starts: list[list[int]] = []
        self._lock = threading.Lock()
        self._own = threading.local()
        self._differences: list[dict[str, _Difference]] = []

    def begin(self, files: Sequence[OutputFile]) -> int:
        for file in files:
            self._files.append(file)
            self._starts.append([segment.offset for segment in file.segments])
            self._differences.append({})
            self._sources.append(self._open(file))
        return CACHED_PIECE

    def holds_copies(self, number: int) -> bool:
        return False

    def store(self, number: int, start: int, view: memoryview, changed: Sequence[Range]) -> None:
        source = self._sources[number]
        count = 0 if source is None else min(len(view), source.size - start)
        if source is None or count <= 0:
            return
        if not hasattr(self._own, "buffer"):
            self._own.buffer = np.empty(CACHED_PIECE, dtype=np.uint8)
        found = self._own.buffer[:count]
        source.read_into(found.data, start)
        wrong = found != np.frombuffer(view[:count], dtype=np.uint8)
        if not wrong.any():
            return
        segments, starts = self._files[number].segments, self._starts[number]
        for segment in segments[bisect_right(starts, start) - 1 : bisect_left(starts, start + count)]:
            low, high = max(0, segment.offset - start), min(count, segment.stop - start)
            many = int(np.count_nonzero(wrong[low:high]))
            if many:
                at = low + int(wrong[low:high].argmax())
                self._note(number, _Difference(segment, many, start + at, int(found[at]), view[at]))

    def finish(self) -> None:
        for source in self._sources:
            if source is not None:
                source.check_unchanged()

    def close(self) -> None:
        sources, self._sources = self._sources, []
        for source in sources:
            if source is not None:
                source.close()

    def report(self, *, others: bool) -> None:
        """Name what differs. With `others` the sources are not the recorded ones, and one line a file must do."""
        for file, differences in zip(self._files, self._differences, strict=True):
            ordered = sorted(differences.values(), key=lambda d: d.offset)
            named = 0 if others else NAMED
            for difference in ordered[:named]:
                self._problems.add(file.name, _describe(difference))
            if len(ordered) > named:
                more = "" if others else "more "
                self._problems.add(
                    file.name,
                    f"{len(ordered) - named} {more}tensors are not what the sources give, such as "
                    f"{_name(ordered[named].segment)}",
                )

    def _open(self, file: OutputFile) -> SourceFile | None:
        try:
            source = SourceFile(resolve_inside("output", self._directory, file.name), "output", self._tally)
        except SourceError as error:
            self._problems.add(file.name, f"cannot be compared: {error}")
            return None
        if source.size != file.size:
            self._problems.add(file.name, f"has {source.size} bytes, the sources give {file.size}")
        return source

    def _note(self, number: int, found: _Difference) -> None:
        name = _name(found.segment)
        with self._lock:
            known = self._differences[number].setdefault(name, found)
            if known is not found:
                known.count += found.count
                if found.offset < known.offset:
                    known.segment, known.offset = found.segment, found.offset
                    known.found, known.expected = found.found, found.expected


def _name(segment: Segment) -> str:
    content = segment.content
    if isinstance(content, Bytes):
        return "the header"
    if isinstance(content, Merge):
        return f"target tensor {content.target.primary.name}"
    return f"tensor {content.tensor.name if hasattr(content, 'tensor') else content.primary.name}"


def _describe(difference: _Difference) -> str:
    content, head = difference.segment.content, ""
    if isinstance(content, Merge):
        target = content.target
        element = (difference.offset - difference.segment.offset) // size(target.out_code)
        head = head_text(target.projection, target.shape, target.heads, element)
    many = f"{difference.count} bytes are" if difference.count > 1 else "1 byte is"
    return (
        f"{_name(difference.segment)}{head}: {many} not what the sources give, first at byte {difference.offset}: "
        f"found 0x{difference.found:02x}, recomputed 0x{difference.expected:02x}"
    )


def recompute(directory: Path, found: Provenance, given: GivenSources, work: Work) -> bool:
    """Merge the sources again by the provenance's parameters and compare every byte; returns whether that was done.

    Raises SourceError where a source cannot be opened, MachineError, SourceChanged.
    """
    record = found.record
    try:
        request = _request(directory, found, given)
    except (HsaError, KeyError, TypeError, ValueError) as error:
        work.problems.add(PROVENANCE, f"its parameters cannot be merged with: {error}")
        return False
    with ExitStack() as stack:
        sources = open_recorded(request, record, given, work, stack)
        if sources is None:
            return False
        try:
            _compare(directory, found, request, sources, work)
        except SourceChanged:
            raise
        except SourceError as error:
            work.problems.add("sources", f"cannot be merged again: {error}")
            return False
    work.notes.extend(cautions(record))
    return True


def _request(directory: Path, found: Provenance, given: GivenSources) -> Request:
    """What the merge was told, by its provenance."""
    parameters = found.record.parameters
    return Request(
        sources=given.paths,
        output=directory,
        config=recorded_config(found.record),
        assets_from=parameters["assets_from"],
        max_shard_size=parameters["max_shard_size"],
        ids=given.ids,
        card=dict(parameters["card"]),
        digest=any(found.files.values()),
        sync=False,
    )


def _compare(directory: Path, found: Provenance, request: Request, sources: Sources, work: Work) -> None:
    plan = make_plan(request.config, sources, request.shard_bytes)
    small = collect_small_files(request, sources, plan, work.tally)
    comparison = Comparison(directory, work.tally, work.problems)
    total, progress = plan.bytes_to_write, work.progress
    step = None if progress is None else lambda done: progress(done, total)
    calculator = Calculator(sources, resolve("auto", "auto", request.config), request.config.numerics)
    options = Options(work.threads, digest=request.digest, sync=False)
    try:
        digests = assemble(plan.files, sources.by_role, calculator, comparison, options, work.memory, step)
    except SourceError:  # a file that is being written looks damaged: say what happened, not what it looks like
        sources.check_unchanged()
        raise
    sources.check_unchanged()
    outcomes = calculator.ordered(plan.targets)
    digests_of_targets = {role: recording.target_digest(role, outcomes) for role in ROLES}
    comparison.report(others=not check_targets(found.record, digests_of_targets, work.problems))
    made = recording.make_record(plan, sources, outcomes, request.settings(found.record.parameters["backend"]))
    made = replace(made, program=found.record.program, libraries=found.record.libraries)
    files = dict(small.files) if plan.index is None else {**small.files, INDEX: plan.index}
    weights = {file.name: digests.get(file.name) for file in plan.files}
    for name, data in metadata_files(made, files, weights, digest=request.digest):
        if name == PROVENANCE:
            _compare_provenance(found, data, directory, work)
        else:
            _compare_small(directory, name, data, work, _wording(found.record) if name == CARD else "")


def _wording(record: Record) -> str:
    """Why the card of another version may differ, and what to do."""
    versions = other_versions(record)
    if versions is None:
        return ""
    return f"; the record names {versions}, which may word it differently: read it, or verify with that version"


def _compare_small(directory: Path, name: str, data: bytes, work: Work, more: str = "") -> None:
    try:
        written = read_whole("output", directory, name, work.tally)
    except SourceError as error:
        work.problems.add(name, f"cannot be compared: {error}")
        return
    where = first_difference(written, data)
    if where is not None:
        work.problems.add(name, f"is not what the sources give: {where}{more}")


def first_difference(found: bytes, expected: bytes) -> str | None:
    """Where a small file differs from what it should be; None where it does not."""
    if found == expected:
        return None
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(len(found), len(expected)))
    return f"{len(found)} bytes, expected {len(expected)}; they differ first at byte {at}"


def _compare_provenance(found: Provenance, data: bytes, directory: Path, work: Work) -> None:
    """By content, so that what differs is named."""
    made = provenance.loads(data, "the provenance made again")
    before, after = found.record.as_dict(), made.record.as_dict()
    wrong = changed_keys(before, after)
    for key in wrong:
        inner = changed_keys(before[key], after[key]) if isinstance(before[key], dict) else []
        what = ", ".join(inner[:NAMED]) or "in their order"
        work.problems.add(PROVENANCE, f"{key} are not what the sources give: {what}")
    unlike = changed_keys(found.files, made.files)
    if unlike:
        work.problems.add(PROVENANCE, f"files are not what the sources give: {', '.join(unlike[:NAMED])}")
    if not wrong and not unlike:
        _compare_small(directory, PROVENANCE, data, work)
