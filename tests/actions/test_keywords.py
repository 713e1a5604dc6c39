"""Arguments of Python's calls: made from declarations, told apart, and refused as Python refuses them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import snapshot

import hsa
from hsa.actions.keywords import MERGE, split
from hsa.actions.request import Request
from hsa.actions.run_options import OutputOptions, RunOptions
from hsa.methods.all_settings import all_settings
from hsa.methods.hsa import HsaSettings
from hsa.methods.settings import declared
from hsa.sweeps.sweep import EVALUATION_DEFAULTS

Triple = dict[str, Path]
SOURCES = ["base", "primary", "secondary", "output"]
IDS = ["base_id", "primary_id", "secondary_id", "model_ids"]
SETTINGS = list(all_settings())
OPTIONS = [field.name for field in fields(RunOptions)]
NOT_IN_PATCHES = {"attention_scale", "non_attention_scale", "numerics", "load_dtype", "dtype"}
OF_PATCHES = [name for name, each in all_settings().items() if each.about.patchable]
EVALUATION = ["data", *EVALUATION_DEFAULTS]


@pytest.mark.parametrize(
    ("call", "settings", "options", "own"),
    [
        (hsa.merge, SETTINGS, OPTIONS, ["config", "progress"]),
        (hsa.merge_patch, OF_PATCHES, [name for name in OPTIONS if name != "digest"], ["progress"]),
        (
            hsa.sweep,
            OF_PATCHES,
            [name for name in OPTIONS if name not in ("backend", "device")],
            ["full", "jobs", *EVALUATION, "progress", "evaluation_progress"],
        ),
    ],
)
def test_a_signature_lists_exactly_what_is_declared(
    call: Callable[..., Any], settings: list[str], options: list[str], own: list[str]
) -> None:
    parameters = inspect.signature(call).parameters
    assert list(parameters)[:4] == SOURCES
    assert sorted(parameters) == sorted([*SOURCES, *settings, "method", "models", *options, *IDS, *own])
    for each in declared(HsaSettings):
        if each.name in settings:
            default = parameters[each.name].default
            assert default in (each.default, (each.default,)), each.name
    assert NOT_IN_PATCHES.isdisjoint(OF_PATCHES)
    for name in (*settings, *options, *own, "models"):
        assert f"\n        {name}: " in (call.__doc__ or ""), name
    assert "{" not in (call.__doc__ or "")


def test_options_that_shape_the_output_are_options_of_a_run() -> None:
    assert [field.name for field in fields(OutputOptions)] == ["assets_from", "max_shard_size", "card"]
    assert {field.name for field in fields(RunOptions)} < {field.name for field in fields(Request)}


@pytest.mark.parametrize(
    ("positional", "keywords", "message"),
    [
        ((), {"lamda": 0.5}, r"^merge\(\) got an unexpected keyword argument 'lamda'\. Did you mean 'lam'"),
        ((), {"zzz": 1}, r"^merge\(\) got an unexpected keyword argument 'zzz'$"),
        (("b", "m1", "m2", "o"), {"model9_id": "a/b"}, "unexpected keyword argument 'model9_id'"),
        (("b", "m1", "m2"), {}, r"^merge\(\) missing required argument: 'output'$"),
        ((), {"output": "o"}, r"^merge\(\) missing required arguments: 'base', 'primary' and 'secondary'$"),
        (("b", "m1", "m2", "o", "p"), {}, r"^merge\(\) takes at most 4 positional arguments, 5 were given$"),
        (("b",), {"base": "b"}, r"^merge\(\) got multiple values for argument 'base'$"),
    ],
)
def test_arguments_that_there_are_not_are_refused_as_python_does(
    positional: tuple[str, ...], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        hsa.merge(*positional, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "nothing"}, "method must be one of .*hsa.*, got 'nothing'"),
        ({"models": ["m1"]}, "method hsa merges 2 to 8 models, got 1"),
        ({"models": "m1"}, "models must be a list of values"),
        ({"models": ["m1", "m2"], "primary": "m1"}, "models and primary both say what is merged"),
        ({"models": ["m1", "m2"], "model_ids": ["a/b"]}, "model_ids must be as many as models, got 1 for 2"),
    ],
)
def test_sources_that_the_method_does_not_take_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(hsa.RequestError, match=message):
        hsa.merge(**{"base": "b", "output": "o", **keywords})


def test_models_in_their_order_have_the_roles_of_the_contract() -> None:
    named = split(MERGE, ("b", "m1", "m2", "o"), {"primary_id": "a/m1", "secondary_id": None, "k": 0.5})
    in_order = split(
        MERGE,
        (),
        {"method": "hsa", "base": "b", "models": ["m1", "m2"], "model_ids": ["a/m1", None], "output": "o", "k": 0.5},
    )
    assert named == in_order
    assert dict(named.sources) == {"base": "b", "primary": "m1", "secondary": "m2"}


def test_every_form_of_a_merge_writes_the_same_bytes(shared_triple: Triple, tmp_path: Path) -> None:
    base, models = shared_triple["base"], [shared_triple["primary"], shared_triple["secondary"]]
    more: dict[str, Any] = {"lam": 0.25, "sync": False}
    hsa.merge(**shared_triple, output=tmp_path / "keywords", **more)
    hsa.merge(base, *models, tmp_path / "positional", **more)
    hsa.merge(method="hsa", base=base, models=models, output=tmp_path / "models", **more)
    hsa.merge(hsa.Request.of(base, *models, tmp_path / "request", **more))
    expected = snapshot(tmp_path / "keywords")
    assert expected
    for form in ("positional", "models", "request"):
        assert snapshot(tmp_path / form) == expected


def test_a_request_stands_alone() -> None:
    request = hsa.Request.of("b", "m1", "m2", "o", k=0.3, threads=2)
    assert (request.settings, request.threads) == (HsaSettings(k=0.3), 2)
    with pytest.raises(TypeError, match=r"^merge\(\) takes a request alone"):
        hsa.merge(request, k=0.5)


def test_a_grid_takes_lists(tmp_path: Path) -> None:
    with pytest.raises(hsa.RequestError, match=r"lam must be a list of values, got 0\.5"):
        hsa.sweep("b", "m1", "m2", tmp_path / "sweep", lam=0.5)
    with pytest.raises(TypeError, match=r"^sweep\(\) got an unexpected keyword argument 'numerics'"):
        hsa.sweep("b", "m1", "m2", tmp_path / "sweep", numerics="exact")
