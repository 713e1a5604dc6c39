"""`hsa.integrations.transformers`: models that must not be merged into, and the model after an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import merged, read_tensors
from loaded_models import TARGET, bytes_of, differing, load, refused
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.integrations.transformers import hsa_merge_

Triple = dict[str, Path]


@pytest.fixture
def model(shared_triple: Triple) -> Any:
    return load(shared_triple["primary"])


# --- memory that two share -------------------------------------------------------------------------------------------

ALIASES: dict[str, Callable[[Any, dict[str, torch.Tensor]], Any]] = {
    "the model itself": lambda model, _: model,
    "its state dict": lambda model, _: model.state_dict(),
    "its inner model": lambda model, _: model.model,
    "views of its tensors": lambda model, _: {name: tensor.view(-1).view_as(tensor) for name, tensor in state(model)},
    "one tied tensor": lambda model, other: {**other, TARGET: model.state_dict()[TARGET]},
    "a part of one": lambda model, other: {
        **other,
        TARGET.replace("weight", "bias"): model.state_dict()[TARGET][3],
    },
}


def state(model: Any) -> Any:
    return model.state_dict().items()


@pytest.mark.parametrize("role", ["base", "secondary"])
@pytest.mark.parametrize("alias", ALIASES)
def test_a_source_that_is_the_model_is_named(shared_triple: Triple, model: Any, role: str, alias: str) -> None:
    source = ALIASES[alias](model, read_tensors(shared_triple[role]))
    sources: dict[str, Any] = {**shared_triple, role: source}
    refused(model, sources["base"], sources["secondary"], f"^{role} and model share memory: .*_proj")


def test_sharing_what_is_no_target_is_allowed(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    frozen = {name: tensor for name, tensor in state(model) if "decoder" in name}
    secondary = {**read_tensors(shared_triple["secondary"]), **frozen}
    hsa_merge_(model, shared_triple["base"], secondary)
    assert differing(model, merged(shared_triple, tmp_path / "out")) == []
    refused(model, shared_triple["base"], secondary, "^secondary and model share memory", targets="attention-qkv")


def test_base_that_is_secondary_is_refused(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shared_triple["base"])
    loaded = load(shared_triple["secondary"])
    refused(model, shared_triple["base"], tmp_path / "link", "^base and secondary are one")
    refused(model, loaded, loaded, "^base and secondary are one")
    refused(model, loaded.model, loaded.state_dict(), "^base and secondary are one")


def test_base_and_secondary_may_share_some_targets(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    """A fine-tune of some layers, whose other layers are base's own tensors."""
    base, secondary = (read_tensors(shared_triple[role]) for role in ("base", "secondary"))
    secondary = {name: tensor if name == TARGET else base[name] for name, tensor in secondary.items()}
    hsa_merge_(model, base, secondary)
    expected = hsa.Merger(base, load(shared_triple["primary"]), secondary).merge()
    assert differing(model, expected) == []


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def test_targets_that_share_memory_in_the_model_are_refused(shared_triple: Triple) -> None:
    sources = shared_triple["base"], shared_triple["secondary"]

    def attention(model: Any) -> Any:
        return model.model.encoder.layers[1].self_attn

    tied = load(shared_triple["primary"])
    attention(tied).k_proj.weight = attention(tied).q_proj.weight
    refused(tied, *sources, r"^model: .*layers\.1\.self_attn\.[qk]_proj\.weight and .*_proj\.weight share memory")

    layers = load(shared_triple["primary"])
    layers.model.encoder.layers[1] = layers.model.encoder.layers[0]
    refused(layers, *sources, r"^model: .*layers\.[01]\..* and .*layers\.[01]\..* share memory")

    views = load(shared_triple["primary"])
    fused = torch.randn(128, 64)
    attention(views).q_proj.weight, attention(views).v_proj.weight = parameter(fused[:64]), parameter(fused[63:127])
    refused(views, *sources, r"^model: .*q_proj\.weight and .*v_proj\.weight share memory")

    other = load(shared_triple["primary"])
    held = torch.randn(128 * 64)
    other.model.encoder.layers[0].fc1.weight = parameter(held.view(128, 64))
    attention(other).v_proj.bias = parameter(held[700:764])
    refused(other, *sources, r"^model: .*fc1\.weight and .*v_proj\.bias share memory")


