"""Open hub ids as sources: `org/name`, with an optional `@revision`, becomes a checkpoint.

The revision is resolved to a commit first, and every file comes from that commit. huggingface_hub and its cache provide
the small files, and weights that are needed whole. If only targets of the weights are needed, headers and target ranges
are fetched by range requests into a cache of this package. Pickle weights and adapters are fetched whole.

huggingface_hub is imported only when there is a hub id to look up. Its token is sent only to the Hub and appears in no
message.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hsa.architectures.registry import architecture_of
from hsa.errors import MachineError, SourceError, shown
from hsa.sources import any_small_files
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
    read_config,
    weight_map,
)
from hsa.sources.hub.downloads import Downloads, missing_offline
from hsa.sources.hub.errors import map_hub_errors
from hsa.sources.hub.needs import Needs
from hsa.sources.hub.range_requests import (
    RangesUnsupported,
    is_transient,
    network_error,
    retry,
)
from hsa.sources.hub.repository import COMMIT, HubId, Repo, cached_path, find_id, load_repo, try_to_save_repo
from hsa.sources.hub.weight_ranges import WeightRanges
from hsa.sources.lora import WEIGHTS as ADAPTER_WEIGHTS
from hsa.sources.lora import is_adapter, open_adapter
from hsa.sources.open import open_source
from hsa.sources.roles import Role
from hsa.sources.small_file_checks import GENERATION_CONFIG
from hsa.sources.small_files import PROCESSOR_FILES
from hsa.sources.source_folder import newest_training_checkpoint
from hsa.sources.tied_tensors import without_tied_copy
from hsa.system.fsio import Tally
from hsa.system.types import PathLike


class Hub:
    """One run's access to the Hub; each repository is looked up only once.

    `bars` shows huggingface_hub's progress bars on a terminal.
    """

    def __init__(self, *, bars: bool = False) -> None:
        self._bars = bars
        self._unreachable = False
        self._repos: dict[HubId, Repo] = {}
        self._downloads = Downloads()
        self._ranges = WeightRanges(self._downloads, bars=bars)

    @property
    def fetched(self) -> Mapping[str, int]:
        """Bytes received, by role."""
        return self._downloads.fetched

    @property
    def pending(self) -> Mapping[str, int]:
        """Bytes that a merge would still fetch, by role."""
        return self._ranges.pending

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages to the user."""
        return self._downloads.notes

    def open(
        self,
        role: Role,
        path: PathLike,
        tally: Tally,
        needs: Needs,
        claimed: str | None = None,
        base: Checkpoint | None = None,
    ) -> Checkpoint:
        """Open a source, local or on the Hub. `needs` says what is needed of it; `base` is the base of an adapter.

        Raises what `open_checkpoint` raises. For a hub id, also raises SourceError (no such repository, revision or
        file, no access) and MachineError (the Hub cannot be reached, the disk is full).
        """
        hub_id = find_id(path)
        if hub_id is None:
            return open_source(role, path, tally, claimed, base)
        with map_hub_errors(role, hub_id), self._quiet():
            repo = self._repo(role, hub_id)
            claimed = claimed or f"{repo.id}@{repo.commit}"
            if repo.is_adapter:
                directory = self._adapter(role, repo, needs)
            else:
                directory, parts = self._checkpoint(role, repo, needs)
        if repo.is_adapter:
            return open_adapter(role, directory, tally, base, claimed)
        return without_tied_copy(open_checkpoint(role, directory, tally, claimed, parts, repo.files))

    def is_adapter(self, role: Role, path: PathLike) -> bool:
        """Whether a source, local or on the Hub, is an adapter on base. For a hub id, raises what `open` raises."""
        hub_id = find_id(path)
        if hub_id is None:
            return bool(os.fspath(path)) and is_adapter(path)
        with map_hub_errors(role, hub_id), self._quiet():
            return self._repo(role, hub_id).is_adapter

    def _repo(self, role: Role, hub_id: HubId) -> Repo:
        if hub_id not in self._repos:
            self._repos[hub_id] = self._resolve(role, hub_id)
        return self._repos[hub_id]

    def _resolve(self, role: Role, hub_id: HubId) -> Repo:
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            repo = load_repo(hub_id)
            if repo is None:
                raise MachineError(
                    f"{role}: {hub_id.repo}@{hub_id.revision or 'main'} is no local directory and not in the cache, "
                    f"and HF_HUB_OFFLINE is set; fetch it once without, or give a directory"
                )
            return repo
        repo = load_repo(hub_id) if self._unreachable else None
        if repo is not None:  # all attempts for another source have already failed
            return self._from_cache(role, repo)
        revision, timeout = hub_id.revision, constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            info = retry(lambda: HfApi().model_info(hub_id.repo, revision=revision, timeout=timeout))
        except network_error() as error:
            repo = load_repo(hub_id) if is_transient(error) else None
            self._unreachable = is_transient(error)
            if repo is None:
                raise
            return self._from_cache(role, repo)
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            raise MachineError(f"{role}: {constants.ENDPOINT} names no commit of {hub_id.repo}; is HF_ENDPOINT right?")
        names = [entry.rfilename for entry in info.siblings or ()]
        if not names or not all(isinstance(name, str) for name in names):
            raise MachineError(f"{role}: {constants.ENDPOINT} lists no files of {hub_id.repo}; is HF_ENDPOINT right?")
        repo = Repo(hub_id.repo, info.sha, frozenset(names), offline=False)
        try_to_save_repo(repo, hub_id)
        return repo

    def _from_cache(self, role: Role, repo: Repo) -> Repo:
        self._downloads.note(
            f"{role}: the Hub cannot be reached; {repo.id} is taken from the cache, at commit {repo.commit}"
        )
        return repo

    def _adapter(self, role: Role, repo: Repo, needs: Needs) -> Path:
        """Download an adapter's files, which are small compared to base's; returns their directory."""
        weights = [name for name in ADAPTER_WEIGHTS if name in repo.files][:1]
        self._downloads.small_files(role, repo, PROCESSOR_FILES if needs.assets else ())
        for name in (ADAPTER_CONFIG, *weights):
            directory = self._downloads.file(role, repo, name).parent
        return directory

    def _checkpoint(self, role: Role, repo: Repo, needs: Needs) -> tuple[Path, Mapping[str, PartialWeights]]:
        """Fetch what is needed of a checkpoint. Returns its directory, and the weights files that are partly there."""
        if CONFIG not in repo.files:
            if not repo.complete:
                raise missing_offline(role, repo, CONFIG)
            raise SourceError(f"{role}: {repo.id} has no {CONFIG}, which says what model it is; is it a model?")
        directory = self._downloads.file(role, repo, CONFIG).parent
        config = read_config(role, directory, Tally())
        architecture = architecture_of(config)
        processor_files = PROCESSOR_FILES if architecture.lists_tensors else any_small_files.wanted(repo.files, config)
        self._downloads.small_files(role, repo, (GENERATION_CONFIG, *(processor_files if needs.assets else ())))
        form, weights = self._weights_files(role, repo)
        if all(cached_path(repo, name) for name in weights):
            return directory, {}
        reason = "pickle weights"
        if form is SAFETENSORS:
            if needs.need == "whole" and not needs.headers_only:
                for name in weights:
                    self._downloads.file(role, repo, name)
                return directory, {}
            try:
                return directory, self._ranges.fetch(role, repo, weights, needs, architecture)
            except RangesUnsupported:
                reason = "server without range support"
        size = sum(self._downloads.file(role, repo, name).stat().st_size for name in weights)
        self._downloads.note(f"{role}: {reason}: {size} bytes of {repo.id} fetched whole")
        return directory, {}

    def _weights_files(self, role: Role, repo: Repo) -> tuple[Format, list[str]]:
        """Return a repository's weights format, and the files that hold the weights; safetensors are preferred."""
        for form in (SAFETENSORS, PICKLES):
            if form.weights in repo.files:
                return form, [form.weights]
            if form.index in repo.files:
                return form, self._shards(role, repo, form)
        if not repo.complete:
            raise missing_offline(role, repo, "the weights")
        weights_names = (*WHOLE_WEIGHTS, ADAPTER_CONFIG)
        newest = newest_training_checkpoint(repo.files, weights_names)
        if newest is not None:
            raise SourceError(
                f"{role}: {repo.id} holds no weights, but training checkpoints, of which the newest is {newest}; "
                f"download it (hf download {repo.id} --include '{newest}/*') and give its directory"
            )
        raise SourceError(f"{role}: {repo.id} holds no weights; looked for {', '.join(weights_names)}")

    def _shards(self, role: Role, repo: Repo, form: Format) -> list[str]:
        text = self._downloads.file(role, repo, form.index).read_bytes()
        names = sorted(set(weight_map(text, f"{role}: {repo.id} {form.index}").values()))
        for name in names:
            if not is_shard_name(name, form.suffix) or name not in repo.files:
                raise SourceError(
                    f"{role}: {repo.id} {form.index} names the shard {shown(name)}; expected the plain name of a "
                    f"{form.suffix} file in the same repository"
                )
        return names

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Suppress huggingface_hub's progress bars, unless they are wanted."""
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        if self._bars or are_progress_bars_disabled():
            yield
            return
        disable_progress_bars()
        try:
            yield
        finally:
            enable_progress_bars()
