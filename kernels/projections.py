"""The tensors of a merge, checked once and laid out as tables that one launch reads.

Nothing here starts a kernel. Shape letters as in `primitives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from hsa.kernels import fused, tuning
from hsa.kernels.primitives import FIELDS, WIDTH
from hsa.kernels.tuning import Tuning
from torch import Tensor

DTYPES = {
    torch.float32: triton.language.float32,
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
}

ROLES = ("base", "primary", "secondary", "out")
ALIGNMENT = 16
MOST_HEADS = 62
LEAST_PADDED_HEADS = 32
"""The least padded length of a row of heads, so that models of different sizes share compiled kernels."""


class KernelInputError(ValueError):
    """An argument that the kernels cannot work on. The message names it, its place, what was expected and found."""


class KernelTypeError(KernelInputError, TypeError):
    """An argument of the wrong type or dtype."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for, apart from the scale: dtypes by role, and what the host checked."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    in_place: bool
    aligned: bool

    def constants(self) -> dict[str, object]:
        base, primary, secondary, out = (DTYPES[dtype] for dtype in self.dtypes)
        return {
            "B": base,
            "M1": primary,
            "M2": secondary,
            "OUT": out,
            "ALIGNED": self.aligned,
            "IN_PLACE": self.in_place,
        }


