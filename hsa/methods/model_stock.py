"""Model Stock: a point between base and the mean of the models, closer to base the less the models agree.

    t * mean(M_i) + (1 - t) * B        with t = N * c / (1 + (N - 1) * c)

and `c` the mean cosine between two task vectors, over all pairs. The cosines are those of the whole tensor, or with
`filter_wise` of each row separately. If the divisor of `t` is nearly 0, the task vectors oppose each other as far as
they can, and `t` is 0.

Source: Jang, Yun, Han, Model Stock: All we need is just a few fine-tuned models, ECCV 2024, arXiv 2403.19522.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsa.methods.base import Contract
from hsa.methods.gram import Gram, pairs_of
from hsa.methods.gram_combination import Axis, GroupedCombination
from hsa.methods.model_method import ModelSettings
from hsa.methods.settings import setting
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Array

SMALLEST_PRODUCT = 1e-6
"""A product of two norms below this counts as this value, as in mergekit."""

SMALLEST_DIVISOR = 1e-6
"""If the divisor of t is below this, it counts as 0, and t is 0, as in mergekit."""


@dataclass(frozen=True)
class ModelStockSettings(ModelSettings):
    """Settings of Model Stock."""

    method = "model_stock"
    filter_wise: bool = setting(False, "Decide for each row of a tensor by itself.", structural=True)


class ModelStock(GroupedCombination[ModelStockSettings]):
    """The mean of the models, pulled towards base by how much they disagree.

    Example:
        >>> hsa.merge(method="model_stock", base="b", models=["m1", "m2"], output="merged")  # doctest: +SKIP
    """

    name = "model_stock"
    title = "Model Stock"
    formula = "t * mean(M_i) + (1 - t) * B, t = N * c / (1 + (N - 1) * c), c the mean cosine of two task vectors"
    source = "Jang et al., Model Stock, ECCV 2024, arXiv 2403.19522"
    citation = """@inproceedings{jang2024model,
  title={Model Stock: All we need is just a few fine-tuned models},
  author={Jang, Dong-Hwan and Yun, Sangdoo and Han, Dongyoon},
  booktitle={ECCV},
  year={2024}
}"""
    contract = Contract(base="required", least=2, most=8)
    Settings = ModelStockSettings

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        settings = ModelStockSettings.from_dict(parameters)
        return f"{self.formula}, for each of the rows by itself" if settings.filter_wise else self.formula

    def axis(self, settings: ModelStockSettings) -> Axis | None:
        return "rows" if settings.filter_wise else None

    def coefficients(self, task: TensorTask, gram: Gram, settings: ModelStockSettings) -> list[float]:
        import numpy as np

        entries = np.array([[gram[one][two]] for one, two in pairs_of(len(gram))])
        coefficients: list[float] = self.group_coefficients(task, entries, settings)[0].tolist()
        return coefficients

    def group_coefficients(self, task: TensorTask, entries: Array, settings: ModelStockSettings) -> Array:
        import numpy as np

        count = len(task.numbers)
        factor = share_of_mean(entries, count) / count
        return np.repeat(factor[:, None], count, axis=1)


def share_of_mean(entries: Array, count: int) -> Array:
    """`t` of each group, float64 [groups], from the entries of its Gram matrix, float64 [pairs, groups].

    Uses only additions, products, divisions and square roots. Each is rounded as Python rounds it.

    Example:
        >>> import numpy as np
        >>> share_of_mean(np.array([[1.0, 1.0], [0.5, 0.0], [1.0, 1.0]]), 2).tolist()
        [0.6666666666666666, 0.0]
    """
    import numpy as np

    pairs = pairs_of(count)
    squares = {one: entries[number] for number, (one, two) in enumerate(pairs) if one == two}
    cosine: Array = np.zeros(entries.shape[1])
    for number, (one, two) in enumerate(pairs):
        if one != two:
            product = np.maximum(np.sqrt(squares[one] * squares[two]), SMALLEST_PRODUCT)
            cosine += np.clip(entries[number] / product, -1.0, 1.0)
    cosine /= len(pairs) - count
    divisor = 1.0 + (count - 1) * cosine
    opposed = np.abs(divisor) < SMALLEST_DIVISOR
    share: Array = np.where(opposed, 0.0, count * cosine / np.where(opposed, 1.0, divisor))
    return share
