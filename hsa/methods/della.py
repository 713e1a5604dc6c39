"""DELLA with the vote of TIES: keep each element of a task vector at random, with a higher probability for elements
that are larger in their row. Rescale the kept elements, elect a sign for every element, and merge what agrees with it.

    keep and rescale as `della_linear` does
    B + lambda * sum of w_i * d_i over the models that agree, over the sum of their w_i with `normalize`

Source: Deep, Bhardwaj, Poria, DELLA-Merging, 2024, arXiv 2406.11617.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsa.methods.della_linear import DellaLinear, DellaLinearSettings
from hsa.methods.masked import L1, VOTE_NORMALIZE, formula_of
from hsa.methods.settings import setting


@dataclass(frozen=True)
class DellaSettings(DellaLinearSettings):
    """Settings of DELLA with the vote of TIES."""

    method = "della"

    normalize: bool = setting(True, VOTE_NORMALIZE)


class Della(DellaLinear):
    """DELLA with the vote of TIES.

    Example:
        >>> hsa.merge(method="della", base="b", models=["m1", "m2"], density=0.5, output="merged")  # doctest: +SKIP
    """

    name = "della"
    title = "DELLA with the vote of TIES"
    formula = formula_of(DellaLinear.kept_part, votes=True, normalize=True, rescale=L1)
    Settings = DellaSettings
    votes = True