def test_targets_side_by_side_in_one_storage_are_merged(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    attention = model.model.encoder.layers[1].self_attn
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    fused = torch.cat([projection.weight.detach() for projection in projections])
    for projection, rows in zip(projections, fused.split(64), strict=True):
        projection.weight = parameter(rows)
    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"])
    assert differing(model, merged(shared_triple, tmp_path / "out")) == []
    assert attention.v_proj.weight.data_ptr() == fused[128:].data_ptr()


# --- models that cannot be merged into -------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """Stands for a quantised or distributed tensor, whose elements lie elsewhere."""


def damage(model: Any, tensor: torch.Tensor, name: str = TARGET) -> Any:
    holder, _, last = name.rpartition(".")
    module = model.get_submodule(holder)
    module._parameters[last] = tensor
    return model


def test_targets_without_data_are_refused(shared_triple: Triple, model: Any) -> None:
    base, secondary = shared_triple["base"], shared_triple["secondary"]
    with torch.device("meta"):
        nowhere = WhisperForConditionalGeneration(model.config)
    with pytest.raises(hsa.RequestError, match=r"^model: target tensor model\.encoder\..* is on the meta device"):
        hsa_merge_(nowhere, base, secondary)
    refused(model, nowhere, secondary, "^base: target tensor .* is on the meta device")
    refused(model, base, nowhere, "^secondary: target tensor .* is on the meta device")
    offloaded = damage(load(shared_triple["primary"]), parameter(torch.empty(64, 64, device="meta")))
    with pytest.raises(hsa.RequestError, match=rf"^model: target tensor {TARGET} is on the meta device"):
        hsa_merge_(offloaded, base, secondary)


def test_other_tensors_may_be_offloaded(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    name = "model.decoder.layers.0.fc1.weight"
    damage(model, parameter(torch.empty(model.get_parameter(name).shape, device="meta")), name)
    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"])
    expected = merged(shared_triple, tmp_path / "out")
    assert differing(model, {other: tensor for other, tensor in expected.items() if other != name}) == []


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.zeros(64, 64, dtype=torch.int8), "a Parameter of torch.int8"),
        (torch.zeros(64, 64, dtype=torch.float64), "a Parameter of torch.float64"),
        (torch.zeros(64, 64).to(torch.float8_e4m3fn), "a Parameter of torch.float8_e4m3fn"),
    ],
)
def test_quantised_targets_are_refused(shared_triple: Triple, tensor: torch.Tensor, found: str) -> None:
    model = damage(load(shared_triple["primary"]), parameter(tensor))
    sources = shared_triple["base"], shared_triple["secondary"]
    with pytest.raises(hsa.RequestError, match=rf"^model: target tensor {TARGET} is {found}.*neither quantised"):
        hsa_merge_(model, *sources)


def test_tensors_of_other_classes_are_refused(shared_triple: Triple, model: Any) -> None:
    base, secondary = shared_triple["base"], shared_triple["secondary"]
    odd = damage(load(shared_triple["primary"]), torch.zeros(64, 64).as_subclass(Wrapped))
    refused(odd, base, secondary, rf"^model: target tensor {TARGET} is a Wrapped of torch.float32")
    refused(model, base, odd, rf"^secondary: target tensor {TARGET} is a Wrapped of torch.float32")


def test_what_is_no_whisper_model_is_refused(shared_triple: Triple, model: Any) -> None:
    base, secondary = shared_triple["base"], shared_triple["secondary"]
    refused(torch.nn.Linear(2, 2), base, secondary, "^model is a Linear with model_type None, expected a Whisper model")
    other = torch.nn.Linear(2, 2)
    other.config = SimpleNamespace(model_type="bert")  # type: ignore[assignment]
    refused(other, base, secondary, "^model is a Linear with model_type 'bert'")
    for wrong in (shared_triple["primary"], model.state_dict(), "openai/whisper-tiny"):
        with pytest.raises(hsa.RequestError, match=r"^model must be a loaded Whisper model, got"):
            hsa_merge_(wrong, base, secondary)  # type: ignore[type-var]


