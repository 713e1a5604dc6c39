"""A merge computed again from its sources, and compared with an output byte for byte instead of written.

The parameters come from the output's provenance; plan and pipeline are those of a merge, so that memory stays bounded
the same way.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hsa import api, provenance
from hsa.backends import resolve
from hsa.checkpoint import INDEX, ROLES, Checkpoint, Role, Sources, contained, read_text
from hsa.checks import Problems, head_text, merge_config
from hsa.compute import Calculator, TargetOutcome
from hsa.dtypes import size
from hsa.errors import HsaError, SourceChanged, SourceError
from hsa.finish import CARD, last_files
from hsa.fsio import Source, Tally
from hsa.hub import Hub
from hsa.layout import Literal, Merge, OutputFile, Segment
from hsa.memory import PeakMemory
from hsa.pipeline import Options, assemble
from hsa.plan import make_plan
from hsa.provenance import PROGRAM, Provenance, SourceRecord, changed_keys
from hsa.provenance_file import PROVENANCE
from hsa.ranges import Range
from hsa.request import PathLike, Request, has_hub_ids, open_sources
from hsa.sink import CACHED_PIECE
from hsa.target import TIE_RISK

NAMED = 8
"""Tensors of a file that are named when they differ."""

Progress = Callable[[int, int], None]


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
        self._sources: list[Source | None] = []
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

    def _open(self, file: OutputFile) -> Source | None:
        try:
            source = Source(contained("output", self._directory, file.name), "output", self._tally)
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
    if isinstance(content, Literal):
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


def recompute(
    directory: Path,
    found: Provenance,
    paths: Mapping[Role, PathLike],
    threads: int,
    tally: Tally,
    memory: PeakMemory,
    problems: Problems,
    notes: list[str],
    progress: Progress | None = None,
) -> bool:
    """Merge the sources again by the provenance's parameters and compare every byte; returns whether that was done.

    `progress` is called with bytes done and bytes in all. Raises SourceError where a source cannot be opened,
    MachineError, SourceChanged.
    """
    record = found.record
    try:
        request = _request(directory, found, paths)
    except (HsaError, KeyError, TypeError, ValueError) as error:
        problems.add(PROVENANCE, f"its parameters cannot be merged with: {error}")
        return False
    hub = Hub(bars=progress is not None)
    with ExitStack() as stack:
        if has_hub_ids(request):  # headers first: other sources need not be fetched whole
            with ExitStack() as trial:
                sources = open_sources(request, Tally(), hub, trial, headers_only=True)
                if not _are_recorded(sources, record.sources, problems):
                    return False
        sources = open_sources(request, tally, hub, stack, headers_only=False)
        notes.extend(hub.notes)
        if not _are_recorded(sources, record.sources, problems):
            notes.append("nothing was recomputed, for the sources given are not the recorded ones")
            return False
        for source in sources:
            source.identity = record.sources[source.role].identity
        try:
            _compare(directory, found, request, sources, threads, tally, memory, problems, progress)
        except SourceChanged:
            raise
        except SourceError as error:
            problems.add("sources", f"cannot be merged again: {error}")
            return False
    notes.extend(_cautions(found))
    return True


def _request(directory: Path, found: Provenance, paths: Mapping[Role, PathLike]) -> Request:
    """What the merge was told, by its provenance."""
    parameters = found.record.parameters
    return Request(
        sources=paths,
        output=directory,
        config=merge_config(found.record),
        assets_from=parameters["assets_from"],
        max_shard_size=parameters["max_shard_size"],
        card=dict(parameters["card"]),
        digest=any(found.files.values()),
        sync=False,
    )


def _are_recorded(sources: Sources, recorded: Mapping[Role, SourceRecord], problems: Problems) -> bool:
    """Whether the sources have the recorded files, by size and header."""
    same = True
    for source in sources:
        for what in _unlike(source, recorded[source.role]):
            problems.add(source.role, f"is not the recorded source: {what}")
            same = False
    return same


def _unlike(source: Checkpoint, recorded: SourceRecord) -> Iterator[str]:
    own = provenance.source_record(source, "")
    if own.kind != recorded.kind:
        yield f"its weights are {own.kind}, {recorded.kind:.40} was recorded"
        return
    for name in changed_keys(own.files, recorded.files)[:NAMED]:
        here, there = own.files.get(name), recorded.files.get(name)
        if here is None or there is None:
            yield f"{name:.200} {'was not recorded' if there is None else 'was recorded and is not there'}"
        elif here.nbytes != there.nbytes:
            yield f"{name} has {here.nbytes} bytes, {there.nbytes} were recorded"
        else:
            yield f"the header of {name} has BLAKE3 {here.header}, {there.header} was recorded"


def _compare(
    directory: Path,
    found: Provenance,
    request: Request,
    sources: Sources,
    threads: int,
    tally: Tally,
    memory: PeakMemory,
    problems: Problems,
    progress: Progress | None,
) -> None:
    plan = make_plan(request.config, sources, request.shard_bytes)
    small = api.collect(request, sources, plan, tally)
    comparison = Comparison(directory, tally, problems)
    total = plan.bytes_to_write
    step = None if progress is None else lambda done: progress(done, total)
    calculator = Calculator(sources, resolve("auto", "auto", request.config), request.config.numerics)
    options = Options(threads, digest=request.digest, sync=False)
    try:
        digests = assemble(plan.files, sources.by_role, calculator, comparison, options, memory, step)
    except SourceError:  # a file that is being written looks damaged: say what happened, not what it looks like
        sources.check_unchanged()
        raise
    sources.check_unchanged()
    outcomes = calculator.ordered(plan.targets)
    comparison.report(others=_other_targets(found, outcomes, problems))
    made = provenance.record(plan, sources, outcomes, request.settings(found.record.parameters["backend"]))
    made = replace(made, program=found.record.program, libraries=found.record.libraries)
    files = dict(small.files) if plan.index is None else {**small.files, INDEX: plan.index}
    weights = {file.name: digests.get(file.name) for file in plan.files}
    for name, data in last_files(made, files, weights, digest=request.digest):
        if name == PROVENANCE:
            _compare_provenance(found, data, directory, tally, problems)
        elif not (name == CARD and _written_by_another(found)):
            _compare_small(directory, name, data, tally, problems)


def _other_targets(found: Provenance, outcomes: Sequence[TargetOutcome], problems: Problems) -> bool:
    """Name the sources whose target tensors are not the recorded ones."""
    others = False
    for role in ROLES:
        digest, recorded = provenance.target_digest(role, outcomes), found.record.sources[role].targets
        if digest != recorded:
            problems.add(role, f"is not the recorded source: its targets have BLAKE3 {digest}, {recorded} was recorded")
            others = True
    return others


def _compare_small(directory: Path, name: str, data: bytes, tally: Tally, problems: Problems) -> None:
    try:
        written = read_text("output", directory, name, tally)
    except SourceError as error:
        problems.add(name, f"cannot be compared: {error}")
        return
    if written != data:
        pairs = enumerate(zip(written, data, strict=False))
        at = next((at for at, (a, b) in pairs if a != b), min(len(written), len(data)))
        sizes = f"{len(written)} bytes, expected {len(data)}"
        problems.add(name, f"is not what the sources give: {sizes}; they differ first at byte {at}")


def _compare_provenance(found: Provenance, data: bytes, directory: Path, tally: Tally, problems: Problems) -> None:
    """By content, for the card of another version may have other bytes, and so another digest."""
    made = provenance.loads(data, "the provenance made again")
    before = found.record.as_dict()
    after = made.record.as_dict()
    wrong = changed_keys(before, after)
    for key in wrong:
        inner = changed_keys(before[key], after[key]) if isinstance(before[key], dict) else []
        problems.add(PROVENANCE, f"{key} are not what the sources give: {', '.join(inner[:NAMED]) or 'in their order'}")
    files, expected = dict(found.files), dict(made.files)
    if _written_by_another(found):
        files.pop(CARD, None)
        expected.pop(CARD, None)
    unlike = changed_keys(files, expected)
    if unlike:
        problems.add(PROVENANCE, f"files are not what the sources give: {', '.join(unlike[:NAMED])}")
    if not wrong and not unlike and not _written_by_another(found):
        _compare_small(directory, PROVENANCE, data, tally, problems)


def _written_by_another(found: Provenance) -> bool:
    """Whether another version of hsa, or of a library, wrote the output: it may word the card in another way."""
    record = found.record
    own = provenance.libraries(numerics=str(record.parameters.get("numerics")))
    return dict(record.program) != PROGRAM or dict(record.libraries) != own


def _cautions(found: Provenance) -> Iterator[str]:
    record = found.record
    if _written_by_another(found):
        own = {**PROGRAM, **provenance.libraries(numerics=str(record.parameters.get("numerics")))}
        theirs = {**record.program, **record.libraries}
        unlike = ", ".join(f"{key} {theirs.get(key)} (here {own.get(key)})" for key in changed_keys(theirs, own))
        yield f"it was written with {unlike[:500]}: {CARD} was not compared, for other versions may word it otherwise"
    close = [target.name for target in record.targets if target.margin is not None and target.margin < TIE_RISK]
    if close:
        yield (
            f"{len(close)} tensors have a margin below {TIE_RISK:g}, such as {close[0]}: another backend could have "
            f"selected other heads there, and would give other bytes"
        )
