"""Exact numerics on a GPU: targets are copied to the device in groups, merged in one launch, and the changes copied
back.

Each worker has a stream of its own, and page-locked host memory for what is read from files and for results, so that
the copies of one worker overlap with the kernels of another. Under Triton's interpreter (TRITON_INTERPRET=1, set before
this module is imported) the same kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from hsa.backends.base import Merged, NotFinite, TaskBuffers, buffers_cost, changed_ranges
from hsa.backends.cpu import CpuWorker
from hsa.backends.resident import ResultBounds, TargetBytes, not_finite_target, write_errors
from hsa.backends.torch_geometry import target_geometry
from hsa.errors import BackendUnavailable, shown
from hsa.kernels.launch import apply_heads, faults, fused_merge, score_heads
from hsa.kernels.projections import KernelInputError, Projections, doubt, interpreted
from hsa.methods.base import BASE, Method
from hsa.methods.copied import untouched_groups
from hsa.methods.hsa import PRIMARY, ROLES, SECONDARY, Hsa, HsaSettings
from hsa.methods.hsa_decision import HeadScores, decision_of
from hsa.methods.hsa_formula import all_settings_of
from hsa.methods.selection import selection_of
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.option_names import option
from hsa.planning.file_layout import Computed
from hsa.planning.tasks import Targets
from hsa.system.dtypes import NAMES, Array

GROUP_BYTES = 16 << 20
"""Bytes of primary's targets that a worker takes at a time: enough work for a launch, and bounded memory."""

KEPT_TABLES = 4
"""Sets of output tensors whose tables a resident merger caches, and thereby keeps alive."""

_ROLE_OF = {role: role for role in ROLES}

_INTERPRETER = threading.Lock()
"""Triton's interpreter keeps its state in globals: one launch at a time."""


class TritonBackend:
    """Exact numerics in Triton, on a CUDA or ROCm device or in the interpreter.

    Raises BackendUnavailable if the device is not available; `device` is auto, cpu (the interpreter), cuda or cuda:N.
    """

    name = "triton"
    group_bytes = GROUP_BYTES

    def __init__(self, device: str) -> None:
        self._device = _resolve_device(device)
        self.device = str(self._device)

    def worker(self, method: Method[Any, Any], settings: Settings) -> TritonWorker:
        assert isinstance(method, Hsa) and isinstance(settings, HsaSettings)
        return TritonWorker(self._device, method, settings)

    def empty(self, nbytes: int) -> Array:
        """Host memory, page-locked where there is a device to copy to."""
        buffer: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda").numpy()
        return buffer

    def cost(self, task: TensorTask) -> int:
        return buffers_cost(task)


