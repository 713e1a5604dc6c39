"""A repository on the Hub at one commit: its id, what is known of it, and the record of both for offline runs.

Records and ranges of weights are in this package's own cache: `HSA_CACHE`, else the directory `hsa` in `HF_HOME`.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hsa.errors import MachineError
from hsa.sources.checkpoint import ADAPTER_CONFIG, WHOLE_WEIGHTS
from hsa.sources.hub.partial_file import load_record, save_record
from hsa.sources.identity import is_hub_id
from hsa.system.types import PathLike

CACHE_VARIABLE = "HSA_CACHE"
REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """A repository, and the requested branch, tag or commit; None is the main branch."""

    repo: str
    revision: str | None = None


def parse_id(text: str) -> HubId | None:
    """Parse a text as a hub id; None if it does not have that form."""
    name, at, revision = text.partition("@")
    if not is_hub_id(name) or (at and (not REVISION.fullmatch(revision) or ".." in revision)):
        return None
    return HubId(name, revision or None)


def find_id(path: PathLike) -> HubId | None:
    """Return the hub id that a source means; None for a path.

    A source is a path if it is a Path object, if it exists on this machine, or if it is `org/name` and a directory
    `org` exists. So a typo in a local path is found at once, before the Hub is asked. `org/name@main` always means the
    Hub's.
    """
    if not isinstance(path, str) or os.path.lexists(path):
        return None
    hub_id = parse_id(path)
    is_local = hub_id is not None and hub_id.revision is None and os.path.isdir(os.path.dirname(path))
    return None if is_local else hub_id


@dataclass
class Repo:
    """A repository at a commit. `files` are its file names, `weights` the known etags and sizes of weights files.

    `offline`: the Hub is not asked about it. `complete`: `files` are all files of the repository, not only those that
    the cache happens to hold.
    """

    id: str
    commit: str
    files: frozenset[str]
    offline: bool
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = True

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter and no weights of a whole model."""
        return ADAPTER_CONFIG in self.files and not self.files.intersection(WHOLE_WEIGHTS)


def cache_directory() -> Path:
    """Return the directory for ranges of weights; it may be removed at any time when no merge runs."""
    from huggingface_hub import constants

    directory = os.environ.get(CACHE_VARIABLE)
    return Path(directory).expanduser() if directory else Path(constants.HF_HOME) / "hsa"


def cache_directories() -> tuple[Path, Path]:
    """huggingface_hub's cache of whole files, and this package's of ranges."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE), cache_directory()


def _folder(repo: str) -> str:
    return f"models--{repo.replace('/', '--')}"


def cache_folder(repo: str) -> Path:
    """The folder of a repository in this package's cache."""
    return cache_directory() / _folder(repo)


def _ref(hub_id: HubId) -> Path:
    return cache_folder(hub_id.repo) / "refs" / f"{quote(hub_id.revision or 'main', safe='')}.json"


def save_repo(repo: Repo, hub_id: HubId | None = None) -> None:
    """Save what is known of a commit, and the `hub_id` that led to it, for offline runs; MachineError if that fails."""
    path = cache_folder(repo.id) / "commits" / f"{repo.commit}.json"
    earlier = (load_record(path) or {}).get("weights", {})
    save_record(path, {"files": sorted(repo.files), "weights": {**earlier, **repo.weights}})
    if hub_id is not None:
        save_record(_ref(hub_id), {"commit": repo.commit})


def try_to_save_repo(repo: Repo, hub_id: HubId | None = None) -> None:
    """Save as `save_repo` does, but ignore failures of the disk: a cache may be read-only."""
    with suppress(MachineError):
        save_repo(repo, hub_id)


def load_repo(hub_id: HubId) -> Repo | None:
    """Return the commit that a revision last resolved to, with what is known of it. Reads huggingface_hub's cache
    too."""
    from huggingface_hub import constants

    revision = hub_id.revision or "main"
    hf_cache = Path(constants.HF_HUB_CACHE) / _folder(hub_id.repo)
    commits = [revision] if COMMIT.fullmatch(revision) else []
    commits += [record["commit"] for record in [load_record(_ref(hub_id))] if record is not None]
    with suppress(OSError, ValueError):
        commits.append((hf_cache / "refs" / revision).read_text(encoding="ascii").strip())
    for commit in commits:
        if not COMMIT.fullmatch(commit):
            continue
        stored = load_record(cache_folder(hub_id.repo) / "commits" / f"{commit}.json")
        record = stored or {"files": [], "weights": {}}
        files = set(record["files"])
        with suppress(OSError):
            files.update(os.listdir(hf_cache / "snapshots" / commit))
        if files:
            return Repo(hub_id.repo, commit, frozenset(files), True, record["weights"], complete=bool(record["files"]))
    return None


def cached_path(repo: Repo, name: str) -> Path | None:
    """Return a file's path in huggingface_hub's cache; None if the whole file is not there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo.id, name, revision=repo.commit)
    return Path(path) if isinstance(path, str) else None
