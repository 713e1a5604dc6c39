"""Fetch headers and tensors of weights files by range requests, into a cache of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from hsa._version import __version__
from hsa.architectures.base import Architecture
from hsa.errors import MachineError, shown
from hsa.sources.checkpoint import PartialWeights
from hsa.sources.hub.downloads import Downloads, missing_offline
from hsa.sources.hub.needs import Needs
from hsa.sources.hub.partial_file import PartialFile
from hsa.sources.hub.range_requests import GAP, HEADER_GUESS, WASTE, RangesUnsupported, RemoteFile, retry
from hsa.sources.hub.repository import Repo, cache_folder, try_to_save_repo
from hsa.sources.roles import Role
from hsa.sources.safetensors import MAX_HEADER, Header, read_header
from hsa.system.fsio import SourceFile, Tally
from hsa.system.ranges import Range, coalesce, total

MAX_FILE = 1 << 43
"""The largest weights file that a server may claim, in bytes: 8 TiB, a thousand times any speech model's."""


class WeightRanges:
    """The weights files of which one run fetches ranges. The Hub is asked about each file only once.

    `pending` counts the bytes, by role, that a merge would still fetch. `bars` shows progress bars on a terminal.
    """

    def __init__(self, downloads: Downloads, *, bars: bool) -> None:
        self.pending: dict[str, int] = {}
        self._downloads, self._bars = downloads, bars
        self._files: dict[tuple[str, str, str], tuple[RemoteFile, PartialFile]] = {}

    def fetch(
        self, role: Role, repo: Repo, weights: list[str], needs: Needs, architecture: Architecture
    ) -> Mapping[str, PartialWeights]:
        """Fetch headers and the tensors that are needed now, and count the bytes that a merge would still fetch.

        Raises RangesUnsupported if the Hub does not serve ranges or does not say how large a file is.
        """
        files = {name: self._file(role, repo, name) for name in weights}
        headers = {name: self._header(role, repo, *files[name]) for name in weights}
        plain = architecture.plain_names(entry.name for header in headers.values() for entry in header.entries)

        def is_target(name: str) -> bool:
            return needs.target(name, architecture)

        is_needed_now = needs.names(headers, architecture)
        self.pending[role] = 0
        whole = needs.need == "whole"
        for name, header in headers.items():
            remote, partial = files[name]
            remaining = [(0, remote.size)] if whole else _tensor_ranges(header, plain, is_target)
            self.pending[role] += total(coalesce(partial.missing(remaining), GAP, remote.size // WASTE))
            self._fetch(role, repo, remote, partial, _tensor_ranges(header, plain, is_needed_now), prefix=False)
        return {name: PartialWeights(partial.path, partial.ranges) for name, (_, partial) in files.items()}

    def _header(self, role: Role, repo: Repo, remote: RemoteFile, partial: PartialFile) -> Header:
        self._fetch(role, repo, remote, partial, [(0, min(8, remote.size))], prefix=True)
        with _open_partial(partial, role) as source:
            length = int.from_bytes(source.read(8), "little") if remote.size >= 8 else 0
        if 8 + length <= remote.size and length <= MAX_HEADER:
            self._fetch(role, repo, remote, partial, [(0, 8 + length)], prefix=True)
        with _open_partial(partial, role) as source:
            return read_header(source)

    def _fetch(
        self, role: Role, repo: Repo, remote: RemoteFile, partial: PartialFile, ranges: list[Range], *, prefix: bool
    ) -> None:
        """Fetch the ranges that are not in the cache."""
        if not partial.missing(ranges):
            return
        if repo.offline:
            raise missing_offline(role, repo, f"{total(partial.missing(ranges))} bytes of {partial.path.stem}")
        if prefix and not partial.ranges:
            ranges = [*ranges, (0, min(HEADER_GUESS, remote.size))]
        with partial.locked(), self._bar(partial, ranges) as advance:

            def on_bytes(count: int) -> None:
                self._downloads.count(role, repo, count)
                advance(count)

            remote.fetch(partial, ranges, on_bytes, prefix=prefix)

    def _file(self, role: Role, repo: Repo, name: str) -> tuple[RemoteFile, PartialFile]:
        """Return a weights file on the Hub, and its cached part; RangesUnsupported if the Hub gives no size."""
        key = (repo.id, repo.commit, name)
        if key not in self._files:
            remote = self._remote_file(role, repo, name)
            folder = cache_folder(repo.id) / "files" / sha256(remote.etag.encode()).hexdigest()[:32]
            self._files[key] = remote, PartialFile(folder, name, remote.size, remote.etag)
        return self._files[key]

    def _remote_file(self, role: Role, repo: Repo, name: str) -> RemoteFile:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        url = hf_hub_url(repo.id, name, revision=repo.commit)
        headers: Mapping[str, str] = {}
        if repo.offline:
            version = repo.weights.get(name)
            if version is None:
                raise missing_offline(role, repo, name)
        else:
            metadata = retry(lambda: get_hf_file_metadata(url, timeout=timeout))
            if metadata.etag is None or metadata.size is None:
                raise RangesUnsupported
            if not 0 <= metadata.size <= MAX_FILE:
                raise MachineError(
                    f"{role}: {constants.ENDPOINT} says that {name} of {repo.id} has {shown(metadata.size)} bytes; at "
                    f"most {MAX_FILE} are fetched"
                )
            version = {"etag": metadata.etag, "size": metadata.size}
            headers = build_hf_headers(library_name="hsa-merge", library_version=__version__)
            if repo.weights.get(name) != version:
                repo.weights[name] = version
                try_to_save_repo(repo)
        return RemoteFile(f"{role}: {repo.id} {name}", url, version["etag"], version["size"], headers, timeout)

    @contextmanager
    def _bar(self, partial: PartialFile, ranges: list[Range]) -> Iterator[Callable[[int], Any]]:
        from huggingface_hub.utils import tqdm

        missing = total(partial.missing(ranges))
        hidden = None if self._bars else True
        with tqdm(total=missing, unit="B", unit_scale=True, desc=partial.path.stem, disable=hidden) as bar:
            yield bar.update


def _tensor_ranges(header: Header, plain: Mapping[str, str], is_needed: Callable[[str], bool]) -> list[Range]:
    """Return the byte ranges of the tensors whose `plain` names are needed."""
    origin = len(header.raw)
    return [(origin + entry.start, origin + entry.stop) for entry in header.entries if is_needed(plain[entry.name])]


@contextmanager
def _open_partial(partial: PartialFile, role: Role) -> Iterator[SourceFile]:
    source = SourceFile(partial.path, role, Tally(), partial.ranges)
    try:
        yield source
    finally:
        source.close()
