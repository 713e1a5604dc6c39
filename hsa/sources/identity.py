"""The identity of a source: a model on the Hub, or a directory with a name that distinguishes it from others."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_REPO = re.compile(r"[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?/[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_GENERIC_NAME = re.compile(
    r"((best|final|last|latest|global)[-_. ]?)?(checkpoints?|ckpts?|epoch|step|model|weights|pytorch_model)"
    r"([-_. ]?(best|final|last|latest|[0-9]+))?(\.pt)?|"
    r"(best|final|last|latest|out|outputs?|results?|models|merged|trained|finetuned)(\.pt)?",
    re.ASCII | re.IGNORECASE,
)
_HUB_SNAPSHOT = re.compile(r"models--(?P<id>.+)/snapshots/(?P<revision>[^/]+)/?")


@dataclass(frozen=True)
class Identity:
    """The identity of a source: a hub id or the directory's own name, and the revision if it is known."""

    id: str
    revision: str | None = None

    def named(self, role: str) -> str:
        """Name the source in a message: its role, and its name if that says more.

        Example:
            >>> Identity("org/children").named("primary"), Identity("primary").named("primary")
            ('primary org/children', 'primary')
        """
        return role if self.id == role else f"{role} {self.id}"


def is_hub_id(text: str) -> bool:
    """Whether this is the name of a model on the Hub, `org/name`. A name without an owner is a directory's."""
    return _REPO.fullmatch(text) is not None and "--" not in text and ".." not in text


def escaped_name(name: str) -> str:
    """Return a file's name as text that any file can hold: bytes that are not UTF-8 are written as `\\xe9`.

    Example:
        >>> escaped_name(os.fsdecode(b"caf\\xe9"))
        'caf\\\\xe9'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def identify(directory: Path, claimed: str | None) -> Identity:
    """Return the identity to record: the claimed one, else the hub snapshot's id, else the directory's own name.

    A generic name, such as checkpoint-1000, is extended by its parent's: see `name_with_parent`.
    """
    if claimed:
        name, _, revision = claimed.partition("@")
        return Identity(name, revision or None)
    snapshot = _HUB_SNAPSHOT.fullmatch("/".join(directory.parts[-3:]))
    if snapshot:
        return Identity(escaped_name(snapshot["id"].replace("--", "/")), escaped_name(snapshot["revision"]))
    return Identity(name_with_parent(directory) if is_generic_name(directory.name) else escaped_name(directory.name))


def is_generic_name(name: str) -> bool:
    """Whether this name of a directory or file is generic: checkpoint-1000, best, final, output, model, ..."""
    return _GENERIC_NAME.fullmatch(name) is not None


def name_with_parent(path: Path) -> str:
    """Add the name of the nearest parent that is not generic, at most two levels up: `checkpoint-1000 in run-a`.

    The spaces show that the result is no hub id. The names of the user's home and of the root are not used.
    """
    home = Path(os.path.expanduser("~"))  # not Path.home(), which fails where there is none
    for parent in path.parents[:2]:
        if not parent.name or parent == home:
            break
        if not is_generic_name(parent.name):
            return escaped_name(f"{path.name} in {parent.name}")
    return escaped_name(path.name)


def is_snapshot(directory: Path) -> bool:
    """Whether this is a snapshot in the hub's cache, which keeps files as links."""
    return _HUB_SNAPSHOT.fullmatch("/".join(directory.parts[-3:])) is not None
