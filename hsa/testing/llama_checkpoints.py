"""Write synthetic Llama-shaped checkpoints, for tests of models from families without heads.

A written directory holds the files of a published Llama (weights, `config.json`, `generation_config.json`, a tokenizer
with a chat template, a licence) and loads offline with transformers, but the model generates only noise. The same
arguments give the same bytes on every run and every machine. Needs only numpy; a whole model is held in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.testing.made_up_numbers import Floats, bit_stream, encode, noise
from hsa.testing.whisper_config import DTYPES, WEIGHT_STD, DType, byte_symbols, check_dtype, write_json

_SPECIAL = {"<s>": 256, "</s>": 257, "<unk>": 258}
TOKENIZER_VOCAB_SIZE = 256 + len(_SPECIAL)
"""The number of tokens of the byte-level tokenizer that is written."""

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
LICENCE = "Made-up numbers: use them as you like.\n"


@dataclass(frozen=True)
class LlamaShape:
    """The dimensions of a Llama, named as in its `config.json`; the defaults are small and mostly odd.

    With `tied`, the output projection is the embedding and is not stored.
    """

    hidden_size: int = 20
    num_hidden_layers: int = 3
    num_attention_heads: int = 5
    num_key_value_heads: int = 1
    intermediate_size: int = 37
    vocab_size: int = TOKENIZER_VOCAB_SIZE
    tied: bool = False


def tensor_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a saved LlamaForCausalLM, in the order of its state dict.

    Example:
        >>> tensor_shapes(LlamaShape(tied=True))["model.embed_tokens.weight"]
        (259, 20)
    """
    return dict(_tensors(shape))


def _tensors(shape: LlamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, ffn = shape.hidden_size, shape.intermediate_size
    narrow = width // shape.num_attention_heads * shape.num_key_value_heads
    yield "model.embed_tokens.weight", (shape.vocab_size, width)
    for number in range(shape.num_hidden_layers):
        layer = f"model.layers.{number}"
        for kind, rows in (("q", width), ("k", narrow), ("v", narrow), ("o", width)):
            yield f"{layer}.self_attn.{kind}_proj.weight", (rows, width)
        yield f"{layer}.mlp.gate_proj.weight", (ffn, width)
        yield f"{layer}.mlp.up_proj.weight", (ffn, width)
        yield f"{layer}.mlp.down_proj.weight", (width, ffn)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab_size, width)


def write_llama(
    directory: str | os.PathLike[str],
    shape: LlamaShape | None = None,
    *,
    dtype: DType = "float32",
    role: str = "base",
    seed: int = 0,
    delta: float = 1e-3,
    shards: int = 1,
    small_files: bool = True,
) -> Path:
    """Create the directory of one Llama, and return it.

    Weights are uniform around 0 (norms around 1) with a standard deviation of 0.02. The model with role "base" depends
    only on the seed. Any other model is that base plus its own task vector, with standard deviation `delta`. Values are
    computed in float32 and rounded once. Tensors are distributed over `shards` files, in order.

    Raises ValueError for an unknown dtype, FileExistsError if the directory exists.

    Example:
        >>> write_llama("llama", LlamaShape(tied=True), dtype="bfloat16", shards=2)  # doctest: +SKIP
        PosixPath('llama')
    """
    check_dtype(dtype)
    shape = shape or LlamaShape()
    directory = Path(directory)
    directory.mkdir(parents=True)
    write_json(directory / "config.json", config_of(shape, dtype))
    if small_files:
        _write_small_files(directory)
    names = list(tensor_shapes(shape).items())
    files = [names[len(names) * n // shards : len(names) * (n + 1) // shards] for n in range(shards)]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_file(directory / file, part, dtype, role, seed, delta)
        weight_map |= {name: file for name, _ in part}
    if shards > 1:
        total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return directory


def write_llamas(
    root: str | os.PathLike[str],
    roles: Sequence[str] = ("base", "model1", "model2", "model3"),
    shape: LlamaShape | None = None,
    **options: Any,
) -> dict[str, Path]:
    """Write `root/ROLE` for each role, all with the same base. Return the directories by role; see `write_llama`."""
    return {role: write_llama(Path(root) / role, shape, role=role, **options) for role in roles}


def config_of(shape: LlamaShape, dtype: DType) -> dict[str, Any]:
    """The contents of `config.json` for this shape and dtype."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": _SPECIAL["<s>"],
        "dtype": dtype,
        "eos_token_id": _SPECIAL["</s>"],
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 64,
        "model_type": "llama",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocab_size,
    }


def _write_file(
    path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: DType, role: str, seed: int, delta: float
) -> None:
    code, _ = DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    end = 0
    for name, dimensions in tensors:
        parts.append(encode(_values(name, dimensions, role, seed, delta), dtype).tobytes())
        start, end = end, end + len(parts[-1])
        entries[name] = {"dtype": code, "shape": list(dimensions), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join((len(text).to_bytes(8, "little"), text, *parts)))


def _values(name: str, dimensions: tuple[int, ...], role: str, seed: int, delta: float) -> Floats:
    count = 1
    for length in dimensions:
        count *= length
    values = noise(bit_stream(seed, "base", name), count, WEIGHT_STD)
    if name.endswith("norm.weight"):
        values += 1
    if role != "base":
        values += noise(bit_stream(seed, role, name), count, delta)
    return values


def _write_small_files(directory: Path) -> None:
    tokens = {"bos_token_id": _SPECIAL["<s>"], "eos_token_id": _SPECIAL["</s>"]}
    write_json(directory / "generation_config.json", {**tokens, "max_length": 64})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(directory / "special_tokens_map.json", special)
    settings = {"model_max_length": 64, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(directory / "tokenizer_config.json", {**special, **settings})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spaces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in _SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": spaces,
        "post_processor": None,
        "decoder": spaces,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**{symbol: number for number, symbol in enumerate(byte_symbols())}, **_SPECIAL},
            "merges": [],
        },
    }
    write_json(directory / "tokenizer.json", tokenizer)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "LICENSE").write_text(LICENCE, encoding="utf-8")
