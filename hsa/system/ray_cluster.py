"""Connect to a Ray cluster, check its nodes, and report problems in one line.

This module is independent of the work that runs there. Ray is imported only where it is used.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from hsa._version import __version__
from hsa.errors import MachineError, RequestError, listed, shown
from hsa.option_names import option
from hsa.system.plugins import VARIABLE as PLUGINS

ADDRESS = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s/:\[\]]+):(?P<port>[0-9]{1,5})")
"""Pattern for the address of a cluster."""

WORDS = ("auto", "local")
"""Words that Ray accepts in place of an address: a cluster that already runs, or a new one on this machine."""

ANSWER_SECONDS = 10.0
"""The time in which an address must answer. Ray itself would try for minutes."""

NODE_SECONDS = 120.0
"""The time in which a node must start a worker, so that its version can be compared. A slower node is not refused:
each task compares again."""

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The first bytes of a gRPC client: the preface of HTTP/2 and empty settings. A server answers with its own."""

_SETTINGS = 4
"""The type of an HTTP/2 frame that holds settings; it is the frame's fourth byte."""

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
"""Disables usage statistics, and the question about them, unless the environment asks for them."""


@contextmanager
def connected(address: str | None = None) -> Iterator[ModuleType]:
    """The module `ray`, connected to a cluster until the block ends.

    Without an address, it is the cluster that the environment names (`RAY_ADDRESS`) or one that runs on this machine.
    If there is none, Ray is started on this machine and stopped at the end. If the program has called `ray.init`, its
    connection is used and kept. Every node must have the version of hsa that runs here.

    Args:
        address: `HOST:PORT` of a cluster, or `ray://HOST:PORT` of its client server; or None.

    Raises RequestError if Ray is not installed or the address is invalid. Raises MachineError if nothing answers within
    about 10 seconds, if Ray cannot be started, or if a node has no hsa or another version of it.

    Example:
        >>> with connected("head:6379") as ray:
        ...     ray.get(ray.remote(len).remote([1, 2]))
        2
    """
    check_address(address)
    ray = imported()
    if ray.is_initialized():
        _refuse_another(ray, address)
        check_nodes(ray)
        yield ray
        return
    named = address or os.environ.get("RAY_ADDRESS") or None
    _refuse_silent(named)
    with _silenced():
        try:
            _connect(ray, address, named)
            check_nodes(ray)
            yield ray
        finally:
            ray.shutdown()


def check_address(address: str | None) -> None:
    """Raise RequestError unless it is the address of a cluster, or None."""
    if address is None or (isinstance(address, str) and (address in WORDS or ADDRESS.fullmatch(address))):
        return
    raise RequestError(f"{option('ray')} takes HOST:PORT or ray://HOST:PORT, got {shown(address)}")


def check_version(version: str) -> None:
    """Raise MachineError unless this process runs that version of hsa. A task calls it first, with the version of the
    sending process, since a node may have joined after `check_nodes`."""
    if version != __version__:
        raise MachineError(
            f"the node {socket.gethostname()} of the Ray cluster has hsa {__version__}, and {version} runs here; "
            f"install one version on all nodes"
        )


