"""Checkpoints of any family without a file of its own, such as Llama or ViT. Only methods that need no attention heads
merge them.

Such a model is known only by its `config.json` and its tensor names. Which tensors it must have, and where its heads
are, is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hsa.architectures.base import (
    Architecture,
    ExpectedTensor,
    ModelClass,
    ModelCounts,
    Preset,
    TensorPlace,
)
from hsa.errors import shown

_WRAPPED = "module."
"""The prefix that DataParallel adds to every name. Elsewhere in a name, it may be the model's own."""

_INNER = re.compile(r"(?<![^.])(_orig_mod|_orig_module|_module|_forward_module|_\w+_wrapped_module)\.")
"""Name components that torch.compile, FSDP and similar wrappers insert. No model uses them for its own modules."""

_EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight")
"""Embeddings of tokens, as the model families of transformers call them."""

_OUTPUT = re.compile(r"(.+\.)?(lm_head|embed_out|output|proj_out|cls\.predictions\.decoder)\.weight")
"""Output projections that may be tied to the embedding of tokens."""

_KINDS = (
    ("norm", re.compile(r"norm|(^|[._])ln(_|\.|$)|layernorm")),
    ("attention", re.compile(r"attn|attention")),
    ("feed-forward", re.compile(r"mlp|ffn|feed_forward|fc[0-9]|dense_h|dense_4h|intermediate|experts|output\.dense")),
    ("embedding", re.compile(r"embed|(^|\.)(wte|wpe|shared)\.")),
    ("convolution", re.compile(r"conv")),
    ("output projection", re.compile(r"lm_head|classifier|(^|\.)(score|output|head)\.")),
)
"""Kinds of tensors in words for readers, by parts of their names. The first pattern that matches counts."""


class _Task(NamedTuple):
    """The meaning of a class name's ending: the Hub's task, the same in words, and the class that prepares the
    input."""

    ending: str
    task: str
    use: str
    processor: str


_TASKS = (
    _Task("ForCausalLM", "text-generation", "Text generation", "AutoTokenizer"),
    _Task("LMHeadModel", "text-generation", "Text generation", "AutoTokenizer"),
    _Task("ForMaskedLM", "fill-mask", "Prediction of masked words", "AutoTokenizer"),
    _Task("ForSequenceClassification", "text-classification", "Text classification", "AutoTokenizer"),
    _Task("ForTokenClassification", "token-classification", "Token classification", "AutoTokenizer"),
    _Task("ForQuestionAnswering", "question-answering", "Question answering", "AutoTokenizer"),
    _Task("ForImageClassification", "image-classification", "Image classification", "AutoImageProcessor"),
    _Task("ForObjectDetection", "object-detection", "Object detection", "AutoImageProcessor"),
    _Task("ForSemanticSegmentation", "image-segmentation", "Image segmentation", "AutoImageProcessor"),
    _Task("ForAudioClassification", "audio-classification", "Audio classification", "AutoFeatureExtractor"),
    _Task("ForCTC", "automatic-speech-recognition", "Speech recognition", "AutoProcessor"),
    _Task("ForSpeechSeq2Seq", "automatic-speech-recognition", "Speech recognition", "AutoProcessor"),
)

_UNKNOWN = _Task("", "", "Use", "")

