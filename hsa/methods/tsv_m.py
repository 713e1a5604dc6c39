"""TSV-M: the first singular directions of every task vector, concatenated and made orthogonal.

From each `d_i = U_i S_i V_i'`, the first `share * r` directions are taken, where `r` is the smaller side of the matrix.
The `U_i` side by side are replaced by their polar factor, the nearest matrix with orthogonal columns, and so are the
`V_i`:

    B + lambda * U S V'

Source: Gargiulo et al., Task Singular Vectors: reducing task interference in model merging, CVPR 2025, arXiv
2412.00081.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hsa.methods.settings import setting
from hsa.methods.subspace_method import SubspaceMethod, Subspaces, SubspaceSettings
from hsa.methods.subspaces import Decompose, Displacement, Orthogonalize, task_singular_vectors
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Array


@dataclass(frozen=True)
class TsvSettings(SubspaceSettings):
    """Settings of TSV-M and its variants."""

    share: float | None = setting(
        None,
        "Share of the directions of each model that is taken, 0 to 1.",
        low=0.0,
        high=1.0,
        axis=True,
        search=(0.05, 1.0),
        metavar="NUMBER",
        default_text="1 / number of models",
    )
    orthogonalize: Orthogonalize = setting(
        "polar",
        "How directions are made orthogonal: polar, by a decomposition, or newton-schulz, by matrix products.",
        choices=("polar", "newton-schulz"),
        group="numerics",
        metavar="polar|newton-schulz",
    )

    def count(self, task: TensorTask) -> int:
        """The number of directions of a matrix that are taken from each model."""
        rank, models = min(task.matrix), len(task.numbers)
        return rank // models if self.share is None else int(self.share * rank)


S = TypeVar("S", bound=TsvSettings)


class TaskSingularVectors(SubspaceMethod[S]):
    """The base class of TSV-M and its variants."""

    @abstractmethod
    def boost(self, task: TensorTask, settings: S) -> float | None:
        """The share of their sum after which singular values are raised; None if they are not raised."""

    def wanted(self, task: TensorTask, settings: S) -> Subspaces:
        counts = (settings.count(task),) * len(task.numbers)
        beta = self.boost(task, settings)
        return Subspaces(settings.of("lam", task), counts, beta=beta, how=settings.orthogonalize)

    def displacement(self, vectors: Sequence[Array], decision: Subspaces, decomposed: Decompose) -> Displacement:
        settings = decision.beta, decision.how, decision.known
        return task_singular_vectors(vectors, decision.directions, *settings, decomposed)


@dataclass(frozen=True)
class TsvMSettings(TsvSettings):
    """Settings of TSV-M."""

    method = "tsv_m"


class TsvM(TaskSingularVectors[TsvMSettings]):
    """The first directions of every task vector, made orthogonal.

    Example:
        >>> hsa.merge(method="tsv_m", base="b", models=["m1", "m2"], lam=1.0, output="merged")  # doctest: +SKIP
    """

    name = "tsv_m"
    title = "Task Singular Vectors (TSV-M)"
    formula = "B + lambda * U S V', of the first directions of every M_i - B, made orthogonal"
    source = "Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081"
    citation = """@inproceedings{gargiulo2025tsv,
  title={Task Singular Vectors: Reducing Task Interference in Model Merging},
  author={Gargiulo, Antonio Andrea and others},
  booktitle={CVPR},
  year={2025}
}"""
    Settings = TsvMSettings

    def boost(self, task: TensorTask, settings: TsvMSettings) -> float | None:
        return None
