"""Model Breadcrumbs with the vote of TIES: drop the largest and the smallest elements of each task vector, elect a sign
for every element, and merge what agrees with it.

    drop as `breadcrumbs` does
    B + lambda * sum of w_i * d_i over the models that agree, over the sum of their w_i with `normalize`

Source: Davari, Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795; the vote: Yadav et al., TIES-Merging,
NeurIPS 2023, arXiv 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsa.methods.breadcrumbs import Breadcrumbs, BreadcrumbsSettings
from hsa.methods.masked import VOTE_NORMALIZE, formula_of
from hsa.methods.settings import setting


@dataclass(frozen=True)
class BreadcrumbsTiesSettings(BreadcrumbsSettings):
    """Settings of Model Breadcrumbs with the vote of TIES."""

    method = "breadcrumbs_ties"

    normalize: bool = setting(False, VOTE_NORMALIZE)


class BreadcrumbsTies(Breadcrumbs):
    """Model Breadcrumbs with the vote of TIES.

    Example:
        >>> hsa.merge(method="breadcrumbs_ties", base="b", models=["m1", "m2"], output="merged")  # doctest: +SKIP
    """

    name = "breadcrumbs_ties"
    title = "Model Breadcrumbs with the vote of TIES"
    formula = formula_of(Breadcrumbs.kept_part, votes=True, normalize=False)
    source = "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795"
    Settings = BreadcrumbsTiesSettings
    votes = True
