"""Work on a cluster of Ray: connect to it, check its nodes, and say what went wrong in one line.

Nothing here knows what is run. Ray is imported where it is used alone.
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
"""Where a cluster can be reached."""

WORDS = ("auto", "local")
"""What Ray takes in the place of an address: a cluster that runs already, or one of its own on this machine."""

ANSWER_SECONDS = 10.0
"""How long an address may take to answer. Ray itself would try for minutes."""

NODE_SECONDS = 120.0
"""How long a node may take to start a worker, whose version is then compared. A node that is slower is not refused:
each task compares again."""

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of gRPC begins: with the preface of HTTP/2 and empty settings. A server answers with its own."""

_SETTINGS = 4
"""The kind of a frame of HTTP/2 that holds settings; it stands in the fourth byte."""

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
"""No usage statistics, and no question about them, unless the environment asks for them."""


@contextmanager
def connected(address: str | None = None) -> Iterator[ModuleType]:
    """The module `ray`, connected to a cluster until the block ends.

    Without an address that is the cluster that the environment names (`RAY_ADDRESS`) or one that runs on this machine;
    where there is none, Ray is started on this machine and stopped at the end. A program that has called `ray.init`
    keeps its connection, which is used. Every node must have the version of hsa that runs here.

    Args:
        address: `HOST:PORT` of a cluster, or `ray://HOST:PORT` of its client server; or None.

    Raises RequestError where Ray is not installed or the address is none, and MachineError where nothing answers within
    about 10 seconds, where Ray cannot be started, or where a node has no hsa or another version of it.

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
    """RequestError unless it is an address of a cluster, or None."""
    if address is None or (isinstance(address, str) and (address in WORDS or ADDRESS.fullmatch(address))):
        return
    raise RequestError(f"{option('ray')} takes HOST:PORT or ray://HOST:PORT, got {shown(address)}")


def check_version(version: str) -> None:
    """MachineError unless this process runs that version of hsa. A task calls it first, with the version of the
    process that sent it, for a node may have joined since `check_nodes`."""
    if version != __version__:
        raise MachineError(
            f"the node {socket.gethostname()} of the Ray cluster has hsa {__version__}, and {version} runs here; "
            f"install one version on all nodes"
        )


def check_nodes(ray: ModuleType) -> None:
    """MachineError where a node that runs tasks has no hsa, or another version than this process."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def version_there() -> str | None:  # a function inside a function travels by value: the node may have no hsa
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
    """The most CPUs or GPUs (`resource` is `CPU` or `GPU`) that one node of the cluster has, in use or not."""
    return max((float(node["Resources"].get(resource, 0.0)) for node in ray.nodes() if node["Alive"]), default=0.0)


def _working_nodes(ray: ModuleType) -> list[dict[str, object]]:
    """The nodes that run tasks: a head often has no CPU to give."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def imported() -> ModuleType:
    """The module `ray`. RequestError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        name = (error.name or "ray").partition(".")[0]
        raise RequestError(
            f"{option('ray', True)} needs {name}, which is not installed: pip install 'hsa-merge[ray]'"
        ) from error
    return ray  # type: ignore[no-any-return]


def _refuse_another(ray: ModuleType, address: str | None) -> None:
    """RequestError where the program is connected to another cluster than is asked for."""
    if address is None or address in WORDS:
        return
    there = str(ray.get_runtime_context().gcs_address)
    if address != there:
        raise RequestError(
            f"this program is connected to the Ray cluster {there} already, not to {address}; leave the address out, "
            f"or call ray.shutdown() first"
        )


def _refuse_silent(address: str | None) -> None:
    """MachineError where no server of gRPC, such as Ray's, answers at an address. Ray itself would try for minutes and
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
    """OSError unless a server of gRPC answers within `ANSWER_SECONDS`; with TLS, unless any server does."""
    with socket.create_connection((host, port), ANSWER_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return
        connection.sendall(_HELLO)
        answer = connection.makefile("rb").read(4)
        if len(answer) < 4 or answer[3] != _SETTINGS:
            raise OSError("what listens there is no server of Ray")


def _connect(ray: ModuleType, address: str | None, named: str | None) -> None:
    """Connect, or start Ray here. What Ray changes in this process is put back: its handler of SIGTERM, and variables
    that keep it quiet."""
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
    except SystemExit:  # of Ray's handler, which is in force until Ray has started
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
    """Keep from stdout what Ray prints there of nodes that are lost, whatever `log_to_driver` says. It has a switch for
    that, which its debugger uses, and no public one."""
    worker = sys.modules["ray._private.worker"]
    enabled = getattr(worker, "_worker_logs_enabled", True)
    setattr(worker, "_worker_logs_enabled", False)  # noqa: B010
    try:
        yield
    finally:
        setattr(worker, "_worker_logs_enabled", enabled)  # noqa: B010


def _carried_variables() -> dict[str, str]:
    """Variables that workers get, so that they import the same modules and the same plugins as this process."""
    carried = {}
    if path := os.environ.get("PYTHONPATH"):
        carried["PYTHONPATH"] = f"{path}{os.pathsep}${{PYTHONPATH}}"  # before that of the node
    if plugins := os.environ.get(PLUGINS):
        files = (os.path.realpath(os.path.expanduser(each)) for each in plugins.split(os.pathsep) if each)
        carried[PLUGINS] = os.pathsep.join(files)
    return carried
