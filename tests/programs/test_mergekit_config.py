"""Files of mergekit's as this package reads them, against mergekit's own reading: what is refused, and every value."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random
from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from mergekit import merge_methods
from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
from mergekit.merge_methods.base import BasePolicy, ParameterScope
from mergekit.parameter_resolver import resolve_parameters

from hsa.actions.mergekit_config.config_request import ConfigRequest
from hsa.actions.mergekit_config.merge_methods import METHODS, NOT_HERE, MergekitMethod
from hsa.actions.mergekit_config.request import loads
from hsa.errors import RequestError
from hsa.methods.values import Where, at

OURS = [each for each in METHODS.values() if each.name != "hsa"]
LAYERS = 5
TENSORS = [
    ("model.embed_tokens.weight", 0.0),
    *(
        (f"model.layers.{n}.{rest}", n / (LAYERS - 1))
        for n in range(LAYERS)
        for rest in ("fc1.bias", "self_attn.q.weight")
    ),
    ("model.norm.weight", 0.0),
]
"""Tensors of a model, each with mergekit's `t`."""

REFUSED = object()


# --- the table of methods ---------------------------------------------------------------------------------------------


def test_every_method_of_mergekit_is_known() -> None:
    assert {each.spec.name for each in merge_methods.registered_methods()} - {"hsa"} == {*METHODS, *NOT_HERE} - {"hsa"}


@pytest.mark.parametrize("method", OURS, ids=lambda each: each.name)
def test_parameters_and_models_are_mergekits(method: MergekitMethod) -> None:
    spec = merge_methods.get(method.name).spec
    kinds = {float: "number", bool: "flag", int: "whole"}
    theirs = {
        each.name: (kinds[each.value_type], each.scope.value, None if each.required else each.default)
        for each in spec.parameters
    }
    assert {each.name: (each.kind, each.scope, each.default) for each in method.parameters} == theirs
    assert all(each.required == (each.default is None) for each in method.parameters)
    contract = spec.contract
    if contract.base == BasePolicy.OPTIONAL:
        assert (method.base, method.least, method.most) == ("optional", contract.min_non_base, contract.max_non_base)
    else:
        base = "required" if contract.base == BasePolicy.REQUIRED else "counts"
        assert (method.base, method.least, method.most) == (base, contract.min_inputs, contract.max_inputs)


# --- random files -----------------------------------------------------------------------------------------------------


def scalar(chance: random.Random, kind: str) -> Any:
    if kind == "flag":
        return chance.choice([True, False, 1, 0, "true", "No"])
    if kind == "whole":
        return chance.choice([1, 3, "7", 5.0])
    return chance.choice([0, 1, 0.25, -0.5, "1e-1", 1.5, "0.75"])


def value(chance: random.Random, kind: str) -> Any:
    """A value of a parameter, now and then one that cannot be."""
    form = chance.randrange(80)
    if form < 30 or (kind != "number" and form < 70):
        return scalar(chance, kind)
    if form < 50:
        return [scalar(chance, kind) for _ in range(chance.randrange(5))]
    if form == 79:
        return chance.choice([None, "much", [[1]], {"filter": "fc1"}, [{"filter": 3, "value": 1}], {}, 0.5])
    entries = [entry(chance, kind) for _ in range(chance.randrange(1, 4))]
    return entries[0] if form < 55 else entries


def entry(chance: random.Random, kind: str) -> dict[str, Any]:
    inner = chance.choice([scalar(chance, kind), [scalar(chance, kind) for _ in range(chance.randrange(1, 4))]])
    parts = ["fc1", "self_attn", "layers.1", "model.layers", "norm", "*", "", None, "fc*", "bias"]
    found = {"filter": chance.choice(parts), "value": inner}
    if chance.random() < 0.2:
        del found["filter"]
    return found


def parameters(chance: random.Random, method: MergekitMethod, share: float) -> dict[str, Any]:
    return {each.name: value(chance, each.kind) for each in method.parameters if chance.random() < share}


