"""A patch file while it is written: created with space for its header, filled with rows, and completed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hsa.methods.tensors import Outcome, TensorRecord, TensorTask
from hsa.outputs import patch_format
from hsa.outputs.patch_format import PatchContents
from hsa.outputs.recording import longest_records, new_record, target_digest, tensors_digest
from hsa.planning.tasks import Targets
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.dtypes import size
from hsa.system.staging import StagingDirectory


@dataclass(frozen=True)
class FinishedPatch:
    """A finished patch: its contents, outcomes in the order of the targets, and size in bytes."""

    contents: PatchContents
    outcomes: tuple[Outcome, ...]
    nbytes: int


@dataclass
class OpenPatch:
    """A patch while it is written. `stop` is the offset at which the rows of the next target begin."""

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
        record = new_record(
            targets.method, targets.settings, sources, parameters, longest_records(targets.method, targets.tasks)
        )
        contents = PatchContents(record, files)
        header = patch_format.header_size(contents)
        path = staging.file(name)
        fd = fsio.create(path, header + expected_bytes(targets))
        direct = fsio.reopen_direct(path)
        return cls(path, contents, targets.tasks, fd, direct, header, header, staging.sync, tally)

    def close(self) -> None:
        os.close(self.fd)
        if self.direct is not None:
            os.close(self.direct)

    def write(self, offset: int, view: memoryview) -> None:
        """Write rows at an offset, with direct I/O if they begin and end at a page boundary."""
        with fsio.map_write_errors(self.path, len(view)):
            aligned = not (offset % fsio.ALIGNMENT or len(view) % fsio.ALIGNMENT)
            if self.direct is not None and aligned and fsio.write_direct(self.direct, view, offset, self.tally):
                return
            fsio.write_cached(self.fd, view, offset, self.tally, writeback=self.sync)

    def complete(self, norms: Mapping[str, Any]) -> FinishedPatch:
        """Write the header, which is only known after the last rows. `norms` has canonical names as keys."""
        outcomes = [self.outcomes[task.name] for task in self.tasks]
        record = self.contents.record
        method, targets = record.method, tuple(map(TensorRecord.of, outcomes))
        sources = {
            role: replace(source, targets=target_digest(role, outcomes)) for role, source in record.sources.items()
        }
        contents = PatchContents(
            replace(record, targets=targets, sources=sources),
            self.contents.files,
            distances=method.distances([(target, norms[target.canonical]) for target in targets]),
        )
        counts = {target.name: len(contents.touched(target)) for target in targets}
        entries = patch_format.tensor_entries(contents, counts)
        digest = tensors_digest([(entry.name, entry.code, entry.shape, self.digests[entry.name]) for entry in entries])
        contents = replace(contents, tensors=digest)
        raw = patch_format.render_header(contents, self.header_bytes)
        with fsio.map_write_errors(self.path, self.stop):
            fsio.write_all(self.fd, memoryview(raw), 0, self.tally)
            os.ftruncate(self.fd, self.stop)
            if self.sync:
                fsio.sync(self.fd)
        return FinishedPatch(contents, tuple(outcomes), self.stop)


def expected_bytes(targets: Targets) -> int:
    """An estimate of the bytes of a patch's rows, assuming that no heads tie at the cut."""
    return sum(
        math.prod(task.shape)
        // task.partition.groups
        * targets.method.touched_count(task, targets.settings)
        * size(task.out_code)
        for task in targets.tasks
    )
