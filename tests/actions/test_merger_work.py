"""What a candidate costs in Python on a model with the tensors and heads of large-v3: work is counted, not seconds."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors
from merger_models import load, parameter, wrong

import hsa
from hsa.actions.merger import writable_targets
from hsa.architectures.whisper import Whisper
from hsa.methods.hsa import Hsa
from hsa.planning.tasks import TaskFinder
from hsa.testing.whisper_checkpoints import write_triple
from hsa.testing.whisper_config import MINIATURE

Triple = dict[str, Path]
MOST_CALLS = 800
"""Python functions that may be called before the first block: five for each target. At 0.1 to 0.5 microseconds each,
with what they call in C, they take a fraction of a millisecond."""


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("miniature"), MINIATURE, processor=False)


@pytest.fixture(scope="module")
def merger(miniature: Triple) -> hsa.Merger:
    return hsa.Merger(**miniature, backend="cpu", threads=1)


@pytest.fixture(scope="module")
def model(miniature: Triple, merger: hsa.Merger) -> Any:
    return merger.apply_(load(miniature["primary"]))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *owners: tuple[Any, str]) -> Iterator[dict[str, int]]:
    """How often each of these functions is called."""
    calls = dict.fromkeys((name for _, name in owners), 0)

    def counting(name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            calls[name] += 1
            return really(*arguments, **more)

        return call

    with monkeypatch.context() as patch:
        for owner, name in owners:
            patch.setattr(owner, name, counting(name, getattr(owner, name)))
        yield calls


def calls_before_the_first_block(monkeypatch: pytest.MonkeyPatch, candidate: Callable[[], Any]) -> int:
    """How many Python functions this thread calls until the method is applied to the first block."""
    calls, really = [0], Hsa.apply

    def counting(frame: Any, event: str, argument: Any) -> None:
        calls[0] += event == "call"

    def applied(*arguments: Any) -> None:
        sys.setprofile(None)
        really(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Hsa, "apply", applied)
        sys.setprofile(counting)
        try:
            candidate()
        finally:
            sys.setprofile(None)
    return calls[0]


def test_the_miniature_has_the_tensors_of_large_v3(model: Any, merger: hsa.Merger) -> None:
    assert len(dict(model.named_parameters())) == 1259
    assert len(merger.scores) == 160
    assert {len(scores) for scores in merger.scores.values()} == {20}


def test_a_candidate_calls_few_functions_before_its_first_block(
    merger: hsa.Merger, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in (model, {name: tensor.clone() for name, tensor in model.state_dict().items()}):
        merger.apply_(target)
        calls = calls_before_the_first_block(monkeypatch, lambda target=target: merger.apply_(target, k=0.3, lam=0.7))
        assert 0 < calls <= MOST_CALLS


def test_a_candidate_plans_nothing_and_walks_no_model(
    merger: hsa.Merger, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = (
        (TaskFinder, "targets"),
        (TaskFinder, "task"),
        (Whisper, "place"),
        (writable_targets, "entries_of"),
        (writable_targets, "_tensors_of"),
        (Hsa, "measure"),
    )
    with counted(monkeypatch, *owners, (Hsa, "decide")) as calls:
        for lam in (0.1, 0.2, 0.3):
            merger.apply_(model, lam=lam)
    assert calls.pop("decide") == 3 * 160
    assert set(calls.values()) == {0}


def test_a_new_reference_to_a_target_has_the_whole_model_checked(
    merger: hsa.Merger, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tensor of the model can share a target's memory only where there is a new reference to either."""
    weight = model.model.encoder.layers[5].self_attn.q_proj.weight
    with counted(monkeypatch, (writable_targets, "_tensors_of")) as calls:
        merger.apply_(model)
        assert calls == {"_tensors_of": 1}
        merger.apply_(model)
        assert calls == {"_tensors_of": 1}
        alias = weight.data[3:]
        merger.apply_(model)
        assert calls == {"_tensors_of": 2}
    del weight, alias
    fc1 = model.model.decoder.layers[7].fc1
    kept = fc1.weight
    fc1.weight = parameter(model.model.encoder.layers[5].self_attn.q_proj.weight.data[:4])
    try:
        with pytest.raises(hsa.RequestError, match="share memory"):
            merger.apply_(model)
    finally:
        fc1.weight = kept
    merger.apply_(model, lam=0.4)
    assert wrong(model, merger.merge(lam=0.4)) == []


def test_a_module_in_the_place_of_another_has_the_whole_model_checked(
    merger: hsa.Merger, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The targets are found through the modules that were there: another one, or none, is looked at anew."""
    layers, other = model.model.encoder.layers, copy.deepcopy(model.model.encoder.layers[3])
    merger.apply_(model)
    kept, layers[3] = layers[3], other
    with counted(monkeypatch, (writable_targets, "_tensors_of")) as calls:
        merger.apply_(model, lam=0.9)
        merger.apply_(model, lam=0.7)
    assert calls == {"_tensors_of": 1}
    assert wrong(model, merger.merge(lam=0.7)) == []
    attention, other.self_attn.q_proj = other.self_attn, torch.nn.Identity()
    with pytest.raises(hsa.MismatchError, match=r"layers\.3\.self_attn\.q_proj\S+ of shape .* the model holds nothing"):
        merger.apply_(model)
    del other.self_attn
    with pytest.raises(hsa.MismatchError, match=r"layers\.3\.self_attn\S+ of shape .* the model holds nothing"):
        merger.apply_(model)
    del attention
    layers[3] = kept
    merger.apply_(model, lam=0.4)
    assert wrong(model, merger.merge(lam=0.4)) == []


def test_a_merger_keeps_no_model_alive(miniature: Triple, merger: hsa.Merger) -> None:
    model = merger.apply_(merger.apply_(load(miniature["primary"])), lam=0.3)
    gone = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert {module() for module in gone} == {None}


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_start_once(miniature: Triple, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    merger = hsa.Merger(**miniature, backend="cpu", threads=threads)
    state = merger.merge()
    with counted(monkeypatch, (threading.Thread, "start")) as calls:
        for lam in (0.1, 0.2, 0.3):
            merger.apply_(state, lam=lam)
    assert calls == {"start": 0}
    assert wrong(state, hsa.Merger(**miniature, threads=2).merge(lam=0.3)) == []


def test_a_sweep_plans_its_structure_once(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch, (TaskFinder, "targets")) as calls:
        report = hsa.sweep(**shared_triple, output=tmp_path / "out", lam=[0.1, 0.5, 0.9], k=[0.2, 0.6], sync=False)
    assert len(report.made) == 6
    assert calls == {"targets": 1}


def test_the_miniature_is_merged_right(miniature: Triple, merger: hsa.Merger, tmp_path: Path) -> None:
    hsa.merge(**miniature, output=tmp_path / "out", lam=0.2, k=0.3, sync=False)
    files = read_tensors(tmp_path / "out")
    ours = merger.merge(lam=0.2, k=0.3)
    assert all(torch.equal(tensor, files[name]) for name, tensor in ours.items())
