"""`hsa.Merger` where tensors share memory, and where a write stops halfway: all targets are written, or none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merged, read_tensors
from merger_models import TARGET, load, parameter, refused, wrong

import hsa
from hsa.backends import resident

Triple = dict[str, Path]
BIAS = TARGET.replace("weight", "bias")


@pytest.fixture
def merger(shared_triple: Triple) -> hsa.Merger:
    return hsa.Merger(**shared_triple)


@pytest.fixture
def model(shared_triple: Triple) -> Any:
    return load(shared_triple["primary"])


# --- memory that two share -------------------------------------------------------------------------------------------


def tied(model: Any) -> None:
    attention = model.model.encoder.layers[1].self_attn
    attention.k_proj.weight = attention.v_proj.weight


def overlapping(model: Any) -> None:
    attention, fused = model.model.encoder.layers[1].self_attn, torch.randn(128, 64)
    attention.q_proj.weight, attention.v_proj.weight = parameter(fused[:64]), parameter(fused[63:127])


def shared_with_another(model: Any) -> None:
    layers = model.model.encoder.layers
    model.model.decoder.layers[0].self_attn.v_proj.weight = layers[1].self_attn.v_proj.weight


def part_of_another(model: Any) -> None:
    held = torch.randn(128 * 64)
    model.model.encoder.layers[0].fc1.weight = parameter(held.view(128, 64))
    model.model.encoder.layers[1].self_attn.v_proj.bias = parameter(held[700:764])


@pytest.mark.parametrize("change", [tied, overlapping, shared_with_another, part_of_another])
def test_targets_that_share_memory_are_refused_by_name(
    merger: hsa.Merger, model: Any, change: Callable[[Any], None]
) -> None:
    merger.apply_(model)  # a model that was checked before is checked again once its tensors are others
    change(model)
    refused(lambda: merger.apply_(model), r"^model: \S+ and \S+ share memory", model, hsa.RequestError)
    state = model.state_dict()
    refused(lambda: merger.apply_(state), r"^model: \S*v_proj\S* and \S+ share memory|^model: \S+ and \S*v_proj", state)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1, 64).expand(64, 64), torch.zeros(127).as_strided((64, 64), (1, 1))],
    ids=["expanded", "strided over itself"],
)
def test_targets_with_several_elements_in_one_place_are_refused(
    shared_triple: Triple, merger: hsa.Merger, tensor: torch.Tensor
) -> None:
    held = {**read_tensors(shared_triple["primary"]), TARGET: tensor}
    refused(lambda: merger.apply_(held), rf"^model: target tensor {TARGET}: several elements lie in one place", held)


def test_an_expanded_source_is_read(shared_triple: Triple, merger: hsa.Merger) -> None:
    held = read_tensors(shared_triple["secondary"])
    held[TARGET] = held[TARGET][:1].expand(64, 64)
    plain = {**held, TARGET: held[TARGET].clone()}
    expected = hsa.Merger(**{**shared_triple, "secondary": plain}).merge()
    assert wrong(hsa.Merger(**{**shared_triple, "secondary": held}).merge(), expected) == []


def test_column_blocks_of_one_matrix_share_nothing(shared_triple: Triple, merger: hsa.Merger) -> None:
    """Their address ranges overlap, their elements lie between each other's."""
    held = read_tensors(shared_triple["primary"])
    fused, bias = torch.full((64, 256), torch.nan), torch.full((64,), torch.nan)
    module = TARGET.removesuffix("v_proj.weight")
    for number, kind in enumerate("qkv"):
        held[f"{module}{kind}_proj.weight"] = fused[:, 64 * number : 64 * (number + 1)]
    held[BIAS] = bias
    held["unrelated"] = fused[3, 192:]
    merger.apply_(held)
    assert wrong(held, merger.merge()) == []
    assert fused[:, 192:].isnan().all()


def test_transposed_and_sliced_targets_are_written_whole(shared_triple: Triple, merger: hsa.Merger) -> None:
    held = read_tensors(shared_triple["primary"])
    held[TARGET] = torch.zeros(64, 64).T
    held[BIAS] = torch.zeros(192)[1::3]
    merger.apply_(held)
    assert wrong(held, merger.merge()) == []


# --- all or nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_overflow_leaves_the_model_as_it_was(shared_triple: Triple, threads: int, transposed: bool) -> None:
    """One target alone overflows, the last of the files or the first, and others are written before it in time."""
    for name in (TARGET, "model.encoder.layers.0.self_attn.k_proj.weight"):
        sources = {of: read_tensors(path) for of, path in shared_triple.items()}
        sources["secondary"][name] *= 1e7
        merger = hsa.Merger(**sources, num_heads=4, num_layers=2, threads=threads)
        model = {stored: tensor.half() for stored, tensor in sources["primary"].items()}
        if transposed:
            model = {stored: tensor.T.contiguous().T for stored, tensor in model.items() if tensor.ndim == 2} | {
                stored: tensor for stored, tensor in model.items() if tensor.ndim != 2
            }
        call = lambda merger=merger, model=model: merger.apply_(model, k=1.0, lam=0.0)  # noqa: E731
        refused(call, rf"{name}, head \d: the result overflows", model, hsa.NonFiniteError)
        merger.apply_(model, k=0.0)
        assert wrong(model, {name: sources["primary"][name].half()}) == []


