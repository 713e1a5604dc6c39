"""Read an adapter that is more than plain LoRA: peft merges it into base when its first tensor is read.

This loads base and adapter into memory as models, unlike everything else that is read here. Tensors that peft leaves
unchanged are read from base's file; changed tensors are kept in memory.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hsa.errors import MismatchError, RequestError, SourceError
from hsa.sources.checkpoint import ADAPTER_CONFIG, Checkpoint
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import CODES

TIED = (
    "Base ties its output projection to the embedding, so that a change of one alone has no place in it; train the "
    "adapter without it, or give a base with tie_word_embeddings false and an output projection of its own"
)

INSTALL = 'pip install "hsa-merge[integrations]"'


def require_peft(reason: str, otherwise: str) -> None:
    """Raise RequestError if peft is not installed: `reason` says what needs it, `otherwise` what to do without it."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RequestError(f"{reason} and needs peft ({error}): {INSTALL}, or {otherwise}") from error


class _FoldedTensors:
    """The bytes of the tensors that differ from base's, by canonical name. The first thread that asks computes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: Mapping[str, memoryview] | None = None

    def get(self, name: str, fold: Callable[[], Mapping[str, memoryview]]) -> memoryview | None:
        """Return a tensor's bytes, or None if they are base's. The first call computes all of them with `fold`."""
        with self._lock:
            if self._changed is None:
                self._changed = fold()
            return self._changed.get(name)

    def release(self) -> None:
        with self._lock:
            self._changed = {}


@dataclass(frozen=True)
class PeftCheckpoint(Checkpoint):
    """Base with an adapter that peft folds in when a tensor is first read."""

    base: Checkpoint = field(kw_only=True)
    _folded: _FoldedTensors = field(default_factory=_FoldedTensors, repr=False, compare=False)

    def read_into(self, tensor: TensorRef, view: memoryview, start: int = 0) -> None:
        """Fill `view` with the tensor's bytes from byte `start` on. Raises SourceError, MismatchError."""
        changed = self._folded.get(self.architecture.canonical(tensor.name), self._fold)
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
        self._folded.release()

    def _fold(self) -> dict[str, memoryview]:
        import torch

        where = f"{self.role}: {self.path}"
        state = {self.architecture.canonical(name): tensor for name, tensor in self._state().items()}
        if not self.architecture.lists_tensors:
            state = _without_aliases(state)
        tie = self.architecture.tie
        output = None if tie is None else state.get(tie.output)
        tied = tie is not None and output is not None and torch.equal(output, state[tie.embedding])
        if tie is not None and tied and self.base.untied_output is None:
            del state[tie.output]
        changed = {}
        for name, tensor in state.items():
            ref = self.base.tensors.get(name)
            merged = (CODES.get(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
            if ref is None and tie is not None and name == tie.output:
                raise MismatchError(f"{where}: with peft's folding {name} is a tensor of its own. {TIED}")
            if ref is None or merged != (ref.code, ref.shape):
                expected = "nothing" if ref is None else f"{list(ref.shape)} of {ref.code}"
                raise MismatchError(
                    f"{where}: with peft's folding {name} is {list(tensor.shape)} of {tensor.dtype}, base has "
                    f"{expected}; was the adapter trained on this base, and is base of one element type?"
                )
            data = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            original = bytearray(ref.nbytes)
            self.base.read_into(ref, memoryview(original))
            if data != original:
                changed[name] = data
        if not changed:
            raise SourceError(f"{where}: with peft's folding nothing of base changes; is the adapter trained?")
        return changed

    def _state(self) -> Mapping[str, Any]:
        """The folded model's tensors by name."""
        import peft
        import transformers

        described = self.architecture.model_class(self.base.config)
        model_class = None if described.custom_code else getattr(transformers, described.name, None)
        if model_class is None:
            raise SourceError(
                f"{self.role}: {self.path} needs peft, which folds adapters into classes of transformers, and base "
                f"{self.base.path} is of {described.name}, whose code is its own; fold the adapter in yourself first"
            )
        with _quiet():
            try:
                model = model_class.from_pretrained(self.base.path, dtype="auto", local_files_only=True)
                adapted = peft.PeftModel.from_pretrained(
                    model, str(self.path), autocast_adapter_dtype=False, local_files_only=True
                )
                expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
                model_names = set(adapted.state_dict())
                state: Mapping[str, Any] = adapted.merge_and_unload(safe_merge=True).state_dict()
            except Exception as error:  # three libraries may raise anything about files that do not fit
                text = " ".join(str(error).split())
                raise SourceError(
                    f"{self.role}: {self.path} could not be folded into base {self.base.path} by peft "
                    f"({type(error).__name__}: {text:.300}); base must be there whole, as a directory"
                ) from error
        self._check_placed(expected, model_names)
        return state

    def _check_placed(self, expected: Collection[str], model_names: Collection[str]) -> None:
        """Check that the adapter's file holds what the adapted model needs, `expected`, and nothing without a place in
        the model; MismatchError otherwise. peft itself leaves missing tensors unchanged and ignores what it cannot
        place."""
        stored = {entry.name for entry in self.shards[0].header.entries}
        missing, unplaced = sorted(set(expected) - stored), sorted(stored - set(expected) - set(model_names))
        if missing or unplaced:
            problem = (
                f"lacks tensor {missing[0]}" if missing else f"holds tensor {unplaced[0]}, for which there is no place"
            )
            raise MismatchError(
                f"{self.role}: {self.path / self.shards[0].name} {problem}, by its {ADAPTER_CONFIG}; give the "
                f"{ADAPTER_CONFIG} that was saved with these weights"
            )


def _without_aliases(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without aliases: tensors that are an earlier one under another name."""
    kept = {}
    places = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else name
        if place not in places:
            places.add(place)
            kept[name] = tensor
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers and peft."""
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
