"""What several test modules share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file


def run_hsa(
    *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "hsa", *map(os.fspath, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )


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


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor: NaN payloads and signed zeros count."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file as it stands, and the data after it."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


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
