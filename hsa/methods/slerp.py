"""SLERP: spherical linear interpolation between base and one model, each tensor as one vector.

    sin((1 - t) * o) / sin(o) * B + sin(t * o) / sin(o) * M        with o the angle between B and M

Interpolation is linear, (1 - t) B + t M, if the tensors are nearly parallel or nearly opposite, or if one is zero.
Fine-tunes of one model are nearly parallel in most tensors.

Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; the threshold is mergekit's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsa.methods.arcs import clamped, norm_product, on_the_arc, on_the_line
from hsa.methods.base import BASE, Block, Contract
from hsa.methods.coefficients import Coefficients
from hsa.methods.gram import Gram
from hsa.methods.gram_combination import GramCombination, add_up
from hsa.methods.model_method import ModelSettings, Weights
from hsa.methods.settings import setting
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Float32

NEARLY_PARALLEL = 0.9995
"""If the magnitude of the cosine is above this, interpolation is linear."""


@dataclass(frozen=True)
class SlerpSettings(ModelSettings):
    """Settings of SLERP. `t` may be a list over layers, or a list with filters."""

    method = "slerp"
    t: Weights | None = setting(
        None,
        "Where the result lies, from base (0) to the model (1).",
        low=0.0,
        high=1.0,
        scheduled=True,
        axis=True,
        search=(0.0, 1.0),
        default_text="required",
        required=True,
    )


class Slerp(GramCombination[SlerpSettings]):
    """Spherical interpolation between base and one model. A recorded decision holds the coefficients of both.

    Example:
        >>> hsa.merge(method="slerp", base="b", models=["m"], t=0.5, output="merged")  # doctest: +SKIP
    """

    name = "slerp"
    title = "SLERP"
    formula = "sin((1 - t) * o) / sin(o) * B + sin(t * o) / sin(o) * M, o the angle between B and M"
    source = "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985"
    citation = """@inproceedings{shoemake1985animating,
  title={Animating rotation with quaternion curves},
  author={Shoemake, Ken},
  booktitle={SIGGRAPH},
  year={1985}
}"""
    contract = Contract(base="required", least=1, most=1)
    Settings = SlerpSettings

    def vectors(self, block: Block) -> list[Float32]:
        return [block.weights(role) for role in (BASE, *block.models)]

    def vector_count(self, task: TensorTask) -> int:
        return 2

    def coefficients(self, task: TensorTask, gram: Gram, settings: SlerpSettings) -> tuple[float, float]:
        t, product = settings.of("t", task), norm_product(gram, 0, 1)
        if product == 0.0:
            return on_the_line(t)
        cosine = clamped(gram[0][1] / product)
        return on_the_line(t) if abs(cosine) > NEARLY_PARALLEL else on_the_arc(cosine, t)

    def coefficients_of(self, decision: Any, models: Sequence[str]) -> dict[str, float]:
        return super().coefficients_of(decision, (BASE, *models) if isinstance(decision, Coefficients) else models)

    def combine(self, block: Block, decision: Coefficients, out: Float32) -> None:
        add_up(_terms(block, decision.models), out, None)

    def largest_result(
        self, task: TensorTask, measured: Gram, settings: SlerpSettings, largest: Mapping[str, float]
    ) -> float | None:
        decision = self.decide(task, measured, settings, None)
        if not isinstance(decision, Coefficients):
            return super().largest_result(task, measured, settings, largest)
        (model,) = (role for role in largest if role != BASE)
        return abs(decision.models[0]) * largest[BASE] + abs(decision.models[1]) * largest[model]

    def longest_decision(self, task: TensorTask, number: float) -> Coefficients:
        return Coefficients((number, number))


def _terms(block: Block, coefficients: tuple[float, ...]) -> Iterator[Float32]:
    import numpy as np

    for role, coefficient in zip((BASE, *block.models), coefficients, strict=True):
        yield np.multiply(block.weights(role), np.float32(coefficient), out=block.room(role))