@dataclass(frozen=True)
class Shape:
    """The layout of a projection: heads that consist of runs. All sizes are in elements."""

    heads: int
    runs: int
    width: int
    pitch: int
    step: int

    @property
    def chunks(self) -> int:
        return -(-self.width // int(WIDTH.value))

    @property
    def regular(self) -> bool:
        return self.width % WIDTH.value == 0 and self.pitch % ALIGNMENT == 0 and self.step % ALIGNMENT == 0

    def fields(self, rows: int, first: int) -> list[int]:
        """The projection's row of the geometry table, for slabs of `rows` tile rows."""
        tile_rows = self.runs * self.chunks
        slabs = -(-tile_rows // rows)
        found = [self.heads, tile_rows, self.width, self.pitch, self.step, slabs, first, self.chunks]
        assert len(found) == FIELDS.value
        return found


@dataclass(frozen=True, eq=False)
class LaunchGroup:
    """The projections that share a launch, see `headwise`: `members` is int32 [n]; `items` is int32 [S', 4], with the
    slabs in the order of their slots. `most_slabs` is the largest number of slabs in one projection."""

    variant: Variant
    tuning: Tuning
    one_run: bool
    members: Tensor
    items: Tensor
    most_slabs: int


class Projections:
    """Target tensors of one model, ready to be merged any number of times.

    Args:
        base, primary, secondary: G tensors each, [d_out, d_in] or [d], contiguous, all on one device (a GPU; the CPU
            in Triton's interpreter), float32, float16 or bfloat16, each with its own dtype.
        out: G tensors to write, of the same shapes; by default primary itself, in place. An output may be the
            primary of its own projection, and must otherwise share no memory with any source or other output.
        heads: H of each projection, or one number for all; 1 to 62; divides the size of the head axis.
        head_axis: 0 where a head is a run of output rows (q, k, v and their biases), 1 where it is a run of columns
            (the weight of out_proj); of each projection, or one for all.
        tuned: how launches are cut; by default `tuning.choose`.

    Projections that differ in dtypes, in being in place, or in alignment cannot share a compiled kernel: each
    combination that occurs takes one launch. A model usually has one. Projections are aligned if their addresses are
    (to 16 bytes) and their shapes are (heads of a multiple of 64 contiguous elements, as in every Whisper weight and
    bias). The others take a slower kernel that loads single elements.

    The tensors' storage is kept alive. If a parameter's `.data` is replaced later, the old data is still used.

    Raises KernelInputError, KernelTypeError.
    """

    def __init__(
        self,
        base: Sequence[Tensor],
        primary: Sequence[Tensor],
        secondary: Sequence[Tensor],
        out: Sequence[Tensor] | None = None,
        *,
        heads: Sequence[int] | int,
        head_axis: Sequence[int] | int = 0,
        tuned: Tuning | None = None,
    ) -> None:
        given = dict(zip(ROLES, (base, primary, secondary, primary if out is None else out), strict=True))
        self._tensors = {role: _tensors(role, tensors) for role, tensors in given.items()}
        self.count = _same_count(self._tensors)
        self.device = _same_device(self._tensors)
        self.heads = _numbers("heads", heads, self.count)
        axes = _numbers("head_axis", head_axis, self.count)
        self.padded_heads = max(LEAST_PADDED_HEADS, triton.next_power_of_2(max(self.heads)))
        shapes = [self._shape(g, self.heads[g], axes[g]) for g in range(self.count)]
        in_place = [self._is_in_place(g) for g in range(self.count)]
        self._refuse_overlap(in_place)
        self._lay_out(shapes, in_place, tuned)
        self._workspaces: dict[int, Workspace] = {}

    def _shape(self, g: int, heads: int, axis: int) -> Shape:
        shape = tuple(self._tensors["base"][g].shape)
        if len(shape) not in (1, 2) or 0 in shape:
            raise KernelInputError(f"base[{g}]: expected a weight [d_out, d_in] or a bias [d], found shape {shape}")
        for role in ROLES[1:]:
            other = tuple(self._tensors[role][g].shape)
            if other != shape:
                raise KernelInputError(f"{role}[{g}]: expected the shape of base[{g}], {shape}, found {other}")
        if axis not in range(len(shape)):
            raise KernelInputError(f"head_axis[{g}]: expected an axis of shape {shape}, found {axis}")
        if not 1 <= heads <= MOST_HEADS:
            raise KernelInputError(f"heads[{g}]: expected 1 to {MOST_HEADS}, found {heads}")
        if shape[axis] % heads:
            raise KernelInputError(
                f"heads[{g}]: expected a divisor of {shape[axis]}, the size of axis {axis} of base[{g}], found {heads}"
            )
        part = shape[axis] // heads
        if axis == 1:
            found = Shape(heads, shape[0], part, shape[1], part)
        else:
            run = part * (shape[1] if len(shape) == 2 else 1)
            found = Shape(heads, 1, run, 0, run)
        if found.runs * found.chunks >= 1 << 30:
            raise KernelInputError(f"base[{g}]: a head of shape {shape} is too large, expected below 2**30 tile rows")
        return found

    def _is_in_place(self, g: int) -> bool:
        out, primary = self._tensors["out"][g], self._tensors["primary"][g]
        return out.data_ptr() == primary.data_ptr() and out.dtype == primary.dtype

    def _refuse_overlap(self, in_place: Sequence[bool]) -> None:
        """Refuse outputs that share memory with anything but their own primary: one sweep over address ranges."""
        ranges = []
        for role, tensors in self._tensors.items():
            for g, tensor in enumerate(tensors):
                if role != "primary" or not in_place[g]:
                    start = tensor.data_ptr()
                    ranges.append((start, start + tensor.numel() * tensor.element_size(), role, g))
        reach_all = reach_out = (0, "", 0)
        for start, stop, role, g in sorted(ranges):
            reach = reach_all if role == "out" else reach_out
            if start < reach[0]:
                raise KernelInputError(
                    f"out: expected every output to be its own primary or memory of its own, "
                    f"found that {role}[{g}] overlaps {reach[1]}[{reach[2]}]"
                )
            if stop > reach_all[0]:
                reach_all = (stop, role, g)
            if role == "out" and stop > reach_out[0]:
                reach_out = (stop, role, g)

    def _lay_out(self, shapes: Sequence[Shape], in_place: Sequence[bool], tuned: Tuning | None) -> None:
        addresses = [[tensor.data_ptr() for tensor in self._tensors[role]] for role in ROLES]
        members: dict[Variant, list[int]] = {}
        for g, shape in enumerate(shapes):
            aligned = shape.regular and all(row[g] % ALIGNMENT == 0 for row in addresses)
            dtypes = [self._tensors[role][g].dtype for role in ROLES]
            variant = Variant((dtypes[0], dtypes[1], dtypes[2], dtypes[3]), in_place[g], aligned)
            members.setdefault(variant, []).append(g)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        geometry: list[list[int]] = [[]] * self.count
        self.groups: list[LaunchGroup] = []
        self.slabs = 0
        for variant, indices in members.items():
            sizes = [dtype.itemsize for dtype in variant.dtypes]
            one_run = variant.aligned and all(shapes[g].runs == 1 for g in indices)
            cut = tuned or tuning.choose(sizes, variant.aligned, one_run, name)
            for g in indices:
                geometry[g] = shapes[g].fields(cut.rows, self.slabs)
                self.slabs += shapes[g].heads * geometry[g][5]
            self.groups.append(self._group(variant, cut, one_run, indices, geometry))
        # An even row length keeps every row at a multiple of 16 bytes, which Triton compiles for.
        padded = [row + [0] * (self.count % 2) for row in addresses]
        self.addresses = torch.tensor(padded, dtype=torch.int64, device="cpu").to(self.device)
        self.geometry = torch.tensor(geometry, dtype=torch.int64, device="cpu").to(self.device)

    def workspace(self) -> Workspace:
        """The workspace of the device's current stream, made on the first call there."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        handle = 0 if stream is None else stream.cuda_stream
        if handle not in self._workspaces:
            if stream is not None:
                # The allocator must not reuse a table's memory while a stream other than its own still reads it.
                for table in self._tables():
                    table.record_stream(stream)
            self._workspaces[handle] = Workspace(self)
        return self._workspaces[handle]

    def _tables(self) -> list[Tensor]:
        return [self.addresses, self.geometry, *(t for group in self.groups for t in (group.items, group.members))]

    def _group(
        self, variant: Variant, cut: Tuning, one_run: bool, indices: Sequence[int], geometry: list[list[int]]
    ) -> LaunchGroup:
        items = [_units(g, geometry[g]) for g in indices]
        members = torch.tensor(indices, dtype=torch.int32, device="cpu")
        most_slabs = max(map(len, items))
        return LaunchGroup(variant, cut, one_run, members.to(self.device), torch.cat(items).to(self.device), most_slabs)


class Workspace:
    """What one stream's launches write besides outputs, and the parameters that they read; see `headwise` and `fused`.

    `zeroed` must be 0 when the fused kernel is launched; `zeroed_of_two` is the part of it that must be 0 for the
    others.
    """

    def __init__(self, projections: Projections) -> None:
        device, count, padded = projections.device, projections.count, projections.padded_heads
        groups = len(projections.groups)
        # Every part starts at a multiple of 16 bytes, which Triton compiles for.
        row, slabs = -(-count // 4) * 4, -(-projections.slabs // 4) * 4
        sizes = [count * padded, row, 4 * groups, 2 * row, 2 * slabs, slabs]
        self.zeroed = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        status, self.arrivals, tickets, released, totals, self.states = torch.split(self.zeroed, sizes)
        self.status, self.tickets = status.view(count, padded), torch.split(tickets, 4)
        self.released, self.slots = released.view(torch.int64), totals.view(torch.int64)
        self.zeroed_of_two = self.zeroed[: sizes[0] + sizes[1]]
        self.scores = torch.zeros(count, padded, dtype=torch.float64, device=device)
        self.selected = torch.zeros(count, padded, dtype=torch.uint8, device=device)
        self._parameters: dict[str, tuple[bytes, Tensor]] = {}

    def upload(self, name: str, values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        """Copy numbers of the host to the device, [G], unless they equal the last ones of that name."""
        last, buffer = self._parameters.get(name, (b"", None))
        if buffer is None:
            buffer = torch.empty(len(values), dtype=dtype, device=self.zeroed.device)
        host = torch.tensor(values, dtype=dtype, device="cpu")
        bits = host.numpy().tobytes()
        if bits != last:
            # From pageable memory, the source has been read when the call returns, without waiting for the stream.
            buffer.copy_(host, non_blocking=True)
            self._parameters[name] = (bits, buffer)
        return buffer


def _units(g: int, fields: Sequence[int]) -> Tensor:
    """Units of a projection, int32 [H * slabs, 4]: heads in order, slabs in order."""
    heads, slabs, first = fields[0], fields[5], fields[6]
    units = torch.empty(heads * slabs, 4, dtype=torch.int32, device="cpu")
    units[:, 0] = g
    units[:, 1] = torch.arange(heads, dtype=torch.int32, device="cpu").repeat_interleave(slabs)
    units[:, 2] = torch.arange(slabs, dtype=torch.int32, device="cpu").repeat(heads)
    units[:, 3] = torch.arange(first, first + heads * slabs, dtype=torch.int32, device="cpu")
    return units


def _tensors(role: str, tensors: object) -> tuple[Tensor, ...]:
    """Check each of a role's tensors by itself, and return aliases of them, which keep their storage alive."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise KernelTypeError(f"{role}: expected a sequence of tensors, found {type(tensors).__name__}")
    for g, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise KernelTypeError(f"{role}[{g}]: expected a tensor, found {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise KernelTypeError(f"{role}[{g}]: expected one of {names}, found {tensor.dtype}")
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise KernelInputError(f"{role}[{g}]: expected a contiguous tensor, found {_layout(tensor)}")
    return tuple(tensor.detach() for tensor in tensors)


def _layout(tensor: Tensor) -> str:
    return f"strides {tensor.stride()}" if tensor.layout == torch.strided else f"layout {tensor.layout}"


def _same_count(tensors: dict[str, tuple[Tensor, ...]]) -> int:
    count = len(tensors["base"])
    if count == 0:
        raise KernelInputError("base: expected at least one tensor, found none")
    for role in ROLES[1:]:
        if len(tensors[role]) != count:
            raise KernelInputError(f"{role}: expected {count} tensors, as many as base, found {len(tensors[role])}")
    return count


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU, in this process."""
    return not isinstance(fused.fused_kernel, triton.runtime.JITFunction)


def inexact(major: int, version: str) -> str:
    """Why kernels of this version of Triton are not exact on NVIDIA devices of this major compute capability, or "".

    Found in compiled code: before 3.7, multiplications and additions are fused for capability 10.0 under any options.
    """
    if major >= 10 and tuple(map(int, version.split(".")[:2])) < (3, 7):
        return f"Triton {version} fuses multiply-adds on NVIDIA GPUs of compute capability 10 and above; 3.7 does not"
    return ""


def doubt(device: torch.device) -> str:
    """`inexact` of a device, for the imported version of Triton."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    return inexact(torch.cuda.get_device_capability(device)[0], triton.__version__)


def _same_device(tensors: dict[str, tuple[Tensor, ...]]) -> torch.device:
    device = tensors["base"][0].device
    expected = "cpu" if interpreted() else "cuda"
    if device.type != expected:
        why = " (kernels are interpreted)" if interpreted() else ""
        raise KernelInputError(f"base[0]: expected a tensor on device {expected}{why}, found {device}")
    for role in ROLES:
        for g, tensor in enumerate(tensors[role]):
            if tensor.device != device:
                raise KernelInputError(f"{role}[{g}]: expected device {device}, that of base[0], found {tensor.device}")
    if why := doubt(device):
        raise KernelInputError(f"base[0]: expected a device on which results are exact, found {device}: {why}")
    return device


def _numbers(name: str, values: Sequence[int] | int, count: int) -> tuple[int, ...]:
    """One whole number for each projection, from one for all or a sequence."""
    numbers = [values] * count if isinstance(values, int) else list(values)
    if len(numbers) != count:
        raise KernelInputError(f"{name}: expected {count} numbers, one for each projection, found {len(numbers)}")
    for g, number in enumerate(numbers):
        if isinstance(number, bool) or not isinstance(number, int):
            raise KernelTypeError(f"{name}[{g}]: expected a whole number, found {number!r}")
    return tuple(numbers)
