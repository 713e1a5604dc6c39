"""Compute patches again from their sources and compare them row by row; each target is read and scored once for all."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hsa.actions.request import Request
from hsa.architectures.base import Preset
from hsa.engine.open_patch import patch_target
from hsa.engine.target_pass import Candidate, TargetDecision, TargetPass
from hsa.errors import HsaError, SourceChanged, SourceError
from hsa.methods.geometry import Norms
from hsa.methods.hsa import HsaDecision, HsaSettings
from hsa.methods.hsa_formula import rounded_pair
from hsa.methods.registry import method_named
from hsa.methods.selection import Selection, selection_of
from hsa.methods.tensors import Outcome, TensorTask
from hsa.outputs import distances
from hsa.outputs.patch_format import PatchTarget
from hsa.outputs.patch_reader import Patch
from hsa.outputs.provenance import SourceRecord, changed_keys
from hsa.outputs.record_checks import config_of_record
from hsa.outputs.recording import target_digest
from hsa.planning.tasks import Targets, find_targets
from hsa.sources import small_files
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system.digests import digest_of
from hsa.system.dtypes import Array, size
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.source_checks import MAX_NAMED, check_targets, comparison_notes, open_recorded

DISTANCE_ERROR = 1e-9
"""Relative; two machines may add the squares of a tile in another order."""


@dataclass
class _PatchDifferences:
    """A patch, its targets as the sources give them, and what differs so far."""

    patch: Patch
    targets: Targets
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    unlike: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.patch.source.path.name

    @cached_property
    def places(self) -> dict[str, int]:
        """The number of each target in the patch, by canonical name."""
        return {each.projection.name: number for number, each in enumerate(self.patch.contents.targets)}

    @cached_property
    def recorded(self) -> dict[str, HsaDecision]:
        """The decisions that the patch records for targets which are what the sources give, by canonical name."""
        patch = self.patch
        return {
            task.name: recorded_decision(
                patch.contents.targets[place], selection_of(patch.squared[place], patch.selected[place])
            )
            for task in self.targets.tasks
            if (place := self.places.get(task.name)) is not None and self.has_same_target(task)
        }

    def has_same_target(self, task: TensorTask) -> bool:
        """Whether the patch says of a target what the sources and its parameters give."""
        settings = self.targets.settings
        assert isinstance(settings, HsaSettings)
        return self.patch.contents.targets[self.places[task.name]] == patch_target(task, settings)


def recorded_decision(target: PatchTarget, selection: Selection) -> HsaDecision:
    """The decision that a patch records for a target."""
    pair = rounded_pair(target.coefficient)
    return HsaDecision(target.keep, target.coefficient, *pair, 1.0, selection)


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
    presets: list[Preset] = ["encoder-qkv", "attention-qkv", "attention-all"]
    widest = max((each["targets"] for each in parameters), key=presets.index)
    secondary = any(each["assets_from"] == "secondary" for each in parameters)
    return Request(
        sources=source_paths.by_role,
        output="",
        settings=HsaSettings(targets=widest),
        assets_from="secondary" if secondary else "primary",
        ids=source_paths.ids,
    )


def _compare(patches: Sequence[Patch], sources: Sources, context: VerifyContext) -> bool:
    differences = []
    for patch in patches:
        try:
            settings = config_of_record(patch.record)
            targets = find_targets(method_named(settings.method), settings, sources)
            _compare_small_files(patch, sources, context)
            differences.append(_PatchDifferences(patch, targets))
        except SourceChanged:
            raise
        except HsaError as error:
            context.problems.add(patch.source.path.name, f"cannot be merged again: {error}")
    if differences:
        _RowComparer(differences, sources, context).run()
    sources.check_unchanged()
    return len(differences) == len(patches)


def _compare_small_files(patch: Patch, sources: Sources, context: VerifyContext) -> None:
    files = small_files.collect(sources, "primary", patch.contents.parameters["assets_from"], None, context.tally).files
    unlike = changed_keys(patch.contents.files, {name: digest_of(data) for name, data in files.items()})
    if unlike:
        what = f"its small files are not those that the sources give: {', '.join(unlike[:MAX_NAMED])}"
        context.problems.add(patch.source.path.name, what)


class _RowComparer:
    """Compares what the sources give with what patches hold: the decisions with the recorded ones, and the rows that
    follow from the recorded decisions with the rows. Each target is read once for all patches."""

    def __init__(self, patches: Sequence[_PatchDifferences], sources: Sources, context: VerifyContext) -> None:
        self.patches, self.sources, self.context = patches, sources, context
        self.norms: dict[str, Norms] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        candidates = [Candidate(number, each.targets, each.recorded) for number, each in enumerate(self.patches)]
        work = TargetPass(candidates, self.sources, self, _file_order)

        def watch() -> None:
            self.context.memory.sample()
            if self.context.progress is not None:
                self.context.progress(work.done, work.source_bytes)

        work.run(self.context.threads, watch)
        for differences in self.patches:
            self._finish(differences)

    def decided(self, decisions: Sequence[TargetDecision], norms: Norms) -> None:
        for each in decisions:
            differences, task = self.patches[each.candidate], each.outcome.task
            self.norms[task.name] = norms
            differences.outcomes[task.name] = each.outcome
            what = _other_decision(differences, task, each.outcome.decision)
            if what is not None:
                self._add(differences, task, what)

    def store(self, decision: TargetDecision, rows: Array) -> None:
        differences, task = self.patches[decision.candidate], decision.outcome.task
        if task.name in differences.recorded:
            what = _other_rows(differences.patch, task, decision.groups, rows)
            if what is not None:
                self._add(differences, task, what)

    def _add(self, differences: _PatchDifferences, task: TensorTask, what: str) -> None:
        with self._lock:
            differences.unlike.append(f"target tensor {task.stored.name}{what}")

    def _finish(self, differences: _PatchDifferences) -> None:
        """Add the problems of a patch whose targets are all compared."""
        problems, patch, name = self.context.problems, differences.patch, differences.name
        outcomes = [differences.outcomes[task.name] for task in differences.targets.tasks]
        digests = {role: target_digest(role, outcomes) for role in self.sources.roles}
        count = MAX_NAMED if check_targets(patch.record, digests, problems) else 1
        unlike = sorted(differences.unlike)
        for what in unlike[:count]:
            problems.add(name, what)
        if len(unlike) > count:
            problems.add(name, f"{len(unlike) - count} more tensors are not what the sources give")
        names = [task.stored.name for task in differences.targets.tasks]
        if names != [target.name for target in patch.contents.targets]:
            problems.add(name, "its targets, or their order, are not those that the sources give")
        expected_distances = distances.by_stack(
            distances.DistanceInputs(
                outcome.task.place.stack,
                outcome.decision.coefficient,
                outcome.decision.selected,
                self.norms[outcome.task.name],
            )
            for outcome in outcomes
            if outcome.task.place is not None
        )
        for stack, expected in expected_distances.items():
            recorded = patch.contents.distances.get(stack)
            if recorded is None or not all(map(_is_close, vars(recorded).values(), vars(expected).values())):
                problems.add(
                    name, f"its distances of {stack} are not what the sources give: {recorded}, expected {expected}"
                )


def _is_close(recorded: float | None, expected: float | None) -> bool:
    if recorded is None or expected is None:
        return recorded is expected
    return math.isclose(recorded, expected, rel_tol=DISTANCE_ERROR)


def _other_decision(differences: _PatchDifferences, task: TensorTask, decision: HsaDecision) -> str | None:
    """How the recorded decision for a target differs from the one that follows from the sources; None where it does
    not."""
    patch, place = differences.patch, differences.places.get(task.name)
    if place is None:
        return " is missing"
    if not differences.has_same_target(task):
        return ": its shape, dtype, heads or lambda_i are not what the sources give"
    if patch.squared[place] != decision.selection.squared:
        return ": its scores are not what the sources give"
    if patch.selected[place] != decision.selected:
        return f": heads {list(patch.selected[place])} are selected, the sources give {list(decision.selected)}"
    return None


def _other_rows(patch: Patch, task: TensorTask, groups: Sequence[int], rows: Array) -> str | None:
    """How the rows of a target differ from those that its recorded heads give; None where they do not."""
    written = np.empty(rows.size, np.uint8)
    patch.source.read_into(written.data, patch.start(task.stored.name))
    differs = written != rows
    if not differs.any():
        return None
    first = int(differs.argmax())
    shape = [*task.shape]
    shape[task.partition.axis : task.partition.axis + 1] = [len(groups), task.group_size]
    row = int(np.unravel_index(first // size(task.out_code), shape)[task.partition.axis])
    return (
        f", head {groups[row]}: {int(np.count_nonzero(differs))} bytes are not what the sources give, "
        f"first at byte {first} of its rows: found 0x{int(written[first]):02x}, recomputed 0x{int(rows[first]):02x}"
    )


def _file_order(task: TensorTask) -> tuple[int, int]:
    ref = task.sources[task.anchor]
    return ref.shard, ref.offset
