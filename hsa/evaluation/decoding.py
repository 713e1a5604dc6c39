"""Recognise speech with a checkpoint: what `hsa eval` and `hsa search` transcribe with.

A recogniser holds one loaded model. Its features depend on the audio and the family alone, so that they are computed
once for many models; a search writes other weights into `recognizer.model` between two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hsa.errors import BackendUnavailable, RequestError, SourceError
from hsa.evaluation.model_kinds import ModelKind, kind_of
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.recognizers import CtcRecognizer, SpeechRecognizer, WhisperRecognizer
from hsa.evaluation.speculative import Drafts
from hsa.evaluation.transformers_calls import FROM_DISK, explained, quiet_transformers
from hsa.option_names import option
from hsa.system.dtypes import Float32

if TYPE_CHECKING:
    import torch


class Recognizer(Protocol):
    """A loaded model that transcribes.

    `rate` is the sampling rate in Hz that it hears at, `features_key` equal for models whose features are equal,
    `model` the torch module, into which other weights may be written between two calls.
    """

    rate: int
    features_key: str
    model: Any

    def features(self, audio: Sequence[Float32]) -> Any:
        """What the model hears of some utterances, float32 [samples] each; computed once and kept for other models."""

    def size_of(self, features: Any) -> int:
        """Bytes of memory that features take."""

    def transcribe(self, features: Any, drafts: Sequence[Drafts] | None = None) -> list[str]:
        """The text of each utterance, all decoded as one batch, as the model writes it. `drafts` are what other models
        wrote for each utterance, which is faster for some models and changes no text; this model's text is added."""


def load_recognizer(
    model: Path | torch.nn.Module, options: DecodingOptions, *, files: Path | None = None
) -> Recognizer:
    """Load a checkpoint directory to transcribe with; a loaded module is taken as it is, with `files` beside it.

    Args:
        model: a directory, or a model of transformers.
        options: how to decode.
        files: the directory with the tokenizer and the feature extractor of a loaded model.

    Raises SourceError for a model that cannot transcribe, RequestError for options that it does not have,
    BackendUnavailable for a device that is not there, MachineError where memory runs out.

    Example:
        >>> recognizer = load_recognizer(Path("merged"), DecodingOptions())
        >>> recognizer.transcribe(recognizer.features([samples]))
        ['so we walked to the river']
    """
    folder = model if isinstance(model, Path) else files
    if folder is None:
        raise RequestError("a loaded model needs the directory of its tokenizer: give files=")
    kind = kind_of(folder)
    kind.check(options)
    device = chosen_device(options.device)
    with quiet_transformers(), explained(folder):
        loaded = load_model(folder, kind, device, options.dtype) if isinstance(model, Path) else model
        owner = CtcRecognizer if kind.head == "ctc" else WhisperRecognizer if kind.whisper else SpeechRecognizer
        return owner(loaded, folder, options)


def chosen_device(name: str) -> str:
    """`cpu` or a GPU by its number, of what `device` says. BackendUnavailable where there is no such GPU."""
    if name == "cpu":
        return name
    count = gpus()
    if name == "auto":
        return "cuda:0" if count else "cpu"
    number = int(name.partition(":")[2] or 0)
    if number >= count:
        found = f"it sees {count} GPUs" if count else "it sees no GPU"
        raise BackendUnavailable(f"torch has no device {name}: {found}; give {option('device', 'cpu')} or another")
    return f"cuda:{number}"


def gpus() -> int:
    """How many GPUs torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def load_model(folder: Path, kind: ModelKind, device: str, dtype: str) -> Any:
    """The model of a directory, ready to be used. SourceError where its weights lack a part of it."""
    import torch
    import transformers

    wanted: Any = ("float32" if device == "cpu" else "auto") if dtype == "auto" else dtype
    wanted = wanted if wanted == "auto" else getattr(torch, wanted)
    owner = getattr(transformers, kind.architecture)
    config = owner.config_class.from_pretrained(folder, **FROM_DISK)
    config._attn_implementation = None  # a config may name one on the Hub, whose code transformers would fetch and run
    model, info = owner.from_pretrained(folder, config=config, dtype=wanted, output_loading_info=True, **FROM_DISK)
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(
            f"{folder} lacks {len(missing)} tensors of a {kind.architecture}, such as {missing[0]}, which would be "
            f"random numbers; give a complete checkpoint"
        )
    return model.to(device).eval()
