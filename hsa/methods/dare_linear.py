"""DARE: keep each element of a task vector at random, rescale the kept elements, and add up.

    keep each element of d_i with probability density, times the rescaling factor
    B + lambda * sum of w_i * d_i, over the sum of w_i with `normalize`

Source: Yu, Yu, Yu, Huang, Li, Language models are super Mario: absorbing abilities from homologous models as a free
lunch, ICML 2024, arXiv 2311.03099.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsa.methods import philox
from hsa.methods.base import Block
from hsa.methods.by_chance import ChanceMethod, ChanceSettings, Drawn
from hsa.methods.masked import DENSITY_LIMITS, FACTOR, L1, LAMBDA, NORMALIZE, RESCALE, RESCALING, formula_of
from hsa.methods.model_method import Weights
from hsa.methods.philox import Key
from hsa.methods.settings import setting

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32


@dataclass(frozen=True)
class DareLinearSettings(ChanceSettings):
    """Settings of DARE."""

    method = "dare_linear"

    density: Weights = setting(
        1.0, "Probability with which an element of a task vector is kept.", search=(0.1, 1.0), **DENSITY_LIMITS
    )
    lam: Weights = setting(1.0, LAMBDA, search=(0.3, 1.5), **FACTOR)
    normalize: bool = setting(False, NORMALIZE)
    rescale: str = setting(L1, RESCALE, **RESCALING)


class DareLinear(ChanceMethod[DareLinearSettings]):
    """DARE, added up.

    Example:
        >>> hsa.merge(method="dare_linear", base="b", models=["m1", "m2"], density=0.3, output="m")  # doctest: +SKIP
    """

    name = "dare_linear"
    title = "DARE"
    kept_part = ("mask_i * (M_i - B)", "mask_i is 1 with probability density, else 0")
    formula = formula_of(kept_part, votes=False, normalize=False, rescale=L1)
    source = "Yu et al., Language models are super Mario, ICML 2024, arXiv 2311.03099"
    citation = """@inproceedings{yu2024dare,
  title={Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch},
  author={Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin},
  booktitle={ICML},
  year={2024}
}"""
    Settings = DareLinearSettings
    votes = False

    def mask(self, block: Block, decision: Drawn, place: int, vector: Float32, key: Key) -> Array:
        limit = philox.limit_of(decision.probabilities[place])
        return philox.kept(block.first, vector.size, key, limit).reshape(vector.shape)
