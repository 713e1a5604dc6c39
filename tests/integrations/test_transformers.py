"""`hsa.integrations.transformers`: merges into a loaded model, in training too, and what is refused as merged twice."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import merged, raw_bytes, read_tensors
from loaded_models import TARGET, bytes_of, differing, load, refused
from transformers import WhisperModel

import hsa
from hsa.integrations.transformers import hsa_merge_
from hsa.testing.whisper_checkpoints import SHAPES

Triple = dict[str, Path]
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "merge_after_training.py"
PARAMETERS = {"k": 0.5, "lam": 0.1, "alpha": 0.7}


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Made-up features [1, mels, frames] and labels [1, tokens] for the shape "test"."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES["test"]
    features = torch.randn(1, shape.num_mel_bins, 2 * shape.max_source_positions, generator=generator)
    return {"input_features": features, "labels": torch.randint(1, 200, (1, 8), generator=generator)}


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


def test_the_page_of_python_shows_the_example() -> None:
    _, _, code = EXAMPLE.read_text(encoding="utf-8").split('"""', 2)
    assert f"```python\n{code.strip()}\n```" in (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
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
