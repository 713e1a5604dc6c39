"""Optuna's samplers with a separate seed for each value, and a grid over the spaces of several methods."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hsa.errors import RequestError, listed, shown
from hsa.option_names import option
from hsa.searches.space import MethodSpace
from hsa.system.digests import digest_of

SAMPLERS = ("tpe", "cmaes", "nsga2", "random", "grid")

POPULATION = 12
"""Trials of a generation of NSGA-II: a search has a few dozen trials, and Optuna's 50 would be one generation."""

METHOD = "method"
"""The parameter name of the choice among methods in a study."""


def check_sampler(name: str, spaces: Sequence[MethodSpace], objective: str) -> None:
    """Raise RequestError for a sampler that does not exist, or that cannot search these spaces."""
    if name not in SAMPLERS:
        raise RequestError(f"{option('sampler')} must be {listed(SAMPLERS, 'or')}, got {shown(name)}")
    if name == "cmaes":
        numbers = [axis for space in spaces for axis in space.axes if not axis.choices]
        if len(spaces) > 1 or len(numbers) < 2 or objective == "pareto":
            raise RequestError(
                f"sampler cmaes searches two or more numbers of one method for one objective; take "
                f"{option('sampler', 'tpe')}"
            )


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Suppress Optuna's messages about studies, and its warnings about experimental features and about heartbeats,
    which searches send themselves."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            yield
    finally:
        optuna.logging.set_verbosity(before)


class SteadySampler:
    """An Optuna sampler for searches that are killed and resumed.

    Optuna draws the values of a trial one after another from one random generator. A search that is killed in the
    middle of a trial would then continue with other values. Each draw therefore gets its own generator, seeded with the
    search's seed, the trial's number and the parameter's name. Jointly drawn values share one.

    Example:
        >>> study.sampler = SteadySampler("tpe", seed=0)  # doctest: +SKIP
    """

    def __init__(self, name: str, seed: int) -> None:
        self._name, self._seed = name, seed
        self._together: tuple[int, Any] = (-1, None)

    def _sampler(self, trial: Any, drawn: str) -> Any:
        key = f"{self._seed} {trial.number} {drawn}".encode()
        return _sampler(self._name, int(digest_of(key)[:8], 16))

    def _of(self, trial: Any) -> Any:
        """The sampler for the jointly drawn numbers of a trial."""
        if self._together[0] != trial.number:
            self._together = trial.number, self._sampler(trial, "")
        return self._together[1]

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        """The jointly drawn numbers, which Optuna requests all at once."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        sampler = self._sampler(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Any, trial: Any) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self._of(trial).after_trial(study, trial, state, values)


def _sampler(name: str, state: int) -> Any:
    import optuna

    if name == "tpe":
        return optuna.samplers.TPESampler(seed=state, multivariate=True, group=True)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=state)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=state, population_size=POPULATION)
    return optuna.samplers.RandomSampler(seed=state)


def suggest(trial: Any, spaces: Mapping[str, MethodSpace], *, whole: bool) -> tuple[str, dict[str, Any]]:
    """Draw a method and a value for each of its axes. With `whole`, the parameters of all methods are drawn, for
    samplers that need the same parameters in every trial."""
    names = list(spaces)
    method = str(trial.suggest_categorical(METHOD, names)) if len(names) > 1 else names[0]
    drawn: dict[str, Any] = {}
    for name, space in spaces.items():
        if name != method and not whole:
            continue
        for axis in space.axes:
            if axis.choices:
                drawn[axis.name] = trial.suggest_categorical(axis.name, list(axis.choices))
            else:
                drawn[axis.name] = trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)
    return method, drawn


def distributions(space: MethodSpace, methods: Sequence[str]) -> dict[str, Any]:
    """Optuna's distributions of the values that `suggest` draws for a method."""
    import optuna

    found: dict[str, Any] = {}
    if len(methods) > 1:
        found[METHOD] = optuna.distributions.CategoricalDistribution(list(methods))
    for axis in space.axes:
        if axis.choices:
            found[axis.name] = optuna.distributions.CategoricalDistribution(list(axis.choices))
        else:
            found[axis.name] = optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log)
    return found


def grid_points(spaces: Mapping[str, MethodSpace], count: int) -> list[dict[str, Any]]:
    """At most `count` points, the same maximum for each method, in the form of `suggest`'s values.

    The values of an axis are evenly spaced between its ends; the first axes get one more than the last if possible.
    Raises the errors of `check_grid`.
    """
    if count < 1:
        return []
    check_grid(list(spaces.values()), count)
    points: list[dict[str, Any]] = []
    for space in spaces.values():
        chosen = {METHOD: space.method} if len(spaces) > 1 else {}
        values = [
            axis.grid(number) for axis, number in zip(space.axes, _counts(space, count // len(spaces)), strict=True)
        ]
        names = [axis.name for axis in space.axes]
        points += [{**chosen, **dict(zip(names, point, strict=True))} for point in itertools.product(*values)]
    return points


def check_grid(spaces: Sequence[MethodSpace], count: int) -> None:
    """Raise RequestError if the choices of a method alone make more points than its share of `count`."""
    share = count // len(spaces)
    for space in spaces:
        least = math.prod(len(axis.choices) or 1 for axis in space.axes)
        if count > 0 and least > share:
            raise RequestError(
                f"the choices of method {space.method} make a grid of {least} points, and after the baselines "
                f"{option('trials')} leaves {share} for each method; raise it, or give fewer choices"
            )


def _counts(space: MethodSpace, most: int) -> list[int]:
    """The number of values on each axis of a grid."""
    counts = [len(axis.choices) or 1 for axis in space.axes]
    grown = True
    while grown:
        grown = False
        for place, axis in enumerate(space.axes):
            trial = [*counts[:place], counts[place] + 1, *counts[place + 1 :]]
            size = 1
            for each in trial:
                size *= each
            if not axis.choices and size <= most:
                counts, grown = trial, True
    return counts
