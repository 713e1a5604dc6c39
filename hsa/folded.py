"""An adapter that is more than plain LoRA, on top of base: peft folds it in, when the first of its tensors is read.

That takes base and adapter as models in memory, unlike everything else that is read here. What peft leaves as it is
comes from base's file; what it changes is kept.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hsa import whisper
from hsa.checkpoint import Checkpoint, TensorRef
from hsa.dtypes import CODES
from hsa.errors import MismatchError, RequestError, SourceError

INSTALL = 'pip install "hsa-merge[integrations]"'


def require_peft(reason: str, otherwise: str) -> None:
    """Raises RequestError where peft is not installed: `reason` says what needs it, `otherwise` what to do without."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RequestError(f"{reason} and needs peft ({error}): {INSTALL}, or {otherwise}") from error


@dataclass
class Folded(Checkpoint):
    """Base with an adapter that peft folded in; `_changed` holds the bytes of the tensors that differ from base's."""

    base: Checkpoint = field(kw_only=True)
    _changed: Mapping[str, memoryview] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read_into(self, tensor: TensorRef, view: memoryview, start: int = 0) -> None:
        """Fill `view` with the tensor's bytes from byte `start` on. Raises SourceError, MismatchError."""
        with self._lock:
            if self._changed is None:
                self._changed = self._fold()
        changed = self._changed.get(whisper.canonical(tensor.name))
        if changed is None:
            self.base.read_into(tensor, view, start)
        else:
            view[:] = changed[start : start + len(view)]

    def check_unchanged(self) -> None:
        super().check_unchanged()
        self.base.check_unchanged()

    def file_of(self, tensor: TensorRef) -> str:
        return f"{self.role} {self.path / self.shards[0].name if self.shards else self.path}"

    def close(self) -> None:
        super().close()
        self._changed = {}

    def _fold(self) -> dict[str, memoryview]:
        import torch

        where = f"{self.role}: {self.path}"
        state = {whisper.canonical(name): tensor for name, tensor in self._state().items()}
        output = state.get(whisper.UNTIED_OUTPUT)
        tied = output is not None and torch.equal(output, state[whisper.EMBEDDING])
        if tied and whisper.UNTIED_OUTPUT not in self.base.tensors:
            del state[whisper.UNTIED_OUTPUT]
        changed = {}
        for name, tensor in state.items():
            ref = self.base.tensors.get(name)
            found = (CODES.get(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
            if ref is None or found != (ref.code, ref.shape):
                expected = "nothing" if ref is None else f"{list(ref.shape)} of {ref.code}"
                raise MismatchError(
                    f"{where}: with peft's folding {name} is {list(tensor.shape)} of {tensor.dtype}, base has "
                    f"{expected}; was the adapter trained on this base, and is base of one element type?"
                )
            data = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            before = bytearray(ref.nbytes)
            self.base.read_into(ref, memoryview(before))
            if data != before:
                changed[name] = data
        if not changed:
            raise SourceError(f"{where}: with peft's folding nothing of base changes; is the adapter trained?")
        return changed

    def _state(self) -> Mapping[str, Any]:
        """The folded model's tensors by name."""
        import peft
        from transformers import WhisperForConditionalGeneration

        with _quiet():
            try:
                model = WhisperForConditionalGeneration.from_pretrained(
                    self.base.path, dtype="auto", local_files_only=True
                )
                adapted = peft.PeftModel.from_pretrained(
                    model, str(self.path), autocast_adapter_dtype=False, local_files_only=True
                )
                state: Mapping[str, Any] = adapted.merge_and_unload(safe_merge=True).state_dict()
            except Exception as error:  # whatever three libraries raise about files that do not fit
                text = " ".join(str(error).split())
                raise SourceError(
                    f"{self.role}: {self.path} could not be folded into base {self.base.path} by peft "
                    f"({type(error).__name__}: {text:.300}); base must be there whole, as a directory"
                ) from error
        return state


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and warnings of transformers and peft."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
