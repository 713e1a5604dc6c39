"""A repository on the Hub at one commit: what names it, what is known of it, and that record for offline runs.

Records and ranges of weights lie in this package's own cache: `HSA_CACHE`, else the directory `hsa` in `HF_HOME`.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hsa.sources.checkpoint import ADAPTER_CONFIG, WHOLE_WEIGHTS
from hsa.sources.hub.partial_file import load_record, save_record
from hsa.sources.identity import is_hub_id
from hsa.system.types import PathLike

CACHE_VARIABLE = "HSA_CACHE"
REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """A repository, and the branch, tag or commit asked for; None is the main branch."""

    repo: str
    revision: str | None = None


def parse_id(text: str) -> HubId | None:
    """The hub id that a text has the form of; None for any other text."""
    name, at, revision = text.partition("@")
    if not is_hub_id(name) or (at and (not REVISION.fullmatch(revision) or ".." in revision)):
        return None
    return HubId(name, revision or None)


def find_id(path: PathLike) -> HubId | None:
    """The hub id that a source means; None for a path.

    A path is every Path object, whatever exists on this machine, and `org/name` where a directory `org` exists: a typo
    in a local path is then found at once, and not after the Hub was asked. `org/name@main` always means the Hub's.
    """
    if not isinstance(path, str) or os.path.lexists(path):
        return None
    found = parse_id(path)
    local = found is not None and found.revision is None and os.path.isdir(os.path.dirname(path))
    return None if local else found


@dataclass
class Repo:
    """A repository at a commit. `files` are its names, `weights` the etag and size of weights files as far as known.

    `offline`: the Hub is not asked about it. `complete`: `files` are all that there are, and not those alone that the
    cache happens to hold.
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


def home(repo: str) -> Path:
    """The folder of a repository in this package's cache."""
    return cache_directory() / _folder(repo)


def _ref(hub_id: HubId) -> Path:
    return home(hub_id.repo) / "refs" / f"{quote(hub_id.revision or 'main', safe='')}.json"


def remember(repo: Repo, asked: HubId | None = None) -> None:
    """Keep what is known of a commit, and what `asked` for it, for offline runs; MachineError when the disk fails."""
    path = home(repo.id) / "commits" / f"{repo.commit}.json"
    known = (load_record(path) or {}).get("weights", {})
    save_record(path, {"files": sorted(repo.files), "weights": {**known, **repo.weights}})
    if asked is not None:
        save_record(_ref(asked), {"commit": repo.commit})


def remembered(hub_id: HubId) -> Repo | None:
    """The commit that a revision had last time, here or in huggingface_hub's cache, with what is known of it."""
    from huggingface_hub import constants

    revision = hub_id.revision or "main"
    ordinary = Path(constants.HF_HUB_CACHE) / _folder(hub_id.repo)
    commits = [revision] if COMMIT.fullmatch(revision) else []
    commits += [record["commit"] for record in [load_record(_ref(hub_id))] if record is not None]
    with suppress(OSError, ValueError):
        commits.append((ordinary / "refs" / revision).read_text(encoding="ascii").strip())
    for commit in commits:
        if not COMMIT.fullmatch(commit):
            continue
        found = load_record(home(hub_id.repo) / "commits" / f"{commit}.json")
        record = found or {"files": [], "weights": {}}
        files = set(record["files"])
        with suppress(OSError):
            files.update(os.listdir(ordinary / "snapshots" / commit))
        if files:
            return Repo(hub_id.repo, commit, frozenset(files), True, record["weights"], complete=bool(record["files"]))
    return None


def cached(repo: Repo, name: str) -> Path | None:
    """A file's place in huggingface_hub's cache; None where it is not there whole."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo.id, name, revision=repo.commit)
    return Path(found) if isinstance(found, str) else None
