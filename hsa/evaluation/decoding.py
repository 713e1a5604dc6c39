"""Recognise speech with a checkpoint, for `hsa eval` and `hsa search`.

A recogniser has one loaded model. Its features depend only on the audio and the model family, so they are computed once
for many models. A search writes other weights into `recognizer.model` between two calls.
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

    `rate` is the sampling rate in Hz that it expects. `features_key` is equal for models whose features are equal.
    `model` is the torch module, into which other weights may be written between two calls.
    """

    rate: int
    features_key: str
    model: Any

    def features(self, audio: Sequence[Float32]) -> Any:
        """Compute the features of some utterances, float32 [samples] each. They can be kept for other models."""

    def size_of(self, features: Any) -> int:
        """The size of features in bytes."""

    def transcribe(self, features: Any, drafts: Sequence[Drafts] | None = None) -> list[str]:
        """Return the text of each utterance as the model writes it. All utterances are decoded as one batch.

        `drafts` are the texts of other models for each utterance, and this model's text is added to them. They make
        some models faster and change no text."""


def load_recognizer(
    model: Path | torch.nn.Module, options: DecodingOptions, *, files: Path | None = None
) -> Recognizer:
    """Load a checkpoint directory to transcribe with, or use a loaded module with the small files in `files`.

    Args:
        model: a directory, or a model of transformers.
        options: how to decode.
        files: the directory with the tokenizer and the feature extractor of a loaded model.

    Raises SourceError for a model that cannot transcribe, RequestError for options that it does not support,
    BackendUnavailable for a missing device, MachineError if memory runs out.

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
    """Resolve `device` to `cpu` or a numbered GPU. BackendUnavailable if there is no such GPU."""
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
    """The number of GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def load_model(folder: Path, kind: ModelKind, device: str, dtype: str) -> Any:
    """Load the model of a directory, ready for use. SourceError if its weights are incomplete."""
    import torch
    import transformers

    wanted: Any = ("float32" if device == "cpu" else "auto") if dtype == "auto" else dtype
    wanted = wanted if wanted == "auto" else getattr(torch, wanted)
    owner = getattr(transformers, kind.architecture)
    config = owner.config_class.from_pretrained(folder, **FROM_DISK)
    config._attn_implementation = None  # a config may name one on the Hub; transformers would run its code
    model, info = owner.from_pretrained(folder, config=config, dtype=wanted, output_loading_info=True, **FROM_DISK)
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(
            f"{folder} lacks {len(missing)} tensors of a {kind.architecture}, such as {missing[0]}, which would be "
            f"random numbers; give a complete checkpoint"
        )
    return model.to(device).eval()
