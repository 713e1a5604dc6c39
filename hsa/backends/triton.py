"""Exact numerics on a GPU: groups of targets go to the device, are merged in one launch, and what changed comes back.

Each worker has a stream of its own, and page-locked host memory that files are read into and results come back to,
so that the copies of one worker run beside the kernels of another. Under Triton's interpreter (TRITON_INTERPRET=1,
set before this module is imported) the same kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch

from hsa.backends.base import NotFinite, TargetBuffers, buffers_cost, changed_ranges
from hsa.backends.cpu import CpuWorker, Scored
from hsa.backends.resident import TargetBytes, may_overflow, not_finite_target, write_errors
from hsa.backends.torch_geometry import target_geometry
from hsa.errors import BackendUnavailable, shown
from hsa.kernels.launch import apply_heads, faults, fused_merge, score_heads
from hsa.kernels.projections import KernelInputError, Projections, doubt, interpreted
from hsa.methods.hsa import ROLES
from hsa.methods.selection import selection_of
from hsa.option_names import option
from hsa.planning.file_layout import Slice
from hsa.planning.outcome import MergedTarget
from hsa.planning.target import Target
from hsa.sources.roles import Role
from hsa.system.dtypes import NAMES, Array

GROUP_BYTES = 16 << 20
"""Bytes of primary's targets that a worker takes at a time: enough work for a launch, and bounded memory."""

KEPT_TABLES = 4
"""Sets of output tensors whose tables a resident merger remembers, and keeps alive."""

_ROLE_OF: dict[str, Role] = {role: role for role in ROLES}

_INTERPRETER = threading.Lock()
"""Triton's interpreter keeps its state in globals: one launch at a time."""


class TritonBackend:
    """Exact numerics in Triton, on a CUDA or ROCm device or in the interpreter.

    Raises BackendUnavailable when the device cannot be had; `device` is auto, cpu (the interpreter), cuda or cuda:N.
    """

    name = "triton"
    group_bytes = GROUP_BYTES

    def __init__(self, device: str) -> None:
        self._device = _resolve_device(device)
        self.device = str(self._device)

    def worker(self) -> TritonWorker:
        return TritonWorker(self._device)

    def empty(self, nbytes: int) -> Array:
        """Host memory, page-locked where there is a device to copy to."""
        buffer: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda").numpy()
        return buffer

    def cost(self, target: Target) -> int:
        return buffers_cost(target)


