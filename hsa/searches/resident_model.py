"""One loaded model that gets the weights of each candidate in turn, from sources that stay in memory. Nothing is
written to disk.

A merge is computed into tensors of the output's dtypes, as `hsa.merge` writes them, and copied from there. The model
therefore decodes with the same rounded values as the written checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from blake3 import blake3

from hsa.actions.merger.loaded_models import LoadedTensor, entries_of, without_tied_output
from hsa.actions.merger.merger import Merger
from hsa.actions.merger.shared_tensors import SharedTensors
from hsa.backends.resident import CODE_OF, bytes_of
from hsa.errors import HsaWarning, MismatchError, SourceError, shown
from hsa.methods.base import BASE
from hsa.methods.registry import method_named
from hsa.methods.settings import declared
from hsa.searches.candidates import Candidate
from hsa.searches.sources import SearchSources
from hsa.searches.space import MethodSpace, is_planned
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.hub.client import Hub
from hsa.sources.hub.needs import Needs
from hsa.system.digests import digest_of
from hsa.system.dtypes import NAMES, Array
from hsa.system.fsio import Tally

RENAMED = (
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
    ("LayerNorm.weight", "LayerNorm.gamma"),
    ("LayerNorm.bias", "LayerNorm.beta"),
)
"""Name parts in loaded models and in checkpoints, which transformers converts when it loads and saves. Source:
transformers, conversion_mapping.py, "legacy"."""

ANCHOR = 0
"""The number of the source that determines names, config and dtypes of the output."""


@dataclass(frozen=True)
class Weights:
    """Digests of the weights in a model: of all its tensors, and of those of its encoder."""

    whole: str
    encoder: str


@dataclass
class _Source:
    """A source in memory: the metadata of its tensors, and their bytes by canonical name."""

    checkpoint: Checkpoint
    data: Mapping[str, Array]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that shares the bytes and must not be modified."""
        ref = self.checkpoint.tensors[name]
        return torch.from_numpy(self.data[name]).view(getattr(torch, NAMES[ref.code])).reshape(ref.shape)


class _Staging:
    """A merge in the output's dtypes, by the anchor's names. Tensors that no merge writes are the anchor's."""

    def __init__(self, anchor: _Source, dtype: str) -> None:
        self._anchor = anchor
        self.stored = {name: anchor.checkpoint.tensors[name].name for name in anchor.data}
        self.tensors: dict[str, torch.Tensor] = {}
        for name, stored in self.stored.items():
            tensor = anchor.tensor(name)
            self.tensors[stored] = (tensor if dtype == "auto" else tensor.to(getattr(torch, dtype))).clone()
        self._written: frozenset[str] = frozenset()

    def merge(self, merger: Merger, settings: Mapping[str, Any]) -> None:
        """Compute a merge with these settings. Raises the errors of `apply_`. The tensors then have the anchor's
        values, or an earlier merge's."""
        targets = frozenset(task.name for task in merger.targets)
        for name in self._written - targets:
            self.tensors[self.stored[name]].copy_(self._anchor.tensor(name))
        self._written = self._written & targets | targets
        merger.apply_(self.tensors, **settings)


