"""The small files selected for an output so far, and the folders that are searched for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsa.sources.checkpoint import read_whole
from hsa.sources.small_file_checks import read_small_file
from hsa.system.fsio import Tally, exists


@dataclass(frozen=True)
class AssetFolder:
    """A directory that is searched for small files: the role of its source, and its name in messages."""

    role: str
    directory: Path
    label: str

    def has(self, name: str) -> bool:
        """Whether a file or directory has that name, including a link whose target is missing."""
        return exists(self.directory / name)

    def holds(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.has(name)]


@dataclass
class SelectedFiles:
    """The small files selected so far: bytes and parsed content by name, and messages to the user."""

    tally: Tally
    files: dict[str, bytes] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _read: dict[Path, tuple[bytes, Any]] = field(default_factory=dict)

    def take(self, folder: AssetFolder, names: Iterable[str]) -> None:
        """Read these files of a folder; SourceError if one cannot be loaded."""
        for name in names:
            if name not in self.files:
                self.files[name], self.documents[name] = self.read(folder, name)

    def read(self, folder: AssetFolder, name: str) -> tuple[bytes, Any]:
        """Return the bytes of a folder's file and its parsed content. A file is read only once."""
        path = folder.directory / name
        if path not in self._read:
            data = read_whole(folder.role, folder.directory, name, self.tally)
            self._read[path] = data, read_small_file(name, data, f"{folder.role}: {path}")
        return self._read[path]


def note_origin(
    selection: SelectedFiles, what: str, names: Sequence[str], folder: AssetFolder, folders: Sequence[AssetFolder]
) -> None:
    if folder is not folders[0]:
        files = "files" if len(names) > 1 else "file"
        verb = "come" if len(names) > 1 else "comes"
        selection.notes.append(
            f"{what} {files} ({', '.join(names)}) {verb} from {folder.label}, for {folders[0].label} has none"
        )
