"""Hub ids as sources: `org/name`, with an optional `@revision`, becomes a checkpoint that can be opened.

The revision is resolved to a commit first, and every file is that commit's. Small files, and weights that are needed
whole, come through huggingface_hub and its cache. Of weights of which only targets are needed, headers and target
ranges come by range requests into a cache of this package. Pickle weights and adapters come whole.

Nothing of huggingface_hub is imported before there is a hub id to look up. Its token goes to the Hub alone, and into no
message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from hsa._version import __version__
from hsa.architectures import whisper
from hsa.architectures.base import Preset
from hsa.errors import MachineError, SourceError, shown
from hsa.sources.checkpoint import (
    ADAPTER_CONFIG,
    CONFIG,
    PICKLES,
    SAFETENSORS,
    WHOLE_WEIGHTS,
    Checkpoint,
    Format,
    PartialWeights,
    is_shard_name,
    open_checkpoint,
    weight_map,
)
from hsa.sources.hub.errors import map_hub_errors
from hsa.sources.hub.partial_file import Partial
from hsa.sources.hub.range_requests import GAP, HEADER_GUESS, WASTE, NoRanges, Remote, network_error, passing, retrying
from hsa.sources.hub.repository import COMMIT, HubId, Repo, cached, find_id, home, remember, remembered
from hsa.sources.lora import WEIGHTS as ADAPTER_WEIGHTS
from hsa.sources.lora import is_adapter, open_adapter
from hsa.sources.open import open_source
from hsa.sources.roles import Role
from hsa.sources.safetensors import MAX_HEADER, Header, read_header
from hsa.sources.small_file_checks import GENERATION_CONFIG
from hsa.sources.small_files import PROCESSOR_FILES
from hsa.sources.source_folder import newest_training_checkpoint
from hsa.system.fsio import SourceFile, Tally
from hsa.system.ranges import Range, coalesce, total
from hsa.system.types import PathLike

MAX_FILE = 1 << 43
"""Bytes of a weights file that a server may claim: 8 TiB, a thousand times what any speech model has."""


@dataclass(frozen=True)
class Want:
    """What is needed of a source's weights: all, or the headers and the targets of a preset.

    `headers_only`: nothing but the headers now; what else a merge would fetch is counted. `compare`: the tensors too
    that reference numerics compare to plan. `assets`: the tokenizer and processor files as well.
    """

    need: Literal["whole", "targets"]
    preset: Preset
    assets: bool = False
    headers_only: bool = False
    compare: bool = False

    def names(self, headers: Mapping[str, Header]) -> Callable[[str], bool]:
        """Which tensors to fetch now, given the headers of all weights files."""
        if not self.headers_only:
            return self.target
        untied = any(
            whisper.canonical(e.name) == whisper.UNTIED_OUTPUT for header in headers.values() for e in header.entries
        )
        compared = {whisper.UNTIED_OUTPUT, whisper.EMBEDDING} if self.compare and untied else set()
        return lambda name: whisper.canonical(name) in compared

    def target(self, name: str) -> bool:
        projection = whisper.parse(name)
        return projection is not None and whisper.is_target(projection, self.preset)


class Hub:
    """One run's dealings with the Hub: what it looked up is asked for once.

    `fetched` counts bytes received by role, `pending` those that a merge would still fetch; `notes` is what the user
    should know. `bars` shows huggingface_hub's progress bars on a terminal.
    """

    def __init__(self, *, bars: bool = False) -> None:
        self.fetched: dict[str, int] = {}
        self.pending: dict[str, int] = {}
        self._bars = bars
        self._notes: dict[str, None] = {}
        self._unreachable = False
        self._totals: dict[str, str] = {}
        self._repos: dict[HubId, Repo] = {}
        self._known: dict[tuple[str, str, str], tuple[Remote, Partial]] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        counted = [f"{role}: {self.fetched[role]} bytes were fetched of {what}" for role, what in self._totals.items()]
        return (*self._notes, *counted)

    def open(
        self,
        role: Role,
        path: PathLike,
        tally: Tally,
        want: Want,
        claimed: str | None = None,
        base: Checkpoint | None = None,
    ) -> Checkpoint:
        """Open a source, local or on the Hub, of which `want` says what is needed; `base` is what an adapter stands on.

        Raises what `open_checkpoint` does; for a hub id also SourceError (no such repository, revision or file, no
        access) and MachineError (the Hub cannot be reached, the disk is full).
        """
        hub_id = find_id(path)
        if hub_id is None:
            return open_source(role, path, tally, claimed, base)
        with map_hub_errors(role, hub_id), self._quiet():
            repo = self._repo(role, hub_id)
            claimed = claimed or f"{repo.id}@{repo.commit}"
            if repo.is_adapter:
                directory = self._adapter(role, repo, want)
            else:
                directory, parts = self._place(role, repo, want)
        if repo.is_adapter:
            return open_adapter(role, directory, tally, base, claimed)
        return open_checkpoint(role, directory, tally, claimed, parts, repo.files)

    def is_adapter(self, role: Role, path: PathLike) -> bool:
        """Whether a source, local or on the Hub, is an adapter on base. Raises what `open` does for a hub id."""
        hub_id = find_id(path)
        if hub_id is None:
            return bool(os.fspath(path)) and is_adapter(path)
        with map_hub_errors(role, hub_id), self._quiet():
            return self._repo(role, hub_id).is_adapter

    # What there is ---------------------------------------------------------------------------------------------

    def _repo(self, role: Role, hub_id: HubId) -> Repo:
        if hub_id not in self._repos:
            self._repos[hub_id] = self._resolve(role, hub_id)
        return self._repos[hub_id]

    def _resolve(self, role: Role, hub_id: HubId) -> Repo:
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            found = remembered(hub_id)
            if found is None:
                raise MachineError(
                    f"{role}: {hub_id.repo}@{hub_id.revision or 'main'} is no local directory and not in the cache, "
                    f"and HF_HUB_OFFLINE is set; fetch it once without, or give a directory"
                )
            return found
        known = remembered(hub_id) if self._unreachable else None
        if known is not None:  # the Hub was asked for another source already, again and again
            return self._from_cache(role, known)
        revision, timeout = hub_id.revision, constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            info = retrying(lambda: HfApi().model_info(hub_id.repo, revision=revision, timeout=timeout))
        except network_error() as error:
            found = remembered(hub_id) if passing(error) else None
            self._unreachable = passing(error)
            if found is None:
                raise
            return self._from_cache(role, found)
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            raise MachineError(f"{role}: {constants.ENDPOINT} names no commit of {hub_id.repo}; is HF_ENDPOINT right?")
        names = [entry.rfilename for entry in info.siblings or ()]
        if not names or not all(isinstance(name, str) for name in names):
            raise MachineError(f"{role}: {constants.ENDPOINT} lists no files of {hub_id.repo}; is HF_ENDPOINT right?")
        repo = Repo(hub_id.repo, info.sha, frozenset(names), offline=False)
        _try_to_remember(repo, hub_id)
        return repo

    def _from_cache(self, role: Role, repo: Repo) -> Repo:
        self._say(f"{role}: the Hub cannot be reached; {repo.id} is taken from the cache, at commit {repo.commit}")
        return repo

    def _say(self, note: str) -> None:
        self._notes[note] = None

    def _adapter(self, role: Role, repo: Repo, want: Want) -> Path:
        """The directory with an adapter's files, which are small beside base's."""
        weights = [name for name in ADAPTER_WEIGHTS if name in repo.files][:1]
        self._small(role, repo, PROCESSOR_FILES if want.assets else ())
        for name in (ADAPTER_CONFIG, *weights):
            directory = self._download(role, repo, name).parent
        return directory

    def _place(self, role: Role, repo: Repo, want: Want) -> tuple[Path, Mapping[str, PartialWeights]]:
        """The directory with the small files, and the weights files that are not there whole."""
        if CONFIG not in repo.files:
            if not repo.complete:
                raise _not_here(role, repo, CONFIG)
            raise SourceError(
                f"{role}: {repo.id} has no {CONFIG}, which says how many heads and layers there are; is it a model?"
            )
        self._small(role, repo, (GENERATION_CONFIG, *(PROCESSOR_FILES if want.assets else ())))
        directory = self._download(role, repo, CONFIG).parent
        form, weights = self._weights(role, repo)
        if all(cached(repo, name) for name in weights):
            return directory, {}
        reason = "pickle weights"
        if form is SAFETENSORS:
            if want.need == "whole" and not want.headers_only:
                for name in weights:
                    self._download(role, repo, name)
                return directory, {}
            try:
                return directory, self._ranges(role, repo, weights, want)
            except NoRanges:
                reason = "server without range support"
        size = sum(self._download(role, repo, name).stat().st_size for name in weights)
        self._say(f"{role}: {reason}: {size} bytes of {repo.id} fetched whole")
        return directory, {}

    def _weights(self, role: Role, repo: Repo) -> tuple[Format, list[str]]:
        """How a repository stores its weights, and the files that hold them: safetensors wherever there are any."""
        for form in (SAFETENSORS, PICKLES):
            if form.weights in repo.files:
                return form, [form.weights]
            if form.index in repo.files:
                return form, self._shards(role, repo, form)
        if not repo.complete:
            raise _not_here(role, repo, "the weights")
        wanted = (*WHOLE_WEIGHTS, ADAPTER_CONFIG)
        newest = newest_training_checkpoint(repo.files, wanted)
        if newest is not None:
            raise SourceError(
                f"{role}: {repo.id} holds no weights, but training checkpoints, of which the newest is {newest}; "
                f"download it (hf download {repo.id} --include '{newest}/*') and give its directory"
            )
        raise SourceError(f"{role}: {repo.id} holds no weights; looked for {', '.join(wanted)}")

    def _shards(self, role: Role, repo: Repo, form: Format) -> list[str]:
        text = self._download(role, repo, form.index).read_bytes()
        names = sorted(set(weight_map(text, f"{role}: {repo.id} {form.index}").values()))
        for name in names:
            if not is_shard_name(name, form.suffix) or name not in repo.files:
                raise SourceError(
                    f"{role}: {repo.id} {form.index} names the shard {shown(name)}; expected the plain name of a "
                    f"{form.suffix} file in the same repository"
                )
        return names

    # Whole files -----------------------------------------------------------------------------------------------

    def _small(self, role: Role, repo: Repo, names: Iterable[str]) -> None:
        """Small files that may be missing; offline they are left out with a note where no run has fetched them."""
        held = [name for name in names if name in repo.files]
        absent = [name for name in held if repo.offline and not cached(repo, name)]
        if absent:
            are = "is" if len(absent) == 1 else "are"
            self._say(
                f"{role}: {', '.join(absent)} of {repo.id} {are} not in the cache and left out, for the Hub is not "
                f"asked"
            )
        for name in held:
            if name not in absent:
                self._download(role, repo, name)

    def _download(self, role: Role, repo: Repo, name: str) -> Path:
        """A file's place in the ordinary cache, where it is fetched to if it is not there."""
        from huggingface_hub import hf_hub_download

        there = cached(repo, name)
        if there is not None:
            return there
        if repo.offline:
            raise _not_here(role, repo, name)
        path = Path(retrying(lambda: hf_hub_download(repo.id, name, revision=repo.commit)))
        self._count(role, repo, path.stat().st_size)
        return path

    def _count(self, role: Role, repo: Repo, size: int) -> None:
        self.fetched[role] = self.fetched.get(role, 0) + size
        self._totals[role] = f"{repo.id} at commit {repo.commit}"

    # Parts of files --------------------------------------------------------------------------------------------

    def _ranges(self, role: Role, repo: Repo, weights: list[str], want: Want) -> Mapping[str, PartialWeights]:
        known = {name: self._look_up(role, repo, name) for name in weights}
        headers = {name: self._header(role, repo, *known[name]) for name in weights}
        plain = whisper.plain_names(entry.name for header in headers.values() for entry in header.entries)
        wanted_now = want.names(headers)
        self.pending[role] = 0
        whole = want.need == "whole"
        for name, header in headers.items():
            remote, partial = known[name]
            later = [(0, remote.size)] if whole else _places(header, plain, want.target)
            self.pending[role] += total(coalesce(partial.missing(later), GAP, remote.size // WASTE))
            self._bring(role, repo, remote, partial, _places(header, plain, wanted_now), prefix=False)
        return {name: PartialWeights(partial.path, partial.ranges) for name, (_, partial) in known.items()}

    def _header(self, role: Role, repo: Repo, remote: Remote, partial: Partial) -> Header:
        self._bring(role, repo, remote, partial, [(0, min(8, remote.size))], prefix=True)
        with _opened(partial, role) as source:
            length = int.from_bytes(source.read(8), "little") if remote.size >= 8 else 0
        if 8 + length <= remote.size and length <= MAX_HEADER:
            self._bring(role, repo, remote, partial, [(0, 8 + length)], prefix=True)
        with _opened(partial, role) as source:
            return read_header(source)

    def _bring(
        self, role: Role, repo: Repo, remote: Remote, partial: Partial, wanted: list[Range], *, prefix: bool
    ) -> None:
        """See to it that the ranges are here."""
        if not partial.missing(wanted):
            return
        if repo.offline:
            raise _not_here(role, repo, f"{total(partial.missing(wanted))} bytes of {partial.path.stem}")
        if prefix and not partial.ranges:
            wanted = [*wanted, (0, min(HEADER_GUESS, remote.size))]
        with partial.writing(), self._bar(partial, wanted) as advance:

            def got(count: int) -> None:
                self._count(role, repo, count)
                advance(count)

            remote.fetch(partial, wanted, got, prefix=prefix)

    def _look_up(self, role: Role, repo: Repo, name: str) -> tuple[Remote, Partial]:
        """A weights file on the Hub, and what is here of it; NoRanges where the Hub does not say how large it is."""
        key = (repo.id, repo.commit, name)
        if key not in self._known:
            remote = self._remote(role, repo, name)
            folder = home(repo.id) / "files" / sha256(remote.etag.encode()).hexdigest()[:32]
            self._known[key] = remote, Partial(folder, name, remote.size, remote.etag)
        return self._known[key]

    def _remote(self, role: Role, repo: Repo, name: str) -> Remote:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        url = hf_hub_url(repo.id, name, revision=repo.commit)
        headers: Mapping[str, str] = {}
        if repo.offline:
            known = repo.weights.get(name)
            if known is None:
                raise _not_here(role, repo, name)
        else:
            found = retrying(lambda: get_hf_file_metadata(url, timeout=timeout))
            if found.etag is None or found.size is None:
                raise NoRanges
            if not 0 <= found.size <= MAX_FILE:
                raise MachineError(
                    f"{role}: {constants.ENDPOINT} says that {name} of {repo.id} has {shown(found.size)} bytes; at "
                    f"most {MAX_FILE} are fetched"
                )
            known = {"etag": found.etag, "size": found.size}
            headers = build_hf_headers(library_name="hsa-merge", library_version=__version__)
            if repo.weights.get(name) != known:
                repo.weights[name] = known
                _try_to_remember(repo)
        return Remote(f"{role}: {repo.id} {name}", url, known["etag"], known["size"], headers, timeout)

    # On the terminal -------------------------------------------------------------------------------------------

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without huggingface_hub's progress bars, unless they are wanted."""
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        if self._bars or are_progress_bars_disabled():
            yield
            return
        disable_progress_bars()
        try:
            yield
        finally:
            enable_progress_bars()

    @contextmanager
    def _bar(self, partial: Partial, wanted: list[Range]) -> Iterator[Callable[[int], Any]]:
        from huggingface_hub.utils import tqdm

        missing = total(partial.missing(wanted))
        hidden = None if self._bars else True
        with tqdm(total=missing, unit="B", unit_scale=True, desc=partial.path.stem, disable=hidden) as bar:
            yield bar.update


def _try_to_remember(repo: Repo, asked: HubId | None = None) -> None:
    """Keep what is known of a repository for runs without the Hub; a cache on a read-only disk goes without."""
    with suppress(MachineError):
        remember(repo, asked)


def _places(header: Header, plain: Mapping[str, str], chosen: Callable[[str], bool]) -> list[Range]:
    """Where the tensors lie whose `plain` names are chosen."""
    begin = len(header.raw)
    return [(begin + entry.start, begin + entry.stop) for entry in header.entries if chosen(plain[entry.name])]


@contextmanager
def _opened(partial: Partial, role: Role) -> Iterator[SourceFile]:
    source = SourceFile(partial.path, role, Tally(), partial.ranges)
    try:
        yield source
    finally:
        source.close()


def _not_here(role: Role, repo: Repo, what: str) -> MachineError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why, remedy = "HF_HUB_OFFLINE is set", "run once with the network and without HF_HUB_OFFLINE"
    else:
        why, remedy = "the Hub cannot be reached", "run once with the network"
    return MachineError(
        f"{role}: the cache lacks {what} of {repo.id} at commit {repo.commit}, and {why}; {remedy}, or give a directory"
    )
