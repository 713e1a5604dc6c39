"""`hsa.integrations.transformers`: merges into a loaded model, and what must not be merged into."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import merged, raw_bytes, read_tensors
from transformers import WhisperForConditionalGeneration, WhisperModel

import hsa
from hsa.integrations.transformers import hsa_merge_
from hsa.testing.whisper_checkpoints import SHAPES

Triple = dict[str, Path]
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "merge_after_training.py"
PARAMETERS = {"k": 0.5, "lam": 0.1, "alpha": 0.7}
TARGET = "model.encoder.layers.1.self_attn.v_proj.weight"


def load(path: Path, kind: Any = WhisperForConditionalGeneration) -> Any:
    return kind.from_pretrained(path, dtype="auto", local_files_only=True)


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Made-up features [1, mels, frames] and labels [1, tokens] for the shape "test"."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES["test"]
    features = torch.randn(1, shape.num_mel_bins, 2 * shape.max_source_positions, generator=generator)
    return {"input_features": features, "labels": torch.randint(1, 200, (1, 8), generator=generator)}


def differing(model: torch.nn.Module, expected: Mapping[str, torch.Tensor]) -> list[str]:
    held = model.state_dict()
    return [
        name
        for name, tensor in expected.items()
        if held[name].dtype != tensor.dtype or raw_bytes(held[name]) != raw_bytes(tensor)
    ]


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: raw_bytes(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}


@pytest.fixture
def model(shared_triple: Triple) -> Any:
    return load(shared_triple["primary"])


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["encoder-qkv", "attention-qkv", "attention-all"])
def test_the_values_are_those_of_hsa_merge(typed_triple: Triple, tmp_path: Path, preset: Any) -> None:
    model = load(typed_triple["primary"])
    before = bytes_of(model)
    result = hsa_merge_(model, typed_triple["base"], typed_triple["secondary"], targets=preset, **PARAMETERS)
    assert result is model
    expected = merged(typed_triple, tmp_path / "out", targets=preset, **PARAMETERS)
    assert differing(model, expected) == []
    changed = {name for name, raw in bytes_of(model).items() if raw != before[name]}
    assert len(changed) == {"encoder-qkv": 10, "attention-qkv": 30, "attention-all": 36}[preset]


def test_defaults_are_those_of_hsa_merge(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"])
    assert differing(model, merged(shared_triple, tmp_path / "out")) == []


def test_attention_scale_and_values_per_tensor(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    names = hsa.Merger(**shared_triple).scores
    lam = {name: number / len(names) for number, name in enumerate(names)}
    options: dict[str, Any] = {"lam": lam, "attention_scale": -0.5}
    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"], backend="cpu", threads=1, **options)
    assert differing(model, merged(shared_triple, tmp_path / "out", **options)) == []


def test_sources_as_models_and_state_dicts(typed_triple: Triple, tmp_path: Path) -> None:
    model, base = load(typed_triple["primary"]), load(typed_triple["base"])
    secondary = {name.removeprefix("model."): t for name, t in read_tensors(typed_triple["secondary"]).items()}
    sources = bytes_of(base), {name: raw_bytes(tensor) for name, tensor in secondary.items()}
    hsa_merge_(model, base, secondary, **PARAMETERS)
    assert differing(model, merged(typed_triple, tmp_path / "out", **PARAMETERS)) == []
    assert sources == (bytes_of(base), {name: raw_bytes(tensor) for name, tensor in secondary.items()})


def test_a_bare_whisper_model(shared_triple: Triple, tmp_path: Path) -> None:
    model = load(shared_triple["primary"], WhisperModel)
    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"])
    expected = merged(shared_triple, tmp_path / "out")
    assert differing(model, {name.removeprefix("model."): tensor for name, tensor in expected.items()}) == []


def test_a_model_in_half_precision_with_sources_in_full(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    model.half().save_pretrained(tmp_path / "primary")
    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"])
    expected = merged({**shared_triple, "primary": tmp_path / "primary"}, tmp_path / "out")
    assert differing(model, expected) == []
    assert model.state_dict()[TARGET].dtype == torch.float16


# --- training --------------------------------------------------------------------------------------------------------


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    model(**batch(seed)).loss.backward()
    optimizer.step()


def test_training_goes_on_with_the_same_parameters(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    model.train()
    model.model.encoder.layers[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, 0)
    model.save_pretrained(tmp_path / "trained")
    before = {name: (p, id(p), p.data_ptr(), p.requires_grad, p.is_leaf) for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"], **PARAMETERS)

    trained = {**shared_triple, "primary": tmp_path / "trained"}
    assert differing(model, merged(trained, tmp_path / "out", **PARAMETERS)) == []
    after = {name: (p, id(p), p.data_ptr(), p.requires_grad, p.is_leaf) for name, p in model.named_parameters()}
    assert {name: rest for name, (_, *rest) in after.items()} == {name: rest for name, (_, *rest) in before.items()}
    assert {requires for _, _, _, requires, _ in after.values()} == {True, False}
    assert model.training
    assert all(torch.equal(gradients[n], p.grad) for n, p in model.named_parameters() if n in gradients)
    assert {id(p) for p in optimizer.state} <= {number for _, number, *_ in after.values()}
    before_step = bytes_of(model)
    step(model, optimizer, 1)
    moved = {name for name, raw in bytes_of(model).items() if raw != before_step[name]}
    assert TARGET in moved
    assert not any(name.startswith("model.encoder.layers.0.") for name in moved)


def test_a_backward_pass_from_before_the_merge_is_refused(shared_triple: Triple, model: Any) -> None:
    """Autograd must see that the weights which it saved have changed."""
    loss = model.train()(**batch()).loss
    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_loaded_in_inference_mode(shared_triple: Triple, tmp_path: Path) -> None:
    with torch.inference_mode():
        model = load(shared_triple["primary"])
        for name, parameter in list(model.named_parameters()):
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, torch.nn.Parameter(parameter.clone(), requires_grad=False))
        model.tie_weights()
    assert model.get_parameter(TARGET).is_inference()
    hsa_merge_(model, shared_triple["base"], shared_triple["secondary"])
    assert differing(model, merged(shared_triple, tmp_path / "out")) == []


class PlainTrainer:
    """What the example needs of a Trainer, in plain torch, for a machine without accelerate."""

    def __init__(self, model: Any, args: Any, train_dataset: Any) -> None:
        self.model, self.args, self.dataset = model, args, train_dataset

    def train(self) -> None:
        optimizer = torch.optim.AdamW(self.model.train().parameters(), lr=self.args.learning_rate)
        for example in self.dataset[: self.args.max_steps]:
            optimizer.zero_grad()
            self.model(**{name: tensor[None] for name, tensor in example.items()}).loss.backward()
            optimizer.step()
        self.trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def save_model(self) -> None:
        self.model.save_pretrained(self.args.output_dir)


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("merge_after_training", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("trainer", ["a plain torch loop", "Seq2SeqTrainer"])
def test_the_example_trains_merges_and_saves(shared_triple: Triple, trainer: str, tmp_path: Path) -> None:
    module = example()
    more: dict[str, Any] = {}
    if trainer == "a plain torch loop":
        module.Seq2SeqTrainer, module.Seq2SeqTrainingArguments = PlainTrainer, SimpleNamespace
    elif importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed, which Seq2SeqTrainer needs; the example ran with a plain torch loop")
    else:
        more = {"per_device_train_batch_size": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    kept: dict[str, torch.Tensor] = {}

    def merge_and_keep(model: Any, *arguments: Any, **parameters: Any) -> Any:
        model.save_pretrained(tmp_path / "trained")
        kept.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return hsa_merge_(model, *arguments, **parameters)

    module.hsa_merge_ = merge_and_keep
    dataset = [{name: tensor[0] for name, tensor in batch(seed).items()} for seed in range(3)]
    model = module.train_and_merge(
        *(shared_triple["base"], shared_triple["secondary"], dataset, tmp_path / "saved"),
        **{"max_steps": 2, "learning_rate": 1e-2, **more},
    )
    assert differing(model, read_tensors(shared_triple["base"])) != []
    trained = {**shared_triple, "primary": tmp_path / "trained"}
    expected = merged(trained, tmp_path / "out", k=0.6, lam=0.5)
    assert differing(load(tmp_path / "saved"), expected) == []
    assert raw_bytes(kept[TARGET]) != raw_bytes(expected[TARGET])


def test_the_readme_shows_the_example() -> None:
    _, _, code = EXAMPLE.read_text(encoding="utf-8").split('"""', 2)
    assert f"```python\n{code.strip()}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")
    body = code.partition("def train_and_merge")[2].splitlines()[1:]
    assert len(body) <= 10


