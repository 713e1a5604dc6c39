"""Patches computed again from their sources, and compared row by row; each target is read and scored once for all."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from hsa.actions.request import Request
from hsa.architectures.base import Preset
from hsa.architectures.whisper import canonical
from hsa.backends.base import NotFinite
from hsa.backends.cpu import Blend, CpuBackend, CpuWorker
from hsa.engine.compute import Calculator, not_finite
from hsa.engine.patch_writer import patch_target
from hsa.errors import HsaError, SourceChanged, SourceError
from hsa.methods.config import MergeConfig
from hsa.methods.geometry import Norms
from hsa.methods.selection import Selection, select
from hsa.option_names import with_current_spelling
from hsa.outputs import distances
from hsa.outputs.patch_reader import Patch
from hsa.outputs.provenance import SourceRecord, changed_keys
from hsa.outputs.record_checks import recorded_config
from hsa.outputs.recording import tensors_digest
from hsa.planning.plan import find_targets
from hsa.planning.target import Target
from hsa.sources import small_files
from hsa.sources.roles import ROLES, Role
from hsa.sources.source_set import Sources
from hsa.system.digests import digest_of
from hsa.system.dtypes import Array, size
from hsa.verification.source_checks import NAMED, GivenSources, Work, cautions, check_targets, open_recorded

DISTANCE_ERROR = 1e-9
"""Relative; two machines may add the squares of a tile in another order."""


@dataclass
class _Comparison:
    """A patch, its targets as the sources give them, and what differs so far."""

    patch: Patch
    targets: tuple[Target, ...]
    selected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unlike: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.patch.source.path.name


def recompute_patches(patches: Sequence[Patch], given: GivenSources, work: Work) -> bool:
    """Compute the merges of these patches again and compare what they hold; returns whether that was done for all.

    Problems are of the patch's file name, or of a source's role. Raises SourceError where a source cannot be opened,
    MachineError, SourceChanged.
    """
    first = patches[0].record
    fitting = []
    for patch in patches:
        if _sources(patch) == _sources(patches[0]):
            fitting.append(patch)
        else:
            name = patches[0].source.path.name
            work.problems.add(patch.source.path.name, f"was made from other sources than {name}, and was not compared")
    with ExitStack() as stack:
        sources = open_recorded(_request(fitting, given), first, given, work, stack, rows_only=True)
        if sources is None:
            return False
        try:
            compared = _compare(fitting, sources, work)
        except SourceChanged:
            raise
        except SourceError as error:
            work.problems.add("sources", f"cannot be merged again: {error}")
            return False
    for note in dict.fromkeys(note for patch in fitting for note in cautions(patch.record)):
        work.notes.append(note)
    return compared and len(fitting) == len(patches)


def _sources(patch: Patch) -> dict[Role, tuple[object, ...]]:
    """What two patches of one triple have in common; the targets digested differ from preset to preset."""

    def about(source: SourceRecord) -> tuple[object, ...]:
        return source.identity, source.kind, dict(source.files)

    return {role: about(source) for role, source in patch.contents.sources.items()}


def _request(patches: Sequence[Patch], given: GivenSources) -> Request:
    """A request for the sources, with all that any of the patches needs of them."""
    parameters = [patch.contents.parameters for patch in patches]
    presets: list[Preset] = ["encoder-qkv", "attention-qkv", "attention-all"]
    widest = max((each["targets"] for each in parameters), key=presets.index)
    secondary = any(each["assets_from"] == "secondary" for each in parameters)
    return Request(
        sources=given.paths,
        output="",
        config=MergeConfig(targets=widest),
        assets_from="secondary" if secondary else "primary",
        ids=given.ids,
    )


def _compare(patches: Sequence[Patch], sources: Sources, work: Work) -> bool:
    comparisons = []
    for patch in patches:
        try:
            found = find_targets(recorded_config(patch.record), sources)
            _compare_small_files(patch, sources, work)
            comparisons.append(_Comparison(patch, found))
        except SourceChanged:
            raise
        except HsaError as error:
            work.problems.add(patch.source.path.name, f"cannot be merged again: {error}")
    _PatchRecomputation(comparisons, sources, work).go()
    sources.check_unchanged()
    return len(comparisons) == len(patches)


def _compare_small_files(patch: Patch, sources: Sources, work: Work) -> None:
    found = small_files.collect(sources, "primary", patch.contents.parameters["assets_from"], None, work.tally).files
    unlike = changed_keys(patch.contents.files, {name: digest_of(data) for name, data in found.items()})
    if unlike:
        what = f"its small files are not those that the sources give: {', '.join(unlike[:NAMED])}"
        work.problems.add(patch.source.path.name, what)


class _PatchRecomputation:
    """The threads that merge targets again. Patches are compared target by target, so that one is in memory at a time
    for each thread."""

    def __init__(self, comparisons: Sequence[_Comparison], sources: Sources, work: Work) -> None:
        self.comparisons, self.sources, self.work = comparisons, sources, work
        self.calculator = Calculator(sources, CpuBackend(), "exact")
        self.norms: dict[str, Norms] = {}
        self.digests: dict[str, dict[Role, str]] = {}
        self.done = 0
        self._own = threading.local()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        jobs: dict[tuple[str, int], list[tuple[_Comparison, Target]]] = {}
        for comparison in comparisons:
            for target in comparison.targets:
                jobs.setdefault((target.projection.name, target.heads), []).append((comparison, target))
        self.jobs = list(jobs.values())

    def go(self) -> None:
        total = sum(target.ref(role).nbytes for ((_, target), *_) in self.jobs for role in ROLES)
        with ThreadPoolExecutor(self.work.threads) as pool:
            ahead = {pool.submit(with_current_spelling(self._do), job) for job in self.jobs}
            try:
                while ahead:
                    finished, ahead = wait(ahead, timeout=0.02)
                    for future in finished:
                        future.result()
                    self.work.memory.sample()
                    if self.work.progress is not None:
                        self.work.progress(self.done, total)
            finally:
                self._stop.set()
        for comparison in self.comparisons:
            self._finish(comparison)

    def _do(self, job: Sequence[tuple[_Comparison, Target]]) -> None:
        target = job[0][1]
        refs = {role: target.ref(role) for role in ROLES}
        with self.calculator.reserve(sum(ref.nbytes for ref in refs.values())):
            if self._stop.is_set():
                return
            data = {role: self.calculator.buffer(ref.nbytes) for role, ref in refs.items()}
            for role, ref in refs.items():
                self.sources.of(role).read_into(ref, data[role].data)
            digests = {role: digest_of(data[role].data) for role in ROLES}
            arrays = data["base"], data["primary"], data["secondary"]
            try:
                worker = self._worker()
                scored = worker.score(target, *arrays)
                norms = worker.norms(target, data["primary"], data["secondary"])
                for comparison, each in job:
                    self._merge(comparison, each, scored.squared, arrays)
            except NotFinite as error:
                raise not_finite(error, refs, target.out_code, self.sources, "exact") from None
            for array in arrays:
                self.calculator.give_back(array)
        with self._lock:
            self.norms[target.projection.name] = norms
            self.digests[target.projection.name] = digests
            self.done += sum(ref.nbytes for ref in refs.values())

    def _worker(self) -> CpuWorker:
        if not hasattr(self._own, "worker"):
            self._own.worker = CpuWorker()
        worker: CpuWorker = self._own.worker
        return worker

    def _merge(
        self, comparison: _Comparison, target: Target, squared: Sequence[float], arrays: tuple[Array, Array, Array]
    ) -> None:
        """Blend the selected heads of one target for one patch, and note what of it differs."""
        selection = select(squared, target.keep)
        rows = np.empty(patch_target(target).rows_bytes(len(selection.selected)), np.uint8)
        blend = Blend(selection.selected, target.c1, target.c2, rows)
        self._worker().blend(target, *arrays, [blend])
        unlike = _difference(comparison.patch, target, selection, rows)
        with self._lock:
            comparison.selected[target.projection.name] = selection.selected
            if unlike is not None:
                comparison.unlike.append(f"target tensor {target.primary.name}{unlike}")

    def _finish(self, comparison: _Comparison) -> None:
        problems, patch, name = self.work.problems, comparison.patch, comparison.name
        named = NAMED if check_targets(patch.record, self._digests(comparison.targets), problems) else 1
        unlike = sorted(comparison.unlike)
        for what in unlike[:named]:
            problems.add(name, what)
        if len(unlike) > named:
            problems.add(name, f"{len(unlike) - named} more tensors are not what the sources give")
        expected = [target.primary.name for target in comparison.targets]
        if expected != [target.name for target in patch.contents.targets]:
            problems.add(name, "its targets, or their order, are not those that the sources give")
        far = distances.by_stack(
            distances.DistanceInputs(
                target.projection.stack,
                target.coefficient,
                comparison.selected[target.projection.name],
                self.norms[target.projection.name],
            )
            for target in comparison.targets
        )
        for stack, each in far.items():
            held = patch.contents.distances.get(stack)
            if held is None or not all(map(_close, vars(held).values(), vars(each).values())):
                problems.add(name, f"its distances of {stack} are not what the sources give: {held}, expected {each}")

    def _digests(self, targets: Sequence[Target]) -> dict[Role, str]:
        """The digest over these target tensors of each source, as a record has it."""
        found = {}
        for role in ROLES:
            lines = []
            for target in targets:
                ref, name = target.ref(role), target.projection.name
                lines.append((name, ref.code, ref.shape, self.digests[name][role]))
            found[role] = tensors_digest(lines)
        return found


def _close(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=DISTANCE_ERROR)


def _difference(patch: Patch, target: Target, selection: Selection, rows: Array) -> str | None:
    """How a patch's target differs from what the sources give; None where it does not."""
    place = next(
        (n for n, each in enumerate(patch.contents.targets) if canonical(each.name) == target.projection.name), None
    )
    if place is None:
        return " is missing"
    if patch.contents.targets[place] != patch_target(target):
        return ": its shape, dtype, heads or lambda_i are not what the sources give"
    if patch.squared[place] != selection.squared:
        return ": its scores are not what the sources give"
    if patch.selected[place] != selection.selected:
        return f": heads {list(patch.selected[place])} are selected, the sources give {list(selection.selected)}"
    found = np.empty(rows.size, np.uint8)
    patch.source.read_into(found.data, patch.start(patch.contents.targets[place].name))
    wrong = found != rows
    if not wrong.any():
        return None
    at = int(wrong.argmax())
    shape = patch_target(target).rows_shape(len(selection.selected))
    row = int(np.unravel_index(at // size(target.out_code), shape)[target.projection.head_axis])
    return (
        f", head {selection.selected[row]}: {int(np.count_nonzero(wrong))} bytes are not what the sources give, first "
        f"at byte {at} of its rows: found 0x{int(found[at]):02x}, recomputed 0x{int(rows[at]):02x}"
    )
