"""Determine from the small files of a checkpoint whether and how it can transcribe, without heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hsa.errors import RequestError, SourceError, listed, shown
from hsa.evaluation.options import DecodingOptions
from hsa.option_names import option
from hsa.sources.any_small_files import VOCABULARIES
from hsa.sources.checkpoint import CONFIG, read_config, read_whole
from hsa.sources.small_file_checks import GENERATION_CONFIG, PREPROCESSOR, PROCESSOR
from hsa.system.fsio import Tally
from hsa.system.strict_json import load_json

Head = Literal["seq2seq", "ctc"]

WHISPER = "WhisperForConditionalGeneration"
SEQ2SEQ = (
    WHISPER,
    "MoonshineForConditionalGeneration",
    "Speech2TextForConditionalGeneration",
    "SpeechEncoderDecoderModel",
)
"""Classes of transformers that generate a text from speech features alone, without a prompt."""
CTC = "ForCTC"
"""The suffix of class names with a CTC head."""

MULTILINGUAL_VOCABULARY = 51865
"""Vocabulary size of the smallest multilingual Whisper; English-only ones have 51864. Source: openai/whisper,
model.py."""


@dataclass(frozen=True)
class ModelKind:
    """A model that transcribes: its class in transformers, how it is decoded, and which languages it supports.

    `multilingual` is None if the files do not say; `languages` are the codes of a multilingual Whisper.
    """

    folder: Path
    architecture: str
    head: Head
    multilingual: bool | None
    languages: frozenset[str]

    @property
    def whisper(self) -> bool:
        return self.architecture == WHISPER

    @property
    def english(self) -> bool:
        """Whether it is an English-only Whisper."""
        return self.whisper and self.multilingual is False

    def check(self, options: DecodingOptions) -> None:
        """Raise RequestError for a task, a language or a beam search that the model does not support."""
        task, language = options.task, options.language
        if options.beams > 1 and self.head == "ctc":
            raise RequestError(
                f"{self.folder} is a {self.architecture}, which is decoded greedily; leave {option('beams')} out"
            )
        if options.max_tokens is not None and self.head == "ctc":
            raise RequestError(
                f"{self.folder} is a {self.architecture}, which writes as long as it hears; leave "
                f"{option('max_tokens')} out"
            )
        if task == "translate" and not (self.whisper and self.multilingual):
            what = "is for English alone" if self.whisper else f"is a {self.architecture}"
            raise RequestError(
                f"{self.folder} {what} and cannot translate; {option('task', 'translate')} needs a multilingual Whisper"
            )
        code = None if language is None else language_code(language)
        if self.english and code not in (None, "en"):
            raise RequestError(f"{self.folder} is for English alone; leave {option('language', language)} out")
        if self.languages and code is not None and code not in self.languages:
            raise RequestError(f"{self.folder} does not know {option('language', language)}; give a code such as de")


def language_code(language: str) -> str:
    """The code of a language given by its code or its English name. Unknown names are returned unchanged.

    Example:
        >>> language_code("German"), language_code("de"), language_code("xx")
        ('de', 'de', 'xx')
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    lower = language.strip().lower()
    return str(TO_LANGUAGE_CODE.get(lower, lower))


def kind_of(folder: Path) -> ModelKind:
    """The kind of a checkpoint directory. SourceError if it cannot transcribe, or lacks files that this requires.

    Example:
        >>> kind_of(Path("whisper-tiny")).head
        'seq2seq'
    """
    folder = folder.resolve()  # files of a source must be in the resolved directory
    config = read_config("model", folder, Tally())
    architecture, head = _architecture(folder, config)
    lacking = []
    if not any((folder / name).is_file() for name in (PREPROCESSOR, PROCESSOR)):
        lacking.append(f"feature extractor ({PREPROCESSOR})")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        lacking.append("tokenizer (tokenizer.json or vocab.json)")
    if lacking:
        raise SourceError(
            f"{folder} has no {listed(lacking)}; copy the files of the model that it was fine-tuned from into it"
        )
    generation = _generation_config(folder)
    whisper = architecture == WHISPER
    languages = generation.get("lang_to_id") if whisper else None
    return ModelKind(
        folder,
        architecture,
        head,
        _multilingual(config, generation) if whisper else None,
        frozenset(name.strip("<|>") for name in languages) if isinstance(languages, dict) else frozenset(),
    )


def _architecture(folder: Path, config: Mapping[str, Any]) -> tuple[str, Head]:
    """The class of the model and its head. SourceError for a model that does not transcribe speech."""
    stated = config.get("architectures")
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    for name in names:
        if name in SEQ2SEQ:
            return name, "seq2seq"
        if name.endswith(CTC):
            return name, "ctc"
    what = f"its {CONFIG} says {listed(map(shown, names))}" if names else f"its {CONFIG} names no architectures"
    raise SourceError(
        f"{folder} cannot transcribe: {what}; expected a sequence-to-sequence speech model or one with a CTC head, "
        f"such as {WHISPER} or Wav2Vec2ForCTC"
    )


def _generation_config(folder: Path) -> Mapping[str, Any]:
    if not (folder / GENERATION_CONFIG).is_file():
        return {}
    text = read_whole("model", folder, GENERATION_CONFIG, Tally())
    return load_json(text, f"model {folder / GENERATION_CONFIG}", "generation config")


def _multilingual(config: Mapping[str, Any], generation: Mapping[str, Any]) -> bool:
    stated = generation.get("is_multilingual")
    if isinstance(stated, bool):
        return stated
    size = config.get("vocab_size")
    return isinstance(size, int) and size >= MULTILINGUAL_VOCABULARY