def check_nodes(ray: ModuleType) -> None:
    """Raise MachineError if a node that runs tasks has no hsa, or another version than this process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def version_there() -> str | None:  # a nested function is pickled by value: the node may have no hsa
        try:
            from hsa._version import __version__
        except ImportError:
            return None
        return str(__version__)

    probe = ray.remote(num_cpus=0, max_retries=0)(version_there)
    asked = {
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(): node
        for node in _working_nodes(ray)
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS) if asked else ([], [])
    wrong = []
    for answer in answered:
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError:  # the node is gone, and runs no task
            continue
        if found != __version__:
            wrong.append(f"{asked[answer]['NodeManagerHostname']} has {f'hsa {found}' if found else 'no hsa'}")
    if wrong:
        raise MachineError(
            f"hsa {__version__} runs here, and on the Ray cluster {listed(sorted(set(wrong)))}; install one version on "
            f"all nodes"
        )


def largest_node(ray: ModuleType, resource: str) -> float:
    """Return the most CPUs or GPUs (`resource` is `CPU` or `GPU`) that one node of the cluster has, in use or not."""
    return max((float(node["Resources"].get(resource, 0.0)) for node in ray.nodes() if node["Alive"]), default=0.0)


def _working_nodes(ray: ModuleType) -> list[dict[str, object]]:
    """Return the nodes that run tasks: a head often has no CPU to offer."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def imported() -> ModuleType:
    """Return the module `ray`; RequestError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        name = (error.name or "ray").partition(".")[0]
        raise RequestError(
            f"{option('ray', True)} needs {name}, which is not installed: pip install 'hsa-merge[ray]'"
        ) from error
    return ray  # type: ignore[no-any-return]


def _refuse_another(ray: ModuleType, address: str | None) -> None:
    """Raise RequestError if the program is connected to another cluster than the requested one."""
    if address is None or address in WORDS:
        return
    there = str(ray.get_runtime_context().gcs_address)
    if address != there:
        raise RequestError(
            f"this program is connected to the Ray cluster {there} already, not to {address}; leave the address out, "
            f"or call ray.shutdown() first"
        )


def _refuse_silent(address: str | None) -> None:
    """Raise MachineError if no gRPC server, such as Ray's, answers at an address. Ray itself would try for minutes and
    then end the process."""
    place = ADDRESS.fullmatch(address or "")
    if place is None:
        return
    try:
        _greet(place["host"].strip("[]"), int(place["port"]))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MachineError(
            f"no Ray cluster answers at {address}: {reason}; start one there (ray start --head), or leave the address "
            f"out to use this machine"
        ) from error


def _greet(host: str, port: int) -> None:
    """Raise OSError unless a gRPC server answers within `ANSWER_SECONDS`. With TLS, any server's answer is enough."""
    with socket.create_connection((host, port), ANSWER_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return
        connection.sendall(_HELLO)
        answer = connection.makefile("rb").read(4)
        if len(answer) < 4 or answer[3] != _SETTINGS:
            raise OSError("what listens there is no server of Ray")


def _connect(ray: ModuleType, address: str | None, named: str | None) -> None:
    """Connect, or start Ray here. Ray's changes to this process are undone: its SIGTERM handler, and the variables that
    keep it quiet."""
    carried = _carried_variables()
    added = {name: value for name, value in _QUIET.items() if name not in os.environ}
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    os.environ.update(added)
    try:
        ray.init(
            address,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": carried} if carried else None,
        )
    except SystemExit:  # from Ray's handler, which is active until Ray has started
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    except Exception as error:  # Ray raises bare exceptions, too
        where = "Ray cannot be started on this machine" if named is None else f"no Ray cluster answers at {named}"
        text = " ".join(str(error).split()) or type(error).__name__
        raise MachineError(f"{where}: {text:.500}") from error
    finally:
        for name in added:
            os.environ.pop(name, None)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress Ray's messages about lost nodes on stdout, whatever `log_to_driver` says. Ray has no public switch for
    that, only one that its debugger uses."""
    worker = sys.modules["ray._private.worker"]
    enabled = getattr(worker, "_worker_logs_enabled", True)
    setattr(worker, "_worker_logs_enabled", False)  # noqa: B010
    try:
        yield
    finally:
        setattr(worker, "_worker_logs_enabled", enabled)  # noqa: B010


def _carried_variables() -> dict[str, str]:
    """Return the variables that workers get, so that they import the same modules and plugins as this process."""
    carried = {}
    if path := os.environ.get("PYTHONPATH"):
        carried["PYTHONPATH"] = f"{path}{os.pathsep}${{PYTHONPATH}}"  # ahead of the node's own
    if plugins := os.environ.get(PLUGINS):
        files = (os.path.realpath(os.path.expanduser(each)) for each in plugins.split(os.pathsep) if each)
        carried[PLUGINS] = os.pathsep.join(files)
    return carried
