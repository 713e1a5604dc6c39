"""Compute patches again from their sources and compare them row by row; each target is read and scored once for all."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hsa.actions.request import Request
from hsa.architectures.base import PRESETS
from hsa.backends.base import NotFinite
from hsa.backends.cpu import Blend, CpuBackend, CpuWorker
from hsa.engine.compute import Calculator, not_finite_error
from hsa.engine.open_patch import patch_target
from hsa.errors import HsaError, SourceChanged, SourceError
from hsa.methods.geometry import Norms
from hsa.methods.hsa import HsaSettings
from hsa.methods.selection import Selection, select
from hsa.outputs import distances
from hsa.outputs.patch_reader import Patch
from hsa.outputs.provenance import SourceRecord, changed_keys
from hsa.outputs.record_checks import config_of_record
from hsa.outputs.recording import tensors_digest
from hsa.planning.plan import find_targets
from hsa.planning.target import Target
from hsa.sources import small_files
from hsa.sources.roles import ANCHOR, BASE, Role
from hsa.sources.source_set import Sources
from hsa.system.digests import digest_of
from hsa.system.dtypes import Array, size
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.run_in_threads import run_in_threads
from hsa.verification.source_checks import MAX_NAMED, check_targets, comparison_notes, open_recorded

DISTANCE_ERROR = 1e-9
"""Relative; two machines may add the squares of a tile in another order."""


@dataclass
class _PatchDifferences:
    """A patch, its targets as the sources give them, and what differs so far."""

    patch: Patch
    targets: tuple[Target, ...]
    selected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unlike: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.patch.source.path.name


def recompute_patches(patches: Sequence[Patch], source_paths: SourcePaths, context: VerifyContext) -> bool:
    """Compute the merges of these patches again and compare what they hold; returns whether that was done for all.

    Problems are of the patch's file name, or of a source's role. Raises SourceError where a source cannot be opened,
    MachineError, SourceChanged.
    """
    first = patches[0].record
    of_same_sources = []
    for patch in patches:
        if _source_identities(patch) == _source_identities(patches[0]):
            of_same_sources.append(patch)
        else:
            name = patches[0].source.path.name
            context.problems.add(
                patch.source.path.name, f"was made from other sources than {name}, and was not compared"
            )
    with ExitStack() as stack:
        sources = open_recorded(
            _request(of_same_sources, source_paths), first, source_paths, context, stack, rows_only=True
        )
        if sources is None:
            return False
        try:
            compared = _compare(of_same_sources, sources, context)
        except SourceChanged:
            raise
        except SourceError as error:
            context.problems.add("sources", f"cannot be merged again: {error}")
            return False
    for note in dict.fromkeys(note for patch in of_same_sources for note in comparison_notes(patch.record)):
        context.notes.append(note)
    return compared and len(of_same_sources) == len(patches)


def _source_identities(patch: Patch) -> dict[Role, tuple[object, ...]]:
    """What two patches of one triple have in common; the targets digested differ from preset to preset."""

    def about(source: SourceRecord) -> tuple[object, ...]:
        return source.identity, source.kind, dict(source.files)

    return {role: about(source) for role, source in patch.contents.sources.items()}


def _request(patches: Sequence[Patch], source_paths: SourcePaths) -> Request:
    """A request for the sources, with all that any of the patches needs of them."""
    parameters = [patch.contents.parameters for patch in patches]
    widest = max((each["targets"] for each in parameters), key=PRESETS.index)
    others = [each["assets_from"] for each in parameters if each["assets_from"] not in (BASE, ANCHOR)]
    return Request(
        sources=source_paths.by_role,
        output="",
        settings=HsaSettings(targets=widest),
        assets_from=others[0] if others else ANCHOR,
        ids=source_paths.ids,
    )


def _compare(patches: Sequence[Patch], sources: Sources, context: VerifyContext) -> bool:
    differences = []
    for patch in patches:
        try:
            targets = find_targets(config_of_record(patch.record), sources)
            _compare_small_files(patch, sources, context)
            differences.append(_PatchDifferences(patch, targets))
        except SourceChanged:
            raise
        except HsaError as error:
            context.problems.add(patch.source.path.name, f"cannot be merged again: {error}")
    _PatchRecomputation(differences, sources, context).run()
    sources.check_unchanged()
    return len(differences) == len(patches)


def _compare_small_files(patch: Patch, sources: Sources, context: VerifyContext) -> None:
    assets_from = patch.contents.parameters["assets_from"]
    files = small_files.collect(sources, sources.anchor, assets_from, None, context.tally).files
    unlike = changed_keys(patch.contents.files, {name: digest_of(data) for name, data in files.items()})
    if unlike:
        what = f"its small files are not those that the sources give: {', '.join(unlike[:MAX_NAMED])}"
        context.problems.add(patch.source.path.name, what)


class _PatchRecomputation:
    """Merges targets again in threads. Each thread has one target in memory, and compares it in all patches."""

    def __init__(self, patches: Sequence[_PatchDifferences], sources: Sources, context: VerifyContext) -> None:
        self.patches, self.sources, self.context = patches, sources, context
        self.calculator = Calculator(sources, CpuBackend(), "exact")
        self.norms: dict[str, Norms] = {}
        self.digests: dict[str, dict[Role, str]] = {}
        self.done = 0
        self._local = threading.local()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        groups: dict[tuple[str, int], list[tuple[_PatchDifferences, Target]]] = {}
        for differences in patches:
            for target in differences.targets:
                groups.setdefault((target.projection.name, target.heads), []).append((differences, target))
        self.groups = list(groups.values())

    def run(self) -> None:
        total = sum(target.ref(role).nbytes for ((_, target), *_) in self.groups for role in self.sources.roles)
        tasks = [partial(self._recompute, group) for group in self.groups]
        run_in_threads(tasks, self.context, self._stop, lambda: (self.done, total))
        for differences in self.patches:
            self._finish(differences)

    def _recompute(self, group: Sequence[tuple[_PatchDifferences, Target]]) -> None:
        target = group[0][1]
        refs = {role: target.ref(role) for role in self.sources.roles}
        with self.calculator.reserve(sum(ref.nbytes for ref in refs.values())):
            if self._stop.is_set():
                return
            data = {role: self.calculator.buffer(ref.nbytes) for role, ref in refs.items()}
            for role, ref in refs.items():
                self.sources.of(role).read_into(ref, data[role].data)
            digests = {role: digest_of(array.data) for role, array in data.items()}
            b, m1, m2 = data.values()
            arrays = b, m1, m2
            try:
                worker = self._worker()
                scored = worker.score(target, *arrays)
                norms = worker.norms(target, m1, m2)
                for differences, own_target in group:
                    self._merge(differences, own_target, scored.squared, arrays)
            except NotFinite as error:
                raise not_finite_error(error, refs, target.out_code, self.sources, "exact") from None
            for array in arrays:
                self.calculator.give_back(array)
        with self._lock:
            self.norms[target.projection.name] = norms
            self.digests[target.projection.name] = digests
            self.done += sum(ref.nbytes for ref in refs.values())

    def _worker(self) -> CpuWorker:
        if not hasattr(self._local, "worker"):
            self._local.worker = CpuWorker()
        worker: CpuWorker = self._local.worker
        return worker

    def _merge(
        self,
        differences: _PatchDifferences,
        target: Target,
        squared: Sequence[float],
        arrays: tuple[Array, Array, Array],
    ) -> None:
        """Blend the selected heads of one target for one patch, and note what of it differs."""
        selection = select(squared, target.keep)
        rows = np.empty(patch_target(target).rows_bytes(len(selection.selected)), np.uint8)
        blend = Blend(selection.selected, target.c1, target.c2, rows)
        self._worker().blend(target, *arrays, [blend])
        difference = _difference(differences.patch, target, selection, rows)
        with self._lock:
            differences.selected[target.projection.name] = selection.selected
            if difference is not None:
                differences.unlike.append(f"target tensor {target.primary.name}{difference}")

    def _finish(self, differences: _PatchDifferences) -> None:
        """Add the problems of a patch whose targets are all compared."""
        problems, patch, name = self.context.problems, differences.patch, differences.name
        count = MAX_NAMED if check_targets(patch.record, self._digests(differences.targets), problems) else 1
        unlike = sorted(differences.unlike)
        for what in unlike[:count]:
            problems.add(name, what)
        if len(unlike) > count:
            problems.add(name, f"{len(unlike) - count} more tensors are not what the sources give")
        names = [target.primary.name for target in differences.targets]
        if names != [target.name for target in patch.contents.targets]:
            problems.add(name, "its targets, or their order, are not those that the sources give")
        expected_distances = distances.by_stack(
            distances.DistanceInputs(
                target.projection.stack,
                target.coefficient,
                differences.selected[target.projection.name],
                self.norms[target.projection.name],
            )
            for target in differences.targets
        )
        for stack, expected in expected_distances.items():
            recorded = patch.contents.distances.get(stack)
            if recorded is None or not all(map(_is_close, vars(recorded).values(), vars(expected).values())):
                problems.add(
                    name, f"its distances of {stack} are not what the sources give: {recorded}, expected {expected}"
                )

    def _digests(self, targets: Sequence[Target]) -> dict[Role, str]:
        """The digest over these target tensors of each source, as a record has it."""
        digests = {}
        for role in self.sources.roles:
            lines = []
            for target in targets:
                ref, name = target.ref(role), target.projection.name
                lines.append((name, ref.code, ref.shape, self.digests[name][role]))
            digests[role] = tensors_digest(lines)
        return digests


def _is_close(recorded: float | None, expected: float | None) -> bool:
    if recorded is None or expected is None:
        return recorded is expected
    return math.isclose(recorded, expected, rel_tol=DISTANCE_ERROR)


def _difference(patch: Patch, target: Target, selection: Selection, rows: Array) -> str | None:
    """How a patch's target differs from what the sources give; None where it does not."""
    place = next(
        (n for n, each in enumerate(patch.contents.targets) if each.projection.name == target.projection.name), None
    )
    if place is None:
        return " is missing"
    if patch.contents.targets[place] != patch_target(target):
        return ": its shape, dtype, heads or lambda_i are not what the sources give"
    if patch.squared[place] != selection.squared:
        return ": its scores are not what the sources give"
    if patch.selected[place] != selection.selected:
        return f": heads {list(patch.selected[place])} are selected, the sources give {list(selection.selected)}"
    written = np.empty(rows.size, np.uint8)
    patch.source.read_into(written.data, patch.start(patch.contents.targets[place].name))
    differs = written != rows
    if not differs.any():
        return None
    first = int(differs.argmax())
    shape = patch_target(target).rows_shape(len(selection.selected))
    row = int(np.unravel_index(first // size(target.out_code), shape)[target.projection.head_axis])
    return (
        f", head {selection.selected[row]}: {int(np.count_nonzero(differs))} bytes are not what the sources give, "
        f"first at byte {first} of its rows: found 0x{int(written[first]):02x}, recomputed 0x{int(rows[first]):02x}"
    )
