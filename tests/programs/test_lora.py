"""Adapters that peft trained and saved, against the same adapters folded in by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, merged, raw_bytes, read_tensors, same_tensors
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.errors import MismatchError, SourceError
from hsa.sources.open import open_source
from hsa.system.fsio import Tally
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

peft = pytest.importorskip("peft", reason="peft is not installed: make test-integrations installs it")

SHAPE = SHAPES["test"]
STEPS = 8


def train(base: Path, adapter: Path, folded: Path, seed: int, **settings: Any) -> None:
    """Train an adapter of base for a few steps, save it, fold it in with peft, and save that."""
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **settings))
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(STEPS):
        features = torch.randn(2, SHAPE.num_mel_bins, 2 * SHAPE.max_source_positions)
        labels = torch.randint(0, SHAPE.vocab_size, (2, 6))
        # base_model: PeftModel.forward itself passes Whisper an argument that it does not take
        loss = tuned.base_model(input_features=features, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned.save_pretrained(adapter)
    # Onto base as it is stored, so that folding rounds to base's dtype.
    stored = WhisperForConditionalGeneration.from_pretrained(base, dtype="auto")
    peft.PeftModel.from_pretrained(stored, adapter, autocast_adapter_dtype=False).merge_and_unload().save_pretrained(
        folded
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "everything, rank-stabilised": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "use_rslora": True,
        "lora_dropout": 0.1,
    },
}


@pytest.fixture(scope="module", params=["float32", "float16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triple(tmp_path_factory.mktemp(request.param), SHAPE, dtype=request.param)["base"]


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, role in enumerate(("primary", "secondary")):
        train(base, root / role, root / f"{role}-folded", seed, **SETTINGS[request.param])
    return root


def bound(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """How far two evaluations of `base + scale * (up @ down)` in float32 may lie apart, and a rounding to base's
    dtype in each."""
    size = base.double().abs() + scale * (up.double().abs() @ down.double().abs())
    unit = torch.finfo(base.dtype).eps if base.dtype != torch.float32 else 0.0
    return 2 * 2.0**-24 * (down.shape[0] + 3) * size + unit * size + torch.finfo(base.dtype).smallest_normal


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_adapted_weights_are_pefts_within_rounding(base: Path, pair: Path, role: Any) -> None:
    from safetensors.torch import load_file

    theirs, stored = read_tensors(pair / f"{role}-folded"), read_tensors(base)
    halves = load_file(pair / role / "adapter_model.safetensors")
    with open_source("base", base, Tally()) as under, open_source(role, pair / role, Tally(), None, under) as source:
        assert len(source.pairs) * 2 == len(halves)  # type: ignore[attr-defined]
        for name, ref in source.tensors.items():
            buffer = bytearray(ref.nbytes)
            source.read_into(ref, memoryview(buffer))
            before = stored[ref.name]
            ours = torch.frombuffer(buffer, dtype=before.dtype).reshape(before.shape)
            if name not in source.pairs:  # type: ignore[attr-defined]
                assert raw_bytes(ours) == raw_bytes(theirs[ref.name]) == raw_bytes(before)
                continue
            module = f"base_model.model.{ref.name.removesuffix('.weight')}"
            down, up = (halves[f"{module}.lora_{half}.weight"] for half in "AB")
            allowed = bound(before, down, up, source.scale)  # type: ignore[attr-defined]
            assert ((ours.double() - theirs[ref.name].double()).abs() <= allowed).all(), name
            assert ((ours.double() - before.double()).abs() > allowed).any(), f"{name} was not trained"


@pytest.mark.parametrize("k", [1.0, 0.5])
def test_the_merge_is_that_of_the_checkpoints_that_peft_folded(
    base: Path, pair: Path, tmp_path: Path, k: float
) -> None:
    parameters: dict[str, Any] = {"k": k, "lam": 0.3, "targets": "attention-qkv", "sync": False}
    ours = hsa.merge(
        base=base, primary=pair / "primary", secondary=pair / "secondary", output=tmp_path / "ours", **parameters
    )
    theirs = hsa.merge(
        base=base,
        primary=pair / "primary-folded",
        secondary=pair / "secondary-folded",
        output=tmp_path / "theirs",
        **parameters,
    )
    found, expected, stored = (read_tensors(path) for path in (tmp_path / "ours", tmp_path / "theirs", base))
    assert found.keys() == expected.keys()
    halves = {role: _halves(pair / role) for role in ("primary", "secondary")}
    for name, tensor in found.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in halves["primary"]:
            assert raw_bytes(tensor) == raw_bytes(expected[name]), name
            continue
        if name in ours.tensors:
            assert ours.tensors[name].selected == theirs.tensors[name].selected
        # A merged weight is B + c1 * tv1 + c2 * tv2 with c1 + c2 = 1, so at most both sources' differences, and the
        # rounding of the merge itself.
        allowed = 4 * torch.finfo(tensor.dtype).eps * stored[name].double().abs()
        for half in halves.values():
            down, up = (half[f"{module}.lora_{side}.weight"] for side in "AB")
            allowed = allowed + 2 * bound(stored[name], down, up, 16 / 4**0.5)
        assert ((tensor.double() - expected[name].double()).abs() <= allowed).all(), name
        assert ((tensor.double() - stored[name].double()).abs() > allowed).any(), f"{name} was not moved"


def _halves(adapter: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def test_lora_on_convolutions_is_pefts_within_rounding(base: Path, tmp_path: Path) -> None:
    """Untrained, for Whisper in transformers 5 asks a convolution for an attribute that peft's layer lacks."""
    torch.manual_seed(9)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["conv1", "conv2", "q_proj"], init_lora_weights=False)
    stored = WhisperForConditionalGeneration.from_pretrained(base, dtype="auto")
    adapted = peft.get_peft_model(stored, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = {name: tensor.clone() for name, tensor in adapted.merge_and_unload().state_dict().items()}
    before, halves = read_tensors(base), _halves(tmp_path / "adapter")
    with (
        open_source("base", base, Tally()) as under,
        open_source("primary", tmp_path / "adapter", Tally(), None, under) as source,
    ):
        for name in ("encoder.conv1.weight", "encoder.conv2.weight"):
            ref, weight = source.tensors[name], before[f"model.{name}"]
            buffer = bytearray(ref.nbytes)
            source.read_into(ref, memoryview(buffer))
            ours = torch.frombuffer(buffer, dtype=weight.dtype).reshape(weight.shape)
            module = f"base_model.model.model.{name.removesuffix('.weight')}"
            down, up = (halves[f"{module}.lora_{half}.weight"].flatten(1) for half in "AB")
            allowed = bound(weight.flatten(1), down, up, source.scale).reshape(weight.shape)  # type: ignore[attr-defined]
            assert ((ours.double() - theirs[f"model.{name}"].double()).abs() <= allowed).all(), name
            assert ((ours.double() - weight.double()).abs() > allowed).any(), name


# More than plain LoRA ------------------------------------------------------------------------------------------------

BEYOND: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 9}},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["layer_norm"]},
}


