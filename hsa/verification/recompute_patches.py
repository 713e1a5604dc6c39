"""Recompute patches from their sources and compare them row by row; each target is read and scored once for all."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hsa.actions.request import Request
from hsa.architectures.base import PRESETS
from hsa.engine.target_pass import Candidate, TargetDecision, TargetPass
from hsa.errors import HsaError, SourceChanged, SourceError
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.methods.tensors import Outcome, TensorRecord, TensorTask
from hsa.outputs.patch_reader import Patch
from hsa.outputs.provenance import changed_keys
from hsa.outputs.record_checks import settings_of_record
from hsa.outputs.recording import target_digest
from hsa.outputs.source_record import SourceRecord
from hsa.planning.tasks import Targets, find_targets
from hsa.sources import small_files
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system.digests import digest_of
from hsa.system.dtypes import Array, size
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.decisions import Answers, is_recorded, other_decision, recorded_decisions
from hsa.verification.source_checks import MAX_NAMED, check_targets, comparison_notes, open_recorded, other_roles

DISTANCE_ERROR = 1e-9
"""The relative tolerance of distances: two machines may add the squares of a tile in different orders."""


@dataclass
class _PatchDifferences:
    """A patch, its targets as derived from the sources, and the differences found so far."""

    patch: Patch
    targets: Targets
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    unlike_decisions: list[str] = field(default_factory=list)
    unlike_rows: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.patch.source.path.name

    @cached_property
    def recorded_targets(self) -> dict[str, TensorRecord]:
        """The patch's target records, by canonical name."""
        return {target.canonical: target for target in self.patch.contents.targets}

    @property
    def needless_targets(self) -> bool:
        """Whether the patch records targets that do not follow from the sources."""
        return not self.recorded_targets.keys() <= {task.name for task in self.targets.tasks}

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """The recorded decisions for targets that match the sources, by canonical name."""
        return recorded_decisions(self.patch.contents.targets, self.targets.tasks)


def recompute_patches(patches: Sequence[Patch], source_paths: SourcePaths, context: VerifyContext) -> Answers | None:
    """Recompute the merges of these patches and compare rows and decisions.

    Rows are compared with those that follow from the recorded decisions, and decisions with those that follow from the
    sources. Return None if some patch could not be compared.

    Problems are reported under the patch's file name or a source's role. Raises SourceError if a source cannot be
    opened, MachineError, SourceChanged.
    """
    first = patches[0].record
    unlike_roles = other_roles(first, source_paths)
    if unlike_roles is not None:
        context.problems.add(patches[0].source.path.name, unlike_roles)
        return None
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
        assets = {patch.record.parameters["assets_from"] for patch in of_same_sources}
        request = _request(of_same_sources, source_paths)
        sources = open_recorded(request, first, source_paths, context, stack, rows_only=True, assets=assets)
        if sources is None:
            return None
        try:
            answers = _compare(of_same_sources, sources, context)
        except SourceChanged:
            raise
        except SourceError as error:
            context.problems.add("sources", f"cannot be merged again: {error}")
            return None
    for note in dict.fromkeys(note for patch in of_same_sources for note in comparison_notes(patch.record)):
        context.notes.append(note)
    return answers if len(of_same_sources) == len(patches) else None


def _source_identities(patch: Patch) -> dict[Role, tuple[object, ...]]:
    """The facts that two patches of the same sources share. Target digests are left out, since they depend on the
    preset."""

    def about(source: SourceRecord) -> tuple[object, ...]:
        return source.identity, source.kind, dict(source.files)

    return {role: about(source) for role, source in patch.record.sources.items()}


def _request(patches: Sequence[Patch], source_paths: SourcePaths) -> Request:
    """The request for the sources, with the settings of the patch that needs the most of their tensors."""
    settings: Any = max((settings_of_record(patch.record) for patch in patches), key=_breadth)
    return Request(sources=source_paths.by_role, output="", settings=settings, ids=source_paths.ids)


def _breadth(settings: Settings) -> int:
    """The position of the settings' preset among the presets, which are ordered from small to large. Without a preset,
    every tensor is needed."""
    preset = getattr(settings, "targets", None)
    return len(PRESETS) if preset is None else PRESETS.index(preset)


