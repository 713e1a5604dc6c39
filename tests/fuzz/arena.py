"""Where a hostile file is tried: sound sources of every kind, and the destination that a command writes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from guard import Finding, Guard

from hsa.cli import app
from hsa.errors import HsaError
from hsa.sources.checkpoint import CONFIG, INDEX, WEIGHTS
from hsa.sources.lora import WEIGHTS as ADAPTER_WEIGHTS
from hsa.testing.llama_checkpoints import write_llamas
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

SMALL: Mapping[str, Any] = {
    "tokenizer.json": {
        "added_tokens": [{"id": 3, "content": "<x>", "special": True}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    },
    "processor_config.json": {
        "feature_extractor": {"feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 1},
        "processor_class": "WhisperProcessor",
    },
}
"""Small files that the made-up triple lacks."""

QUIETLY = ("--no-sync", "--threads=1", "--json")


class Arena:
    """Sound sources in every form, made once below `place/arena`, and the destination that each attempt writes."""

    def __init__(self, place: Path) -> None:
        import torch
        from helpers import edit_json, read_tensors, write_adapter, write_openai, write_pickle, write_tensors

        root = place / "arena"
        self.sources = root / "sources"
        self.triple = write_triple(self.sources, SHAPES["test"])
        base = self.triple["base"]
        tensors = read_tensors(base)
        self.sharded, self.pickled = self._copy("sharded"), self._copy("pickled")
        write_tensors(self.sharded, tensors, shards=2)
        write_pickle(self.pickled, tensors)
        self.tokenized = self._copy("tokenized")
        for name, document in SMALL.items():
            (self.tokenized / name).write_text(json.dumps(document), encoding="utf-8")
        self.adapter = self.sources / "adapter"
        adapted = {name: tensor for name, tensor in tensors.items() if name.endswith("encoder.layers.0.fc1.weight")}
        matrices = write_adapter(self.adapter, adapted or dict(list(tensors.items())[:0]))
        self.pickled_adapter = Path(shutil.copytree(self.adapter, self.sources / "pickled_adapter"))
        (self.pickled_adapter / ADAPTER_WEIGHTS[0]).unlink()
        torch.save(matrices, self.pickled_adapter / ADAPTER_WEIGHTS[1])
        self.llamas = write_llamas(self.sources / "llamas", ("model1", "model2"))
        own = self.llamas["model1"]
        (own / "modeling_mine.py").write_text("from .helpers import x\n", encoding="utf-8")
        edit_json(own / CONFIG, auto_map={"AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM"})
        self.openai = write_openai(self.sources / "openai" / "small.pt", base)
        (place / "secret").mkdir()
        shutil.copy(base / WEIGHTS, place / "secret" / WEIGHTS)
        (self.sources / "link").symlink_to(place / "secret")
        (root / "out").mkdir()
        self.output = root / "out" / "merged"
        os.chdir(root / "out")
        self.guard = Guard(root)
        self._sound: dict[Path, bytes] = {}

    def _copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.triple["primary"], self.sources / name))

    def merge(self, *more: str, **sources: Path) -> str:
        """`hsa merge` in this process, as the command line does it; the destination is there, whole, or absent."""
        given = {**self.triple, **sources}
        arguments = ["merge", *(f"--{role}={path}" for role, path in given.items()), f"--output={self.output}"]
        return self.command(*arguments, *QUIETLY, *more)

    def merge_llamas(self) -> str:
        """The same of two models of no family with heads, by a method that needs none; what is written is sound."""
        models = (f"--model={path}" for path in self.llamas.values())
        said = self.command("merge", "--method=linear", *models, f"--output={self.output}", *QUIETLY)
        if said == "success":
            code, _, lines = self.run("verify", str(self.output))
            if code:
                raise Finding(f"merge wrote what verify refuses: {lines!r:.500}")
        return said

    def command(self, *arguments: str) -> str:
        """A command line that writes the destination, which is there afterwards, whole, or absent: success, or the line
        of an error that is the input's fault."""
        shutil.rmtree(self.output, ignore_errors=True)
        code, said, lines = self.run(*arguments)
        failed = [line for line in lines if line.startswith("hsa: error: ")]
        if len(failed) != (code == 2):
            raise Finding(f"exit code {code} with {lines!r:.500}")
        left = {path.name for path in self.output.parent.iterdir()} - {self.output.name}
        if left:
            raise Finding(f"left behind {left}")
        if self.output.exists() != (code == 0):
            raise Finding(f"exit code {code}, and the destination is {'there' if code else 'not there'}")
        for file in _OURS if code == 0 else ():
            if (self.output / file).exists():
                json.loads((self.output / file).read_bytes(), parse_constant=_no_constant)
        if code == 0:
            json.loads(said)
        return failed[0] if failed else "success"

    def run(self, *arguments: str, codes: tuple[int, ...] = (0, 2)) -> tuple[int, str, list[str]]:
        """A command line in this process: exit code, one of `codes`; what it says; printable lines on stderr."""
        said, errors = io.StringIO(), io.StringIO()
        with self.guard.watching(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = app.run(arguments)
        lines = errors.getvalue().splitlines()
        if code not in codes or any(not line.startswith("hsa: ") for line in lines):
            raise Finding(f"exit code {code} with {lines!r:.500}")
        if any(not line.isprintable() for line in lines):
            raise Finding(f"control characters in {lines!r:.500}")
        return code, said.getvalue(), lines

    def call(self, work: Callable[[], object]) -> str:
        """Work of this package without a command: success, or an HsaError."""
        try:
            with self.guard.watching():
                work()
        except HsaError as error:
            if not str(error).isprintable():
                raise Finding(f"control characters in {str(error)!r:.500}") from error
            return str(error)
        return "success"


_OURS = (CONFIG, INDEX, "hsa_merge.json")
"""Files that are written anew from what was read, and must be JSON whatever that was."""


def _no_constant(name: str) -> None:
    raise Finding(f"wrote {name} into JSON")


def sound_bytes(arena: Arena, path: Path) -> bytes:
    """The bytes of a sound file, from before anything wrote over it."""
    return arena._sound.setdefault(path, path.read_bytes())


def placed(place: Callable[[Arena], Path], run: Callable[[Arena], str]) -> Callable[[Arena, bytes], str]:
    """A target that writes its bytes over one sound file."""

    def attempt(arena: Arena, data: bytes) -> str:
        path = place(arena)
        sound = sound_bytes(arena, path)
        path.write_bytes(data)
        try:
            return run(arena)
        finally:
            path.write_bytes(sound)

    return attempt
