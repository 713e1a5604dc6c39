"""Write the patch files of many candidates in one pass: the touched rows of each target go into every candidate's file.

The offset of a target's rows in a file is known once all targets before it are decided.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from hsa.engine.open_patch import FinishedPatch, OpenPatch, expected_bytes
from hsa.engine.target_pass import Candidate, TargetDecision, TargetPass
from hsa.errors import RequestError
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.outputs.patch_format import patch_obstacles
from hsa.planning.tasks import Targets
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.digests import digest_of
from hsa.system.dtypes import BITS, Array
from hsa.system.memory import PeakMemory
from hsa.system.staging import StagingDirectory


@dataclass(frozen=True)
class PatchSpec:
    """One patch to make: its targets under its settings, and the name of its file in the staging directory."""

    targets: Targets
    name: str


def check_patchable(settings: Settings, sources: Sources) -> None:
    """Raise RequestError if a patch cannot represent the merge; see `patch_obstacles`."""
    method, anchor = method_named(settings.method), sources.anchor_checkpoint
    for why in patch_obstacles(method, settings, anchor.role, anchor.kind):
        raise RequestError(f"a patch holds the rows of merged heads alone, and {why}; write a whole checkpoint")


def write_patches(
    points: Sequence[PatchSpec],
    sources: Sources,
    parameters: Mapping[str, Any],
    files: Mapping[str, str],
    staging: StagingDirectory,
    threads: int,
    tally: fsio.Tally,
    memory: PeakMemory,
    progress: Callable[[int, int], None] | None = None,
) -> list[FinishedPatch]:
    """Write a patch for every point into the staging directory, and fsync it if the directory is set to sync.

    `parameters` is what a merge's provenance records besides the method's own settings. `files` are the digests of the
    small files that the merge would write. `progress` gets the bytes done and the total. Raises as a merge does.
    """
    with ExitStack() as stack:
        writer = _PatchWriter()
        for point in points:
            file = OpenPatch.create(point.targets, point.name, sources, parameters, files, staging, tally)
            stack.callback(file.close)
            writer.files.append(file)
        total = sum(expected_bytes(point.targets) for point in points)

        def watch() -> None:
            memory.sample()
            if progress is not None:
                progress(min(writer.done, total), total)

        candidates = [Candidate(number, point.targets) for number, point in enumerate(points)]
        TargetPass(candidates, sources, writer, _file_order).run(threads, watch)
        return [file.complete(writer.norms) for file in writer.files]


class _PatchWriter:
    """Writes rows into the candidates' patch files, which are numbered like the candidates."""

    def __init__(self) -> None:
        self.files: list[OpenPatch] = []
        self.norms: dict[str, Any] = {}
        self.done = 0
        self._offsets: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()

    def decided(self, decisions: Sequence[TargetDecision], norms: Any) -> None:
        """Assign the rows of a target their offsets in every file."""
        for each in decisions:
            file, name = self.files[each.candidate], each.outcome.task.name
            self.norms[name] = norms
            file.outcomes[name] = each.outcome
            self._offsets[each.candidate, name] = file.stop
            file.stop += each.rows_bytes

    def store(self, decision: TargetDecision, rows: Array) -> None:
        file, task = self.files[decision.candidate], decision.outcome.task
        file.digests[task.stored.name] = digest_of(rows.data)
        file.write(self._offsets[decision.candidate, task.name], rows.data)
        with self._lock:
            self.done += rows.nbytes


def _file_order(task: TensorTask) -> tuple[int, bool, int, int]:
    """The sort key that gives `PatchContents.in_file_order` for targets in the order of the anchor's files."""
    ref = task.sources[task.anchor]
    return -BITS[task.out_code], len(task.shape) == 1, ref.shard, ref.offset
