"""Starting the kernels: one launch (`fused_merge`) or two (`score_heads`, then `apply_heads`).

Every function works on a `Projections` that was built once, on the current stream of its device. All memory that a
launch writes besides the outputs belongs to one stream's workspace, made on the first call there, so that later calls
allocate nothing on the device and streams do not disturb each other. The caller has to order two streams that write the
same output tensors.

NaN and Inf are found on the device: only `faults` and `check` wait for the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hsa.kernels import fused, headwise, tuning
from hsa.kernels.projections import KernelInputError, KernelTypeError, LaunchGroup, Projections, Workspace, interpreted
from torch import Tensor

MOST_FINITE = torch.finfo(torch.float32).max

CAUSES = {
    headwise.BASE_BIT.value: "base",
    headwise.PRIMARY_BIT.value: "primary",
    headwise.SECONDARY_BIT.value: "secondary",
    headwise.SCORE_BIT.value: "score",
    headwise.RESULT_BIT.value: "result",
}


@dataclass(frozen=True)
class KernelFault:
    """A head that holds NaN or Inf.

    `where` is base, primary, secondary, score or result. `score` means that the head's sum is not finite: because a
    source is not, the task vectors overflow float32, or the given scores were not. `result` means that a written value
    is not finite in the output's dtype.
    """

    projection: int
    head: int
    where: str


class NonFinite(ArithmeticError):
    """NaN or Inf in some head; `faults` lists all of them."""

    def __init__(self, message: str, faults: Sequence[KernelFault]) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class NonFiniteInput(NonFinite):
    """A projection's sources or scores are not finite. None of its output was written."""


class NonFiniteResult(NonFinite):
    """A value that was written is not finite: in place, primary is damaged and must be loaded again."""