def test_a_candidate_that_overflows_leaves_the_model_where_one_of_a_wider_dtype_did_not(shared_triple: Triple) -> None:
    merger = hsa.Merger(**shared_triple, threads=1, attention_scale=1e8)
    wide = merger.merge()
    narrow = {name: tensor.to(torch.float16) for name, tensor in wide.items()}
    merger.apply_(wide)
    refused(lambda: merger.apply_(narrow), "the result overflows", narrow, hsa.NonFiniteError)
    merger.apply_(wide, lam=0.1)


def test_values_near_the_end_of_a_dtype_are_written(shared_triple: Triple, tmp_path: Path) -> None:
    """Where an overflow cannot be excluded beforehand the values are still those of hsa.merge."""
    sources = {of: read_tensors(path) for of, path in shared_triple.items()}
    sources["base"][TARGET] *= 0
    sources["primary"][TARGET][:] = 60000.0
    sources["secondary"][TARGET][:] = -60000.0
    merger = hsa.Merger(**sources, num_heads=4, num_layers=2)
    model = {name: torch.zeros_like(sources["primary"][name]).half() for name in merger.scores}
    merger.apply_(model, lam=1.0)
    assert bool((model[TARGET] == 60000.0).all())


def test_an_interrupt_while_targets_are_written_leaves_them_all_written(
    shared_triple: Triple, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGINT, sent by the first thread that computes."""
    merger = hsa.Merger(**shared_triple, threads=2)
    expected, once = merger.merge(lam=0.1), threading.Event()
    really = resident.CpuWorker.apply

    def interrupting(self: Any, *arguments: Any) -> None:
        if not once.is_set():
            once.set()
            os.kill(os.getpid(), signal.SIGINT)
        really(self, *arguments)

    monkeypatch.setattr(resident.CpuWorker, "apply", interrupting)
    with pytest.raises(KeyboardInterrupt):
        merger.apply_(model, lam=0.1)
    assert once.is_set()
    assert wrong(model, expected) == []


def test_a_failure_of_the_machine_halfway_says_what_was_changed(
    shared_triple: Triple, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger = hsa.Merger(**shared_triple, threads=1)
    really, calls = resident.CpuWorker.apply, iter(range(100))

    def failing(self: Any, *arguments: Any) -> None:
        if next(calls) == 3:
            raise MemoryError("no room")
        really(self, *arguments)

    monkeypatch.setattr(resident.CpuWorker, "apply", failing)
    with pytest.raises(hsa.MachineError, match=r"stopped \(MemoryError: no room\): some of them hold the merge and"):
        merger.apply_(model, lam=0.1)
    monkeypatch.undo()
    merger.apply_(model, lam=0.1)
    assert wrong(model, merger.merge(lam=0.1)) == []


# --- autograd and torch's modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_autograd_notices_that_targets_were_written(merger: hsa.Merger, model: Any, transposed: bool) -> None:
    if transposed:
        weight = model.get_parameter(TARGET)
        weight.data = weight.data.T.contiguous().T
    weight = model.get_parameter(TARGET)
    loss = (torch.ones(3, 64, requires_grad=True) @ weight).square().sum()
    version = weight._version
    assert merger.apply_(model) is model
    assert weight._version > version
    assert weight.requires_grad and weight.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_default_device_of_meta_changes_nothing(
    shared_triple: Triple, merger: hsa.Merger, model: Any, tmp_path: Path
) -> None:
    files = merged(shared_triple, tmp_path / "out")
    before = (merger.merge(), merger.scores)
    torch.set_default_device("meta")
    try:
        anew = hsa.Merger(**shared_triple)
        result, scores = anew.merge(), anew.scores
        anew.apply_(model)
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for tensor in (*result.values(), *scores.values())} == {"cpu"}
    assert wrong(result, before[0]) == wrong(scores, before[1]) == wrong(model, files) == []


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_torchs_modes_change_nothing(
    shared_triple: Triple, merger: hsa.Merger, model: Any, tmp_path: Path, mode: Any
) -> None:
    files = merged(shared_triple, tmp_path / "out")
    with mode():
        inside = hsa.Merger(**shared_triple)
        result = inside.merge()
        inside.apply_(model)
        loaded_inside = {name: tensor.clone() for name, tensor in read_tensors(shared_triple["primary"]).items()}
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in result.values())
    result[TARGET].requires_grad_().sum().backward()
    assert wrong(result, merger.merge()) == wrong(model, files) == []
    held = {name: tensor.T if name in result and tensor.ndim == 2 else tensor for name, tensor in loaded_inside.items()}
    assert mode is not torch.inference_mode or held[TARGET].is_inference()
    merger.apply_(held)
    inside.apply_(held)
    assert wrong(held, merger.merge()) == []
