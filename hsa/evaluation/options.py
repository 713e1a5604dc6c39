"""How speech is decoded: the options that `hsa eval` and `hsa search` share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hsa.errors import RequestError, shown
from hsa.option_names import option

TASKS = ("transcribe", "translate")
DTYPES = ("auto", "float32", "float16", "bfloat16")
MOST_AT_ONCE = 4096
"""Maximum utterances in a batch, beams, and tokens of an utterance that a caller may request."""

_DEVICE = re.compile(r"auto|cpu|cuda|cuda:[0-9]{1,3}")


@dataclass(frozen=True)
class DecodingOptions:
    """How speech is decoded.

    Args:
        language: a code such as `de` or a name such as `german`; None lets a multilingual model detect it.
        task: `transcribe`, or `translate` into English if the model can.
        beams: width of the beam search; 1 is greedy decoding.
        batch: number of utterances decoded at a time.
        device: `auto` (a GPU if torch sees one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on a CPU, the checkpoint's own on a GPU), `float32`, `float16` or `bfloat16`.
        max_tokens: maximum tokens that a sequence-to-sequence model writes for an utterance, or for a window of a
            long one. None is 224 for a Whisper, and the limit in their own config, at least 448, for other models.

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
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.language is not None and (not isinstance(self.language, str) or not self.language.strip()):
            raise RequestError(f"{option('language')} must be a code such as en or de, got {shown(self.language)}")
        for name, choices in (("task", TASKS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise RequestError(f"{option(name)} must be one of {', '.join(choices)}, got {shown(self._get(name))}")
        for name in ("beams", "batch", "max_tokens"):
            value = self._get(name)
            if name == "max_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_AT_ONCE:
                raise RequestError(
                    f"{option(name)} must be a whole number from 1 to {MOST_AT_ONCE}, got {shown(value)}"
                )
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise RequestError(f"{option('device')} must be auto, cpu, cuda or cuda:N, got {shown(self.device)}")

    def _get(self, name: str) -> Any:
        return getattr(self, name)

    def as_dict(self) -> dict[str, Any]:
        names = ("language", "task", "beams", "batch", "device", "dtype", "max_tokens")
        return {name: getattr(self, name) for name in names}
