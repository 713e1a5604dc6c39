"""mergekit's merge methods: the models and the parameters that each takes, as mergekit 0.1.5 defines them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hsa.methods.hsa import HsaSettings
from hsa.methods.settings import declared

Kind = Literal["number", "flag", "whole", "text", "any"]
"""The type of a parameter's values; `any` for parameters that no method has."""

Scope = Literal["shared", "input", "non_base"]
"""Where mergekit reads a parameter: `shared` above all models, `input` at each model, `non_base` at each but base."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method in mergekit.

    `setting` is the Python name of the setting with this meaning here, if the name differs. `has_effect` is False if no
    value of the parameter changes a merged tensor. `default` is mergekit's.
    """

    name: str
    kind: Kind
    scope: Scope = "shared"
    default: float | bool | str | None = None
    required: bool = False
    setting: str | None = None
    has_effect: bool = True

    @property
    def python(self) -> str:
        """The name of its setting here."""
        return self.setting or self.name


@dataclass(frozen=True)
class MergekitMethod:
    """The models and the parameters of a method in mergekit.

    `base` says what base_model is: `counts` as one of the models, `required`, or `optional`. `least` and `most` limit
    the number of models; base is included if it counts or is required, but not if it is optional. `has_roles` says that
    the models have roles (`role: primary`) and are merged whole, and that the first of them gives config and tokenizer.
    """

    name: str
    base: Literal["counts", "required", "optional"]
    least: int
    most: int | None
    parameters: tuple[Parameter, ...]
    has_roles: bool = False

    def parameter(self, name: str) -> Parameter | None:
        return next((each for each in self.parameters if each.name == name), None)


_INT8_MASK = Parameter("int8_mask", "flag", default=False, has_effect=False)


def _weight(scope: Scope) -> Parameter:
    return Parameter("weight", "number", scope, required=True, setting="weights")


def _arithmetic(name: str, *own: Parameter, normalize: bool, rescale: bool, sparse: bool = True) -> MergekitMethod:
    """A method that adds task vectors to base. Without sparsification, `density` and `rescale` change nothing."""
    parameters = (
        _INT8_MASK,
        Parameter("normalize", "flag", default=normalize),
        Parameter("rescale", "flag", default=rescale, has_effect=sparse),
        Parameter("lambda", "number", default=1.0, setting="lam"),
        _weight("non_base"),
        Parameter("density", "number", "non_base", 1.0, has_effect=sparse),
        *own,
    )
    return MergekitMethod(name, "required", 1, None, parameters)


_GAMMA = Parameter("gamma", "number", "non_base", 0.01)
_EPSILON = Parameter("epsilon", "number", "non_base", 0.15)

_HSA: dict[str, Any] = {each.name: each.default for each in declared(HsaSettings)}

_METHODS = (
    MergekitMethod("linear", "counts", 1, None, (_weight("input"), Parameter("normalize", "flag", default=True))),
    _arithmetic("task_arithmetic", normalize=False, rescale=False, sparse=False),
    _arithmetic("ties", normalize=True, rescale=False),
    _arithmetic("dare_linear", normalize=False, rescale=True),
    _arithmetic("dare_ties", normalize=False, rescale=True),
    _arithmetic("breadcrumbs", _GAMMA, normalize=False, rescale=False),
    _arithmetic("breadcrumbs_ties", _GAMMA, normalize=False, rescale=False),
    _arithmetic("della", _EPSILON, normalize=True, rescale=True),
    _arithmetic("della_linear", _EPSILON, normalize=False, rescale=True),
    MergekitMethod("slerp", "required", 2, 2, (Parameter("t", "number", required=True),)),
    MergekitMethod(
        "nuslerp",
        "optional",
        2,
        2,
        (
            _weight("non_base"),
            Parameter("nuslerp_row_wise", "flag", default=False, setting="row_wise"),
            Parameter("nuslerp_flatten", "flag", default=True, setting="flatten"),
        ),
    ),
    MergekitMethod(
        "multislerp",
        "optional",
        1,
        None,
        (
            _weight("non_base"),
            Parameter("normalize_weights", "flag", default=True),
            Parameter("eps", "number", default=1e-8),
        ),
    ),
    MergekitMethod(
        "karcher",
        "counts",
        1,
        None,
        (Parameter("max_iter", "whole", default=10), Parameter("tol", "number", default=1e-5)),
    ),
    MergekitMethod("model_stock", "required", 3, None, (Parameter("filter_wise", "flag", default=False),)),
    MergekitMethod("nearswap", "required", 2, 2, (Parameter("t", "number", required=True),)),
    MergekitMethod("ram", "required", 1, None, (Parameter("epsilon", "number", default=1e-5),)),
    MergekitMethod("sce", "required", 1, None, (_INT8_MASK, Parameter("select_topk", "number", default=1.0))),
    MergekitMethod(
        "hsa",
        "required",
        3,
        3,
        (
            Parameter("k", "number", default=_HSA["k"]),
            Parameter("lambda", "number", default=_HSA["lam"], setting="lam"),
            Parameter("alpha", "number", default=_HSA["alpha"]),
            Parameter("targets", "text", default=_HSA["targets"]),
            Parameter("role", "text", "non_base", has_effect=False),
        ),
        has_roles=True,
    ),
)

METHODS = {each.name: each for each in _METHODS}
"""The methods that both packages have, by name; mergekit has `hsa` when `hsa mergekit` runs it."""

NOT_HERE = ("arcee_fusion", "passthrough", "ramplus_tl")
"""Methods that only mergekit has."""
