"""Boosted TSV-M, experimental: TSV-M of task vectors whose small singular values were raised.

In each task vector, the singular values after the point where their running sum reaches `beta` of the whole are raised
to the value at that point. Then the first directions are taken as in TSV-M.

Source: after the description in Carvalho et al., Exploring the potential and limitations of model merging for
multi-domain adaptation in ASR, 2026, arXiv 2603.05354. It was not compared with the authors' program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hsa.findings import Findings
from hsa.methods.model_method import Weights
from hsa.methods.settings import setting
from hsa.methods.tensors import TensorTask
from hsa.methods.tsv_m import TaskSingularVectors, TsvSettings


@dataclass(frozen=True)
class TsvMBoostedSettings(TsvSettings):
    """Settings of boosted TSV-M."""

    method = "tsv_m_boosted"
    beta: Weights = setting(
        0.3,
        "Share of the sum of the singular values after which they are raised, 0 to 1.",
        low=0.0,
        high=1.0,
        scheduled=True,
        axis=True,
        search=(0.0, 0.9),
    )


class TsvMBoosted(TaskSingularVectors[TsvMBoostedSettings]):
    """TSV-M with small singular values raised.

    Example:
        >>> hsa.merge(method="tsv_m_boosted", base="b", models=["m1", "m2"], beta=0.5, output="m")  # doctest: +SKIP
    """

    name = "tsv_m_boosted"
    title = "Boosted Task Singular Vectors (BoostedTSV-M), experimental"
    formula = "TSV-M, with singular values raised after the point where their sum reaches beta of the whole"
    source = "after the description in Carvalho et al., 2026, arXiv 2603.05354"
    Settings = TsvMBoostedSettings

    def boost(self, task: TensorTask, settings: TsvMBoostedSettings) -> float | None:
        return settings.of("beta", task)

    def settings_findings(self, candidates: Sequence[TsvMBoostedSettings]) -> Findings:
        return Findings(
            notes=(
                "tsv_m_boosted is experimental: it follows the paper's description and was not compared with its "
                "program",
            )
        )