def document(chance: random.Random) -> dict[str, Any]:
    method = chance.choice(OURS)
    most = method.most or 4
    known = ["a", "b", "c", "org/d@v"] if chance.random() < 0.8 else ["a", "b", "c", "base+l"]
    names = chance.sample(known, chance.randrange(max(1, most - 1), most + 1))
    found: dict[str, Any] = {"merge_method": method.name, "parameters": parameters(chance, method, 0.9)}
    if chance.random() < {"required": 1.0, "optional": 0.7, "counts": 0.5}[method.base]:
        found["base_model"] = chance.choice(["base", names[0]])
    models = [{"model": name, "parameters": parameters(chance, method, 0.4)} for name in names]
    if chance.random() < 0.2:
        models.append({"model": "base"})
    found["models"] = models
    if chance.random() < 0.3:
        count = chance.choice([LAYERS, LAYERS, 2])
        sources = [{**each, "layer_range": [0, count]} for each in models]
        found["slices"] = [{"sources": sources, "parameters": parameters(chance, method, 0.3)}]
        del found["models"]
    return found


def theirs(text: str) -> Any:
    """What mergekit reads: models in order with every parameter, by tensor; REFUSED where it stops."""
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        method = merge_methods.get(config.merge_method)
        if config.slices:
            (output,) = config.slices
        else:
            sources = [
                InputSliceDefinition(layer_range=(0, LAYERS), model=each.model, parameters=each.parameters)
                for each in config.models
            ]
            if config.base_model and config.base_model not in [each.model for each in sources]:
                sources.append(InputSliceDefinition(layer_range=(0, LAYERS), model=config.base_model))
            output = OutputSliceDefinition(sources=sources)
        models = [each.model for each in output.sources]
        method.validate_inputs(models, config.base_model)
        found = {}
        for name, t in TENSORS:
            reader = ConfigReader(config=config, slice_out=output, t=t)
            found[name] = resolve_parameters(
                method.spec,
                tensor_name=name,
                inputs=dict.fromkeys(models, name),
                sources=reader.parameter_sources,
                base_model=config.base_model,
                t=t,
            )
    except (RuntimeError, ValueError):  # of pydantic too
        return REFUSED
    return models, config.base_model, found


def ours(text: str) -> ConfigRequest | RequestError:
    try:
        return loads(text.encode(), "c.yml")
    except RequestError as error:
        return error


def evaluated(setting: Any, where: Where) -> Any:
    return setting if isinstance(setting, (bool, int)) else at("setting", setting, where)


def evaluate_all(request: ConfigRequest) -> None:
    """Every setting for every tensor."""
    for parameter in METHODS[request.method].parameters:
        setting = request.settings.get(parameter.python)
        shared = parameter.scope == ParameterScope.SHARED
        for one in [] if setting is None else [setting] if shared else setting:
            for name, t in TENSORS:
                evaluated(one, Where(name, t))


def agree(request: ConfigRequest, found: Any) -> None:
    models, base, by_tensor = found
    counts = METHODS[request.method].base == "counts"
    merged = models if counts else [each for each in models if each != base]
    assert list(map(str, request.models)) == list(map(str, merged))
    assert (request.base and str(request.base)) == (None if counts or base is None else str(base))
    for name, t in TENSORS:
        shared, each = by_tensor[name]
        compare(request, shared, [each[model] for model in merged], Where(name, t))


def compare(request: ConfigRequest, shared: dict[str, Any], each: Sequence[dict[str, Any]], where: Where) -> None:
    for parameter in METHODS[request.method].parameters:
        if not parameter.has_effect:
            continue
        setting = request.settings.get(parameter.python)
        if parameter.scope == ParameterScope.SHARED:
            own = parameter.default if setting is None else evaluated(setting, where)
            assert own == shared[parameter.name]
        else:
            default = (parameter.default,) * len(each)
            own_each = [evaluated(one, where) for one in (default if setting is None else setting)]
            assert own_each == [model[parameter.name] for model in each]


NARROWER = ("differs among tensors", "slice names", "cannot be an adapter", "is an adapter on", "empty list", "must be")
"""What this package refuses where mergekit does not, such as a wrong value for which it has no tensor."""


@pytest.mark.parametrize("seed", range(20))
def test_random_files_mean_what_they_mean_to_mergekit(seed: int) -> None:
    chance = random.Random(seed)
    read = 0
    for _ in range(50):
        text = yaml.safe_dump(document(chance))
        found, request = theirs(text), ours(text)
        if found is REFUSED:
            if not isinstance(request, RequestError):  # refused at the first tensor without a value
                with pytest.raises(RequestError, match="has no value for tensor"):
                    evaluate_all(request)
        elif isinstance(request, RequestError):
            assert any(reason in str(request) for reason in NARROWER), f"{request}\n{text}"
        else:
            agree(request, found)
            read += 1
    assert read >= 10, "too few files are such that both take them"