class TritonWorker:
    """One thread's stream on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._cpu = CpuWorker()
        self._differs: dict[Role, bool] = {"primary": False, "secondary": False}

    def slice(self, piece: Slice, primary: Array, base: Array | None, out: Array) -> None:
        """Compute a slice of a tensor that is no target, on the CPU: it passes through its memory anyway."""
        self._cpu.slice(piece, primary, base, out)

    @torch.no_grad()
    def merge_all(self, jobs: Sequence[TargetBuffers]) -> list[MergedTarget]:
        """Score, select and merge a group of targets in one launch for each combination of dtypes."""
        with self._exclusive():
            sources = {role: [self._upload(job, role) for job in jobs] for role in ROLES}
            out = [
                primary
                if job.in_place
                else torch.empty(job.target.shape, dtype=_dtype(job.target.out_code), device=self._device)
                for job, primary in zip(jobs, sources["primary"], strict=True)
            ]
            for role in self._differs:
                self._differs[role] = self._differs[role] or any(map(_differ, sources["base"], sources[role]))
            targets = [job.target for job in jobs]
            # Taken before the merge, which may overwrite primary.
            geometries = list(map(target_geometry, targets, sources["base"], sources["primary"], sources["secondary"]))
            projections = _make_projections(sources, out, targets)
            scores, selection = fused_merge(
                projections,
                keep=[target.keep for target in targets],
                c1=[target.c1 for target in targets],
                c2=[target.c2 for target in targets],
                scale=targets[0].scale,
            )
            squared, selected = scores.tolist(), selection.tolist()
            for fault in faults(projections):
                raise NotFinite(_ROLE_OF.get(fault.where), fault.head, fault.projection)
            merged = []
            for number, target in enumerate(targets):
                heads = tuple(head for head in range(target.heads) if selected[number][head])
                head_selection = selection_of(squared[number][: target.heads], heads)
                merged.append(
                    MergedTarget(
                        head_selection,
                        changed_ranges(target, heads),
                        self._differs["primary"],
                        self._differs["secondary"],
                        geometries[number],
                    )
                )
            for job, tensor, result in zip(jobs, out, merged, strict=True):
                self._download(job, tensor, result)
            if self._stream is not None:
                self._stream.synchronize()
        return merged

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        stream = torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
        with _INTERPRETER if interpreted() else nullcontext(), stream:
            yield

    def _upload(self, job: TargetBuffers, role: Role) -> torch.Tensor:
        ref = job.target.ref(role)
        host = torch.from_numpy(job.source(role)).view(_dtype(ref.code)).view(job.target.shape)
        return host.to(self._device, non_blocking=True)

    def _download(self, job: TargetBuffers, tensor: torch.Tensor, merged: MergedTarget) -> None:
        """The ranges that changed, or everything where the output is no copy of primary yet."""
        host, device = torch.from_numpy(job.out), tensor.view(-1).view(torch.uint8)
        if job.in_place and self._device.type == "cpu":
            return
        for start, stop in merged.changed if job.in_place else ((0, job.out.size),):
            host[start:stop].copy_(device[start:stop], non_blocking=True)


class TritonResident:
    """Targets in a GPU's memory: scored in one launch, then one launch for every candidate.

    Writing into tensors of the same device allocates nothing there after the first call with these tensors.
    """

    def __init__(self, data: TargetBytes, targets: Sequence[Target], device: str) -> None:
        self._device = _resolve_device(device)
        self._sources = {
            role: [
                torch.from_numpy(data[role][target.projection.name])
                .view(_dtype(target.ref(role).code))
                .view(target.shape)
                for target in targets
            ]
            for role in ROLES
        }
        self._sources = {
            role: [tensor.to(self._device) for tensor in tensors] for role, tensors in self._sources.items()
        }
        self._tables: dict[tuple[tuple[int, torch.dtype], ...], Projections] = {}
        self._results: dict[tuple[torch.dtype, ...], list[torch.Tensor]] = {}
        self._scores: torch.Tensor | None = None
        self._squared: list[tuple[float, ...]] = []
        self._largest_base: list[float] = []
        self._lock = threading.Lock()  # tables, buffers and workspaces are those of one write

    # Everything that is kept is made and written in inference mode, whatever mode a caller is in.
    @torch.inference_mode()
    def score(self, targets: Sequence[Target]) -> list[Scored]:
        with _INTERPRETER if interpreted() else nullcontext():
            projections = self._projections(targets, self._sources["primary"])
            self._scores = score_heads(projections).clone()
            _raise_faults(projections, targets)
            rows = self._scores.tolist()
        self._largest_base = [float(base.abs().amax()) for base in self._sources["base"]]
        self._squared = [tuple(row[: target.heads]) for row, target in zip(rows, targets, strict=True)]
        sources = self._sources["base"], self._sources["primary"], self._sources["secondary"]
        return [
            Scored(
                squared,
                _differ(base, primary),
                _differ(base, secondary),
                target_geometry(target, base, primary, secondary),
            )
            for target, squared, base, primary, secondary in zip(targets, self._squared, *sources, strict=True)
        ]

    @torch.inference_mode()
    def write(self, targets: Sequence[Target], out: Sequence[torch.Tensor]) -> None:
        places = [tensor.detach() for tensor in out]
        same_device = all(place.device == self._device and place.is_contiguous() for place in places)
        with self._lock:
            direct = same_device and not any(map(self._may_overflow, targets, range(len(targets)), places))
            written = places if direct else self._buffers(places)
            projections = self._projections(targets, written)
            with write_errors() if direct else nullcontext():
                self._launch(projections, targets)
            with write_errors():
                for place, tensor in zip(places, written, strict=True):
                    if place is not tensor:
                        place.copy_(tensor)
                # What a kernel wrote, autograd does not see by itself.
                torch.autograd.graph.increment_version(list(out))

    def _may_overflow(self, target: Target, number: int, place: torch.Tensor) -> bool:
        return may_overflow(self._squared[number], self._largest_base[number], target.scale, place.dtype)

    def _launch(self, projections: Projections, targets: Sequence[Target]) -> None:
        assert self._scores is not None
        with _INTERPRETER if interpreted() else nullcontext():
            apply_heads(
                projections,
                self._scores,
                keep=[target.keep for target in targets],
                c1=[target.c1 for target in targets],
                c2=[target.c2 for target in targets],
                scale=targets[0].scale,
            )
            _raise_faults(projections, targets)

    def _buffers(self, places: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of this device for results that go elsewhere, made once for each row of dtypes."""
        dtypes = tuple(place.dtype for place in places)
        if dtypes not in self._results:
            self._results[dtypes] = [torch.empty(p.shape, dtype=p.dtype, device=self._device) for p in places]
        return self._results[dtypes]

    def _projections(self, targets: Sequence[Target], out: list[torch.Tensor]) -> Projections:
        """The tables for these outputs, kept for the last few sets of them."""
        key = tuple((tensor.data_ptr(), tensor.dtype) for tensor in out)
        if key not in self._tables:
            while len(self._tables) >= KEPT_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = _make_projections(self._sources, out, targets)
        return self._tables[key]


