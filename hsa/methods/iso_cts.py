"""Iso-CTS: common directions of all task vectors, and further directions of each, all with one singular value.

`c` directions come from the sum of the task vectors: `c = r - N * round((r - int(f * r)) / N)`, where `r` is the
smaller side of the matrix, `N` the number of models and `f` the share of common directions. From the rest of each task
vector without these, the first `(r - c) / N` directions are taken. All of them are made orthogonal as in TSV-M:

    B + lambda * mean(S) * U V'

Source: Marczak et al., No task left behind: isotropic model merging with common and task-specific subspaces, ICML 2025,
arXiv 2502.04959.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsa.methods.iso_c import CITATION, SOURCE
from hsa.methods.model_method import Weights
from hsa.methods.settings import setting
from hsa.methods.subspace_method import SubspaceMethod, Subspaces, SubspaceSettings
from hsa.methods.subspaces import Decompose, Displacement, common_and_own, common_and_specific
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Array


@dataclass(frozen=True)
class IsoCtsSettings(SubspaceSettings):
    """Settings of Iso-CTS."""

    method = "iso_cts"
    common_share: Weights = setting(
        0.8,
        "Share of the directions that all models have in common, 0 to 1.",
        low=0.0,
        high=1.0,
        scheduled=True,
        axis=True,
        search=(0.0, 1.0),
    )


class IsoCts(SubspaceMethod[IsoCtsSettings]):
    """Common and task-specific directions with equal singular values.

    Example:
        >>> hsa.merge(method="iso_cts", base="b", models=["m1", "m2"], common_share=0.7, output="m")  # doctest: +SKIP
    """

    name = "iso_cts"
    title = "Isotropic merge in common and task-specific subspaces (Iso-CTS)"
    formula = "B + lambda * mean(S) * U V', of directions that models have in common and of each beside them"
    source = SOURCE
    citation = CITATION
    Settings = IsoCtsSettings

    def wanted(self, task: TensorTask, settings: IsoCtsSettings) -> Subspaces:
        models = len(task.numbers)
        common, own = common_and_own(min(task.matrix), models, settings.of("common_share", task))
        return Subspaces(settings.of("lam", task), (common, *(own,) * models))

    def displacement(self, vectors: Sequence[Array], decision: Subspaces, decomposed: Decompose) -> Displacement:
        return common_and_specific(vectors, decision.directions, decision.known, decomposed)
