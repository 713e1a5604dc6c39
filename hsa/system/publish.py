"""Write a directory atomically: it is staged beside its destination, locked, and renamed into place.

Order on disk: every file is written and fsynced, then the staging directory, then the rename, then the parent
directory. A run that is killed leaves at most a staging directory, which the next run to the same destination
recognises by its name, locks and clears.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from hsa.errors import DestinationError, ProvenanceError
from hsa.system import fsio
from hsa.system.descriptors import list_directory, reason
from hsa.system.destinations import check_replaceable, unlisted
from hsa.system.manifest import PROVENANCE
from hsa.system.staging import REPLACED, STAGING, StagingDirectory, hidden_sibling, is_directory_at, lock

CANNOT_MOVE = (
    "it lies in a lower layer of an overlay filesystem, such as a container's image, where no directory can be renamed "
    "or swapped; nothing was changed: choose another output, such as one on a volume, or remove the old one first"
)


def staging_path(destination: Path) -> Path:
    return hidden_sibling(destination, STAGING)


def _replaced_path(destination: Path) -> Path:
    return hidden_sibling(destination, REPLACED)


class StagedOutput(StagingDirectory):
    """A locked staging directory. `publish` puts it into place; leaving the block without it removes the directory.

    Raises DestinationError if another run holds the lock, MachineError if the disk fails. After `publish`, `notes` say
    what could not be removed of an earlier output.
    """

    def __init__(self, destination: Path, *, overwrite: bool, sync: bool) -> None:
        self.notes: list[str] = []
        super().__init__(staging_path(destination), destination, sync=sync)
        self.overwrite = overwrite
        try:  # check again: another run may have ended, or a killed run's old output may be back
            if check_replaceable(self.destination, overwrite=self.overwrite):
                self._check_movable()
        except BaseException:
            self._discard()
            raise

    def publish(self) -> None:
        """Move the staged directory to the destination atomically, and make the move durable."""
        with fsio.map_write_errors(self.destination):
            if self.sync:
                fsio.sync_directory(self.path)
            names = check_replaceable(self.destination, overwrite=self.overwrite)
            if names:
                self._replace(names)
            else:
                fsio.rename(self.path, self.destination)
                try:
                    self.sync_entries(self.destination.parent)
                except OSError:
                    fsio.rename(self.destination, self.path)
                    raise
        self.closed = True
        with suppress(OSError):  # the output is in place, and nothing was written through this descriptor
            os.close(self._lock)

    def _check_movable(self) -> None:
        """Raise DestinationError if the earlier output can be neither renamed nor swapped, before anything is computed.

        Only overlay filesystems are checked. The probe is a rename onto a directory that is not empty: it fails on
        every filesystem, but an overlay names this problem.
        """
        if not fsio.is_overlay(self.destination):
            return
        obstacle = self.file("obstacle")
        with fsio.map_write_errors(self.path):
            os.close(fsio.create(obstacle, 0))
            try:
                fsio.rename(self.destination, self.path)
            except OSError as error:
                obstacle.unlink()
                if error.errno == errno.EXDEV:
                    raise DestinationError(f"output {self.destination} cannot be replaced: {CANNOT_MOVE}") from error

    def _recover(self) -> None:
        """Finish a replacement that was killed: restore the old output, or remove it if the new one is in place."""
        replaced = _replaced_path(self.destination)
        if not fsio.exists(replaced):
            return
        if not fsio.exists(self.destination) or not any(self.destination.iterdir()):
            old = lock(replaced, created=True)
            if old is not None:
                try:
                    fsio.rename(replaced, self.destination)
                finally:
                    os.close(old)
            return
        try:
            old = lock(replaced, created=True)
            if old is None:  # another run is just ending and still removes it
                return
            try:
                names = list_directory(old)
                surplus = unlisted(replaced, names) if names else []
                if surplus:
                    raise OSError(errno.ENOTEMPTY, f"it holds {surplus[0]}, which its record does not list")
                self._remove(old, replaced, names)
            finally:
                os.close(old)
        except (OSError, ProvenanceError) as error:
            self._note_left(replaced, error)

    def _replace(self, names: Collection[str]) -> None:
        """Swap the new directory with the earlier output, then remove the latter, which holds these names.

        If the filesystem cannot swap, the old output is renamed first. However this is interrupted, the old output is
        removed only if the new one is in place. It is restored if nothing is in place, or if the disk fails to keep
        the swap.
        """
        old = lock(self.destination, created=True)
        if old is None:
            raise DestinationError(f"another run holds {self.destination}; wait for it to end")
        replaced = _replaced_path(self.destination)
        try:
            if not fsio.exchange(self.path, self.destination):
                self._move_to_replaced(replaced)
                fsio.rename(self.path, self.destination)
            try:
                self.sync_entries(self.destination.parent)
            except OSError:
                if not is_directory_at(old, self.path):
                    fsio.rename(self.destination, self.path)
                    fsio.rename(replaced, self.destination)
                else:
                    fsio.exchange(self.path, self.destination)
                raise
        finally:
            try:
                self._remove_or_restore(old, replaced, names)
            except BaseException:  # an interrupt during a long removal: finish it
                self._remove_or_restore(old, replaced, names)
                raise
            finally:
                os.close(old)

    def _move_to_replaced(self, replaced: Path) -> None:
        try:
            fsio.rename(self.destination, replaced)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise DestinationError(f"output {self.destination} cannot be replaced: {CANNOT_MOVE}") from error
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise DestinationError(
                    f"output {self.destination} cannot be replaced: {replaced} is in the way, which an earlier run "
                    f"could not remove; remove it yourself, or choose another output"
                ) from error
            raise

    def _remove_or_restore(self, old: int, replaced: Path, names: Collection[str]) -> None:
        """Remove the old output from where it was moved to, or restore it if nothing is in its place."""
        leftover = next((place for place in (self.path, replaced) if is_directory_at(old, place)), None)
        if leftover is None:
            return
        if not fsio.exists(self.destination):
            fsio.rename(leftover, self.destination)
            return
        try:
            self._remove(old, leftover, names)
        except OSError as error:  # the new output is in place, so this run did what it was asked to
            with suppress(OSError):
                if leftover != replaced and not fsio.exists(replaced):
                    fsio.rename(leftover, replaced)
                    leftover = replaced
            self._note_left(leftover, error)

    def _remove(self, old: int, place: Path, names: Collection[str]) -> None:
        """Remove an output that was moved to `place`: the files of these names, its record last, and its directory.

        A file that was added there meanwhile keeps the directory: OSError.
        """
        present = set(list_directory(old))
        for name in sorted(present & set(names) - {PROVENANCE}):
            os.unlink(name, dir_fd=old)
        if present - set(names):
            raise OSError(errno.ENOTEMPTY, f"it holds {min(present - set(names))}, which its record does not list")
        if PROVENANCE in present:
            if self.sync:
                with suppress(OSError):  # so that a crash does not leave files without the record that lists them
                    os.fsync(old)
            os.unlink(PROVENANCE, dir_fd=old)
        place.rmdir()

    def _note_left(self, place: Path, error: Exception) -> None:
        cause = reason(error) if isinstance(error, OSError) else str(error)
        self.notes.append(
            f"an earlier output could not be removed whole and is left at {place} ({cause}); remove it yourself, or "
            f"the next run tries again"
        )
