"""TIES: keep the largest elements of each task vector, elect a sign for every element, and merge what agrees with it.

    keep the int(density * n) largest |d_i| of the n elements of a tensor
    B + lambda * sum of w_i * d_i over the models that agree, over the sum of their w_i with `normalize`

A model agrees where its `w_i * d_i` has the sign of the sum over all models; plus is elected where that sum is 0.

Source: Yadav, Tam, Choshen, Raffel, Bansal, TIES-Merging: resolving interference when merging models, NeurIPS 2023,
arXiv 2306.01708.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsa.methods.by_threshold import Ranks, ThresholdMethod
from hsa.methods.masked import (
    DENSITY_LIMITS,
    FACTOR,
    LAMBDA,
    NONE,
    RESCALE,
    RESCALING,
    VOTE_NORMALIZE,
    MaskedSettings,
    formula_of,
)
from hsa.methods.model_method import Weights
from hsa.methods.settings import setting
from hsa.methods.tensors import TensorTask


@dataclass(frozen=True)
class TiesSettings(MaskedSettings):
    """Settings of TIES."""

    method = "ties"
    search_passes = 2

    density: Weights = setting(
        1.0, "Share of each task vector that is kept, the largest elements.", search=(0.05, 1.0), **DENSITY_LIMITS
    )
    lam: Weights = setting(1.0, LAMBDA, search=(0.5, 2.0), **FACTOR)
    normalize: bool = setting(True, VOTE_NORMALIZE)
    rescale: str = setting(NONE, RESCALE, **RESCALING)


class Ties(ThresholdMethod[TiesSettings]):
    """TIES merging.

    Example:
        >>> hsa.merge(method="ties", base="b", models=["m1", "m2"], density=0.5, output="merged")  # doctest: +SKIP
    """

    name = "ties"
    title = "TIES"
    kept_part = ("trim(M_i - B)", "trim keeps the int(density * n) largest of n elements")
    formula = formula_of(kept_part, votes=True, normalize=True)
    source = "Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708"
    citation = """@inproceedings{yadav2023ties,
  title={{TIES}-Merging: Resolving Interference When Merging Models},
  author={Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit},
  booktitle={NeurIPS},
  year={2023}
}"""
    Settings = TiesSettings
    votes = True

    def ranks(self, task: TensorTask, settings: TiesSettings, elements: int) -> tuple[Ranks | None, ...]:
        densities = settings.each("density", task)
        return tuple(None if each >= 1.0 else Ranks(1, int(each * elements)) for each in densities)
