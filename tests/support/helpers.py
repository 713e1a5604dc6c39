"""What several test modules share."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from soundness import check_command

import hsa
from hsa.system import manifest


def run_hsa(
    *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process; what it has written is verified."""
    done = subprocess.run(
        [sys.executable, "-m", "hsa", *map(os.fspath, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if done.returncode == 0:
        check_command(arguments)
    return done


def merge_arguments(triple: Mapping[str, Path], output: Path, *more: str) -> Sequence[str]:
    """`merge` on a triple, as a list of arguments."""
    return ["merge", *(f"--{role}={path}" for role, path in triple.items()), f"--output={output}", *more]


def snapshot(root: Path) -> dict[str, str]:
    """Every path below `root`, with the digest of its bytes (or where a link leads): equal when untouched."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = blake3(path.read_bytes()).hexdigest()
    return found


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory, by name as stored, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys(), f"{path} repeats tensors"
        found |= tensors
    return found


def write_tensors(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 1,
    metadata: Mapping[str, str] | None = MappingProxyType({"format": "pt"}),
) -> None:
    """Replace a checkpoint's weights: one file, or the tensors dealt out over several with an index."""
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = None if metadata is None else dict(metadata)
    if shards == 1:
        save_file(contiguous, directory / "model.safetensors", metadata=about)
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(contiguous)[shard::shards]
        save_file({name: contiguous[name] for name in names}, directory / file, metadata=about)
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in contiguous.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    document = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in document.items() if value is not None}
    path.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def same_tensors(found: Path | Mapping[str, torch.Tensor], expected: Path | Mapping[str, torch.Tensor]) -> None:
    """Names, element types, shapes and bytes of two checkpoints, given as directories or tensors by name."""
    ours, theirs = (read_tensors(given) if isinstance(given, Path) else given for given in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(ours[name]) == raw_bytes(tensor), name


def merged(triple: Mapping[str, Path], output: Path, **parameters: Any) -> dict[str, torch.Tensor]:
    """Every tensor that `hsa.merge` writes, by name."""
    hsa.merge(**triple, output=output, **{"sync": False, "overwrite": True, **parameters})
    return read_tensors(output)


def merged_bytes(triple: Mapping[str, Path], output: Path, **parameters: Any) -> dict[str, bytes]:
    """The bytes of every tensor that `hsa.merge` writes, by name."""
    return {name: raw_bytes(tensor) for name, tensor in merged(triple, output, **parameters).items()}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor: NaN payloads and signed zeros count."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file as it stands, and the data after it."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def provenance_bytes(*files: str) -> bytes:
    """A smallest record file that lists these files: enough to be replaced by, not to be verified."""
    document: dict[str, Any] = {"format": manifest.FORMAT, "files": {name: {} for name in files}}
    document[manifest.DIGEST] = manifest.document_digest(document)
    return manifest.render(document)


def safetensors_bytes(document: Any, data: bytes = b"") -> bytes:
    """A file with this header, right or wrong: a dict, or the header's own bytes."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def poke(path: Path, tensor: str, element: int, bits: bytes) -> None:
    """Overwrite one element of a tensor with `bits`, which are as long as an element."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    start = end + json.loads(raw[8:end])[tensor]["data_offsets"][0] + element * len(bits)
    path.write_bytes(raw[:start] + bits + raw[start + len(bits) :])


@contextmanager
def mounted(point: Path, *arguments: str) -> Iterator[Path]:
    """Mount on `point`, with the arguments of mount(8), for a while; a printed skip where that is not permitted."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a filesystem needs root")
    point.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, os.fspath(point)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        if subprocess.run(["umount", os.fspath(point)], capture_output=True, check=False).returncode:
            subprocess.run(["umount", "--lazy", os.fspath(point)], check=True)


@contextmanager
def ordinary_user(user: int = 65534) -> Iterator[None]:
    """Let permission bits bind: root takes on another user's rights for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)


def write_pickle(directory: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1) -> None:
    """Replace a checkpoint's weights by `pytorch_model.bin`, or by shards with an index, as torch.save writes them."""
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    if shards == 1:
        torch.save(dict(tensors), directory / "pytorch_model.bin")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def description(archive: bytes) -> bytes:
    """The pickle that describes the tensors of an archive of torch.save."""
    with zipfile.ZipFile(io.BytesIO(archive)) as records:
        return next(records.read(name) for name in records.namelist() if name.endswith("/data.pkl"))


def with_description(archive: bytes, data: bytes) -> bytes:
    """The archive with another pickle in the place of its own, which must not be longer."""
    own = description(archive)
    start = archive.index(own)
    return archive[:start] + data.ljust(len(own), b"\0") + archive[start + len(own) :]


def write_adapter(
    directory: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    rank: int = 3,
    seed: int = 0,
    scale: float = 0.02,
    dtype: torch.dtype = torch.float32,
    **settings: object,
) -> dict[str, torch.Tensor]:
    """A LoRA adapter as peft saves one, of random numbers, for these weights by name; returns its tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        ones = [1] * (weight.ndim - 2)  # of a convolution
        for half, shape in (("A", [rank, *weight.shape[1:]]), ("B", [weight.shape[0], rank, *ones])):
            numbers = torch.randn(shape, generator=generator) * scale
            tensors[f"{module}.lora_{half}.weight"] = numbers.to(dtype)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": "somewhere/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": sorted({name.split(".")[-2] for name in weights}),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
        **settings,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tensors


def openai_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of OpenAI's own code."""
    changes = (
        ("model.", ""),
        (".layers.", ".blocks."),
        ("self_attn_layer_norm", "attn_ln"),
        ("encoder_attn_layer_norm", "cross_attn_ln"),
        ("final_layer_norm", "mlp_ln"),
        ("self_attn", "attn"),
        ("encoder_attn", "cross_attn"),
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("out_proj", "out"),
        ("fc1", "mlp.0"),
        ("fc2", "mlp.2"),
        ("encoder.layer_norm", "encoder.ln_post"),
        ("decoder.layer_norm", "decoder.ln"),
        ("embed_tokens", "token_embedding"),
        ("embed_positions.weight", "positional_embedding"),
    )
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in changes:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def write_openai(
    path: Path, directory: Path, extra: Mapping[str, torch.Tensor] = MappingProxyType({}), **dims: object
) -> Path:
    """A checkpoint directory as one file in OpenAI's format; `dims` and `extra` tensors are added or replaced."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    known = {
        "n_mels": config["num_mel_bins"],
        "n_audio_ctx": config["max_source_positions"],
        "n_audio_state": config["d_model"],
        "n_audio_head": config["encoder_attention_heads"],
        "n_audio_layer": config["encoder_layers"],
        "n_vocab": config["vocab_size"],
        "n_text_ctx": config["max_target_positions"],
        "n_text_state": config["d_model"],
        "n_text_head": config["decoder_attention_heads"],
        "n_text_layer": config["decoder_layers"],
    }
    tensors = {**openai_tensors(read_tensors(directory)), **extra}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"dims": {**known, **dims}, "model_state_dict": tensors}, path)
    return path


RATE = 16_000
"""Samples a second of every clip, as Whisper hears them."""


def read_clips(folder: Path) -> list[tuple[str, str, np.ndarray]]:
    """File name, text and float32 samples of every clip that transcripts.tsv names."""
    import soundfile

    found = []
    for line in (folder / "transcripts.tsv").read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition("\t")
        if name.endswith(".flac"):
            samples, rate = soundfile.read(folder / name, dtype="float32")
            assert rate == RATE and samples.ndim == 1, name
            found.append((name, text, samples))
    assert found
    return found


def word_edits(first: Sequence[str], second: Sequence[str]) -> int:
    """How many words must be put in, left out or replaced to make one text of the other."""
    row = list(range(len(second) + 1))
    for i, ours in enumerate(first, 1):
        previous, row = row, [i]
        for j, theirs in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (ours != theirs)))
    return row[-1]