class ResidentModel:
    """A loaded model of transformers, the sources of a search, and a `Merger` for each method, all in memory.

    Args:
        model: the model to write into, loaded from the anchor.
        sources: base and the fine-tunes.
        spaces: the search space of each method; plain merges of other methods can be put too.
        threads: worker threads of the merging, None for the usable cores and one more.

        Raises the errors of `hsa.Merger`, and SourceError if the model has tensors that no source has.

    Example:
        >>> resident = ResidentModel(recognizer.model, sources, {"ties": space}, None)  # doctest: +SKIP
        >>> resident.put(Candidate("trial 1", "sampled", "ties", {"density": 0.4}))  # doctest: +SKIP
    """

    def __init__(
        self, model: Any, sources: SearchSources, spaces: Mapping[str, MethodSpace], threads: int | None
    ) -> None:
        self.model = model
        self._given, self._spaces, self._threads = sources, spaces, threads
        self._shared = SharedTensors()
        self._sources = dict(zip(sources.numbers, self._read(), strict=True))
        self._anchor = self._sources[ANCHOR]
        family = self._anchor.checkpoint.architecture
        entries = entries_of("model", model, family)
        self._places = places_of(entries, without_tied_output(entries, family), self._anchor.data)
        encoder = _encoder_tensors(model)
        self._encoder = frozenset(name for name, tensor in self._places.items() if id(tensor) in encoder)
        self._stagings: dict[str, _Staging] = {}
        self._mergers: dict[str, Merger] = {}
        self._digests: dict[int, dict[str, str]] = {}
        self._held: dict[str, str] = {}
        for method in spaces:
            self.merger(method)  # raises before anything is scored if a method cannot merge them

    def merger(self, method: str) -> Merger:
        """The Merger of a method, with the settings that its space fixes."""
        if method not in self._mergers:
            space = self._spaces.get(method)
            planned = {} if space is None else space.planned
            arguments = {**self._given.arguments(method), **planned, "backend": "cpu", "threads": self._threads}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", HsaWarning)
                self._mergers[method] = Merger.sharing(self._shared, method=method, **arguments)
        return self._mergers[method]

    def layers_of(self, method: str) -> dict[str, int]:
        """The layer of each target of a method that belongs to a layer, by canonical name."""
        found = {}
        for task in self.merger(method).targets:
            if task.place is not None:
                found[task.name] = task.place.layer
            elif task.span is not None:
                found[task.name] = task.span.layer
        return found

    def put(self, candidate: Candidate) -> Weights:
        """Put a candidate into the model. Raises RequestError, MismatchError or NonFiniteError if that is
        impossible."""
        if candidate.method is None:
            assert candidate.source is not None
            return self._write(*self._source(candidate.source))
        merger = self.merger(candidate.method)
        known = {each.name: each for each in declared(method_named(candidate.method).Settings)}
        settings = {name: value for name, value in candidate.settings.items() if not is_planned(known[name])}
        staging = self._staging(str(candidate.settings.get("dtype", "auto")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HsaWarning)  # reported when the merge is written
            staging.merge(merger, settings)
        tensors = {name: staging.tensors[stored] for name, stored in staging.stored.items()}
        return self._write(tensors, {name: _digest(tensor) for name, tensor in tensors.items()})

    def _staging(self, dtype: str) -> _Staging:
        if dtype not in self._stagings:
            self._stagings[dtype] = _Staging(self._anchor, dtype)
        return self._stagings[dtype]

    def _source(self, number: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of an unmerged source, and their digests."""
        source = self._sources[number]
        for name in self._places:
            shape = None if name not in source.data else source.checkpoint.tensors[name].shape
            if shape != self._anchor.checkpoint.tensors[name].shape:
                raise MismatchError(
                    f"{self._given.name_of(number)} has {'no tensor' if shape is None else f'shape {list(shape)} of'} "
                    f"{name}, expected {list(self._anchor.checkpoint.tensors[name].shape)} as in "
                    f"{self._given.name_of(ANCHOR)}; it cannot be scored beside its merges"
                )
        tensors = {name: source.tensor(name) for name in self._anchor.data if name in source.data}
        if number not in self._digests:
            self._digests[number] = {name: _digest(tensor) for name, tensor in tensors.items()}
        return tensors, self._digests[number]

    def _write(self, tensors: Mapping[str, torch.Tensor], digests: Mapping[str, str]) -> Weights:
        """Copy the tensors that differ from those in the model."""
        with torch.inference_mode():
            for name, place in self._places.items():
                if self._held.get(name) != digests[name]:
                    self._held.pop(name, None)
                    place.copy_(tensors[name])
                    self._held[name] = digests[name]
        return Weights(_digest_of_names(digests, digests), _digest_of_names(self._encoder, digests))

    def _read(self) -> list[_Source]:
        """Read all sources completely."""
        hub, found = Hub(), []
        with ExitStack() as stack:
            for number in self._given.numbers:
                role = BASE if number < 0 else f"model{number + 1}"
                path = self._given.path(number)
                checkpoint = stack.enter_context(hub.open(role, path, Tally(), Needs("whole", None)))
                data = self._shared.read_all(checkpoint)
                checkpoint.check_unchanged()
                found.append(_Source(replace(checkpoint, shards=()), data))
        return found


def places_of(
    entries: Sequence[LoadedTensor], distinct: Sequence[LoadedTensor], stored: Collection[str]
) -> dict[str, torch.Tensor]:
    """The tensors of a loaded model by the names of a checkpoint's tensors. `distinct` are the entries without those
    that are a second name of another entry.

    transformers loads some tensors under other names than checkpoints have. SourceError for a numeric tensor without a
    known name in a checkpoint: it would keep the values of the loaded model.
    """
    places, found = {}, set()
    for entry in entries:
        if entry.name in stored:
            found.add(id(entry.tensor))
    for entry in distinct:
        names = (entry.name, *(entry.name.replace(new, old) for new, old in RENAMED if new in entry.name))
        name = next((name for name in names if name in stored), None)
        if name is not None:
            places[name] = entry.tensor
        elif id(entry.tensor) not in found and getattr(entry.tensor, "dtype", None) in CODE_OF:
            raise SourceError(
                f"the model has a tensor {shown(entry.stored)} that no source has under this name, so that a search "
                f"could not write it; load it with transformers, save it, and give the saved checkpoint"
            )
    return places


def _encoder_tensors(model: Any) -> frozenset[int]:
    """The identities of an encoder's tensors; empty if the model is not an encoder-decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return frozenset()
    encoder = model.get_encoder()
    return frozenset(id(tensor) for tensor in (*encoder.parameters(), *encoder.buffers()))


def _digest(tensor: torch.Tensor) -> str:
    """BLAKE3 of a tensor's dtype and bytes."""
    return f"{tensor.dtype}:{digest_of(bytes_of(tensor.contiguous()))}"


def _digest_of_names(names: Iterable[str], digests: Mapping[str, str]) -> str:
    digest = blake3()
    for name in sorted(names):
        digest.update(f"{name} {digests[name]}\n".encode())
    return digest.hexdigest()
