"""The data that a process needs to score the candidates of a search: values from which it loads an evaluator.

Worker processes and actors on other machines get one of these, and load sources, model and features themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsa.errors import SourceError
from hsa.evaluation.decoding import chosen_device, load_recognizer
from hsa.evaluation.model_kinds import kind_of
from hsa.evaluation.models import OpenWeights, open_weights, small_files
from hsa.evaluation.normalizers import normalizer
from hsa.evaluation.prepared import AudioDigests, PreparedSet, prepare
from hsa.evaluation.utterance import DataSet
from hsa.searches.dev_sets import DevSets, make_dev_sets
from hsa.searches.evaluators import OwnEvaluator, SpeechEvaluator
from hsa.searches.objectives import Objective
from hsa.searches.options import SearchOptions
from hsa.searches.own_models import load_any_model
from hsa.searches.resident_model import ANCHOR, ResidentModel
from hsa.searches.sources import SearchSources
from hsa.searches.space import MethodSpace
from hsa.sources.checkpoint import read_config
from hsa.sources.hub.client import Hub
from hsa.sources.hub.repository import find_id
from hsa.system.digests import digest_of
from hsa.system.fsio import Tally


@dataclass(frozen=True)
class Files:
    """The sources of a search on this machine, by their numbers: directories, and digests of weights and small files.
    `dtype` names the dtypes of the anchor, the source whose files the output gets."""

    folders: Mapping[int, Path]
    digests: Mapping[int, str]
    dtype: str

    @property
    def anchor(self) -> Path:
        return self.folders[ANCHOR]

    def anchor_files(self) -> str:
        """BLAKE3 of the anchor's small files and of the dtypes of its weights. Besides weights and options, these
        determine how candidates are decoded."""
        found = small_files(self.anchor, read_config("model", self.anchor, Tally()))
        entries = [f"{name} {digest_of(data)}" for name, data in sorted(found.items())]
        return digest_of("\n".join([self.dtype, *entries]).encode("utf-8", "surrogatepass"))

    def located(self, sources: SearchSources) -> Files:
        """The same files on another machine. SourceError if a source has other weights or small files there."""
        found = open_files(sources)
        for number in sources.numbers:
            if found.digests[number] != self.digests[number]:
                raise SourceError(
                    f"{sources.path(number)} on this machine differs from the one that the search began with; every "
                    f"machine must see the same files"
                )
        return found


def open_files(sources: SearchSources, *, transcribing: bool = False) -> Files:
    """Fetch all sources and read them once.

    Raises SourceError if transformers cannot load one, or, with `transcribing`, if one cannot transcribe.
    """
    hub = Hub()
    opened = {number: _open(sources.path(number), hub, transcribing=transcribing) for number in sources.numbers}
    return Files(
        {number: each.folder for number, each in opened.items()},
        {number: each.digest for number, each in opened.items()},
        opened[ANCHOR].dtype,
    )


def _open(path: str, hub: Hub, *, transcribing: bool) -> OpenWeights:
    place = path if find_id(path) else Path(path).expanduser()
    if transcribing and isinstance(place, Path) and place.is_dir():
        kind_of(place)  # a model that cannot transcribe fails before its weights are read
    weights = open_weights(place, path, hub)
    if transcribing:
        kind_of(weights.folder)
    return weights


@dataclass(frozen=True)
class SpeechSetup:
    """A search by word errors. `prepared` are the dev sets, `tested` the test sets; `located` also checks their audio.

    Example:
        >>> evaluator = setup.open()  # doctest: +SKIP
        >>> evaluator.evaluate(Candidate("ties defaults", "default", "ties"), None).errors  # doctest: +SKIP
        (0, 2, 1)
    """

    sources: SearchSources
    spaces: Mapping[str, MethodSpace]
    options: SearchOptions
    objective: Objective
    files: Files
    prepared: tuple[PreparedSet, ...]
    tested: tuple[PreparedSet, ...] = ()

    def dev_sets(self) -> DevSets:
        """The utterances in the order of decoding, with the function that normalises texts."""
        return make_dev_sets(self.prepared, self.normalizer(), self.options.decoding.batch, self.options.seed)

    def normalizer(self) -> Callable[[str], str]:
        """The function that normalises references and transcripts."""
        decoding = self.options.decoding
        language = "en" if decoding.task == "translate" else decoding.language
        return normalizer(self.options.normalizer, language=language, model=self.files.anchor)

    def open(self) -> SpeechEvaluator:
        recognizer = load_recognizer(self.files.anchor, self.options.decoding)
        resident = ResidentModel(recognizer.model, self.sources, self.spaces, self.options.threads)
        device = chosen_device(self.options.decoding.device)
        return SpeechEvaluator(resident, recognizer, self.dev_sets(), self.objective, device)

    def located(self) -> SpeechSetup:
        digests = AudioDigests()
        for each in (*self.prepared, *self.tested):
            again = prepare(DataSet(each.name, each.path, each.utterances, ()), None, digests)
            if again.digest != each.digest:
                raise SourceError(
                    f"the audio of {each.path} on this machine differs from the one that the search began with; every "
                    f"machine must see the same files"
                )
        return replace(self, files=self.files.located(self.sources))


@dataclass(frozen=True)
class OwnSetup:
    """A search by the caller's own function, which gets the loaded model."""

    sources: SearchSources
    spaces: Mapping[str, MethodSpace]
    options: SearchOptions
    files: Files
    score: Callable[[Any], float]

    def open(self) -> OwnEvaluator:
        device = chosen_device(self.options.decoding.device)
        model = load_any_model(self.files.anchor, device, self.options.decoding.dtype)
        resident = ResidentModel(model, self.sources, self.spaces, self.options.threads)
        return OwnEvaluator(resident, self.score, device)

    def located(self) -> OwnSetup:
        return replace(self, files=self.files.located(self.sources))


Setup = SpeechSetup | OwnSetup
"""`open` loads the evaluator, and `located` checks the files of another machine first."""


def for_worker(setup: Setup, threads: int, device: str) -> Setup:
    """The setup of one worker: its device, and its merging threads unless the caller set them."""
    options = setup.options
    decoding = replace(options.decoding, device=device)
    return replace(setup, options=replace(options, threads=options.threads or threads, decoding=decoding))


def use_threads(count: int) -> None:
    """Set the number of threads that torch uses in this process."""
    import torch

    torch.set_num_threads(count)