class Wrapper(torch.nn.Module):
    """A wrapper of its own kind, with the config of what it wraps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": torch.compile,
    "DataParallel": torch.nn.DataParallel,
    "another": Wrapper,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_merged_as_the_model_in_it(
    shared_triple: Triple, model: Any, tmp_path: Path, wrapper: str
) -> None:
    base, secondary = shared_triple["base"], shared_triple["secondary"]
    expected, wrap = merged(shared_triple, tmp_path / "out"), WRAPPERS[wrapper]
    wrapped = wrap(model)
    assert hsa_merge_(wrapped, base, secondary) is wrapped
    assert differing(model, expected) == []
    for again in (wrapped, model):
        with pytest.raises(hsa.RequestError, match=r"^model was merged by hsa_merge_ already"):
            hsa_merge_(again, base, secondary)
    other = load(shared_triple["primary"])
    hsa.Merger(wrap(load(base)), other, wrap(load(secondary))).apply_(wrap(other))
    assert differing(other, expected) == []


class AdaptedLinear(torch.nn.Module):
    """A projection as PEFT's layers hold it."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


class PeftModel(torch.nn.Module):
    """The attributes of peft's wrapper that tell it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.config, self.peft_config = model, model.config, {"default": object()}

    def get_base_model(self) -> Any:
        return self.base_model


def test_adapters_are_refused_until_they_are_merged(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    base, secondary = shared_triple["base"], shared_triple["secondary"]
    refused(PeftModel(model), base, secondary, r"^model is a PeftModel with PEFT adapters.*merge_and_unload\(\)")
    refused(
        model, base, PeftModel(load(shared_triple["secondary"])), r"^secondary is a PeftModel.*merge_and_unload\(\)"
    )
    attention = model.model.encoder.layers[0].self_attn
    attention.q_proj = AdaptedLinear(attention.q_proj)
    refused(model, base, secondary, r"^model is a WhisperForConditionalGeneration with PEFT adapters")
    attention.q_proj = attention.q_proj.base_layer
    model.peft_config = {}
    hsa_merge_(model, base, secondary)
    assert differing(model, merged(shared_triple, tmp_path / "out")) == []


def test_a_real_adapter_is_refused_until_it_is_merged(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; a stand-in with its attributes was refused")
    base, secondary = shared_triple["base"], shared_triple["secondary"]
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for wrapped in (adapted, model):
        refused(wrapped, base, secondary, r"with PEFT adapters.*merge_and_unload\(\)")
    folded = adapted.merge_and_unload()
    folded.save_pretrained(tmp_path / "primary")
    hsa_merge_(folded, base, secondary)
    trained = {**shared_triple, "primary": tmp_path / "primary"}
    assert differing(folded, merged(trained, tmp_path / "out")) == []


# --- the model after an error ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [
        ({"k": -1}, "k must be in"),
        ({"lam": 1.5}, "lam must be in"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"targets": "decoder"}, "targets must be one of"),
        ({"attention_scale": float("inf")}, "attention_scale must be finite"),
        ({"lam": {TARGET: 0.5}}, "lam is given per tensor but has no value"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"device": "cuda:999"}, "cuda"),
    ],
)
def test_a_bad_request_leaves_the_model(shared_triple: Triple, model: Any, wrong: dict[str, Any], pattern: str) -> None:
    refused(model, shared_triple["base"], shared_triple["secondary"], pattern, **wrong)


def test_an_overflow_leaves_the_model(shared_triple: Triple, model: Any) -> None:
    """The last tensor alone overflows, and none of those before it may have been written."""
    sources = {role: read_tensors(shared_triple[role]) for role in ("base", "secondary")}
    sources["secondary"][TARGET] *= 1e9
    model.half()
    before = bytes_of(model)
    with pytest.raises(hsa.NonFiniteError, match=rf"{TARGET}, head \d: the result overflows"):
        hsa_merge_(model, sources["base"], sources["secondary"], lam=0.0, k=1.0, threads=1)
    assert bytes_of(model) == before


def test_a_missing_source_leaves_the_model(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    before = bytes_of(model)
    with pytest.raises(hsa.SourceError, match="secondary"):
        hsa_merge_(model, shared_triple["base"], tmp_path / "nothing")
    assert bytes_of(model) == before
