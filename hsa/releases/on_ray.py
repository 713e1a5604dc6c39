"""Build the entries of a release as Ray tasks, one task per entry.

Ray may run a task again after its node fails, even if the task was finished and only its result was lost. Tasks are
idempotent, because outputs are written atomically, and:

- The next run removes what a killed process left beside the output. A failed node may hold its lock for a while; on a
  network filesystem, until the lease ends. The task waits for the lock.
- If the entry exists by then, it is planned again, so that it is verified instead of refused.

Arguments are pickled explicitly, so that a node without hsa can report that hsa is missing.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hsa._version import __version__
from hsa.errors import HsaError, MachineError, RequestError, shown
from hsa.methods.registry import methods
from hsa.option_names import option, with_current_spelling
from hsa.outputs.provenance import loads
from hsa.releases.entries import EntryReport, build_or_verify, failed
from hsa.releases.index import EntryState, Row
from hsa.releases.plan import PlannedEntry, ReleasePlan, plan_entry
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import staging_path
from hsa.system.ray_cluster import check_address, check_version, connected, imported, largest_node
from hsa.system.staging import lock

CPUS = 4
"""The default number of CPUs that a task requests and of threads that it uses; fewer if no node has that many. A merge
mostly waits for the disk, so more CPUs gain little."""

RETRIES = 3
"""How often Ray repeats an entry after its node or process fails. Limited, because the entry may be the cause."""

LOST_SECONDS = 120.0
"""How long to wait for the lock of a lost node. A server of NFS gives it up after 90 seconds."""

CANCEL_SECONDS = 10.0
"""How long tasks have to clean up when the release is interrupted."""

WATCH_SECONDS = 0.05
"""Seconds between two checks of the tasks."""

_Result = tuple[EntryReport, Row]

_Returned = tuple[EntryReport, EntryState, bytes | None]
"""The result of a task: the report, the state of the entry, and the bytes of its provenance if it is complete. The
parsed provenance is not returned, because it holds objects of its process, such as the model family, which pickling
would copy."""


def check(ray: bool | str) -> None:
    """Raise RequestError if `ray` is neither True nor an address, or if Ray is not installed."""
    if not (ray is True or isinstance(ray, str)):
        raise RequestError(f"{option('ray')} must be True, False or an address HOST:PORT, got {shown(ray)}")
    check_address(_address(ray))
    imported()


def build_all(
    release_plan: ReleasePlan, ray: bool | str, *, overwrite: bool, watch: Callable[[EntryReport], None] | None
) -> list[_Result]:
    """Build or verify all entries on a cluster. Return their reports and rows in the order of the recipe.

    Raises RequestError if no node has the resources of an entry, MachineError if the cluster does not answer or has
    another version of hsa.
    """
    with connected(_address(ray)) as module:
        placed = [_placed(module, planned) for planned in release_plan.entries]
        tasks = _Tasks(module, release_plan.tree, overwrite=overwrite)
        try:
            return tasks.run(placed, watch)
        except BaseException:
            tasks.cancel()
            raise


def _address(ray: bool | str) -> str | None:
    return None if isinstance(ray, bool) else ray


class _Tasks:
    """The tasks of one release."""

    def __init__(self, ray: ModuleType, tree: Path, *, overwrite: bool) -> None:
        self._ray, self._tree, self._overwrite = ray, tree, overwrite
        self._pending: dict[Any, int] = {}

    def run(self, entries: Collection[PlannedEntry], watch: Callable[[EntryReport], None] | None) -> list[_Result]:
        results: dict[int, _Result] = {}
        planned = list(entries)
        build = self._ray.remote(with_current_spelling(_build_there))
        for place, each in enumerate(planned):
            task = build.options(
                num_cpus=each.request.threads,
                num_gpus=1 if _uses_gpu(each) else 0,
                max_retries=RETRIES,
                name=f"hsa release {each.entry.path}",
            )
            self._pending[task.remote(__version__, pickle.dumps(each), str(self._tree), self._overwrite)] = place
        while self._pending:
            ready, _ = self._ray.wait(list(self._pending), timeout=0)
            for task in ready:
                place = self._pending.pop(task)
                results[place] = self._result(task, planned[place])
                if watch is not None:
                    watch(results[place][0])
            if not ready:
                time.sleep(WATCH_SECONDS)  # outside Ray, which would turn a signal into another error
        return [results[place] for place in range(len(planned))]

    def _result(self, task: Any, planned: PlannedEntry) -> _Result:
        errors = self._ray.exceptions
        try:
            report, state, record = self._ray.get(task)
        except errors.RayTaskError as error:
            if isinstance(error.cause, HsaError):
                return failed(planned, str(error.cause), planned.state)
            raise error.cause from error  # a bug, which also ends a release without Ray
        except errors.RayError as error:
            text = " ".join(str(error).split()) or type(error).__name__
            problem = f"its node or its process was lost {RETRIES + 1} times, the last time so: {text:.300}"
            return failed(planned, problem, planned.state)
        return report, _row(planned, state, record)

    def cancel(self) -> None:
        """Cancel all tasks. Running tasks remove their incomplete output."""
        with suppress(Exception):  # if the cluster is gone, so are its tasks
            for task in self._pending:
                self._ray.cancel(task)
            if self._pending:
                self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=CANCEL_SECONDS)


def _row(planned: PlannedEntry, state: EntryState, record: bytes | None) -> Row:
    provenance = None if record is None else loads(record, str(planned.plan.output / PROVENANCE))
    return Row(planned.entry, state, provenance)


# What a task needs ----------------------------------------------------------------------------------------------------


def _placed(ray: ModuleType, planned: PlannedEntry) -> PlannedEntry:
    """The entry with the threads and the backend of its task. Raises RequestError or MachineError if no node can run
    it."""
    request = planned.request
    cpus = int(largest_node(ray, "CPU"))  # 0 if nodes start on demand: their size is not known
    if request.threads is not None and 0 < cpus < request.threads:
        raise RequestError(
            f"each entry asks Ray for {request.threads} CPUs, and no node of the cluster has more than {cpus}; give "
            f"{option('threads', cpus)}"
        )
    request = replace(request, threads=request.threads or min(CPUS, cpus or CPUS))
    if not _uses_gpu(planned):
        return replace(planned, request=replace(request, backend="cpu") if request.backend == "auto" else request)
    if request.device.startswith("cuda:") and request.device != "cuda:0":
        raise RequestError(f"Ray gives each entry a GPU of its own; give {option('device', 'cuda')}")
    if largest_node(ray, "GPU") >= 1:
        return replace(planned, request=request)
    if request.backend == "auto" and request.device == "auto":
        on_cpu = replace(planned.plan, backend="cpu", device="cpu")
        return replace(planned, request=replace(request, backend="cpu"), plan=on_cpu)
    raise MachineError(
        f"{planned.entry.path} asks Ray for a GPU, and no node of the cluster has one; give {option('backend', 'cpu')}"
    )


def _uses_gpu(planned: PlannedEntry) -> bool:
    return planned.plan.backend == "triton"


# In the task ----------------------------------------------------------------------------------------------------------


def _build_there(version: str, data: bytes, tree: str, overwrite: bool) -> _Returned:
    """Build or verify an entry on the node of the task."""
    check_version(version)
    methods()  # loads the plugins, whose settings the plan may contain
    planned: PlannedEntry = pickle.loads(data)
    destination = planned.plan.output
    _wait_for_lost_run(destination)
    report, row = _build_or_verify_again(planned, Path(tree), overwrite=overwrite)
    return report, row.state, None if row.provenance is None else (destination / PROVENANCE).read_bytes()


def _build_or_verify_again(planned: PlannedEntry, tree: Path, *, overwrite: bool) -> _Result:
    """Build or verify an entry. An entry that was missing and exists by now is planned again."""
    if planned.action == "build" and (planned.plan.output / PROVENANCE).is_file():
        try:
            planned = plan_entry(planned.entry, planned.request, tree, overwrite=overwrite)
        except HsaError as error:
            return failed(planned, str(error), planned.state)
    return build_or_verify(planned, None, overwrite=overwrite)


def _wait_for_lost_run(destination: Path) -> None:
    """Wait while another run holds the lock on the output's staging directory. It may be an earlier run of this task on
    a lost node."""
    end = time.monotonic() + LOST_SECONDS
    while time.monotonic() < end:
        try:
            held = lock(staging_path(destination), created=False)
        except OSError:  # it does not exist, or the run will report what is wrong
            return
        if held is not None:
            os.close(held)
            return
        time.sleep(WATCH_SECONDS)