def _compare(patches: Sequence[Patch], sources: Sources, context: VerifyContext) -> Answers | None:
    differences = []
    for patch in patches:
        try:
            settings = settings_of_record(patch.record)
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
    answers = Answers(
        not any(each.unlike_rows for each in differences),
        not any(each.unlike_decisions or each.needless_targets for each in differences),
    )
    return answers if len(differences) == len(patches) else None


def _compare_small_files(patch: Patch, sources: Sources, context: VerifyContext) -> None:
    files = small_files.collect(
        sources, sources.anchor, patch.record.parameters["assets_from"], None, context.tally
    ).files
    unlike = changed_keys(patch.contents.files, {name: digest_of(data) for name, data in files.items()})
    if unlike:
        what = f"its small files are not those that the sources give: {', '.join(unlike[:MAX_NAMED])}"
        context.problems.add(patch.source.path.name, what)


class _RowComparer:
    """Compares patches with their sources.

    The recomputed decisions are compared with the recorded ones. The rows that follow from the recorded decisions are
    compared with the stored rows. Each target is read once for all patches.
    """

    def __init__(self, patches: Sequence[_PatchDifferences], sources: Sources, context: VerifyContext) -> None:
        self.patches, self.sources, self.context = patches, sources, context
        self.norms: dict[str, Any] = {}
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

    def decided(self, decisions: Sequence[TargetDecision], norms: Any) -> None:
        for each in decisions:
            differences, task = self.patches[each.candidate], each.outcome.task
            self.norms[task.name] = norms
            differences.outcomes[task.name] = each.outcome
            what = _other_decision(differences, task, each.outcome.decision)
            if what is not None:
                self._add(differences.unlike_decisions, task, what)

    def store(self, decision: TargetDecision, rows: Array) -> None:
        differences, task = self.patches[decision.candidate], decision.outcome.task
        if task.name in differences.recorded:
            what = _other_rows(differences.patch, task, decision.groups, rows)
            if what is not None:
                self._add(differences.unlike_rows, task, what)

    def _add(self, lines: list[str], task: TensorTask, what: str) -> None:
        with self._lock:
            lines.append(f"target tensor {task.stored.name}{what}")

    def _finish(self, differences: _PatchDifferences) -> None:
        """Add the problems of a patch once all its targets have been compared."""
        problems, patch, name = self.context.problems, differences.patch, differences.name
        outcomes = [differences.outcomes[task.name] for task in differences.targets.tasks]
        digests = {role: target_digest(role, outcomes) for role in self.sources.roles}
        count = MAX_NAMED if check_targets(patch.record, digests, problems) else 1
        unlike = sorted({*differences.unlike_decisions, *differences.unlike_rows})
        for what in unlike[:count]:
            problems.add(name, what)
        if len(unlike) > count:
            problems.add(name, f"{len(unlike) - count} more tensors are not what the sources give")
        names = [task.stored.name for task in differences.targets.tasks]
        if names != [target.name for target in patch.contents.targets]:
            problems.add(name, "its targets, or their order, are not those that the sources give")
        pairs = [(TensorRecord.of(outcome), self.norms[outcome.task.name]) for outcome in outcomes]
        for stack, expected in patch.record.method.distances(pairs).items():
            recorded = patch.contents.distances.get(stack)
            if recorded is None or not all(_is_close(recorded.get(role), value) for role, value in expected.items()):
                problems.add(
                    name, f"its distances of {stack} are not what the sources give: {recorded}, expected {expected}"
                )


def _is_close(recorded: float | None, expected: float | None) -> bool:
    if recorded is None or expected is None:
        return recorded is expected
    return math.isclose(recorded, expected, rel_tol=DISTANCE_ERROR)


def _other_decision(differences: _PatchDifferences, task: TensorTask, decision: Any) -> str | None:
    """The difference between a target's recorded decision and the one that follows from the sources; None if there is
    none."""
    target = differences.recorded_targets.get(task.name)
    if target is None:
        return " is missing"
    if not is_recorded(target, task):
        return ": its shape, dtype or heads are not what the sources give"
    return other_decision(differences.targets.method, target.decision, decision)


def _other_rows(patch: Patch, task: TensorTask, groups: Sequence[int], rows: Array) -> str | None:
    """The difference between a target's rows and those that follow from its recorded heads; None if there is none."""
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
