"""Files of mergekit's as texts, and as the requests that they are read as."""

from __future__ import annotations

from hsa.actions.mergekit_config.config_request import ConfigRequest, Model
from hsa.actions.mergekit_config.request import loads

TWO = "models: [{model: a}, {model: b}]"


def read(text: str) -> ConfigRequest:
    return loads(text.encode(), "c.yml")


def names(models: tuple[Model, ...]) -> list[str]:
    return [str(model) for model in models]


def linear(parameters: str, more: str = "") -> str:
    return f"merge_method: linear\n{TWO}\nparameters: {parameters}\n{more}"


def ties(a: str = "{}", b: str = "{}", whole: str = "{weight: 1}", more: str = "") -> str:
    models = f"[{{model: a, parameters: {a}}}, {{model: b, parameters: {b}}}]"
    return f"merge_method: ties\nbase_model: base\nmodels: {models}\nparameters: {whole}\n{more}"


def slices(*ranges: tuple[int, int], parameters: str = "{t: 0.5}", each: str = "{}", more: str = "") -> str:
    parts = [
        f"{{sources: [{{model: a, layer_range: [{i}, {j}]}}, {{model: b, layer_range: [{i}, {j}]}}], "
        f"parameters: {each.replace('N', str(number))}}}"
        for number, (i, j) in enumerate(ranges)
    ]
    return f"merge_method: slerp\nbase_model: a\nslices: [{', '.join(parts)}]\nparameters: {parameters}\n{more}"
