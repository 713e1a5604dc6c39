"""One patch file while it is written: created with room for its header, given rows, and completed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsa.methods.geometry import Norms
from hsa.methods.hsa import HsaSettings
from hsa.methods.hsa_formula import settings_of
from hsa.methods.tensors import Outcome, TensorTask
from hsa.outputs import distances, patch_format
from hsa.outputs.patch_format import PatchContents, PatchTarget
from hsa.outputs.recording import PROGRAM, libraries, source_record, target_digest, tensors_digest
from hsa.planning.tasks import Targets
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.digests import digest_of
from hsa.system.manifest import BLANK_DIGEST
from hsa.system.staging import StagingDirectory


@dataclass(frozen=True)
class FinishedPatch:
    """A finished patch: its contents, outcomes in the order of the targets, and bytes."""

    contents: PatchContents
    outcomes: tuple[Outcome, ...]
    nbytes: int


@dataclass
class OpenPatch:
    """A patch while it is written. `stop` is where the rows of the next target begin."""

    path: Path
    contents: PatchContents
    tasks: tuple[TensorTask, ...]
    fd: int
    direct: int | None
    header_bytes: int
    stop: int
    sync: bool
    tally: fsio.Tally
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        targets: Targets,
        name: str,
        sources: Sources,
        parameters: Mapping[str, Any],
        files: Mapping[str, str],
        staging: StagingDirectory,
        tally: fsio.Tally,
    ) -> OpenPatch:
        """Create the file of that name; `parameters` and `files` as for `patch_writer.write_patches`."""
        contents = PatchContents(
            PROGRAM,
            libraries(),
            {**targets.settings.as_dict(), **parameters},
            {source.role: source_record(source, BLANK_DIGEST) for source in sources},
            patch_targets(targets),
            files,
            sources.architecture,
        )
        size = patch_format.header_size(contents)
        path = staging.file(name)
        fd = fsio.create(path, size + expected_row_bytes(contents))
        direct = fsio.reopen_direct(path)
        return cls(path, contents, targets.tasks, fd, direct, size, size, staging.sync, tally)

    def close(self) -> None:
        os.close(self.fd)
        if self.direct is not None:
            os.close(self.direct)

    def write(self, offset: int, view: memoryview) -> None:
        """Write rows at their place, past the page cache where they begin and end at a page."""
        with fsio.map_write_errors(self.path, len(view)):
            aligned = not (offset % fsio.ALIGNMENT or len(view) % fsio.ALIGNMENT)
            if self.direct is not None and aligned and fsio.write_direct(self.direct, view, offset, self.tally):
                return
            fsio.write_cached(self.fd, view, offset, self.tally, writeback=self.sync)

    def complete(self, norms: Mapping[str, Norms]) -> FinishedPatch:
        """Write scores, selection and header, which are known after the last rows; `norms` are by canonical name."""
        outcomes = [self.outcomes[task.name] for task in self.tasks]
        selections = [outcome.decision.selection for outcome in outcomes]
        counts = {outcome.task.stored.name: len(outcome.decision.selected) for outcome in outcomes}
        distances_of_stacks = distances.by_stack(
            distances.DistanceInputs(
                outcome.task.place.stack,
                outcome.decision.coefficient,
                outcome.decision.selected,
                norms[outcome.task.name],
            )
            for outcome in outcomes
            if outcome.task.place is not None
        )
        tail = {
            patch_format.SCORES: patch_format.pack_scores([s.squared for s in selections]),
            patch_format.SELECTED: patch_format.pack_selected(
                [s.selected for s in selections], [t.heads for t in self.contents.targets]
            ),
        }
        digests = {**self.digests, **{name: digest_of(data) for name, data in tail.items()}}
        entries = patch_format.tensor_entries(self.contents, counts)
        contents = patch_format.with_digests(
            self.contents,
            {role: target_digest(role, outcomes) for role in self.contents.sources},
            tensors_digest([(entry.name, entry.code, entry.shape, digests[entry.name]) for entry in entries]),
            distances_of_stacks,
        )
        raw = patch_format.render_header(contents, counts, self.header_bytes)
        stop = self.stop + sum(map(len, tail.values()))
        with fsio.map_write_errors(self.path, stop):
            fsio.write_all(self.fd, memoryview(b"".join(tail.values())), self.stop, self.tally)
            fsio.write_all(self.fd, memoryview(raw), 0, self.tally)
            os.ftruncate(self.fd, stop)
            if self.sync:
                fsio.sync(self.fd)
        return FinishedPatch(contents, tuple(outcomes), stop)


def patch_targets(targets: Targets) -> tuple[PatchTarget, ...]:
    """What a patch says of its targets before they are merged."""
    assert isinstance(targets.settings, HsaSettings)
    return tuple(patch_target(task, targets.settings) for task in targets.tasks)


def patch_target(task: TensorTask, settings: HsaSettings) -> PatchTarget:
    """What a patch says of a target."""
    assert task.place is not None
    keep, coefficient = settings_of(task, settings)
    return PatchTarget(
        task.stored.name, task.place, task.shape, task.out_code, task.partition.groups, keep, coefficient
    )


def expected_bytes(targets: Targets) -> int:
    """Bytes of the rows of a patch, where no heads tie at the cut."""
    return sum(target.rows_bytes(target.keep) for target in patch_targets(targets))


def expected_row_bytes(contents: PatchContents) -> int:
    """Bytes of a patch's rows, scores and selection, where no heads tie at the cut."""
    return sum(target.rows_bytes(target.keep) + 9 * target.heads for target in contents.targets)
