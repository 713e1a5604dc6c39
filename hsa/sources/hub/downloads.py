"""Download whole files of repositories through huggingface_hub and its cache, and count what was received."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hsa.errors import MachineError
from hsa.sources.hub.range_requests import retry
from hsa.sources.hub.repository import Repo, cached_path
from hsa.sources.roles import Role


class Downloads:
    """The downloads of one run: `fetched` counts received bytes by role, `notes` are messages to the user."""

    def __init__(self) -> None:
        self.fetched: dict[str, int] = {}
        self._notes: dict[str, None] = {}
        self._totals: dict[str, str] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        received = [f"{role}: {self.fetched[role]} bytes were fetched of {what}" for role, what in self._totals.items()]
        return (*self._notes, *received)

    def note(self, text: str) -> None:
        """Add a note, once."""
        self._notes[text] = None

    def count(self, role: Role, repo: Repo, size: int) -> None:
        """Add bytes received for a source."""
        self.fetched[role] = self.fetched.get(role, 0) + size
        self._totals[role] = f"{repo.id} at commit {repo.commit}"

    def file(self, role: Role, repo: Repo, name: str) -> Path:
        """Return the path of a file in huggingface_hub's cache, and download the file if it is not there."""
        from huggingface_hub import hf_hub_download

        path = cached_path(repo, name)
        if path is not None:
            return path
        if repo.offline:
            raise missing_offline(role, repo, name)
        path = Path(retry(lambda: hf_hub_download(repo.id, name, revision=repo.commit)))
        self.count(role, repo, path.stat().st_size)
        return path

    def small_files(self, role: Role, repo: Repo, names: Iterable[str]) -> None:
        """Fetch small files that may be missing. Offline, those that no run has fetched are left out with a note."""
        present = [name for name in names if name in repo.files]
        absent = [name for name in present if repo.offline and not cached_path(repo, name)]
        if absent:
            are = "is" if len(absent) == 1 else "are"
            self.note(
                f"{role}: {', '.join(absent)} of {repo.id} {are} not in the cache and left out, for the Hub is not "
                f"asked"
            )
        for name in present:
            if name not in absent:
                self.file(role, repo, name)


def missing_offline(role: Role, repo: Repo, what: str) -> MachineError:
    """Return the error for something that is not in the cache while the Hub cannot be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        cause, remedy = "HF_HUB_OFFLINE is set", "run once with the network and without HF_HUB_OFFLINE"
    else:
        cause, remedy = "the Hub cannot be reached", "run once with the network"
    return MachineError(
        f"{role}: the cache lacks {what} of {repo.id} at commit {repo.commit}, and {cause}; {remedy}, or give a "
        f"directory"
    )
