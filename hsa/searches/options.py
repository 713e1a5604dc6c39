"""The options of a search besides its sources and its data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hsa.arguments import check_flags
from hsa.errors import RequestError, listed, shown
from hsa.evaluation.bootstrap import check_confidence
from hsa.evaluation.options import DecodingOptions
from hsa.methods.registry import method_named
from hsa.methods.settings import DEFAULT_METHOD
from hsa.option_names import option
from hsa.searches.durations import seconds_of
from hsa.searches.objectives import PARETO
from hsa.searches.space import parse_layers

SAMPLER, PARETO_SAMPLER = "tpe", "nsga2"
"""The default samplers: of a search for one value, and for a Pareto front."""

SOUPS = ("greedy",)
MOST_TRIALS = 100_000


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search. See `hsa.search` for their meaning.

    Raises RequestError for an invalid value.

    Example:
        >>> SearchOptions(methods=("ties", "linear"), trials=40).sampler
        'tpe'
    """

    methods: tuple[str, ...] = (DEFAULT_METHOD,)
    trials: int = 60
    time: float | None = None
    sampler: str = SAMPLER
    objective: str = "mean"
    space: tuple[str, ...] = ()
    by_layer: str | None = None
    seed: int = 0
    racing: bool = True
    soup: str | None = None
    normalizer: str = "auto"
    confidence: float = 0.95
    limit: int | None = None
    threads: int | None = None
    decoding: DecodingOptions = field(default_factory=DecodingOptions)

    def __post_init__(self) -> None:
        for method in self.methods:
            method_named(method)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise RequestError(f"{option('method')} must name methods, each once, got {shown(list(self.methods))}")
        _check_whole("trials", self.trials, 1, MOST_TRIALS)
        _check_whole("seed", self.seed, 0, 2**32 - 1)
        if self.limit is not None:
            _check_whole("limit", self.limit, 1, 2**31)
        if self.soup is not None and self.soup not in SOUPS:
            raise RequestError(f"{option('soup')} must be {listed(SOUPS)}, got {shown(self.soup)}")
        if self.by_layer is not None:
            if not isinstance(self.by_layer, str):
                raise RequestError(f"{option('by_layer')} must be a text such as 0-3,4-7, got {shown(self.by_layer)}")
            parse_layers(self.by_layer)
        check_flags(racing=self.racing)
        check_confidence(self.confidence)

    def as_dict(self) -> dict[str, Any]:
        """The options that must stay the same when a search is resumed; trials, time and threads may change."""
        names = ("sampler", "objective", "by_layer", "seed", "racing", "soup", "normalizer", "limit")
        return {
            "methods": list(self.methods),
            "space": list(self.space),
            **{name: getattr(self, name) for name in names},
            "decoding": self.decoding.as_dict(),
        }


def search_options(method: str | Sequence[str], time: str | float | None, **values: Any) -> SearchOptions:
    """Make options from a caller's arguments; methods may be one text with commas. Raises RequestError."""
    names = method.split(",") if isinstance(method, str) else _listed("method", method, "a name, or a list of names")
    methods = tuple(name.strip() if isinstance(name, str) else name for name in names)
    space = values.pop("space", None) or ()
    sampler = values.pop("sampler", None)
    return SearchOptions(
        methods=methods,
        sampler=(PARETO_SAMPLER if values.get("objective") == PARETO else SAMPLER) if sampler is None else sampler,
        time=None if time is None else seconds_of(time),
        space=(space,) if isinstance(space, str) else _listed("space", space, "a text, or a list of texts"),
        **values,
    )


def _listed(name: str, given: Any, expected: str) -> tuple[Any, ...]:
    if not isinstance(given, Iterable):
        raise RequestError(f"{option(name)} must be {expected}, got {shown(given)}")
    return tuple(given)


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{option(name)} must be a whole number from {low} to {high}, got {shown(value)}")