# --- merging twice ---------------------------------------------------------------------------------------------------


def test_a_cell_that_is_run_twice_is_refused(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    sources = shared_triple["base"], shared_triple["secondary"]
    hsa_merge_(model, *sources)
    expected = merged(shared_triple, tmp_path / "out")
    refused(model, *sources, r"^model was merged by hsa_merge_ already: \S+ still holds merged values.*again=True")
    refused(model.model, *sources, "^model was merged by hsa_merge_ already")
    refused(copy.deepcopy(model), *sources, "^model was merged by hsa_merge_ already")
    refused(copy.deepcopy(model).bfloat16(), *sources, "^model was merged by hsa_merge_ already")
    refused(model, *sources, "^model was merged by hsa_merge_ already", lam=0.1, targets="attention-all")
    assert differing(model, expected) == []
    model.save_pretrained(tmp_path / "once")
    hsa_merge_(model, *sources, again=True)
    assert differing(model, merged({**shared_triple, "primary": tmp_path / "once"}, tmp_path / "twice")) == []
    refused(model, *sources, "^model was merged by hsa_merge_ already")


def test_a_model_that_holds_other_values_again_may_be_merged(shared_triple: Triple, model: Any, tmp_path: Path) -> None:
    """Loaded again into the same object, trained on, or never changed by the merge before."""
    sources = shared_triple["base"], shared_triple["secondary"]
    primary = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hsa_merge_(model, *sources, k=0)
    hsa_merge_(model, *sources)
    model.load_state_dict(primary)
    hsa_merge_(model, *sources)
    assert differing(model, merged(shared_triple, tmp_path / "out")) == []
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    step(model, optimizer, 0)
    hsa_merge_(model, *sources)


def test_a_frozen_target_that_is_still_merged_is_named(shared_triple: Triple, model: Any) -> None:
    sources = shared_triple["base"], shared_triple["secondary"]
    hsa_merge_(model, *sources)
    model.get_parameter(TARGET).requires_grad_(False)
    step(model, torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.1), 0)
    refused(model, *sources, rf"^model was merged by hsa_merge_ already: {TARGET} still holds merged values")


def test_a_merge_that_changes_nothing_is_warned_of(shared_triple: Triple, model: Any) -> None:
    before = bytes_of(model)
    with pytest.warns(hsa.HsaWarning, match="the merge changes next to nothing") as caught:
        hsa_merge_(model, shared_triple["base"], shared_triple["secondary"], k=0)
    assert [entry.filename for entry in caught] == [__file__]
    assert bytes_of(model) == before


# --- memory that two share -------------------------------------------------------------------------------------------


def refused(model: Any, base: Any, secondary: Any, pattern: str, **more: Any) -> None:
    """A RequestError in one line, and a model that is as it was."""
    before = bytes_of(model)
    with pytest.raises(hsa.RequestError, match=pattern) as caught:
        hsa_merge_(model, base, secondary, **more)
    assert "\n" not in str(caught.value)
    assert bytes_of(model) == before


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


class LoraCheckpoint(torch.nn.Module):
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
    attention.q_proj = LoraCheckpoint(attention.q_proj)
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
