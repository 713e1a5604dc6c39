"""Where the arithmetic of a merge runs.

A backend makes one worker per thread; a worker owns its scratch memory and merges one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from hsa.checkpoint import Role
from hsa.config import MergeConfig
from hsa.dtypes import Array, size
from hsa.errors import BackendUnavailable, RequestError, shown
from hsa.geometry import Geometry
from hsa.layout import Slice
from hsa.option_names import option
from hsa.target import Selection, Target

BACKENDS = ("auto", "cpu", "triton")
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of NVIDIA's and AMD's drivers, and of either under WSL."""

_NUMBERED = re.compile(r"cuda:[0-9]{1,3}")


@dataclass(frozen=True)
class Merged:
    """What came of a target: its heads, the byte ranges that now differ from primary, whether any task vector element
    is nonzero (False for every tensor means that a fine-tune equals base), and how large the task vectors are."""

    selection: Selection
    changed: tuple[tuple[int, int], ...]
    primary_moved: bool
    secondary_moved: bool
    geometry: Geometry


class NotFinite(Exception):
    """NaN or Inf: in a source's tensor where `role` is given, else in the result; `job` is the place in the group."""

    def __init__(self, role: Role | None, head: int | None, job: int = 0) -> None:
        super().__init__(role, head, job)
        self.role, self.head, self.job = role, head, job


@dataclass(frozen=True)
class Job:
    """A target to merge: the bytes of its three tensors and of its result, one-dimensional uint8.

    `out` is `primary` itself where the result replaces it.
    """

    target: Target
    base: Array
    primary: Array
    secondary: Array
    out: Array

    @property
    def in_place(self) -> bool:
        return self.out is self.primary

    def source(self, role: Role) -> Array:
        return {"base": self.base, "primary": self.primary, "secondary": self.secondary}[role]


class Worker(Protocol):
    """One thread's share of a backend."""

    def merge_all(self, jobs: Sequence[Job]) -> list[Merged]:
        """Score, select and merge a group of targets into their outputs. Raises NotFinite."""

    def slice(self, piece: Slice, primary: Array, base: Array | None, out: Array) -> None:
        """Compute a slice of a tensor that is no target into `out`; all uint8. Raises NotFinite."""


class Backend(Protocol):
    """A place to compute: its name and device, how many bytes of targets a worker takes at a time, and workers."""

    name: str
    device: str
    group_bytes: int

    def worker(self) -> Worker: ...

    def empty(self, nbytes: int) -> Array:
        """Host memory for a tensor's bytes, uninitialised uint8."""

    def cost(self, target: Target) -> int:
        """Bytes of host memory that merging a target takes while it lasts."""


def buffers_cost(target: Target) -> int:
    """Bytes of the three tensors and of a result of their size."""
    return target.base.nbytes + 2 * target.primary.nbytes + target.secondary.nbytes


def one_by_one(jobs: Sequence[Job], merge: Callable[[Target, Array, Array, Array, Array], Merged]) -> list[Merged]:
    """`merge_all` for a worker that merges one target at a time."""
    merged = []
    for number, job in enumerate(jobs):
        try:
            merged.append(merge(job.target, job.base, job.primary, job.secondary, job.out))
        except NotFinite as error:
            raise NotFinite(error.role, error.head, number) from None
    return merged


def changed_ranges(target: Target, selected: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Byte ranges of the output tensor that may differ from primary's bytes, in order and apart."""
    rows, columns = target.matrix
    whole = rows * columns * size(target.out_code)
    if target.scale != 1.0 or target.out_code != target.primary.code:
        return ((0, whole),)
    if not selected:
        return ()
    if target.projection.head_axis == 1:
        return ((0, whole),)
    step = whole // target.heads
    starts = [selected[0]] + [after for before, after in pairwise(selected) if after != before + 1]
    stops = [before + 1 for before, after in pairwise(selected) if after != before + 1] + [selected[-1] + 1]
    return tuple((start * step, stop * step) for start, stop in zip(starts, stops, strict=True))


def resolve(name: str, device: str, config: MergeConfig) -> Backend:
    """The backend of that name; only `auto` chooses, and a name that cannot be had is an error.

    Raises BackendUnavailable, or RequestError for an unknown name or numerics that a backend does not offer.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise RequestError(f"{option('backend')} must be one of {', '.join(BACKENDS)}, got {shown(name)}")
    if not isinstance(device, str) or not (device in ("auto", "cpu", "cuda") or _NUMBERED.fullmatch(device)):
        raise RequestError(f"{option('device')} must be the text auto, cpu, cuda or cuda:N, got {shown(device)}")
    on_gpu = name == "triton" or device.startswith("cuda")
    if config.numerics == "reference" and on_gpu:
        raise RequestError(
            f"numerics 'reference' repeats the script's torch operations on the CPU; use {option('backend', 'cpu')}"
        )
    if name == "cpu" and on_gpu:
        raise RequestError(f"backend 'cpu' has no device {shown(device)}; use {option('backend', 'triton')} or auto")
    if on_gpu or (name == "auto" and device == "auto" and config.numerics == "exact" and _sees_gpu()):
        return _triton(device)
    if config.numerics == "reference":
        try:
            from hsa.backends.script import ScriptBackend
        except ImportError as error:
            raise BackendUnavailable(
                f"numerics 'reference' needs torch, which cannot be imported: {error}; install torch, or use numerics "
                f"'exact'"
            ) from error
        return ScriptBackend()
    from hsa.backends.cpu import CpuBackend

    return CpuBackend()


def _sees_gpu() -> bool:
    """Whether a GPU's device file is there and torch can use it: torch, if installed, is imported after the first."""
    if not any(Path(file).exists() for file in GPU_FILES):
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _triton(device: str) -> Backend:
    try:
        from hsa.backends.triton import TritonBackend
    except ImportError as error:
        raise BackendUnavailable(
            f"backend 'triton' cannot be imported: {error}; install triton, or use {option('backend', 'cpu')}"
        ) from error
    return TritonBackend(device)
