"""Iso-C: the sum of the task vectors with all its singular values made equal.

    B + lambda * mean(S) * U V', where sum of (M_i - B) = U S V'

Source: Marczak et al., No task left behind: isotropic model merging with common and task-specific subspaces, ICML 2025,
arXiv 2502.04959.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsa.methods.subspace_method import SubspaceMethod, Subspaces, SubspaceSettings
from hsa.methods.subspaces import Decompose, Displacement, isotropic
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Array

SOURCE = "Marczak et al., No task left behind, ICML 2025, arXiv 2502.04959"

CITATION = """@inproceedings{marczak2025isotropic,
  title={No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces},
  author={Marczak, Daniel and others},
  booktitle={ICML},
  year={2025}
}"""


@dataclass(frozen=True)
class IsoCSettings(SubspaceSettings):
    """Settings of Iso-C."""

    method = "iso_c"


class IsoC(SubspaceMethod[IsoCSettings]):
    """The sum of the task vectors with equal singular values.

    Example:
        >>> hsa.merge(method="iso_c", base="b", models=["m1", "m2"], lam=1.0, output="merged")  # doctest: +SKIP
    """

    name = "iso_c"
    title = "Isotropic merge in the common subspace (Iso-C)"
    formula = "B + lambda * mean(S) * U V', sum(M_i - B) = U S V'"
    source = SOURCE
    citation = CITATION
    Settings = IsoCSettings

    def wanted(self, task: TensorTask, settings: IsoCSettings) -> Subspaces:
        return Subspaces(settings.of("lam", task), (min(task.matrix),))

    def displacement(self, vectors: Sequence[Array], decision: Subspaces, decomposed: Decompose) -> Displacement:
        return isotropic(vectors, decision.directions, decision.known, decomposed)
