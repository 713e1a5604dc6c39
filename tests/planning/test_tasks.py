"""The tensors that a merge computes: shared by settings of one structure, and what is refused per tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from hsa.errors import RequestError
from hsa.methods.hsa import HsaSettings
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings, declared
from hsa.methods.tensors import TensorTask
from hsa.planning.plan import Plan, make_plan
from hsa.planning.tasks import Targets, check_names, find_targets, refuse_unknown_names
from hsa.sources.checkpoint import open_checkpoint
from hsa.sources.source_set import Sources
from hsa.system.fsio import Tally

ROLES = ("base", "primary", "secondary")
LAYERS = 2
NAMES = tuple(
    f"encoder.layers.{layer}.self_attn.{part}"
    for layer in range(LAYERS)
    for part in ("k_proj.weight", "q_proj.bias", "q_proj.weight", "v_proj.bias", "v_proj.weight")
)
"""The targets of the preset encoder-qkv: Whisper's k has no bias."""

OTHER_STRUCTURES: tuple[dict[str, Any], ...] = (
    {"targets": "attention-all"},
    {"non_attention_scale": 0.5},
    {"num_heads": 2},
    {"num_layers": 5},
    {"numerics": "reference"},
    {"numerics": "reference", "load_dtype": "float32"},
    {"dtype": "float16"},
    {"only": ("encoder.layers.0.*",)},
    {"exclude": ("encoder.layers.0.*",)},
    {"layers": "0"},
    {"stack": "encoder"},
)


@dataclass(frozen=True)
class OtherSettings(Settings):
    """Settings of a method that is not HSA."""


@pytest.fixture(scope="module")
def sources(shared_triple: Mapping[str, Path]) -> Iterator[Sources]:
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(role, shared_triple[role], Tally())) for role in ROLES]  # type: ignore[arg-type]
        yield Sources.of_checkpoints(opened)


def targets_of(settings: HsaSettings, sources: Sources) -> Targets:
    return find_targets(method_named(settings.method), settings, sources)


def plan_of(settings: HsaSettings, sources: Sources) -> Plan:
    return make_plan(settings, sources)


def tasks_of(made: Targets | Plan) -> tuple[TensorTask, ...]:
    return made.tasks if isinstance(made, Targets) else made.targets


Make = Callable[[HsaSettings, Sources], "Targets | Plan"]
BOTH = pytest.mark.parametrize("make", [targets_of, plan_of])


@BOTH
def test_settings_of_the_same_structure_share_the_tasks(make: Make, sources: Sources) -> None:
    made = make(HsaSettings(), sources)
    per_tensor = {name: n / 10 for n, name in enumerate(NAMES)}
    for settings in (
        HsaSettings(k=0.1, lam=0.9, alpha=3.0),
        HsaSettings(attention_scale=0.5),
        HsaSettings(k=per_tensor, lam={f"model.{name}": 0.5 for name in NAMES}),
    ):
        other = made.with_settings(settings)
        assert type(other) is type(made)
        assert other.settings is settings
        assert tasks_of(other) is tasks_of(made)
        assert other.method is made.method
        for field in fields(made):
            if field.name != "settings":
                assert getattr(other, field.name) is getattr(made, field.name)
        assert made.settings == HsaSettings()
        assert other == make(settings, sources)


@BOTH
@pytest.mark.parametrize("options", OTHER_STRUCTURES, ids=str)
def test_settings_of_another_structure_are_refused(make: Make, options: dict[str, Any], sources: Sources) -> None:
    made, other = make(HsaSettings(), sources), HsaSettings(**options)
    with pytest.raises(ValueError, match="need a plan of their own"):
        made.with_settings(other)
    with pytest.raises(ValueError, match="need a plan of their own"):
        make(other, sources).with_settings(HsaSettings())


def test_every_structural_setting_is_tried() -> None:
    assert {name for options in OTHER_STRUCTURES for name in options} == {
        each.name for each in declared(HsaSettings) if each.about.structural
    }


@BOTH
def test_settings_of_another_method_are_refused(make: Make, sources: Sources) -> None:
    with pytest.raises(ValueError, match="need a plan of their own"):
        make(HsaSettings(), sources).with_settings(OtherSettings())


@BOTH
@pytest.mark.parametrize("setting", ["k", "lam", "alpha"])
def test_settings_per_tensor_must_name_the_targets_and_no_other(make: Make, setting: str, sources: Sources) -> None:
    made = make(HsaSettings(), sources)
    whole = dict.fromkeys(NAMES, 0.5)
    unknown = "decoder.layers.0.self_attn.q_proj.weight"
    refused = [
        ({**whole, unknown: 0.5}, rf"^{setting} is given for '{unknown}', which is no target of 'encoder-qkv'$"),
        ({**whole, f"model.{unknown}": 0.5}, rf"^{setting} is given for 'model\.{unknown}', which is no target"),
        (dict(list(whole.items())[:-1]), rf"^{setting} is given per tensor .* no value for target tensor {NAMES[-1]}$"),
        ({}, rf"^{setting} is given per tensor .* no value for target tensor "),
    ]
    for values, message in refused:
        settings = HsaSettings(**{setting: values})  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=message):
            made.with_settings(settings)
        with pytest.raises(RequestError, match=message):
            make(settings, sources)


def test_names_are_checked_against_tasks(sources: Sources) -> None:
    tasks = targets_of(HsaSettings(), sources).tasks
    check_names(HsaSettings(), tasks)
    check_names(HsaSettings(k=dict.fromkeys(NAMES, 0.5)), tasks)
    with pytest.raises(RequestError, match=f"k is given per tensor but has no value for target tensor {NAMES[0]}"):
        check_names(HsaSettings(k=dict.fromkeys(NAMES[1:], 0.5)), tasks)
    with pytest.raises(RequestError, match=f"k is given for '{NAMES[0]}', which is no target"):
        check_names(HsaSettings(k=dict.fromkeys(NAMES, 0.5)), tasks[1:])
    refuse_unknown_names(HsaSettings(k={NAMES[0]: 0.5}), NAMES)  # which others are missing is not asked


def test_targets_stand_in_the_order_of_the_anchors_file(sources: Sources) -> None:
    tasks = targets_of(HsaSettings(), sources).tasks
    offsets = [task.stored.offset for task in tasks]  # type: ignore[attr-defined]
    assert offsets == sorted(offsets)
    assert sorted(task.name for task in tasks) == sorted(NAMES)
    for task in tasks:
        assert task.place is not None
        assert (tuple(task.sources), task.anchor, task.layers, task.passes) == (ROLES, "primary", LAYERS, 1)
        assert (task.merged, task.listed, task.partition.groups) == (True, True, 4)