def fused_merge(
    projections: Projections,
    keep: Sequence[int] | int | Tensor,
    c1: Sequence[float] | float | Tensor,
    c2: Sequence[float] | float | Tensor,
    *,
    scale: float = 1.0,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score, select and merge all projections in one launch (one for each of `projections.groups`).

    On AMD it takes two: there Triton drops the `volatile` of a load, without which a program could wait forever.

    Args:
        keep: heads to keep of each projection, 0 to H, or one number for all; ties at the cut are all selected.
            Like c1 and c2, a tensor [G] on the device (int32; float32) is used directly; its values are not checked.
        c1, c2: weights of primary's and secondary's task vector in selected heads, rounded to float32.
        scale: factor of the displacement in every head, finite. At 1, unselected heads are primary's bits.
        programs: how many programs to start, by default as tuned; the results do not depend on it.

    Returns:
        squared scores, float64 [G, P], and the selection, bool [G, P]; 0 and False beyond a projection's heads
        (P is `projections.padded_heads`). They belong to the stream and are valid until its next call: clone them to
        keep them.

    A projection with a source that is not finite is not written, and none of its heads is selected: see `check`.

    Raises KernelInputError, KernelTypeError. Source: see `headwise`.
    """
    scale = _finite("scale", scale)
    if programs is not None and programs < 1:
        raise KernelInputError(f"programs: expected at least 1, found {programs}")
    with _on_device(projections):
        space = projections.workspace()
        counts = _keep(projections, keep, space)
        weights = _weights("c1", projections, c1, space), _weights("c2", projections, c2, space)
        if torch.version.hip is not None:
            space.zeroed_of_two.zero_()
            _score(projections, space)
            _apply(projections, space, space.scores, counts, weights, scale)
            return space.scores, space.selected.view(torch.bool)
        space.zeroed.zero_()
        base, primary, secondary, out = projections.addresses
        for group, tickets in zip(projections.groups, space.tickets, strict=True):
            work = len(group.items)
            grid = min(work, programs or _resident(projections, group))
            fused.fused_kernel[(grid,)](
                base, primary, secondary, out, projections.geometry, group.items, work,
                group.members, len(group.members), space.slots, space.scores, space.selected, space.status,
                space.released, space.states, tickets, counts, *weights, scale,
                tuning.deciders(grid), _patience(group, grid),
                SCALED=scale != 1, HELD=group.tuning.held, ALONE=interpreted(),
                **_options(projections, group, group.tuning.fused_registers),
            )  # fmt: skip
        return space.scores, space.selected.view(torch.bool)


def score_heads(projections: Projections) -> Tensor:
    """Squared scores of every head, float64 [G, P], 0 beyond a projection's heads; writes no output.

    NaN or Inf if a source or a task vector is not finite: see `check`. The tensor belongs to the stream and is valid
    until its next call: clone it to keep it. Source: see `headwise`.
    """
    with _on_device(projections):
        space = projections.workspace()
        space.zeroed_of_two.zero_()
        _score(projections, space)
        return space.scores


def apply_heads(
    projections: Projections,
    scores: Tensor,
    keep: Sequence[int] | int | Tensor,
    c1: Sequence[float] | float | Tensor,
    c2: Sequence[float] | float | Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Select by known scores, and merge: `fused_merge` without its first read, for sweeps.

    Args:
        scores: squared scores, float64 [G, P], contiguous, as `score_heads` returns them (a clone, or the stream's
            own). In place, scores must have been taken before primary was first overwritten.
        keep, c1, c2, scale: as for `fused_merge`.

    Returns:
        the selection, bool [G, P], which belongs to the stream and is valid until its next call.

    A projection with a score that is not finite is not written, and none of its heads is selected: see `check`.

    Raises KernelInputError, KernelTypeError.
    """
    scale = _finite("scale", scale)
    _check_table("scores", scores, projections, torch.float64, (projections.count, projections.padded_heads))
    with _on_device(projections):
        space = projections.workspace()
        counts = _keep(projections, keep, space)
        weights = _weights("c1", projections, c1, space), _weights("c2", projections, c2, space)
        space.zeroed_of_two.zero_()
        _apply(projections, space, scores, counts, weights, scale)
        return space.selected.view(torch.bool)


def faults(projections: Projections) -> list[KernelFault]:
    """What the current stream's last launch found wrong, by projection and head. Waits for the launch to end."""
    with _on_device(projections):
        status = projections.workspace().status.cpu()
    found = []
    for g, head in status.nonzero().tolist():
        bits = int(status[g, head])
        found += [KernelFault(g, head, where) for bit, where in CAUSES.items() if bits & bit]
    return found


def check(projections: Projections) -> None:
    """Raise if the current stream's last launch met NaN or Inf: NonFiniteInput, else NonFiniteResult.

    Waits for the launch to end.
    """
    found = faults(projections)
    inputs = [fault for fault in found if fault.where != "result"]
    if inputs:
        raise NonFiniteInput(f"{_listed(inputs)}: expected finite numbers, found NaN or Inf", found)
    if found:
        raise NonFiniteResult(
            f"{_listed(found)}: a merged value is not finite in the output's dtype; outputs that were written in "
            "place must be loaded again",
            found,
        )


def _listed(found: Sequence[KernelFault]) -> str:
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{first.where} of projection {first.projection}, head {first.head}{more}"


@contextmanager
def _on_device(projections: Projections) -> Iterator[None]:
    if projections.device.type == "cuda":
        with torch.cuda.device(projections.device):
            yield
    else:
        yield


def _score(projections: Projections, space: Workspace) -> None:
    base, primary, secondary, _ = projections.addresses
    for group in projections.groups:
        options = _options(projections, group, group.tuning.registers)
        del options["OUT"], options["IN_PLACE"]
        headwise.score_kernel[(len(group.items),)](
            base, primary, secondary, projections.geometry, group.items,
            space.slots, space.scores, space.status, space.arrivals, **options,
        )  # fmt: skip


def _apply(
    projections: Projections,
    space: Workspace,
    scores: Tensor,
    counts: Tensor,
    weights: tuple[Tensor, Tensor],
    scale: float,
) -> None:
    base, primary, secondary, out = projections.addresses
    for group in projections.groups:
        headwise.apply_kernel[(len(group.items),)](
            base, primary, secondary, out, projections.geometry, group.items, scores, space.selected,
            space.status, counts, *weights, scale, SCALED=scale != 1,
            **_options(projections, group, group.tuning.registers),
        )  # fmt: skip


def _options(projections: Projections, group: LaunchGroup, registers: int) -> dict[str, object]:
    """Constexprs and compiler options."""
    amd = torch.version.hip is not None
    return {
        **group.variant.constants(),
        "P": projections.padded_heads,
        "ROWS": group.tuning.rows,
        "ONE_RUN": group.one_run and not amd,
        **tuning.compiler_options(group.tuning, registers, amd=amd),
    }


def _resident(projections: Projections, group: LaunchGroup) -> int:
    if projections.device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(projections.device)
    return int(properties.multi_processor_count) * group.tuning.per_processor


def _patience(group: LaunchGroup, grid: int) -> int:
    """How often a program looks for a decision before it leaves a slab.

    It is once if waiting is pointless: if programs run one after the other, or hold too little of a projection.
    """
    return 1 if interpreted() or group.most_slabs > grid * group.tuning.held else tuning.PATIENCE


def _keep(projections: Projections, keep: Sequence[int] | int | Tensor, space: Workspace) -> Tensor:
    if isinstance(keep, Tensor):
        return _check_table("keep", keep, projections, torch.int32, (projections.count,))
    numbers = [keep] * projections.count if isinstance(keep, int) else list(keep)
    _check_count("keep", numbers, projections)
    for g, (number, heads) in enumerate(zip(numbers, projections.heads, strict=True)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise KernelTypeError(f"keep[{g}]: expected a whole number, found {number!r}")
        if not 0 <= number <= heads:
            raise KernelInputError(f"keep[{g}]: expected 0 to {heads}, found {number}")
    return space.upload("keep", numbers, torch.int32)


def _weights(name: str, projections: Projections, values: Sequence[float] | float | Tensor, space: Workspace) -> Tensor:
    if isinstance(values, Tensor):
        return _check_table(name, values, projections, torch.float32, (projections.count,))
    numbers = [values] * projections.count if isinstance(values, (int, float)) else list(values)
    _check_count(name, numbers, projections)
    for g, number in enumerate(numbers):
        _finite(f"{name}[{g}]", number)
    return space.upload(name, [float(number) for number in numbers], torch.float32)


def _check_count(name: str, values: Sequence[object], projections: Projections) -> None:
    if len(values) != projections.count:
        raise KernelInputError(
            f"{name}: expected {projections.count} numbers, one for each projection, found {len(values)}"
        )


def _check_table(
    name: str, table: Tensor, projections: Projections, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    if not isinstance(table, Tensor):
        raise KernelTypeError(f"{name}: expected a tensor, found {type(table).__name__}")
    if table.dtype != dtype:
        raise KernelTypeError(f"{name}: expected {dtype}, found {table.dtype}")
    if tuple(table.shape) != shape or not table.is_contiguous():
        raise KernelInputError(
            f"{name}: expected contiguous {shape}, found shape {tuple(table.shape)}, strides {table.stride()}"
        )
    if table.device != projections.device:
        raise KernelInputError(f"{name}: expected device {projections.device}, found {table.device}")
    return table


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise KernelTypeError(f"{name}: expected a number, found {value!r}")
    if not abs(value) <= MOST_FINITE:
        raise KernelInputError(f"{name}: expected a number finite in float32, found {value}")
    return float(value)
