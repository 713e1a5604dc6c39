"""The parts of a model that a mergekit file treats separately: slices of layers, which stay in place, and stacks."""

from __future__ import annotations

from dataclasses import dataclass

from hsa.actions.mergekit_config.config_request import Model
from hsa.actions.mergekit_config.document import Document, Module, Slice
from hsa.actions.mergekit_config.nodes import RUN_MERGEKIT
from hsa.actions.mergekit_config.parameters import Part
from hsa.errors import shown


@dataclass(frozen=True)
class PartOfModel:
    """Tensors with parameters of their own: which tensors, and the module and the slice that set the parameters."""

    part: Part
    module: Module
    slice: Slice


def read_parts(document: Document) -> tuple[list[PartOfModel], dict[str | None, int]]:
    """The parts of the model that have parameters of their own, and the number of layers in each stack's slices."""
    parts: list[PartOfModel] = []
    layers: dict[str | None, int] = {}
    several = len(document.modules) > 1
    first = next(document.slices)
    for module in document.modules:
        stack = module.name if several else None
        end = 0
        for each in module.slices:
            _check_same_models(each, first, document.base)
            begin, end = end, _check_in_place(each, end)
            span = (begin, None if each is module.slices[-1] else end - 1) if len(module.slices) > 1 else None
            parts.append(PartOfModel(Part(stack, span), module, each))
        if end:
            layers[stack] = end
    return parts, layers


def _check_same_models(each: Slice, first: Slice, base: Model | None) -> None:
    own, expected = _models(each, base), _models(first, base)
    missing = next((model for model in expected if model not in own), None)
    other = next((source for source in each.sources if source.model not in expected), None)
    if other is not None or missing is not None:
        node = other.node if other is not None else each.node
        what = f"merges {shown(str(other.model))}" if other is not None else f"lacks {shown(str(missing))}"
        raise node.error(
            f"{what}, unlike {first.node.path}; every part of a model is merged of the same models here; {RUN_MERGEKIT}"
        )


def _models(each: Slice, base: Model | None) -> list[Model]:
    """The models of a slice; mergekit adds base to a list of whole models."""
    added = [base] if base is not None and any(source.layers is None for source in each.sources) else []
    return [*(source.model for source in each.sources), *added]


def _check_in_place(each: Slice, begin: int) -> int:
    """The end of the output's layers after a slice. Raises RequestError if layers move."""
    for source in each.sources:
        if source.layers is None:
            return 0
        first, end = source.layers
        if first != begin:
            raise source.node.error(
                f"takes layers {first} to {end - 1} for the output's {begin} to {begin + end - first - 1}; layers "
                f"stay in their places here; {RUN_MERGEKIT}"
            )
    return begin + end - first
