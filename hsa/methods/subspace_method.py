"""The common part of the subspace methods: which tensors are matrices, what is recorded of each, and how they run.

A matrix is computed whole, by one thread, in two passes. The first detects sources that are not finite. The second
computes the displacement, from which the decision follows, and keeps it until `apply` adds it to base. Every other
tensor becomes base plus the mean of the task vectors.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from hsa.architectures.base import TensorInfo, TensorPlace
from hsa.errors import SourceError
from hsa.findings import Findings
from hsa.methods.base import BASE, Block, Contract, NotFiniteSums, Treatment
from hsa.methods.coefficients import Coefficients
from hsa.methods.json_fields import between, count, number
from hsa.methods.model_method import Average, ModelMethod, ModelSettings, Weights, by_role, write_sum
from hsa.methods.settings import MAX_FLOAT32, setting
from hsa.methods.subspaces import Decompose, Displacement, Known, Orthogonalize, decompose, work_bytes
from hsa.methods.tensors import Outcome, TensorRecord, TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Arrays, Float32

TOLERANCE = 1e-4
"""The largest difference of results from those of another machine, relative to the norm of the tensor."""

EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias", "lm_head", "proj_out")
"""Modules, besides those with `embed` in their names, that are embeddings, or output projections over a vocabulary. The
latter often share a matrix with an embedding."""

PASSES = 2

MOST_NAMED = 3
"""The number of tensors that a note names."""


@dataclass(frozen=True)
class SubspaceSettings(ModelSettings):
    """Settings of the subspace methods."""

    lam: Weights = setting(
        1.0,
        "Factor on the merged task vector.",
        low=-MAX_FLOAT32,
        high=MAX_FLOAT32,
        scheduled=True,
        axis=True,
        search=(0.3, 2.0),
    )


@dataclass(frozen=True)
class Subspaces:
    """The decision for a matrix.

    `directions` is the number of directions that are taken of each decomposed matrix, and `zeros` the number of those
    that count as zero. `scale` is the singular value that all have in the result. Before the second pass, `directions`
    are the wanted numbers, and `zeros` and `scale` are unknown. The rest follows from the settings.
    """

    lam: float
    directions: tuple[int, ...]
    zeros: tuple[int, ...] | None = None
    scale: float | None = None
    beta: float | None = None
    how: Orthogonalize = "polar"
    wanted: tuple[int, ...] = field(default=(), compare=False)
    replaced: int = field(default=0, compare=False)

    @property
    def known(self) -> Known | None:
        """The values that need not be computed again."""
        return None if self.zeros is None else Known(self.zeros, self.scale)


class _Kept(threading.local):
    """The last displacement of a thread, kept from the second pass until it is applied."""

    task: TensorTask | None = None
    decision: Subspaces | None = None
    displacement: Float32 | None = None

    def put(self, task: TensorTask, decision: Subspaces, displacement: Float32) -> None:
        self.task, self.decision, self.displacement = task, decision, displacement

    def take(self, task: TensorTask, decision: Subspaces) -> Float32 | None:
        """Return the displacement if it is the one for this decision. It is not kept any longer."""
        kept, fits = self.displacement, self.task is task and self.decision == decision
        self.task = self.decision = self.displacement = None
        return kept if fits else None


def _decomposed(block: Block, number: int, matrix: Array) -> Arrays:
    return block.kept(f"decomposition {number}", lambda: decompose(matrix))


S = TypeVar("S", bound=SubspaceSettings)


class SubspaceMethod(ModelMethod[S, Coefficients | Subspaces]):
    """The base class. A method overrides `wanted` and `displacement`."""

    contract = Contract(base="required", least=1, most=8)
    libraries = ("lapack",)
    tolerance = TOLERANCE
    approximate = ("scale",)

    def __init__(self) -> None:
        self._kept = _Kept()

    @abstractmethod
    def wanted(self, task: TensorTask, settings: S) -> Subspaces:
        """The decision before the matrix is measured."""

    @abstractmethod
    def displacement(self, vectors: Sequence[Array], decision: Subspaces, decomposed: Decompose) -> Displacement:
        """The matrix that is added to base at a lambda of 1, from the task vectors float32 [m, n]. Raises ValueError if
        a recorded decision does not fit them."""

    def plan(self, info: TensorInfo, place: TensorPlace | None, settings: S) -> Treatment:
        return Treatment("merge", "whole", PASSES) if is_matrix(info) else Treatment("merge")

    def measure(self, block: Block, number: int, so_far: Any) -> Subspaces | None:
        if number == 0:
            return None
        decision, displacement = self._compute(block, so_far)
        self._kept.put(block.task, decision, displacement)
        return decision

    def decision(self, task: TensorTask, measured: Any, settings: S, so_far: Any) -> Coefficients | Subspaces:
        if task.layout != "whole":
            models = len(task.numbers)
            return Coefficients((settings.of("lam", task) / models,) * models)
        if so_far is None:
            return self.wanted(task, settings)
        [[found]] = measured
        decision: Subspaces = found
        return decision

    def combine(self, block: Block, decision: Coefficients | Subspaces, out: Float32) -> None:
        import numpy as np

        if isinstance(decision, Coefficients):
            write_sum(block, decision.models, out, on_base=True)
            return
        displacement = self._kept.take(block.task, decision)
        if displacement is None:
            if block.task.layout != "whole":
                raise ValueError("it has directions, and the tensor is no matrix")
            _, displacement = self._compute(block, decision)
        np.add(block.weights(BASE), displacement, out=out)

    def _compute(self, block: Block, decision: Subspaces) -> tuple[Subspaces, Float32]:
        """The decision with all computed values, and the displacement that is added to base."""
        import numpy as np

        vectors = [block.task_vector(role) for role in block.models]
        if not all(np.isfinite(vector).all() for vector in vectors):
            raise NotFiniteSums(block.group)
        try:
            found = self.displacement(vectors, decision, partial(_decomposed, block))
        except np.linalg.LinAlgError as error:
            raise SourceError(
                f"tensor {block.task.name}: its singular value decomposition failed ({error}); are the sources sound?"
            ) from error
        displacement = np.multiply(found.matrix, decision.lam, out=found.matrix).astype(np.float32)
        known = replace(
            decision,
            directions=found.taken,
            zeros=found.zeros,
            scale=found.scale,
            wanted=decision.directions,
            replaced=found.replaced,
        )
        return known, displacement

    def coefficients_of(self, decision: Any, models: Sequence[str]) -> dict[str, float]:
        if not isinstance(decision, Coefficients):
            return super().coefficients_of(decision, models)
        return by_role(models, decision.models)

    # --- records -----------------------------------------------------------------------------------------------------

    def entry(self, decision: Coefficients | Subspaces) -> dict[str, Any]:
        if isinstance(decision, Coefficients):
            return {"coefficients": list(decision.models)}
        entry: dict[str, Any] = {
            "lambda": decision.lam,
            "directions": list(decision.directions),
            "zeros": list(decision.zeros or ()),
        }
        optional = {"scale": decision.scale, "beta": decision.beta}
        return entry | {key: value for key, value in optional.items() if value is not None}

    def read_entry(self, entry: Mapping[str, Any], settings: S) -> Coefficients | Subspaces:
        if "coefficients" in entry:
            return Coefficients(tuple(between(each, -MAX_FLOAT32, MAX_FLOAT32) for each in entry["coefficients"]))
        directions, zeros = (tuple(map(count, entry[key])) for key in ("directions", "zeros"))
        if len(directions) != len(zeros):
            raise ValueError(f"{len(directions)} matrices have directions, and {len(zeros)} have zeros")
        scale, beta = (None if key not in entry else number(entry[key]) for key in ("scale", "beta"))
        how: Orthogonalize = getattr(settings, "orthogonalize", "polar")
        return Subspaces(number(entry["lambda"]), directions, zeros, scale, beta, how)

    def longest_decision(self, task: TensorTask, number: float) -> Coefficients | Subspaces:
        models = len(task.numbers)
        if task.layout != "whole":
            return Coefficients((number,) * models)
        many = (max(task.matrix),) * (models + 1)
        return Subspaces(number, many, many, number, number)

    def record_faults(self, record: TensorRecord, settings: S, layers: int) -> Iterator[str]:
        decision = record.decision
        if not isinstance(decision, Subspaces):
            return
        rank = min(record.shape) if len(record.shape) == 2 else 0
        for taken, zeros in zip(decision.directions, decision.zeros or (), strict=True):
            if taken + zeros > rank:
                yield f"takes {taken} directions and has {zeros} zeros, of {rank} in all"

    # --- reports on a merge ------------------------------------------------------------------------------------------

    def work_bytes(self, task: TensorTask, settings: S) -> int:
        if task.layout != "whole":
            return 0
        return work_bytes(*task.matrix, len(task.numbers), sum(self.wanted(task, settings).directions))

    def largest_result(
        self, task: TensorTask, measured: Any, settings: S, largest: Mapping[str, float]
    ) -> float | None:
        """No element of a matrix is larger than its largest singular value, which is at most its norm."""
        base = largest.get(BASE, 0.0)
        moved = math.fsum(magnitude + base for role, magnitude in largest.items() if role != BASE)
        if isinstance(self.decide(task, measured, settings, None), Average):
            return moved
        elements = math.prod(task.shape) if task.layout == "whole" else 1
        return base + abs(settings.of("lam", task)) * math.sqrt(elements) * moved

    def planned_findings(self, tasks: Sequence[TensorTask], settings: S) -> Findings:
        matrices = [task for task in tasks if task.layout == "whole"]
        if not matrices:
            return Findings()
        needs = {task.name: self.work_bytes(task, settings) for task in matrices}
        largest = max(matrices, key=lambda task: needs[task.name])
        notes = [
            f"{len(matrices)} matrices are decomposed, one on each core at a time; the largest, {largest.name} "
            f"{list(largest.shape)}, takes about {max(1, needs[largest.name] >> 20)} MiB of memory meanwhile"
        ]
        notes.extend(_untouched(task.name for task in matrices if not any(self.wanted(task, settings).directions)))
        return Findings(notes=tuple(notes))

    def decision_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        decided = [(each.task.name, each.decision) for each in outcomes if isinstance(each.decision, Subspaces)]
        missing = {
            name: sum(max(0, most - taken) for most, taken in zip(found.wanted, found.directions, strict=True))
            for name, found in decided
            if found.wanted
        }
        short = [name for name, missed in missing.items() if missed]
        notes = list(_untouched(name for name, found in decided if found.wanted and not any(found.wanted)))
        if short:
            whole = sum(sum(found.wanted) for _, found in decided)
            notes.append(
                f"{sum(missing.values())} of {whole} directions count as zero and were left out, in {len(short)} of "
                f"{len(decided)} matrices, such as {short[0]}: some task vectors are of low rank, as of a LoRA adapter"
            )
        replaced = sum(found.replaced for _, found in decided)
        if replaced:
            notes.append(
                f"Newton-Schulz did not converge for {replaced} of {2 * len(decided)} polar factors, so they were "
                f"computed by a decomposition"
            )
        return Findings(notes=tuple(notes))


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor is the weight matrix of a linear layer: it has two axes, its name ends in a weight, and its
    module is no embedding. `info.name` is canonical.

    Example:
        >>> is_matrix(TensorInfo("encoder.layers.0.fc1.weight", "F32", (3072, 768)))
        True
        >>> is_matrix(TensorInfo("decoder.embed_tokens.weight", "F32", (51865, 768)))
        False
    """
    *_, module, last = "", *info.name.split(".")
    embedding = "embed" in module or module in EMBEDDINGS
    return len(info.shape) == 2 and last.startswith("weight") and not embedding


def _untouched(names: Iterable[str]) -> Iterator[str]:
    """A note on the matrices of which no direction is taken, if there are any. It names the first of them."""
    first, more = [*islice(every := iter(names), MOST_NAMED)], sum(1 for _ in every)
    if first:
        others = f" and {more} more" if more else ""
        yield f"base's matrices stay where these settings take no direction of any model: {', '.join(first)}{others}"
