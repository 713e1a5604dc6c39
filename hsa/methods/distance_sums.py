"""Sums over the elements of a merge's sources and of its output, from which norms, cosines and distances follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hsa.methods.geometry import Pair, cosine, ratio
from hsa.methods.gram import pairs_of
from hsa.methods.tensors import BASE, DistanceSums, Outcome


@dataclass(frozen=True)
class ModelDistances:
    """The distances of a merge's models from base and from each other, over all target tensors.

    `models` are their roles in order [N], `base` is |B|^2, `squares` are the |tv|^2 of their task vectors [N];
    `products` and `differences` are tv_i . tv_j and |tv_i - tv_j|^2 of each pair.

    Example:
        >>> distances = ModelDistances(("model1", "model2"), 100.0, (1.0, 4.0), {(0, 1): 0.4}, {(0, 1): 4.2})
        >>> distances.size(1), distances.cosine((0, 1))
        (0.2, 0.2)
    """

    models: tuple[str, ...]
    base: float
    squares: tuple[float, ...]
    products: Mapping[Pair, float]
    differences: Mapping[Pair, float]

    def size(self, model: int) -> float | None:
        """|tv| / |B| of a model; None where base is zero."""
        return ratio(self.squares[model], self.base)

    def cosine(self, pair: Pair) -> float | None:
        """The cosine of two task vectors; None where one of them is zero."""
        first, second = pair
        return cosine(self.squares[first], self.squares[second], self.products[pair])


@dataclass(frozen=True)
class MergeDistances:
    """The distances of a merge's sources, and of its output if it was computed. The origin is base, or the first model
    if there is no base; `with_base` says which. `moved` is the squared distance of the output from the origin, and
    `from_models` are its squared distances from each model [N]. `sampled`: from a sample of the elements."""

    sources: ModelDistances
    with_base: bool
    moved: float | None
    from_models: tuple[float, ...]
    sampled: bool

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> MergeDistances | None:
        """The distances of a merge. If there is a base, only the tensors that base has count. None if no sums were
        taken."""
        with_base = any(BASE in outcome.task.sources for outcome in outcomes)
        known = [
            (outcome, outcome.sums)
            for outcome in outcomes
            if outcome.sums is not None and (BASE in outcome.task.sources) == with_base
        ]
        if not known:
            return None
        models = _models(outcome for outcome, _ in known)
        computed = all(sums.output for _, sums in known)
        places = {number: place for place, number in enumerate(models)}
        entries: dict[Pair, list[float]] = {pair: [] for pair in pairs_of(len(models) + 1)}
        origin = []
        for outcome, sums in known:
            scale = math.prod(outcome.task.shape) / sums.elements
            origin.append(scale * sums.origin)
            own = [places[number] for number in outcome.task.numbers] + [len(models)] * sums.output
            for (i, j), value in zip(pairs_of(len(own)), sums.products, strict=True):
                entries[own[i], own[j]].append(scale * value)
        products = {pair: math.fsum(values) for pair, values in entries.items()}
        last = len(models)
        return cls(
            _sources(tuple(models.values()), math.fsum(origin), products),
            with_base,
            products[last, last] if computed else None,
            tuple(_difference(products, (place, last)) for place in range(last)) if computed else (),
            any(sums.elements < math.prod(outcome.task.shape) for outcome, sums in known),
        )

    @property
    def relative(self) -> float | None:
        """The distance of the output from the origin, relative to the origin's norm; None if the output was not
        computed or the origin is zero."""
        return None if self.moved is None else ratio(self.moved, self.sources.base)

    @property
    def change(self) -> float | None:
        """The distance of the output from the first model, relative to that model's task vector; None without a base or
        an output, or if the task vector is zero."""
        if self.moved is None or not self.with_base:
            return None
        return ratio(self.from_models[0], self.sources.squares[0])


def _models(outcomes: Iterable[Outcome]) -> dict[int, str]:
    """The roles of the models by their numbers, in order."""
    found: dict[int, str] = {}
    for outcome in outcomes:
        task = outcome.task
        found.update(zip(task.numbers, (role for role in task.sources if role != BASE), strict=True))
    return dict(sorted(found.items()))


def _sources(models: tuple[str, ...], origin: float, products: Mapping[Pair, float]) -> ModelDistances:
    pairs = [(one, two) for one, two in pairs_of(len(models)) if one != two]
    return ModelDistances(
        models,
        origin,
        tuple(products[place, place] for place in range(len(models))),
        {pair: products[pair] for pair in pairs},
        {pair: _difference(products, pair) for pair in pairs},
    )


def _difference(products: Mapping[Pair, float], pair: Pair) -> float:
    """|v_i - v_j|^2."""
    one, two = pair
    return max(0.0, products[one, one] + products[two, two] - 2.0 * products[pair])


def added(parts: Iterable[DistanceSums]) -> DistanceSums | None:
    """The sums of a tensor from those of its slices; None where there are none.

    Example:
        >>> added([DistanceSums(2, 5.0, (1.0,), output=True)] * 2)
        DistanceSums(elements=4, origin=10.0, products=(2.0,), output=True)
    """
    each = list(parts)
    if not each:
        return None
    columns = zip(*(part.products for part in each), strict=True)
    return DistanceSums(
        sum(part.elements for part in each),
        math.fsum(part.origin for part in each),
        tuple(map(math.fsum, columns)),
        output=each[0].output,
    )
