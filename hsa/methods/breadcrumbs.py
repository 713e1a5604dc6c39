"""Model Breadcrumbs: drop the largest elements of each task vector, which are outliers, and the smallest, then add up.

    of the n elements of a tensor drop the top = min(int(gamma * n), n - int(density * n)) largest |d_i|, and the
    smallest until int(density * n) stay; density 1 drops nothing
    B + lambda * sum of w_i * d_i, over the sum of w_i with `normalize`

Source: Davari, Belilovsky, Model Breadcrumbs: scaling multi-task model merging with sparse masks, ECCV 2024,
arXiv 2312.06795.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsa.methods.by_threshold import Ranks, ThresholdMethod
from hsa.methods.masked import (
    DENSITY_LIMITS,
    FACTOR,
    LAMBDA,
    NONE,
    NORMALIZE,
    RESCALE,
    RESCALING,
    MaskedSettings,
    formula_of,
)
from hsa.methods.model_method import Weights
from hsa.methods.settings import setting
from hsa.methods.tensors import TensorTask


@dataclass(frozen=True)
class BreadcrumbsSettings(MaskedSettings):
    """Settings of Model Breadcrumbs."""

    method = "breadcrumbs"
    search_passes = 2

    density: Weights = setting(1.0, "Share of each task vector that is kept.", search=(0.3, 0.99), **DENSITY_LIMITS)
    lam: Weights = setting(1.0, LAMBDA, search=(0.3, 1.5), **FACTOR)
    normalize: bool = setting(False, NORMALIZE)
    rescale: str = setting(NONE, RESCALE, **RESCALING)
    gamma: Weights = setting(
        0.01,
        "Share of each task vector that is dropped, the largest elements.",
        low=0.0,
        high=1.0,
        per_model=True,
        axis=True,
        search=(0.0, 0.05),
    )


def ranks_between(task: TensorTask, settings: BreadcrumbsSettings, elements: int) -> tuple[Ranks | None, ...]:
    """The ranks of the magnitudes that are kept of each model, by density and gamma."""
    ranks: list[Ranks | None] = []
    for density, gamma in zip(settings.each("density", task), settings.each("gamma", task), strict=True):
        keep = int(density * elements)
        top = min(int(gamma * elements), elements - keep)
        ranks.append(None if density >= 1.0 else Ranks(top + 1, top + keep if keep else 0))
    return tuple(ranks)


class Breadcrumbs(ThresholdMethod[BreadcrumbsSettings]):
    """Model Breadcrumbs, added up.

    Example:
        >>> hsa.merge(method="breadcrumbs", base="b", models=["m1", "m2"], density=0.9, output="m")  # doctest: +SKIP
    """

    name = "breadcrumbs"
    title = "Model Breadcrumbs"
    kept_part = (
        "trim(M_i - B)",
        "trim drops the min(int(gamma * n), n - int(density * n)) largest of n elements, and the smallest until "
        "int(density * n) are left",
    )
    formula = formula_of(kept_part, votes=False, normalize=False)
    source = "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795"
    citation = """@inproceedings{davari2024breadcrumbs,
  title={Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks},
  author={Davari, MohammadReza and Belilovsky, Eugene},
  booktitle={ECCV},
  year={2024}
}"""
    Settings = BreadcrumbsSettings
    votes = False
    drops_largest = True

    def ranks(self, task: TensorTask, settings: BreadcrumbsSettings, elements: int) -> tuple[Ranks | None, ...]:
        return ranks_between(task, settings, elements)
