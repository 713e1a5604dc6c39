"""Recognise speech with a checkpoint: what `hsa eval` and `hsa search` transcribe with.

A recogniser holds one loaded model. Its features depend on the audio and the family alone, so that they are computed
once for many models; a search writes other weights into `recognizer.model` between two calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hsa.errors import BackendUnavailable, MachineError, RequestError, SourceError, shown
from hsa.evaluation.model_kinds import ModelKind, kind_of
from hsa.option_names import option
from hsa.system.dtypes import Float32

if TYPE_CHECKING:
    import torch

TASKS = ("transcribe", "translate")
DTYPES = ("auto", "float32", "float16", "bfloat16")
MOST_AT_ONCE = 4096
"""Utterances in a batch, and beams, that a caller may ask for."""

_DEVICE = re.compile(r"auto|cpu|cuda|cuda:[0-9]{1,3}")


@dataclass(frozen=True)
class DecodingOptions:
    """How speech is decoded.

    Args:
        language: a code such as `de` or a name such as `german`; None lets a multilingual model detect it.
        task: `transcribe`, or `translate` into English, of models that can.
        beams: width of the beam search; 1 is greedy decoding.
        batch: utterances that are decoded at a time.
        device: `auto` (a GPU where torch sees one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on a CPU, the checkpoint's own on a GPU), `float32`, `float16` or `bfloat16`.

    Raises RequestError for any other value.

    Example:
        >>> DecodingOptions(language="en", beams=5).as_dict()["beams"]
        5
    """

    language: str | None = None
    task: str = "transcribe"
    beams: int = 1
    batch: int = 16
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.language is not None and (not isinstance(self.language, str) or not self.language.strip()):
            raise RequestError(f"{option('language')} must be a code such as en or de, got {shown(self.language)}")
        for name, choices in (("task", TASKS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise RequestError(f"{option(name)} must be one of {', '.join(choices)}, got {shown(self._get(name))}")
        for name in ("beams", "batch"):
            value = self._get(name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_AT_ONCE:
                raise RequestError(
                    f"{option(name)} must be a whole number from 1 to {MOST_AT_ONCE}, got {shown(value)}"
                )
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise RequestError(f"{option('device')} must be auto, cpu, cuda or cuda:N, got {shown(self.device)}")

    def _get(self, name: str) -> Any:
        return getattr(self, name)

    def as_dict(self) -> dict[str, Any]:
        names = ("language", "task", "beams", "batch", "device", "dtype")
        return {name: getattr(self, name) for name in names}


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

    def transcribe(self, features: Any) -> list[str]:
        """The text of each utterance, all decoded as one batch, as the model writes it."""


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
    from hsa.evaluation.recognizers import CtcRecognizer, SpeechRecognizer, WhisperRecognizer

    folder = model if isinstance(model, Path) else files
    if folder is None:
        raise RequestError("a loaded model needs the directory of its tokenizer: give files=")
    kind = kind_of(folder)
    kind.check(options.task, options.language)
    device = chosen_device(options.device)
    with quiet_transformers(), explained(folder):
        loaded = load_model(folder, kind, device, options.dtype) if isinstance(model, Path) else model
        owner = CtcRecognizer if kind.head == "ctc" else WhisperRecognizer if kind.whisper else SpeechRecognizer
        return owner(loaded, folder, options)


def chosen_device(name: str) -> str:
    """`cpu` or a GPU by its number, of what `device` says. BackendUnavailable where there is no such GPU."""
    if name == "cpu":
        return name
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda:0" if count else "cpu"
    number = int(name.partition(":")[2] or 0)
    if number >= count:
        found = f"it sees {count} GPUs" if count else "it sees no GPU"
        raise BackendUnavailable(f"torch has no device {name}: {found}; give {option('device', 'cpu')} or another")
    return f"cuda:{number}"


def load_model(folder: Path, kind: ModelKind, device: str, dtype: str) -> Any:
    """The model of a directory, ready to be used. SourceError where its weights lack a part of it."""
    import torch
    import transformers

    wanted: Any = ("float32" if device == "cpu" else "auto") if dtype == "auto" else dtype
    wanted = wanted if wanted == "auto" else getattr(torch, wanted)
    owner = getattr(transformers, kind.architecture)
    model, info = owner.from_pretrained(folder, dtype=wanted, local_files_only=True, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise SourceError(
            f"{folder} lacks {len(missing)} tensors of a {kind.architecture}, such as {missing[0]}, which would be "
            f"random numbers; give a complete checkpoint"
        )
    return model.to(device).eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without warnings and progress bars of transformers, which is as talkative as before afterwards."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say in one line what torch and transformers could not do with a model."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MachineError(f"out of memory with {folder}; lower {option('batch')}, or free some") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, IndexError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise SourceError(f"{folder} cannot transcribe: {type(error).__name__}: {lines[0]}") from error
