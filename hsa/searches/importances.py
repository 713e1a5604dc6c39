"""The importance of each drawn number, by Optuna's PED-ANOVA over the trials of a method."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from hsa.searches.samplers import METHOD, quiet_optuna
from hsa.searches.space import MethodSpace

LEAST = 4
"""Minimum trials of a method for an estimate."""


def importances(study: Any, spaces: Mapping[str, MethodSpace]) -> dict[str, dict[str, float]]:
    """Shares that sum to 1, for each method with enough trials. `study` is Optuna's, with one or several objectives."""
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    found: dict[str, dict[str, float]] = {}
    with quiet_optuna(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Target and region quantiles")  # few distinct scores
        for method, space in spaces.items():
            own = [trial for trial in complete if trial.params.get(METHOD, method) == method and trial.params]
            names = [axis.name for axis in space.axes if len({trial.params.get(axis.name) for trial in own}) > 1]
            if len(own) < LEAST or not names:
                continue
            part = optuna.create_study(storage=optuna.storages.InMemoryStorage(), direction="minimize")
            part.add_trials([_of_one_value(trial, names) for trial in own])
            shares = optuna.importance.get_param_importances(
                part, evaluator=optuna.importance.PedAnovaImportanceEvaluator(), params=names
            )
            found[method] = {name: float(share) for name, share in shares.items()}
    return found


def _of_one_value(trial: Any, names: list[str]) -> Any:
    """The trial with only these numbers, and the mean of its values."""
    import optuna

    return optuna.trial.create_trial(
        value=sum(trial.values) / len(trial.values),
        params={name: trial.params[name] for name in names},
        distributions={name: trial.distributions[name] for name in names},
    )
