"""Methods that merge whole models: every tensor of floating-point numbers, of any number of fine-tunes.

This module has their common part: which tensors they merge, the weights of models, the treatment of running statistics,
and coefficients as the record contains them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from hsa.architectures.base import TensorInfo, TensorPlace
from hsa.methods.base import BASE, KEEP, Block, Method, Treatment
from hsa.methods.json_fields import number
from hsa.methods.settings import MAX_FLOAT32, Settings, setting
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Float32

OnMismatch = Literal["first", "error", "skip-model"]

FLOATING = ("F32", "F16", "BF16")
"""Element types that a merge computes with, in safetensors notation."""

RUNNING = (".running_mean", ".running_var")
"""Suffixes of the names of BatchNorm's statistics, which are averages over data, not trained weights."""


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Settings of every method that merges whole models."""

    on_mismatch: OnMismatch = setting(
        "first",
        "A tensor that differs in shape, or is missing: keep the first model's, stop, or merge the models that agree.",
        choices=("first", "error", "skip-model"),
        structural=True,
        silent=True,
        group="sources",
        metavar="first|error|skip-model",
        kw_only=True,
    )


def weights_setting(
    help: str = "Weight of each model, in their order; repeat.", low: float = -100.0, **about: Any
) -> Any:
    """The setting `weights`: a number for each model, or one for all; `about` are further fields of `SettingInfo`."""
    return setting(
        1.0,
        help,
        low=low,
        high=100.0,
        per_model=True,
        repeated=True,
        search=(0.0, 1.0),
        metavar="NUMBER",
        default_text="1 each",
        **about,
    )


Weights = float | Sequence[Any] | Mapping[str, float]
"""A scheduled value for all models, or one for each (`hsa.methods.values`)."""


@dataclass(frozen=True)
class WeightedSettings(ModelSettings):
    """Settings of methods that weight the models."""

    weights: Weights = weights_setting()


@dataclass(frozen=True)
class Average:
    """The decision for running statistics: the mean of the models with these weights, which sum to one."""

    coefficients: tuple[float, ...]


S = TypeVar("S", bound=ModelSettings)
D = TypeVar("D")


class ModelMethod(Method[S, Any], Generic[S, D]):
    """The base class of methods that merge whole models.

    A subclass defines by `plan` how a tensor is cut and measured, and overrides `decision` and `combine`. If it records
    its decisions, it also overrides `entry`, `read_entry` and `longest_decision`.
    """

    writes_out_last = True

    def plan(self, info: TensorInfo, place: TensorPlace | None, settings: S) -> Treatment:
        """How a trained tensor of floating-point numbers is merged. `info.name` is canonical."""
        return Treatment("merge")

    @abstractmethod
    def decision(self, task: TensorTask, measured: Any, settings: S, so_far: D | None) -> D:
        """The decision for a trained tensor; see `Method.decide`."""

    @abstractmethod
    def combine(self, block: Block, decision: D, out: Float32) -> None:
        """Write the merged values of a block of a trained tensor; see `Method.apply`."""

    @abstractmethod
    def entry(self, decision: D) -> dict[str, Any]:
        """The decision as the provenance records it."""

    @abstractmethod
    def read_entry(self, entry: Mapping[str, Any], settings: S) -> D:
        """The decision that `entry` recorded. Raises KeyError, TypeError or ValueError if the entry is no decision."""

    @abstractmethod
    def longest_decision(self, task: TensorTask, number: float) -> D:
        """See `Method.longest`."""

    def copies_equal(self, settings: S) -> bool:
        return True

    def treatment(self, info: TensorInfo, place: TensorPlace | None, settings: S) -> Treatment:
        if info.code not in FLOATING:
            return KEEP
        return Treatment("merge") if is_running(info.name) else self.plan(info, place, settings)

    def decide(self, task: TensorTask, measured: Any, settings: S, so_far: Any) -> D | Average:
        if is_running(task.name):
            return average_of(task, settings)
        return self.decision(task, measured, settings, so_far)

    def apply(self, block: Block, decision: D | Average, out: Float32) -> None:
        if isinstance(decision, Average):
            write_sum(block, decision.coefficients, out, on_base=False)
        else:
            self.combine(block, decision, out)

    def coefficients_of(self, decision: Any, models: Sequence[str]) -> dict[str, float]:
        return by_role(models, decision.coefficients) if isinstance(decision, Average) else {}

    def as_dict(self, decision: D | Average) -> dict[str, Any]:
        if isinstance(decision, Average):
            return {"average": list(decision.coefficients)}
        return self.entry(decision)

    def from_dict(self, entry: Mapping[str, Any], groups: int, settings: S) -> D | Average:
        if entry.keys() == {"average"}:
            return Average(tuple(map(number, entry["average"])))
        return self.read_entry(entry, settings)

    def longest(self, task: TensorTask, number: float) -> D | Average:
        return self.longest_decision(task, number)


def is_running(name: str) -> bool:
    """Whether a tensor holds running statistics of BatchNorm.

    Example:
        >>> is_running("encoder.layers.0.conv.norm.running_mean")
        True
    """
    return name.endswith(RUNNING)


def by_role(models: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
    """The numbers by role. Empty if there are fewer or more numbers than roles, as for a tensor that some models
    lack."""
    return dict(zip(models, numbers, strict=True)) if len(models) == len(numbers) else {}


def average_of(task: TensorTask, settings: ModelSettings) -> Average:
    """The mean of the models by their weights, of which negative ones count as 0. All models weigh the same if there
    are no weights, or none above 0."""
    weights = settings.each("weights", task) if isinstance(settings, WeightedSettings) else ()
    positive = [max(weight, 0.0) for weight in weights]
    whole = math.fsum(positive)
    count = len(task.numbers)
    return Average(tuple(weight / whole for weight in positive) if whole > 0.0 else (1.0 / count,) * count)


def rounded(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Coefficients in float64, each rounded to float32. Raises ValueError if one is not finite as a float32."""
    if not all(abs(each) <= MAX_FLOAT32 for each in coefficients):
        raise ValueError(f"a coefficient is beyond float32: {list(coefficients)}")
    import numpy as np

    return tuple(float(np.float32(each)) for each in coefficients)


def write_sum(block: Block, coefficients: Sequence[float], out: Float32, *, on_base: bool) -> None:
    """Write `B + (a_1 * d_1 + a_2 * d_2 + ...)` into `out`, or without a base `a_1 * M_1 + a_2 * M_2 + ...`.

    Every product and every sum is rounded to float32, in the order of the models. `out` is written only by the last
    operation, so it may be the memory of one of the block's rooms.
    """
    import numpy as np

    role, *others = block.models
    vector = block.task_vector if on_base else block.weights
    last = out if not others and not on_base else block.room(role)
    total = np.multiply(vector(role), np.float32(coefficients[0]), out=last)
    for count, (other, coefficient) in enumerate(zip(others, coefficients[1:], strict=True), 1):
        product = np.multiply(vector(other), np.float32(coefficient), out=block.room(other))
        last = out if count == len(others) and not on_base else total
        total = np.add(total, product, out=last)
    if on_base:
        np.add(block.weights(BASE), total, out=out)
