"""What `hsa.Merger` reads from and writes to loaded models and state dicts: right, or refused with nothing changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merged, read_tensors
from merger_models import TARGET, load, parameter, refused, wrong
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize, prune
from transformers import WhisperForConditionalGeneration

import hsa

Triple = dict[str, Path]
OTHER = "model.decoder.layers.0.fc1.weight"


@pytest.fixture
def merger(shared_triple: Triple) -> hsa.Merger:
    return hsa.Merger(**shared_triple)


@pytest.fixture
def model(shared_triple: Triple) -> Any:
    return load(shared_triple["primary"])


def replace(model: Any, tensor: Any, name: str = TARGET) -> Any:
    module, _, part = name.rpartition(".")
    model.get_submodule(module)._parameters[part] = tensor
    return model


# --- tensors without data, or of other classes -----------------------------------------------------------------------


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_source_on_the_meta_device_is_refused(shared_triple: Triple, model: Any, role: str) -> None:
    with torch.device("meta"):
        nowhere = WhisperForConditionalGeneration(model.config)
    sources: dict[str, Any] = {**shared_triple, role: nowhere}
    refused(lambda: hsa.Merger(**sources), rf"^{role}: target tensor model\.encoder\S+ is on the meta device")


def test_a_model_on_the_meta_device_is_not_silently_left_empty(merger: hsa.Merger, model: Any) -> None:
    with torch.device("meta"):
        nowhere = WhisperForConditionalGeneration(model.config)
    refused(lambda: merger.apply_(nowhere), r"^model: target tensor model\.encoder\S+ is on the meta device")


def test_one_offloaded_target_is_refused_before_any_is_written(merger: hsa.Merger, model: Any) -> None:
    replace(model, parameter(torch.empty(64, 64, device="meta")))
    refused(lambda: merger.apply_(model), rf"^model: target tensor {TARGET} is on the meta device.*offloaded", model)


def test_offloaded_tensors_that_are_no_target_do_not_matter(
    shared_triple: Triple, merger: hsa.Merger, model: Any, tmp_path: Path
) -> None:
    replace(model, parameter(torch.empty(128, 64, device="meta")), OTHER)
    merger.apply_(model)
    assert wrong(model, {n: t for n, t in merged(shared_triple, tmp_path / "out").items() if n != OTHER}) == []


class Wrapped(torch.Tensor):
    """Stands for the tensors of bitsandbytes, torchao and DTensor, whose elements lie elsewhere."""


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(64, 64)


STRANGE: dict[str, Callable[[], Any]] = {
    "int8": lambda: torch.zeros(64, 64, dtype=torch.int8),
    "packed in uint8, as bitsandbytes' 4 bits": lambda: torch.zeros(2048, 1, dtype=torch.uint8),
    "float64": lambda: torch.zeros(64, 64, dtype=torch.float64),
    "float8": lambda: torch.zeros(64, 64).to(torch.float8_e4m3fn),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(64, 64), 1.0, 0, torch.qint8),
    "sparse": lambda: torch.eye(64).to_sparse(),
    "compressed": lambda: torch.eye(64).to_sparse_csr(),
    "of a subclass": lambda: torch.zeros(64, 64).as_subclass(Wrapped),
    "fake": fake,
    "a lazily negated view": lambda: torch._neg_view(torch.zeros(64, 64)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", STRANGE)
def test_a_target_that_is_no_plain_tensor_is_refused_by_name(
    shared_triple: Triple, merger: hsa.Merger, kind: str
) -> None:
    held = {**read_tensors(shared_triple["primary"]), TARGET: STRANGE[kind]()}
    refused(lambda: merger.apply_(held), rf"^model: target tensor {TARGET} is a .*expected a plain tensor", held)
    for role in ("base", "primary", "secondary"):
        sources: dict[str, Any] = {**shared_triple, role: held}
        refused(lambda sources=sources: hsa.Merger(**sources), rf"^{role}: target tensor {TARGET} is a ")  # type: ignore[misc]


@pytest.mark.parametrize("value", [None, 0.5, [[0.0]], "x", {"a": 1}])
def test_values_that_are_no_tensors_are_refused_by_name(shared_triple: Triple, merger: hsa.Merger, value: Any) -> None:
    held = {**read_tensors(shared_triple["primary"]), TARGET: value}
    refused(lambda: merger.apply_(held), rf"^model: target tensor {TARGET} is a .*expected a torch tensor")
    refused(lambda: hsa.Merger(**{**shared_triple, "base": held}), rf"^base: target tensor {TARGET} is a ")


@pytest.mark.parametrize("key", [0, None, b"model", (1,)])
def test_a_state_dict_with_keys_that_are_no_names_is_refused(
    shared_triple: Triple, merger: hsa.Merger, key: Any
) -> None:
    held = {**read_tensors(shared_triple["primary"]), key: torch.zeros(1)}
    refused(lambda: merger.apply_(held), "^model: a state dict maps names to tensors, and this one has the key")
    refused(lambda: hsa.Merger(**{**shared_triple, "secondary": held}), "^secondary: a state dict maps names")


@pytest.mark.parametrize("wrong_kind", [None, 3, [], torch.zeros(2), b"path"])
def test_what_is_neither_model_nor_state_dict_nor_path_is_refused(
    shared_triple: Triple, merger: hsa.Merger, wrong_kind: Any
) -> None:
    refused(lambda: merger.apply_(wrong_kind), "^model: expected a loaded model or a state dict, got ")
    refused(lambda: hsa.Merger(**{**shared_triple, "base": wrong_kind}), "^base: expected a ")


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_wrong_source_of_a_merger_names_all_that_it_takes(shared_triple: Triple, role: str) -> None:
    expected = f"^{role}: expected a checkpoint directory, an id on the Hub, a loaded model or a state dict, got int$"
    refused(lambda: hsa.Merger(**{**shared_triple, role: 3}), expected, kind=hsa.RequestError)


def test_empty_state_dicts_are_refused(shared_triple: Triple, merger: hsa.Merger) -> None:
    refused(lambda: merger.apply_({}), "the model holds nothing", kind=hsa.MismatchError)
    refused(lambda: hsa.Merger({}, {}, {}, num_heads=4, num_layers=2), "holds no tensor")
    refused(lambda: hsa.Merger(**{**shared_triple, "base": {}}), "is missing from base")


def test_a_tensor_under_two_names_is_refused_by_both(shared_triple: Triple, merger: hsa.Merger) -> None:
    held = read_tensors(shared_triple["primary"])
    held[TARGET.removeprefix("model.")] = held[TARGET].clone()
    refused(lambda: merger.apply_(held), rf"^model: {TARGET} and \S+ are one tensor of Whisper", held)
    refused(lambda: hsa.Merger(**{**shared_triple, "primary": held}), rf"^primary: {TARGET} and \S+ are one tensor")


class Lazy(Mapping[str, torch.Tensor]):
    """Makes a tensor whenever it is asked, as readers of files do."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_a_mapping_that_would_lose_what_is_written_is_refused(shared_triple: Triple, merger: hsa.Merger) -> None:
    lazy = Lazy(read_tensors(shared_triple["primary"]))
    refused(lambda: merger.apply_(lazy), "^model: a Lazy makes its tensors when it is asked")
    assert hsa.Merger(**{**shared_triple, "primary": lazy}).selected() == merger.selected()