class TritonWorker:
    """One thread's stream on a device, for HSA."""

    def __init__(self, device: torch.device, method: Hsa, settings: HsaSettings) -> None:
        self._device, self._settings = device, settings
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._cpu = CpuWorker(method, settings)
        self._differs = {PRIMARY: False, SECONDARY: False}

    def slice(self, piece: Computed, sources: Mapping[str, Array], out: Array, decision: Any, recorded: Any) -> None:
        """Compute a slice of a tensor that is not a target, on the CPU, whose memory it passes through anyway."""
        self._cpu.slice(piece, sources, out, decision, recorded)

    def measure_slice(self, piece: Computed, sources: Mapping[str, Array], number: int, so_far: Any) -> list[Any]:
        return self._cpu.measure_slice(piece, sources, number, so_far)

    @torch.no_grad()
    def merge_all(self, jobs: Sequence[TaskBuffers]) -> list[Merged]:
        """Score, select and merge a group of targets in one launch for each combination of dtypes."""
        if any(job.recorded is not None for job in jobs):
            return self._cpu.merge_all(jobs)
        with self._exclusive():
            sources = {role: [self._upload(job, role) for job in jobs] for role in ROLES}
            out = [
                primary
                if job.in_place
                else torch.empty(job.task.shape, dtype=_dtype(job.task.out_code), device=self._device)
                for job, primary in zip(jobs, sources[PRIMARY], strict=True)
            ]
            for role in self._differs:
                self._differs[role] = self._differs[role] or any(map(_differ, sources[BASE], sources[role]))
            tasks = [job.task for job in jobs]
            # Taken before the merge, which may overwrite primary.
            geometries = list(map(target_geometry, tasks, sources[BASE], sources[PRIMARY], sources[SECONDARY]))
            projections = _make_projections(sources, out, tasks)
            planned = all_settings_of(tasks, self._settings)
            scores, selection = fused_merge(
                projections,
                keep=[keep for keep, _ in planned],
                c1=[c1 for _, (c1, _) in planned],
                c2=[c2 for _, (_, c2) in planned],
                scale=self._settings.attention_scale,
            )
            squared, selected = scores.tolist(), selection.tolist()
            for fault in faults(projections):
                raise NotFinite(_ROLE_OF.get(fault.where), fault.head, fault.projection)
            merged = []
            for task, task_squared, flags, geometry in zip(tasks, squared, selected, geometries, strict=True):
                heads = task.partition.groups
                scored = HeadScores(tuple(task_squared[:heads]), tuple(self._differs.values()), geometry)
                merged_heads = tuple(head for head in range(heads) if flags[head])
                decision = decision_of(task, self._settings, selection_of(scored.squared, merged_heads), scored)
                merged.append(
                    Merged(
                        decision,
                        changed_ranges(task, untouched_groups(self._cpu.method, task.partition.groups, decision)),
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

    def _upload(self, job: TaskBuffers, role: str) -> torch.Tensor:
        code = job.task.sources[role].code
        host = torch.from_numpy(job.sources[role]).view(_dtype(code)).view(job.task.shape)
        return host.to(self._device, non_blocking=True)

    def _download(self, job: TaskBuffers, tensor: torch.Tensor, merged: Merged) -> None:
        """Copy back the changed ranges, or everything if the output is not yet a copy of primary."""
        host, device = torch.from_numpy(job.out), tensor.view(-1).view(torch.uint8)
        if job.in_place and self._device.type == "cpu":
            return
        for start, stop in merged.changed if job.in_place else ((0, job.out.size),):
            host[start:stop].copy_(device[start:stop], non_blocking=True)


class TritonResident:
    """HSA's targets in a GPU's memory: scored in one launch, then one launch for every candidate.

    Writing into tensors of the same device allocates nothing there after the first call with these tensors.
    """

    def __init__(self, targets: Targets, data: TargetBytes, device: str) -> None:
        self._device, self._targets, self._tasks = _resolve_device(device), targets, targets.tasks
        self._sources = {
            role: [
                torch.from_numpy(data[role][task.name])
                .view(_dtype(task.sources[role].code))
                .view(task.shape)
                .to(self._device)
                for task in self._tasks
            ]
            for role in ROLES
        }
        self._tables: dict[tuple[tuple[int, torch.dtype], ...], Projections] = {}
        self._results: dict[tuple[torch.dtype, ...], list[torch.Tensor]] = {}
        self._scores: torch.Tensor | None = None
        self._measured: list[HeadScores] = []
        self._bounds = ResultBounds(targets, [], [])
        self._lock = threading.Lock()  # tables, buffers and workspaces serve one write at a time

    # All cached tensors are created and written in inference mode, whatever mode a caller is in.
    @torch.inference_mode()
    def measure(self) -> list[HeadScores]:
        with _INTERPRETER if interpreted() else nullcontext():
            projections = self._projections(self._sources[PRIMARY])
            self._scores = score_heads(projections).clone()
            _raise_faults(projections, self._tasks)
            rows = self._scores.tolist()
        sources = self._sources[BASE], self._sources[PRIMARY], self._sources[SECONDARY]
        self._measured = [
            HeadScores(
                tuple(row[: task.partition.groups]),
                (_differ(base, one), _differ(base, two)),
                target_geometry(task, base, one, two),
            )
            for task, row, base, one, two in zip(self._tasks, rows, *sources, strict=True)
        ]
        largest = [{BASE: float(base.abs().amax())} for base in self._sources[BASE]]
        self._bounds = ResultBounds(self._targets, self._measured, largest)
        return self._measured

    @torch.inference_mode()
    def write(self, settings: Settings, out: Sequence[torch.Tensor]) -> None:
        assert isinstance(settings, HsaSettings)
        places = [tensor.detach() for tensor in out]
        same_device = all(place.device == self._device and place.is_contiguous() for place in places)
        with self._lock:
            direct = same_device and not self._bounds.overflow_risks(settings, places)
            written = places if direct else self._buffers(places)
            projections = self._projections(written)
            with write_errors() if direct else nullcontext():
                self._launch(projections, settings)
            with write_errors():
                for place, tensor in zip(places, written, strict=True):
                    if place is not tensor:
                        place.copy_(tensor)
                # Autograd does not notice by itself what a kernel wrote.
                torch.autograd.graph.increment_version(list(out))

    def _launch(self, projections: Projections, settings: HsaSettings) -> None:
        assert self._scores is not None
        planned = all_settings_of(self._tasks, settings)
        with _INTERPRETER if interpreted() else nullcontext():
            apply_heads(
                projections,
                self._scores,
                keep=[keep for keep, _ in planned],
                c1=[c1 for _, (c1, _) in planned],
                c2=[c2 for _, (_, c2) in planned],
                scale=settings.attention_scale,
            )
            _raise_faults(projections, self._tasks)

    def _buffers(self, places: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors on this device for results that are copied elsewhere, allocated once for each sequence of dtypes."""
        dtypes = tuple(place.dtype for place in places)
        if dtypes not in self._results:
            self._results[dtypes] = [torch.empty(p.shape, dtype=p.dtype, device=self._device) for p in places]
        return self._results[dtypes]

    def _projections(self, out: list[torch.Tensor]) -> Projections:
        """The tables for these outputs, cached for the last few sets of outputs."""
        key = tuple((tensor.data_ptr(), tensor.dtype) for tensor in out)
        if key not in self._tables:
            while len(self._tables) >= KEPT_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = _make_projections(self._sources, out, self._tasks)
        return self._tables[key]


def _make_projections(
    sources: Mapping[str, Sequence[torch.Tensor]], out: Sequence[torch.Tensor], tasks: Sequence[TensorTask]
) -> Projections:
    """The tables of a launch. Raises BackendUnavailable for what the kernels do not support, such as too many heads."""
    try:
        return Projections(
            sources[BASE],
            sources[PRIMARY],
            sources[SECONDARY],
            out,
            heads=[task.partition.groups for task in tasks],
            head_axis=[task.partition.axis for task in tasks],
        )
    except KernelInputError as error:
        raise BackendUnavailable(
            f"backend 'triton' cannot merge these targets: {error}; use {option('backend', 'cpu')}"
        ) from error


def _raise_faults(projections: Projections, tasks: Sequence[TensorTask]) -> None:
    for fault in faults(projections):
        error = NotFinite(_ROLE_OF.get(fault.where), fault.head, fault.projection)
        raise not_finite_target(error, tasks[fault.projection])


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
