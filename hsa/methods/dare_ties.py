"""DARE with the vote of TIES: keep each element of a task vector at random, rescale the kept elements, elect a sign for
every element, and merge what agrees with it.

    keep and rescale as `dare_linear` does
    B + lambda * sum of w_i * d_i over the models that agree, over the sum of their w_i with `normalize`

Source: Yu et al., Language models are super Mario, ICML 2024, arXiv 2311.03099; the vote: Yadav et al., TIES-Merging,
NeurIPS 2023, arXiv 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsa.methods.dare_linear import DareLinear, DareLinearSettings
from hsa.methods.masked import L1, VOTE_NORMALIZE, formula_of
from hsa.methods.settings import setting


@dataclass(frozen=True)
class DareTiesSettings(DareLinearSettings):
    """Settings of DARE with the vote of TIES."""

    method = "dare_ties"

    normalize: bool = setting(False, VOTE_NORMALIZE)


class DareTies(DareLinear):
    """DARE with the vote of TIES.

    Example:
        >>> hsa.merge(method="dare_ties", base="b", models=["m1", "m2"], density=0.5, output="m")  # doctest: +SKIP
    """

    name = "dare_ties"
    title = "DARE with the vote of TIES"
    formula = formula_of(DareLinear.kept_part, votes=True, normalize=False, rescale=L1)
    Settings = DareTiesSettings
    votes = True
