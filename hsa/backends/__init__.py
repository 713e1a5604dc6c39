"""Where the arithmetic of a merge runs.

A backend makes one worker per thread; a worker owns its scratch memory and merges one tensor at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hsa.checkpoint import Role
from hsa.config import MergeConfig
from hsa.dtypes import Array
from hsa.errors import BackendUnavailable, RequestError
from hsa.layout import Slice
from hsa.target import Selection, Target

BACKENDS = ("auto", "cpu", "triton")


@dataclass(frozen=True)
class Merged:
    """What came of a target: its heads, the byte ranges that now differ from primary, and whether any task
    vector element is nonzero (False for every tensor means that a fine-tune equals base)."""

    selection: Selection
    changed: tuple[tuple[int, int], ...]
    primary_moved: bool
    secondary_moved: bool


class NotFinite(Exception):
    """NaN or Inf: in a source's tensor where `role` is given, else in the result of the arithmetic."""

    def __init__(self, role: Role | None, head: int | None) -> None:
        super().__init__(role, head)
        self.role, self.head = role, head


class Worker(Protocol):
    """One thread's share of a backend. Buffers are one-dimensional uint8 arrays of whole tensors or slices."""

    def merge(self, target: Target, base: Array, primary: Array, secondary: Array, out: Array) -> Merged:
        """Score, select and merge a target into `out`, which may be `primary` itself. Raises NotFinite."""

    def slice(self, piece: Slice, primary: Array, base: Array | None, out: Array) -> None:
        """Compute a slice of a tensor that is no target into `out`. Raises NotFinite."""


class Backend(Protocol):
    """A place to compute: its name, its device, and workers."""

    name: str
    device: str

    def worker(self) -> Worker: ...


def resolve(name: str, device: str, config: MergeConfig) -> Backend:
    """The backend of that name; only `auto` chooses, and a name that cannot be had is an error.

    Raises BackendUnavailable, or RequestError for an unknown name or numerics that a backend does not offer.
    """
    if name not in BACKENDS:
        raise RequestError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton":
        if config.numerics == "reference":
            raise RequestError(
                "numerics 'reference' repeats the script's torch operations on the CPU; use --backend cpu"
            )
        raise BackendUnavailable("backend 'triton' is not part of this version yet; use --backend cpu or auto")
    if device not in ("auto", "cpu"):
        if device == "cuda" or (device.startswith("cuda:") and device[5:].isdigit()):
            raise BackendUnavailable(
                f"device {device!r} needs backend 'triton', which is not part of this version yet; use --device cpu"
            )
        raise RequestError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if config.numerics == "reference":
        from hsa.backends.script import ScriptBackend

        return ScriptBackend()
    from hsa.backends.cpu import CpuBackend

    return CpuBackend()