_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]{0,99}")
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Patterns of names from a `config.json` that may appear unchanged on a model card."""


class Generic(Architecture):
    """Any checkpoint with a `config.json` whose `model_type` no other family has.

    Source: the names of classes, tensors and files in transformers 5.
    """

    name = "generic"
    title = "Generic"
    tags = ()
    model_types = frozenset()
    all_stacks = ()
    blocks = ()
    first_target = ""
    width = "hidden_size"
    has_heads = False
    lists_tensors = False

    def knows(self, name: str) -> bool:
        return True

    def place(self, name: str) -> TensorPlace | None:
        """Return None: the places of such a model's heads are unknown."""
        return None

    def group_of(self, name: str) -> tuple[str, str]:
        """The stack of a tensor (`model` outside of layers), and its kind as far as its name shows it.

        Example:
            >>> GENERIC.group_of("model.layers.3.mlp.up_proj.weight")
            ('model', 'feed-forward')
        """
        bare = self.canonical(name)
        layer = self.layer_of(bare)
        kind = next((kind for kind, pattern in _KINDS if pattern.search(bare)), "other")
        return "model" if layer is None else layer[0], kind

    def layers_key_of(self, name: str) -> str | None:
        return None

    def expected(self, config: Mapping[str, Any], where: str) -> Iterator[ExpectedTensor]:
        return iter(())

    def expected_targets(self, layers: Mapping[str, int], preset: Preset) -> Iterator[str]:
        return iter(())

    def counts(self, config: Mapping[str, Any], where: str) -> ModelCounts:
        """Return no counts: the meaning of the keys of `config.json` depends on the model."""
        return ModelCounts({}, {})

    def kind(self, config: Mapping[str, Any]) -> str:
        """See `Architecture.kind`. Fine-tunes of one model have the same `model_type`."""
        return f"a checkpoint of model_type {shown(config.get('model_type'))}"

    def canonical(self, name: str) -> str:
        return _INNER.sub("", name).removeprefix(self.prefix)

    def plain_names(self, stored: Iterable[str]) -> dict[str, str]:
        """The name of each tensor without the parts that wrappers added. A part is removed if no model uses it, or if
        all names begin with it.

        Example:
            >>> GENERIC.plain_names(["module.lm_head.weight", "module.model.norm.weight"])
            {'module.lm_head.weight': 'lm_head.weight', 'module.model.norm.weight': 'model.norm.weight'}
        """
        names = {name: _INNER.sub("", name) for name in stored}
        if names and all(name.startswith(_WRAPPED) for name in names.values()):
            return {name: plain_name.removeprefix(_WRAPPED) for name, plain_name in names.items()}
        return names

    def embedding_of(self, names: Iterable[str]) -> str | None:
        """The first tensor that is named as an embedding of tokens."""
        return next((name for name in names if _EMBEDDING.fullmatch(name)), None)

    def tied_output(self, names: Iterable[str], config: Mapping[str, Any]) -> tuple[str, str] | None:
        """The output projection and the embedding to which `config.json` ties it, if both are stored.

        They are one tensor if they have the same bytes. None if the config does not say that they are tied, because the
        defaults of model classes differ.
        """
        if config.get("tie_word_embeddings") is not True:
            return None
        names = list(names)
        output = next((name for name in names if _OUTPUT.fullmatch(name)), None)
        embedding = self.embedding_of(names)
        return None if output is None or embedding is None else (output, embedding)

    def model_class(self, config: Mapping[str, Any]) -> ModelClass:
        """The class that `architectures` names, and the task that its name implies; `AutoModel` if there is none.

        If the class is code in the checkpoint's directory (`auto_map`), the Auto class that loads it.

        Example:
            >>> GENERIC.model_class({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).task
            'text-generation'
        """
        classes, model_type = config.get("architectures"), config.get("model_type")
        first = classes[0] if isinstance(classes, list) and classes else None
        own = first if isinstance(first, str) and _CLASS.fullmatch(first) else None
        task = next((task for task in _TASKS if own is not None and own.endswith(task.ending)), _UNKNOWN)
        known = isinstance(model_type, str) and _TYPE.fullmatch(model_type) is not None
        auto = _auto_class(config, own)
        described = f"{model_type} ({own})" if known and own else own or (model_type if known else "not named")
        return ModelClass(
            auto or own or "AutoModel",
            description=str(described),
            task=task.task,
            use=task.use,
            processor=task.processor,
            reads_tokens=task.processor in ("AutoTokenizer", "AutoProcessor"),
            reads_features=task.processor not in ("AutoTokenizer", ""),
            custom_code=auto is not None,
            library="transformers" if known else "",
        )


def _auto_class(config: Mapping[str, Any], own: str | None) -> str | None:
    """The Auto class of transformers that loads custom code; None without such code."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return None
    models = {key: value for key, value in auto_map.items() if _CLASS.fullmatch(key) and key.startswith("AutoModel")}
    for key, value in models.items():
        if own is not None and isinstance(value, str) and value.rpartition(".")[2] == own:
            return str(key)
    return next(iter(models), None)


GENERIC = Generic()
