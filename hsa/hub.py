"""Hub ids as sources: `org/name`, with an optional `@revision`, becomes a checkpoint that can be opened.

The revision is resolved to a commit first, and every file is that commit's. Small files, and weights that are needed
whole, come through huggingface_hub and its cache. Of weights of which only targets are needed, headers and target
ranges come by range requests into a cache of this package: `HSA_CACHE`, else the directory `hsa` in `HF_HOME`.

Nothing of huggingface_hub is imported before there is a hub id to look up. Its token goes to the Hub alone, and into no
message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from hsa import whisper
from hsa._version import __version__
from hsa.assets import GENERATION_CONFIG, PROCESSOR_FILES
from hsa.checkpoint import (
    CONFIG,
    INDEX,
    PICKLES,
    WEIGHTS,
    Checkpoint,
    Part,
    Role,
    is_hub_id,
    is_plain,
    open_checkpoint,
    weight_map,
)
from hsa.config import Preset
from hsa.errors import HsaError, MachineError, SourceError
from hsa.fetch import GAP, HEADER_GUESS, WASTE, NoRanges, Remote, network_error, passing, retrying
from hsa.fsio import Source, Tally
from hsa.header import MAX_HEADER, Header, read_header
from hsa.opening import open_source
from hsa.partial import Partial, load_record, save_record
from hsa.ranges import Range, coalesce, total

CACHE_VARIABLE = "HSA_CACHE"
REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class HubId:
    """A repository, and the branch, tag or commit asked for; None is the main branch."""

    repo: str
    revision: str | None = None


def parse_id(text: str) -> HubId | None:
    """The hub id that a text has the form of; None for any other text."""
    name, at, revision = text.partition("@")
    if "/" not in name or not is_hub_id(name) or (at and (not REVISION.fullmatch(revision) or ".." in revision)):
        return None
    return HubId(name, revision or None)


def find_id(path: PathLike) -> HubId | None:
    """The hub id that a source means; None for a path. What exists locally is a path, and so is every Path object."""
    return None if not isinstance(path, str) or os.path.lexists(path) else parse_id(path)


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
        untied = any(e.name == whisper.UNTIED_OUTPUT for header in headers.values() for e in header.entries)
        compared = {whisper.UNTIED_OUTPUT, whisper.EMBEDDING} if self.compare and untied else set()
        return lambda name: whisper.canonical(name) in compared

    def target(self, name: str) -> bool:
        projection = whisper.parse(name)
        return projection is not None and whisper.is_target(projection, self.preset)


@dataclass
class _Repo:
    """A repository at a commit. `files` are its names, `weights` the etag and size of weights files as far as known."""

    id: str
    commit: str
    files: frozenset[str]
    offline: bool
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)


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
        self._repos: dict[HubId, _Repo] = {}
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
        with _explained(role, hub_id), self._quiet():
            repo = self._repo(role, hub_id)
            directory, parts = self._place(role, repo, want)
        return open_checkpoint(role, directory, tally, claimed or f"{repo.id}@{repo.commit}", parts)

    # What there is ---------------------------------------------------------------------------------------------

    def _repo(self, role: Role, hub_id: HubId) -> _Repo:
        if hub_id not in self._repos:
            self._repos[hub_id] = self._resolve(role, hub_id)
        return self._repos[hub_id]

    def _resolve(self, role: Role, hub_id: HubId) -> _Repo:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HFValidationError

        if constants.HF_HUB_OFFLINE:
            found = _remembered(hub_id)
            if found is None:
                raise MachineError(
                    f"{role}: {hub_id.repo}@{hub_id.revision or 'main'} is no local directory and not in the cache, "
                    f"and HF_HUB_OFFLINE is set; fetch it once without, or give a directory"
                )
            return found
        known = _remembered(hub_id) if self._unreachable else None
        if known is not None:  # the Hub was asked for another source already, again and again
            return self._from_cache(role, known)
        revision, timeout = hub_id.revision, constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            info = retrying(lambda: HfApi().model_info(hub_id.repo, revision=revision, timeout=timeout))
        except network_error() as error:
            found = _remembered(hub_id) if passing(error) else None
            self._unreachable = passing(error)
            if found is None:
                raise
            return self._from_cache(role, found)
        except ValueError as error:
            if isinstance(error, HFValidationError):
                raise
            raise MachineError(
                f"{role}: {constants.ENDPOINT} does not answer as the Hub does; check HF_ENDPOINT and the network"
            ) from None
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise MachineError(f"{role}: {constants.ENDPOINT} names no commit of {hub_id.repo}; is HF_ENDPOINT right?")
        files = frozenset(entry.rfilename for entry in info.siblings or ())
        with suppress(MachineError):  # a cache that cannot be written to costs the next run's offline mode alone
            save_record(_ref(hub_id), {"commit": info.sha})
            _remember(_Repo(hub_id.repo, info.sha, files, False))
        return _Repo(hub_id.repo, info.sha, files, False)

    def _from_cache(self, role: Role, repo: _Repo) -> _Repo:
        self._say(f"{role}: the Hub cannot be reached; {repo.id} is taken from the cache, at commit {repo.commit}")
        return repo

    def _say(self, note: str) -> None:
        self._notes[note] = None

    def _place(self, role: Role, repo: _Repo, want: Want) -> tuple[Path, Mapping[str, Part]]:
        """The directory with the small files, and the weights files that are not there whole."""
        small = [CONFIG, GENERATION_CONFIG, *(PROCESSOR_FILES if want.assets else ())]
        if CONFIG not in repo.files:
            raise SourceError(
                f"{role}: {repo.id} has no {CONFIG}, which says how many heads and layers there are; is it a model?"
            )
        for name in small:
            if name in repo.files:
                self._small(role, repo, name)
        directory = self._download(role, repo, CONFIG).parent
        weights = self._weights(role, repo)
        if all(_cached(repo, name) for name in weights):
            return directory, {}
        if want.need == "whole" and not want.headers_only:
            for name in weights:
                self._download(role, repo, name)
            return directory, {}
        try:
            return directory, self._ranges(role, repo, weights, want)
        except NoRanges:
            size = sum(self._download(role, repo, name).stat().st_size for name in weights)
            self._say(f"{role}: server without range support: {size} bytes of {repo.id} fetched whole")
            return directory, {}

    def _weights(self, role: Role, repo: _Repo) -> list[str]:
        if WEIGHTS in repo.files:
            return [WEIGHTS]
        if INDEX not in repo.files:
            for name in (PICKLES.weights, PICKLES.index):
                if name in repo.files:
                    raise SourceError(
                        f"{role}: {repo.id} holds pickle weights alone ({name}), which are read from local "
                        f"directories alone; download it (hf download {repo.id}) and give that directory"
                    )
            raise SourceError(f"{role}: {repo.id} holds no weights; looked for {WEIGHTS} and {INDEX}")
        text = self._download(role, repo, INDEX).read_bytes()
        names = sorted(set(weight_map(text, f"{role}: {repo.id} {INDEX}").values()))
        for name in names:
            if not is_plain(name) or name not in repo.files:
                raise SourceError(
                    f"{role}: {repo.id} {INDEX} names the shard {name!r}; expected the plain name of a .safetensors "
                    f"file in the same repository"
                )
        return names

    # Whole files -----------------------------------------------------------------------------------------------

    def _small(self, role: Role, repo: _Repo, name: str) -> None:
        """A small file that may be missing; offline it is left out with a note where no run has fetched it."""
        if repo.offline and name != CONFIG and not _cached(repo, name):
            self._say(f"{role}: {name} of {repo.id} is not in the cache and left out, for the Hub is not asked")
            return
        self._download(role, repo, name)

    def _download(self, role: Role, repo: _Repo, name: str) -> Path:
        """A file's place in the ordinary cache, where it is fetched to if it is not there."""
        from huggingface_hub import hf_hub_download

        cached = _cached(repo, name)
        if cached is not None:
            return cached
        if repo.offline:
            raise _not_here(role, repo, name)
        path = Path(retrying(lambda: hf_hub_download(repo.id, name, revision=repo.commit)))
        self._count(role, repo, path.stat().st_size)
        return path

    def _count(self, role: Role, repo: _Repo, size: int) -> None:
        self.fetched[role] = self.fetched.get(role, 0) + size
        self._totals[role] = f"{repo.id} at commit {repo.commit}"

    # Parts of files --------------------------------------------------------------------------------------------

    def _ranges(self, role: Role, repo: _Repo, weights: list[str], want: Want) -> Mapping[str, Part]:
        known = {name: self._look_up(role, repo, name) for name in weights}
        headers = {name: self._header(role, repo, *known[name]) for name in weights}
        wanted_now = want.names(headers)
        self.pending[role] = 0
        whole = want.need == "whole"
        for name, header in headers.items():
            remote, partial = known[name]
            later = [(0, remote.size)] if whole else _places(header, want.target)
            self.pending[role] += total(coalesce(partial.missing(later), GAP, remote.size // WASTE))
            self._bring(role, repo, remote, partial, _places(header, wanted_now), prefix=False)
        return {name: Part(partial.path, partial.ranges) for name, (_, partial) in known.items()}

    def _header(self, role: Role, repo: _Repo, remote: Remote, partial: Partial) -> Header:
        self._bring(role, repo, remote, partial, [(0, min(8, remote.size))], prefix=True)
        with _opened(partial, role) as source:
            length = int.from_bytes(source.read(8), "little") if remote.size >= 8 else 0
        if 8 + length <= remote.size and length <= MAX_HEADER:
            self._bring(role, repo, remote, partial, [(0, 8 + length)], prefix=True)
        with _opened(partial, role) as source:
            return read_header(source)

    def _bring(
        self, role: Role, repo: _Repo, remote: Remote, partial: Partial, wanted: list[Range], *, prefix: bool
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

    def _look_up(self, role: Role, repo: _Repo, name: str) -> tuple[Remote, Partial]:
        """A weights file on the Hub, and what is here of it; NoRanges where the Hub does not say how large it is."""
        key = (repo.id, repo.commit, name)
        if key not in self._known:
            remote = self._remote(role, repo, name)
            folder = _home(repo.id) / "files" / sha256(remote.etag.encode()).hexdigest()[:32]
            self._known[key] = remote, Partial(folder, name, remote.size, remote.etag)
        return self._known[key]

    def _remote(self, role: Role, repo: _Repo, name: str) -> Remote:
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
            known = {"etag": found.etag, "size": found.size}
            headers = build_hf_headers(library_name="hsa-merge", library_version=__version__)
            if repo.weights.get(name) != known:
                repo.weights[name] = known
                _remember(repo)
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


def _places(header: Header, chosen: Callable[[str], bool]) -> list[Range]:
    begin = len(header.raw)
    return [(begin + entry.start, begin + entry.stop) for entry in header.entries if chosen(entry.name)]


@contextmanager
def _opened(partial: Partial, role: Role) -> Iterator[Source]:
    source = Source(partial.path, role, Tally(), partial.ranges)
    try:
        yield source
    finally:
        source.close()


def _not_here(role: Role, repo: _Repo, what: str) -> MachineError:
    return MachineError(
        f"{role}: {what} of {repo.id} at commit {repo.commit} is not in the cache, and the Hub is not asked "
        f"(offline, or out of reach); run once with the network, without HF_HUB_OFFLINE"
    )


# The caches ----------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Where ranges of weights are kept; it may be removed at any time when no merge runs."""
    from huggingface_hub import constants

    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path(constants.HF_HOME) / "hsa"


def cache_directories() -> tuple[Path, Path]:
    """huggingface_hub's cache of whole files, and this package's of ranges."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE), cache_directory()


def _folder(repo: str) -> str:
    return f"models--{repo.replace('/', '--')}"


def _home(repo: str) -> Path:
    return cache_directory() / _folder(repo)


def _ref(hub_id: HubId) -> Path:
    return _home(hub_id.repo) / "refs" / f"{quote(hub_id.revision or 'main', safe='')}.json"


def _remember(repo: _Repo) -> None:
    """Keep what is known of a commit, for offline runs."""
    path = _home(repo.id) / "commits" / f"{repo.commit}.json"
    known = (load_record(path) or {}).get("weights", {})
    save_record(path, {"files": sorted(repo.files), "weights": {**known, **repo.weights}})


def _remembered(hub_id: HubId) -> _Repo | None:
    """The commit that a revision had last time, here or in huggingface_hub's cache, with what is known of it."""
    from huggingface_hub import constants

    revision = hub_id.revision or "main"
    ordinary = Path(constants.HF_HUB_CACHE) / _folder(hub_id.repo)
    commits = [revision] if _COMMIT.fullmatch(revision) else []
    commits += [record["commit"] for record in [load_record(_ref(hub_id))] if record is not None]
    with suppress(OSError, ValueError):
        commits.append((ordinary / "refs" / revision).read_text(encoding="ascii").strip())
    for commit in commits:
        if not _COMMIT.fullmatch(commit):
            continue
        record = load_record(_home(hub_id.repo) / "commits" / f"{commit}.json") or {"files": [], "weights": {}}
        files = set(record["files"])
        with suppress(OSError):
            files.update(os.listdir(ordinary / "snapshots" / commit))
        if files:
            return _Repo(hub_id.repo, commit, frozenset(files), True, record["weights"])
    return None


def _cached(repo: _Repo, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo.id, name, revision=repo.commit)
    return Path(found) if isinstance(found, str) else None


# What went wrong -----------------------------------------------------------------------------------------------


@contextmanager
def _explained(role: Role, hub_id: HubId) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    try:
        yield
    except HsaError:
        raise
    except Exception as error:
        explained = _explain(error, role, hub_id)
        if explained is None:
            raise
        raise explained from None  # the library's own text may repeat what a server says, and link with signatures


def _explain(error: Exception, role: Role, hub_id: HubId) -> HsaError | None:
    from huggingface_hub import constants, errors

    name = f"{role}: {hub_id.repo}"
    where = f"{constants.ENDPOINT}/{hub_id.repo}"
    response = error.response if isinstance(error, errors.HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if isinstance(error, errors.GatedRepoError):
        return SourceError(f"{name} is gated: accept its terms at {where} and log in (hf auth login), or set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{name} has no revision {hub_id.revision or 'main'!r}; see {where}/commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{name} is no local directory, and {constants.ENDPOINT} shows no such model; check the name, or, where it "
            f"is private, log in with an account that may read it (hf auth login), or set HF_TOKEN"
        )
    if isinstance(error, errors.DisabledRepoError):
        return SourceError(f"{name} was disabled on the Hub; take another model")
    if status in (401, 403):
        return SourceError(
            f"{name}: the Hub refuses access ({status}); log in anew (hf auth login), or set HF_TOKEN to another token"
        )
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        cause = error.__cause__
        reason = f" ({type(cause).__name__})" if cause is not None else ""
        return MachineError(
            f"{name}: a file is not in the cache and {constants.ENDPOINT} cannot be asked{reason}; check the network "
            f"and HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return SourceError(f"{name}: a file that the repository lists is missing on the Hub; see {where}/tree/main")
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{name} is no local directory and no name that the Hub knows; check it")
    if status is not None:
        return MachineError(
            f"{name}: {constants.ENDPOINT} answered {status}; try again later: what was fetched is kept"
        )
    if isinstance(error, network_error()):
        return MachineError(
            f"{name} is no local directory, and {constants.ENDPOINT} cannot be reached ({type(error).__name__}); check "
            f"the network and try again: what was fetched is kept"
        )
    if isinstance(error, OSError):
        return MachineError(f"{name} could not be fetched: {error.strerror or type(error).__name__}; see --debug")
    return None
