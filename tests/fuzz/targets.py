"""What is fuzzed: one entry for each kind of file that a stranger may have written.

A target puts the bytes in their place in an otherwise sound source, runs what a user would run, and returns what came
of it: a word for success, or the HsaError. Any other exception, and whatever `guard` forbids, is a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import targets_outputs as outputs
import targets_text as text
import targets_weights as weights
from arena import Arena, placed

from hsa.sources.checkpoint import ADAPTER_CONFIG, CONFIG, INDEX, PICKLES


@dataclass(frozen=True)
class Target:
    """`run` takes an arena and the file's bytes, in one attempt; `seeds` are sound files; `kind` chooses the mutations.

    `tokens` are words that stand in such files.
    """

    run: Callable[[Arena, bytes], str]
    seeds: Callable[[Arena], Iterable[bytes]]
    kind: str = "json"
    tokens: tuple[str, ...] = ()


TARGETS: Mapping[str, Target] = {
    "header": Target(
        weights.merge_header,
        weights.header_seeds,
        tokens=("dtype", "shape", "data_offsets", "__metadata__", "F16", "BF16"),
    ),
    "weights": Target(weights.merge_weights, weights.weights_seeds, "bytes"),
    "index": Target(
        placed(lambda arena: arena.sharded / INDEX, lambda arena: arena.merge(primary=arena.sharded)),
        text.index_seeds,
        tokens=("weight_map", "metadata", "../", "/", "model-00001-of-00002.safetensors", "model.safetensors"),
    ),
    "config": Target(
        placed(lambda arena: arena.triple["primary"] / CONFIG, text.merge_config),
        text.config_seeds,
        tokens=("dtype", "torch_dtype", "encoder_layers", "decoder_layers", "tie_word_embeddings", "whisper"),
    ),
    "any_config": Target(
        placed(lambda arena: arena.llamas["model1"] / CONFIG, Arena.merge_llamas),
        text.any_config_seeds,
        tokens=("auto_map", "architectures", "model_type", "llama", "tie_word_embeddings", "quantization_config", "--"),
    ),
    "any_tokenizer": Target(
        placed(lambda arena: arena.llamas["model1"] / "tokenizer_config.json", Arena.merge_llamas),
        lambda arena: [(arena.llamas["model1"] / "tokenizer_config.json").read_bytes()],
        tokens=("auto_map", "AutoTokenizer", "modeling_mine.Mine", "../x.Mine", "added_tokens_decoder"),
    ),
    "any_code": Target(
        placed(lambda arena: arena.llamas["model1"] / "modeling_mine.py", Arena.merge_llamas),
        lambda arena: [b"from .helpers import x\nimport .modeling_mine\n"],
        "bytes",
        ("from .", " import ", "import .", "modeling_mine", "../", "\n", "\0"),
    ),
    "tokenizer": Target(
        placed(lambda arena: arena.tokenized / "tokenizer.json", text.merge_tokenized),
        lambda arena: [(arena.tokenized / "tokenizer.json").read_bytes()],
        tokens=("model", "vocab", "merges", "added_tokens", "id", "content"),
    ),
    "processor": Target(
        placed(lambda arena: arena.tokenized / "processor_config.json", text.merge_tokenized),
        lambda arena: [(arena.tokenized / "processor_config.json").read_bytes()],
        tokens=("feature_extractor", "audio_processor", "feature_size", "hop_length", "tokenizer_class"),
    ),
    "merges": Target(
        placed(lambda arena: arena.tokenized / "merges.txt", text.merge_tokenized),
        lambda arena: [b"#version: 0.2\na b\nab \xc4\xa0\n"],
        "bytes",
        ("#version", "\r\n", " ", "\ufeff"),
    ),
    "adapter_config": Target(
        placed(lambda arena: arena.adapter / ADAPTER_CONFIG, text.merge_adapter),
        lambda arena: [(arena.adapter / ADAPTER_CONFIG).read_bytes()],
        tokens=("r", "lora_alpha", "use_rslora", "peft_type", "LORA", "bias"),
    ),
    "provenance": Target(
        outputs.read_provenance,
        outputs.provenance_seeds,
        tokens=("digest", "blake3", "selected", "scores", "revision", "decision", "groups", "axis"),
    ),
    "recipe": Target(
        text.read_recipe, text.recipe_seeds, "bytes", ("merges:", "- name: ", "&a", "*a", "<<: ", "!!", "|", "card: {")
    ),
    "verify": Target(
        outputs.verify, outputs.verify_seeds, tokens=("files", "../x", "/etc/passwd", "blake3", "scores", "parameters")
    ),
    "recompute": Target(
        outputs.recompute, outputs.verify_seeds, tokens=("max_shard_size", "dtype", "targets", "k", "card", "files")
    ),
    "release": Target(
        text.release_recipe, text.release_seeds, tokens=("max_shard_size", "dtype", "targets", "k", "lambda", "card")
    ),
    "inspect": Target(
        outputs.inspect, outputs.inspect_seeds, tokens=("<x-a>", "</script><x-b>", '"onload="x', "scores", "id", "k")
    ),
    "patch": Target(
        outputs.verify_and_apply,
        outputs.patch_seeds,
        tokens=("targets", "files", "decision", "selected", "scores", "groups", "method", "max_shard_size"),
    ),
    "sweep_index": Target(
        outputs.verify_index("index.csv", outputs.sweep_folder),
        lambda arena: [(outputs.sweep_folder(arena) / "index.csv").read_bytes()],
        "bytes",
        ("encoder-qkv_k0.6", ",,", '"', "nan", "1e999", "../", "\n"),
    ),
    "release_index": Target(
        outputs.verify_index("index.json", outputs.tree_folder),
        lambda arena: [(outputs.tree_folder(arena) / "index.json").read_bytes()],
        tokens=("entries", "path", "../x", "g/a", "complete", "provenance", "state"),
    ),
    "pickle": Target(
        weights.merge_pickle, weights.pickle_seeds, "bytes", ("torch._utils\n_rebuild_tensor_v2\n", "storage", "cpu")
    ),
    "zip": Target(
        placed(lambda arena: arena.pickled / PICKLES.weights, lambda arena: arena.merge(secondary=arena.pickled)),
        weights.zip_seeds,
        "bytes",
        ("PK\x01\x02", "PK\x03\x04", "PK\x05\x06", "data.pkl", "byteorder"),
    ),
    "openai": Target(weights.merge_openai, weights.openai_seeds, "bytes", ("dims", "n_audio_head", "model_state_dict")),
    "adapter_pickle": Target(
        weights.merge_adapter_pickle, weights.adapter_pickle_seeds, "bytes", ("lora_A", "storage", "cpu")
    ),
    "card": Target(
        outputs.render_card,
        outputs.card_seeds,
        "bytes",
        ("<b>", "](", "```", "---\n", "\n# ", "&lt;", "\u2028", "{{", "!["),
    ),
}