# --- modules that compute their weights ------------------------------------------------------------------------------


class Upper(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu()


def test_parametrised_and_pruned_weights_are_named(shared_triple: Triple, merger: hsa.Merger) -> None:
    sources = shared_triple
    for change, name in (
        (lambda module: parametrize.register_parametrization(module, "weight", Upper()), "parametrizations.weight"),
        (torch.nn.utils.parametrizations.weight_norm, "parametrizations.weight.original0"),
        (lambda module: prune.l1_unstructured(module, "weight", amount=0.5), "weight_orig"),
    ):
        model = load(sources["primary"])
        change(model.model.encoder.layers[1].self_attn.v_proj)
        refused(lambda model=model: merger.apply_(model), f"the model holds nothing of that name.*{name}", model)  # type: ignore[misc]
        refused(lambda model=model: hsa.Merger(**{**sources, "primary": model}), "is missing from primary")  # type: ignore[misc]


def test_adapters_beside_the_targets_are_refused(shared_triple: Triple, merger: hsa.Merger) -> None:
    held = read_tensors(shared_triple["primary"])
    held["model.encoder.layers.0.fc1.lora_A.default.weight"] = torch.zeros(4, 64)
    refused(lambda: merger.apply_(held), r"^model holds \S+lora_A\S+, a PEFT adapter's tensor.*merge_and_unload", held)
    refused(lambda: hsa.Merger(**{**shared_triple, "base": held}), "^base holds .*merge_and_unload")


# --- a model whose other tensors are not primary's -------------------------------------------------------------------


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(entry.filename == __file__ for entry in caught)
    return [str(entry.message) for entry in caught if issubclass(entry.category, hsa.HsaWarning)]


@pytest.mark.parametrize("as_state_dict", [False, True])
@pytest.mark.parametrize("primary_as", ["directory", "model"])
def test_a_model_that_is_not_primary_is_warned_of_once(
    shared_triple: Triple, as_state_dict: bool, primary_as: str
) -> None:
    primary: Any = shared_triple["primary"] if primary_as == "directory" else load(shared_triple["primary"])
    merger = hsa.Merger(shared_triple["base"], primary, shared_triple["secondary"])
    other = load(shared_triple["base"])
    target = other.state_dict() if as_state_dict else other
    said = warned(lambda: merger.apply_(target))
    assert len(said) == 1
    assert "the model's other tensors are not primary's: " in said[0]
    assert merger.warnings[-1:] == said
    assert warned(lambda: merger.apply_(target, lam=0.1)) == []
    assert wrong(other, merger.merge(lam=0.1)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", hsa.HsaWarning)
        with pytest.raises(hsa.HsaWarning):
            merger.apply_(load(shared_triple["secondary"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_primary_itself_is_not_warned_of(typed_triple: Triple, dtype: torch.dtype) -> None:
    merger = hsa.Merger(**typed_triple)
    model = load(typed_triple["primary"]).to(dtype)
    assert merger.warnings == []
    assert warned(lambda: merger.apply_(model)) == []
    assert warned(lambda: merger.apply_(model.model.state_dict())) == []
    assert warned(lambda: merger.apply_(merger.merge())) == []
    assert merger.warnings == []


def test_one_other_tensor_that_differs_is_named(shared_triple: Triple, merger: hsa.Merger, model: Any) -> None:
    model.get_parameter(OTHER).data.mul_(1.001)
    said = warned(lambda: merger.apply_(model))
    assert len(said) == 1
    assert f"{OTHER.removeprefix('model.')} differs of " in said[0]
    resized = load(shared_triple["primary"])
    resized.resize_token_embeddings(resized.config.vocab_size + 3)
    assert "decoder.embed_tokens.weight has shape" in warned(lambda: merger.apply_(resized))[0]


def test_a_model_that_was_exchanged_between_calls_is_checked_again(
    shared_triple: Triple, merger: hsa.Merger, model: Any
) -> None:
    assert warned(lambda: merger.apply_(model)) == []
    model.load_state_dict({name: tensor.clone() for name, tensor in load(shared_triple["base"]).state_dict().items()})
    other = copy.deepcopy(model)
    assert len(warned(lambda: merger.apply_(other))) == 1


# --- mistakes of meaning ---------------------------------------------------------------------------------------------


def test_sources_that_are_exchanged_or_given_twice_are_warned_of(shared_triple: Triple) -> None:
    base, primary, secondary = (str(shared_triple[role]) for role in ("base", "primary", "secondary"))
    for given, pattern in (
        ((base, primary, primary), "primary and secondary are equal on all 10 target tensors"),
        ((base, load(shared_triple["base"]), secondary), "base and primary are equal on all 10 target tensors"),
        ((primary, base, secondary), "secondary is nearer to|primary is nearer to"),
    ):
        said = warned(lambda given=given: hsa.Merger(*given))  # type: ignore[misc]
        assert len(said) == 1 and re.search(pattern, said[0]), said
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert hsa.Merger(*given).warnings == said
    assert warned(lambda: hsa.Merger(base, primary, secondary)) == []


def test_a_cell_that_makes_a_merger_of_the_model_it_wrote_to_is_warned_of(shared_triple: Triple, model: Any) -> None:
    base, secondary = shared_triple["base"], shared_triple["secondary"]
    primary = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def cell(given: Any) -> None:
        hsa.Merger(base, given, secondary).apply_(given)

    assert warned(lambda: cell(model)) == []
    for again in (model, model.model):
        (said,) = warned(lambda again=again: cell(again))  # type: ignore[misc]
        assert re.match(r"primary is a model that a merge was written to: \S+_proj\.(weight|bias) still holds", said)
    assert "secondary is a model that a merge" in warned(lambda: hsa.Merger(base, shared_triple["primary"], model))[0]
    model.load_state_dict(primary)
    assert warned(lambda: cell(model)) == []


def test_a_merger_says_what_a_merge_comes_to(shared_triple: Triple, merger: hsa.Merger, tmp_path: Path) -> None:
    report = hsa.merge(output=tmp_path / "out", sync=False, **shared_triple)
    found = merger.check()
    assert found.warnings == ()
    assert found.notes == (report.extent.text,)
    assert "changes next to nothing" in merger.check(lam=1.0).warnings[0]
    refused(lambda: merger.check(lam=2.0), "^lam must be in")


# --- what it says of itself ------------------------------------------------------------------------------------------


def test_a_merger_says_what_it_is(shared_triple: Triple, model: Any) -> None:
    text = repr(hsa.Merger(shared_triple["base"], model, read_tensors(shared_triple["secondary"])))
    assert text == (
        "<hsa.Merger of base base, primary model, secondary state dict: 10 targets of encoder-qkv, in memory of cpu, "
        "backend cpu>"
    )


def test_a_torch_device_is_taken(shared_triple: Triple, merger: hsa.Merger) -> None:
    assert hsa.Merger(**shared_triple, device=torch.device("cpu")).selected() == merger.selected()