def _make_projections(
    sources: Mapping[Role, Sequence[torch.Tensor]], out: Sequence[torch.Tensor], targets: Sequence[Target]
) -> Projections:
    """The tables of a launch. Raises BackendUnavailable for what the kernels have no room for, such as many heads."""
    try:
        return Projections(
            sources["base"],
            sources["primary"],
            sources["secondary"],
            out,
            heads=[target.heads for target in targets],
            head_axis=[target.projection.head_axis for target in targets],
        )
    except KernelInputError as error:
        raise BackendUnavailable(
            f"backend 'triton' cannot merge these targets: {error}; use {option('backend', 'cpu')}"
        ) from error


def _raise_faults(projections: Projections, targets: Sequence[Target]) -> None:
    for fault in faults(projections):
        error = NotFinite(_ROLE_OF.get(fault.where), fault.head, fault.projection)
        raise not_finite_target(error, targets[fault.projection])


def _dtype(code: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, NAMES[code])
    return dtype


def _differ(base: torch.Tensor, tuned: torch.Tensor) -> bool:
    return bool(torch.ne(base, tuned).any())


def _resolve_device(device: str) -> torch.device:
    if interpreted():
        if device not in ("auto", "cpu"):
            raise BackendUnavailable(
                f"device {shown(device)}: with TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')} the kernels run "
                f"on the CPU; unset it, or use {option('device', 'cpu')}"
            )
        return torch.device("cpu")
    if device == "cpu":
        raise BackendUnavailable(f"backend 'triton' runs on a GPU; use {option('backend', 'cpu')} for the CPU")
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            f"backend 'triton', device {shown(device)}: torch {torch.__version__} finds no GPU; use "
            f"{option('backend', 'cpu')}, or a CUDA or ROCm build of torch on a machine with a GPU"
        )
    resolved = torch.device("cuda" if device == "auto" else device)
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise BackendUnavailable(f"device {shown(device)}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    resolved = torch.device("cuda", index)
    if why := doubt(resolved):
        raise BackendUnavailable(f"backend 'triton', device {shown(device)}: {why}; use {option('backend', 'cpu')}")
    return resolved