@pytest.fixture(scope="module", params=BEYOND)
def beyond(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("beyond")
    train(base, root / "adapter", root / "folded", 5, target_modules=["q_proj", "v_proj"], **BEYOND[request.param])
    return request.param, root


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_what_is_more_than_plain_lora_is_folded_by_peft(
    base: Path, beyond: tuple[str, Path], tmp_path: Path, role: str, capfd: pytest.CaptureFixture[str]
) -> None:
    setting, root = beyond
    other = {"primary": "secondary", "secondary": "primary"}[role]
    tuned = write_triple(tmp_path / "sources", SHAPE, dtype=dtype_of(base))[other]  # type: ignore[arg-type]
    given: dict[str, Path] = {"base": base, other: tuned, role: root / "adapter"}
    report = hsa.merge(**given, output=tmp_path / "ours", targets="attention-qkv", sync=False)
    assert any(note.startswith(f"{role}'s adapter has {setting} = ") for note in report.notes)
    assert capfd.readouterr() == ("", ""), "neither library prints anything"
    expected = merged({**given, role: root / "folded"}, tmp_path / "theirs", targets="attention-qkv")
    same_tensors(tmp_path / "ours", expected)
    assert not any(torch.equal(a, b) for a, b in zip(*(qkv(path) for path in (base, tmp_path / "ours")), strict=True))
    resident = hsa.Merger(**given, targets="attention-qkv").merge()
    assert resident and all(raw_bytes(tensor) == raw_bytes(expected[name]) for name, tensor in resident.items())


def dtype_of(base: Path) -> str:
    return str(next(iter(read_tensors(base).values())).dtype).removeprefix("torch.")


def qkv(directory: Path) -> list[torch.Tensor]:
    return [tensor for name, tensor in sorted(read_tensors(directory).items()) if name.endswith("q_proj.weight")]


def test_an_output_projection_of_its_own_is_refused(base: Path, tmp_path: Path) -> None:
    """Base has none to change: its output projection is the embedding."""
    train(base, tmp_path / "a1", tmp_path / "folded", 6, target_modules=["q_proj"], modules_to_save=["proj_out"])
    triple = write_triple(tmp_path / "sources", SHAPE)
    with pytest.raises(MismatchError, match=r"with peft's folding proj_out.weight is a tensor of its own. Base ties"):
        hsa.merge(base=base, primary=tmp_path / "a1", secondary=triple["secondary"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["lacks", "holds"])
def test_an_adapter_of_which_peft_would_leave_a_part_aside_is_refused(base: Path, tmp_path: Path, change: str) -> None:
    train(base, tmp_path / "a1", tmp_path / "folded", 8, target_modules=["q_proj", "v_proj"], use_dora=True)
    if change == "lacks":
        from safetensors.torch import save_file

        halves = _halves(tmp_path / "a1")
        dropped = next(name for name in halves if ".v_proj.lora_B" in name)
        save_file({n: t for n, t in halves.items() if n != dropped}, tmp_path / "a1" / "adapter_model.safetensors")
    else:
        edit_json(tmp_path / "a1" / "adapter_config.json", target_modules=["q_proj"])
    triple = write_triple(tmp_path / "sources", SHAPE)
    with pytest.raises(MismatchError, match=rf"adapter_model.safetensors {change} tensor \S+v_proj\S+.*was saved with"):
        hsa.merge(base=base, primary=tmp_path / "a1", secondary=triple["secondary"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_peft_cannot_fold_is_one_line(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "a1", tmp_path / "folded", 7, target_modules=["q_proj"], use_dora=True)
    edit_json(tmp_path / "a1" / "adapter_config.json", target_modules=["nothing_of_that_name"])
    triple = write_triple(tmp_path / "sources", SHAPE)
    with pytest.raises(SourceError, match=r"a1 could not be folded into base .* by peft \(\w+: Target modules "):
        hsa.merge(base=base, primary=tmp_path / "a1", secondary=triple["secondary"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
