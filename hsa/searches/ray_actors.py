"""Workers of a search that are Ray actors, one for each GPU of a cluster, or for some cores.

An actor has its own sources, model and features. Sources and audio must be on a filesystem that all machines share, or
be ids on the Hub. Each actor checks that its files are those with which the search began.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hsa._version import __version__
from hsa.errors import MachineError, RequestError
from hsa.option_names import Spelling, current_spelling, option, spelled
from hsa.searches.pools import Event, Known, WorkerPool
from hsa.searches.processes import portable
from hsa.searches.setups import Setup, for_worker, use_threads
from hsa.searches.tasks import Task
from hsa.system.allocator import keep_freed_memory

CORES = 4
"""Cores of an actor that computes on the CPU, if the machines have that many. More cores hardly speed up decoding of
short utterances."""

PATIENCE = 600.0
"""Seconds without any ready actor after which a search ends: a cluster may need minutes to replace a machine."""

POLL = 0.05
"""Seconds between two polls of the actors. Ray's own waiting would swallow a signal that ends the search."""

MOST_LOSSES = 10
"""Number of actors lost with one task at which the search ends. Preemptible machines are lost more often than
processes."""


@dataclass(eq=False)
class _Actor:
    """A worker: Ray's handle, and Ray's reference to the result of its current work."""

    handle: Any
    reference: Any


@dataclass(frozen=True)
class Share:
    """The resources that an actor requests from Ray."""

    cores: int
    gpus: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_cpus": self.cores, "num_gpus": self.gpus}


class RayPool(WorkerPool[_Actor]):
    """Actors on a connected cluster: `count` of them, or as many as the cluster has room for.

    Example:
        >>> with connected(None) as ray:  # doctest: +SKIP
        ...     pool = RayPool(ray, setup, None)
    """

    def __init__(self, ray: Any, setup: Setup, count: int | None) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, self._share = shares(nodes, setup.options.decoding.device, count)
        super().__init__(count, most_losses=MOST_LOSSES)
        self._ray = ray
        self._setup = ray.put(_for_actors(setup, self._share))
        self._spelling = current_spelling()
        self._class = ray.remote(ActorWorker)
        self._seen_alive = time.monotonic()
        self.start()

    def start_worker(self) -> _Actor:
        how = {**self._share.options, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        handle = self._class.options(**how).remote(self._setup, self._share.cores, self._spelling)
        return _Actor(handle, handle.open.remote(versions()))

    def send(self, worker: _Actor, task: Task, cached: Sequence[Known]) -> None:
        worker.reference = worker.handle.work.remote(task, list(cached))

    def events(self, workers: Sequence[_Actor], timeout: float | None) -> list[Event[_Actor]]:
        by_reference = {worker.reference: worker for worker in workers if worker.reference is not None}
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            found = self._finished(list(by_reference))
            if found:
                self._seen_alive = time.monotonic()
                return [self._event(by_reference[reference]) for reference in found]
            self._require_an_actor()
            if end is not None and time.monotonic() >= end:
                return []
            time.sleep(POLL)

    def end_worker(self, worker: _Actor) -> None:
        if self._ray.is_initialized():
            self._ray.kill(worker.handle)

    def _finished(self, references: list[Any]) -> list[Any]:
        """The references whose results are available."""
        try:
            found, _ = self._ray.wait(references, num_returns=1, timeout=0)
        except self._ray.exceptions.RayError as error:
            raise MachineError(f"the Ray cluster is gone: {_last_line(error)}; finished trials are kept") from error
        return list(found)

    def _event(self, worker: _Actor) -> Event[_Actor]:
        reference, worker.reference = worker.reference, None
        try:
            what, value = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # tasks raise nothing: the actor or its machine failed
            if not self._ray.is_initialized():
                raise MachineError(f"the Ray cluster is gone: {_last_line(error)}; finished trials are kept") from error
            return Event(worker, "lost", f"Ray says: {_last_line(error)}")
        return Event(worker, what, value)

    def _require_an_actor(self) -> None:
        """Raise MachineError if no actor has been ready for long: the cluster has no room for one."""
        if any(state.ready for state in self._workers.values()):
            self._seen_alive = time.monotonic()
        elif time.monotonic() - self._seen_alive > PATIENCE:
            raise MachineError(
                f"no actor could be started in {PATIENCE:.0f} s: the Ray cluster has no machine with "
                f"{self._share.cores} free cores and {self._share.gpus} free GPUs; finished trials are kept"
            )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class ActorWorker:
    """The actor on another machine: it loads an evaluator there and runs tasks."""

    def __init__(self, setup: Setup, threads: int, spelling: Spelling) -> None:
        self._setup, self._threads, self._spelling = setup, threads, spelling
        self._evaluator: Any = None

    def open(self, expected: Mapping[str, str]) -> tuple[str, Any]:
        """Check versions and files of this machine and load the evaluator. Returns the message to the pool."""
        use_threads(self._threads)
        keep_freed_memory()
        with spelled(self._spelling):
            try:
                check_versions(expected)
                self._evaluator = self._setup.located().open()
            except Exception as error:
                return "raised", portable(error)
        return "ready", self._evaluator.device

    def work(self, task: Task, cached: Sequence[Known]) -> tuple[str, Any]:
        """Run a task. Returns the message to the pool."""
        with spelled(self._spelling):
            try:
                for known in cached:
                    self._evaluator.add_cached(*known)
                return "done", task.run(self._evaluator)
            except Exception as error:
                return "raised", portable(error)


def versions() -> dict[str, str]:
    """The library versions on which scores depend; those of the extra `search` are `none` if it is not installed."""
    found = {"hsa": __version__}
    for name in ("torch", "transformers", "soxr", "soundfile"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def check_versions(expected: Mapping[str, str]) -> None:
    """Raise MachineError if this process has other versions: a machine may have joined the cluster after its check.

    Example:
        >>> check_versions(versions())
    """
    for name, found in versions().items():
        if found != expected[name]:
            raise MachineError(
                f"the node {socket.gethostname()} of the Ray cluster has {name} {found}, and the search runs with "
                f"{expected[name]}; install one version on all nodes"
            )


def shares(nodes: Sequence[Mapping[str, float]], device: str, count: int | None) -> tuple[int, Share]:
    """The number of actors for a cluster, and the resources that each requests. `nodes` are the resources of its
    machines by their names.

    RequestError if the cluster has less than requested.

    Example:
        >>> shares([{"CPU": 8.0}, {"CPU": 2.0}], "cpu", 2)
        (2, Share(cores=4, gpus=0))
        >>> shares([{"CPU": 32.0, "GPU": 4.0}], "auto", None)
        (4, Share(cores=1, gpus=1))
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device.startswith("cuda") and not gpus:
        raise RequestError(f"the Ray cluster has no GPU; give {option('device', 'cpu')}, or another cluster")
    if gpus and device != "cpu":
        _require(gpus, "GPUs", count)
        return count or gpus, Share(1, 1)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    _require(sum(cores), "cores", count or 1)
    for each in range(min(CORES, max(cores)), 0, -1):
        room = sum(number // each for number in cores)
        if count is None or room >= count or each == 1:
            return count or room, Share(each, 0)
    raise AssertionError  # one core each always fits


def _require(found: int, what: str, count: int | None) -> None:
    if count is not None and found < count:
        raise RequestError(f"the Ray cluster has {found} {what}, fewer than {option('workers', count)} asks for")


def _for_actors(setup: Setup, share: Share) -> Setup:
    """The setup of every actor. Ray shows an actor only its own GPU, which has number 0 there."""
    return for_worker(setup, share.cores, "cuda" if share.gpus else "cpu")
