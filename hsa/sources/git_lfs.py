"""Refuse Git LFS pointers: three lines of text in place of a large file that git-lfs did not fetch.

Source: the pointer specification of Git LFS (docs/spec.md of git-lfs/git-lfs).
"""

from __future__ import annotations

from hsa.errors import HeaderError

_START = b"version https://git-lfs.github.com/spec/v1"
_LEAST = len(b"version ")
"""Enough bytes to recognise a pointer: read as the length of a safetensors header, they exceed any file's size."""


def refuse_pointer(head: bytes, where: str) -> None:
    """Raise HeaderError if these first bytes of a file, at least 8, are those of a Git LFS pointer.

    Example:
        >>> refuse_pointer(b"version https://git-lfs.github.com/spec/v1", "base: model.safetensors")
        Traceback (most recent call last):
        hsa.errors.HeaderError: base: model.safetensors is a Git LFS pointer, not the file itself; run git lfs pull ...
    """
    if len(head) >= _LEAST and head[: len(_START)] == _START[: len(head)]:
        raise HeaderError(
            f"{where} is a Git LFS pointer, not the file itself; run git lfs pull in its folder, or fetch the file "
            f"with hf download"
        )
