"""Verify an output directory: its files against its provenance, its parts against one another, and all of it against
its sources."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hsa.architectures.base import TensorPlace
from hsa.architectures.registry import architecture_of
from hsa.errors import HsaError, MachineError, SourceChanged, SourceError, shown
from hsa.option_names import option
from hsa.outputs import record_checks
from hsa.outputs.provenance import Provenance
from hsa.outputs.provenance import load as load_provenance
from hsa.sources.any_small_files import limit_of
from hsa.sources.checkpoint import (
    CONFIG,
    INDEX,
    MAX_TEXT,
    SAFETENSORS,
    WEIGHTS,
    Checkpoint,
    open_checkpoint,
    open_shard,
    read_whole,
    resolve_inside,
)
from hsa.sources.identity import is_snapshot
from hsa.sources.small_file_checks import (
    CHECKED_FILES,
    ModelSizes,
    contradictions,
    read_any_small_file,
    read_small_file,
)
from hsa.sources.tensor_places import TensorRef
from hsa.system.descriptors import reason
from hsa.system.fsio import SourceFile, exists
from hsa.system.manifest import PROVENANCE
from hsa.system.strict_json import load_json
from hsa.system.threads import out_of_memory
from hsa.verification import output_checks
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.output_checks import STEP
from hsa.verification.problems import Problems
from hsa.verification.report import VerifyResult
from hsa.verification.run_in_threads import run_in_threads
from hsa.verification.unlisted_files import is_read_by_loaders

LARGE = 64 << 20
"""Files of at least this many bytes are digested by several threads."""

LABEL = "output"
"""The name of the verified checkpoint in messages, in place of a source's role."""


def verify_output(directory: Path, source_paths: SourcePaths | None, context: VerifyContext) -> VerifyResult:
    """Check an output's directory, whose path has its links resolved. With sources, merge them again and compare every
    byte."""
    provenance = _load_provenance(directory, context.problems)
    names = [] if provenance is None else list(_readable_files(directory, provenance, context.problems))
    _check_unlisted_files(directory, provenance, context)
    _OutputVerification(directory, provenance, context).run(names)
    if provenance is not None and not all(provenance.files.values()):
        context.notes.append(
            "without whole-file digests it cannot be told whether copied tensors and small files are what was written"
            + ("" if source_paths else f"; give {option('sources')} to compare them")
        )
    answers = None
    if source_paths and provenance is None:
        context.notes.append(f"nothing was recomputed, for {PROVENANCE} does not say how")
    elif source_paths and provenance is not None:
        from hsa.verification.recompute import recompute

        answers = recompute(directory, provenance, source_paths, context)
    return VerifyResult(
        None if provenance is None else provenance.record, len(names) + (provenance is not None), answers
    )


def _load_provenance(directory: Path, problems: Problems) -> Provenance | None:
    fault = _fault_of_file(directory, PROVENANCE)
    if not os.path.lexists(directory / PROVENANCE):
        fault = (
            "is missing: hsa did not write this checkpoint, or its record was removed. Nothing says what it should "
            "hold, so its headers, names, shapes and attention tensors alone were checked; give an output of hsa"
        )
    if fault is not None:
        problems.add(PROVENANCE, fault)
        return None
    try:
        return load_provenance(directory)
    except SourceError as error:
        problems.add(PROVENANCE, str(error))
        return None


def _fault_of_file(directory: Path, name: str) -> str | None:
    """The fault of a file that shows before it is opened; None for a regular file, or a link in the Hub's cache."""
    try:
        mode = os.lstat(directory / name).st_mode
    except OSError as error:
        return f"is missing ({error.strerror})"
    if stat.S_ISLNK(mode) and is_snapshot(directory):
        try:
            resolve_inside(LABEL, directory, name)
        except SourceError as error:
            return str(error)
        return None
    if not stat.S_ISREG(mode):
        return f"is {'a link' if stat.S_ISLNK(mode) else 'no regular file'}; expected a file with data in it"
    return None


def _readable_files(directory: Path, provenance: Provenance, problems: Problems) -> Iterator[str]:
    """The files listed in the provenance that can be read; the others are added to the problems."""
    for name in provenance.files:
        if name != os.path.basename(name) or name in ("", ".", "..", PROVENANCE) or "\0" in name:
            problems.add(PROVENANCE, f"lists the file {shown(name)}; expected the plain name of another file")
            continue
        fault = _fault_of_file(directory, name)
        if fault is None:
            yield name
        else:
            problems.add(name, fault)


def _check_unlisted_files(directory: Path, provenance: Provenance | None, context: VerifyContext) -> None:
    """Report files that the provenance does not list: a problem if a loader would read the file, else a note."""
    if provenance is None:
        return
    listed = {PROVENANCE, *provenance.files}
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.name not in listed)
    except OSError as error:
        raise MachineError(f"output {directory} cannot be listed: {reason(error)}") from error
    for name in filter(is_read_by_loaders, names):
        context.problems.add(
            name, f"{PROVENANCE} does not know it, and loaders read files of that name; expected no file that the "
            f"merge did not write"
        )  # fmt: skip
    ignored = [name for name in names if not is_read_by_loaders(name)]
    if ignored:
        context.notes.append(f"{len(ignored)} files beside the output were not looked at, such as {shown(ignored[0])}")


class _OutputVerification:
    """The checks that read weights, spread over threads: file digests, and whether targets are finite."""

    def __init__(self, directory: Path, provenance: Provenance | None, context: VerifyContext) -> None:
        self.directory, self.provenance, self.context = directory, provenance, context
        self.problems, self.tally = context.problems, context.tally
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self.done = self.total = 0

    def run(self, names: list[str]) -> None:
        tasks: list[tuple[str, Callable[[], None]]] = []
        with ExitStack() as stack:
            for name in names:
                tasks += self._digest_task(name)
            checkpoint = self._open_checkpoint(stack)
            documents = self._documents(checkpoint)
            if checkpoint is not None:
                tasks += self._target_checks(checkpoint)
                sizes = ModelSizes.of(checkpoint)
                self.context.notes.extend(contradictions(documents, sizes))
            calls = [partial(self._run_task, name, task) for name, task in tasks]
            run_in_threads(calls, self.context, self.stop, lambda: (self.done, self.total))

    def _run_task(self, name: str, task: Callable[[], None]) -> None:
        try:
            task()
        except MachineError:
            self.stop.set()
            raise
        except SourceChanged:
            self.problems.add(name, "changed while it was read; verify it again once nothing writes to it")
        except SourceError as error:
            self.problems.add(name, str(error))
        except MemoryError as error:
            raise MachineError(out_of_memory()) from error

    def _digest_task(self, name: str) -> list[tuple[str, Callable[[], None]]]:
        assert self.provenance is not None
        expected = self.provenance.files[name]
        if expected is None:
            return []
        with suppress(OSError):
            self.total += os.stat(self.directory / name).st_size
        return [(name, partial(self._check_digest, name, expected))]

    def _check_digest(self, name: str, expected: str) -> None:
        from blake3 import blake3

        source = SourceFile(resolve_inside(LABEL, self.directory, name), LABEL, self.tally)
        try:
            hasher = blake3(max_threads=self.context.threads if source.size >= LARGE else 1)
            buffer = memoryview(bytearray(min(STEP, source.size)))
            for start in range(0, source.size, STEP):
                if self.stop.is_set():
                    return
                piece = buffer[: min(STEP, source.size - start)]
                source.read_into(piece, start)
                hasher.update(piece)
                with self._lock:
                    self.done += len(piece)
            source.check_unchanged()
        finally:
            source.close()
        digest = hasher.hexdigest()
        if digest != expected:
            self.problems.add(
                name, f"its BLAKE3 is {digest}, {PROVENANCE} says {expected} ({source.size} bytes); it was changed"
            )

    def _open_checkpoint(self, stack: ExitStack) -> Checkpoint | None:
        """Open the output as a checkpoint; None unless its headers, index and config are sound."""
        directory, problems = self.directory, self.problems
        single, index = (exists(directory / name) for name in (WEIGHTS, INDEX))
        if not single and not index:
            problems.add(WEIGHTS, f"is missing, and so is {INDEX}; expected one of them")
            return None
        sound = True
        files = self.provenance.files if self.provenance is not None else ()
        for name in sorted(entry for entry in files if entry.endswith(SAFETENSORS.suffix)):
            if name == os.path.basename(name) and _fault_of_file(directory, name) is None:
                sound &= self._passes(name, partial(self._read_header, name))
        sound &= self._passes(CONFIG, self._read_config)
        if not sound or any(_fault_of_file(directory, n) for n in (CONFIG, WEIGHTS if single else INDEX)):
            return None
        checkpoints: list[Checkpoint] = []
        if not self._passes(
            WEIGHTS if single else INDEX, lambda: checkpoints.append(open_checkpoint(LABEL, directory, self.tally))
        ):
            return None
        checkpoint = stack.enter_context(checkpoints[0])
        used = {shard.name for shard in checkpoint.shards}
        for name in files:
            if name.endswith(SAFETENSORS.suffix) and name not in used:
                problems.add(name, "is a weights file that no index names, so that no loader reads it")
        return checkpoint

    def _documents(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """The parsed small files, by name. Files that cannot be loaded are added to the problems."""
        documents: dict[str, Any] = {}
        record = None if self.provenance is None else self.provenance.record
        families = [owner.architecture for owner in (checkpoint, record) if owner is not None]
        read = read_small_file if all(family.lists_tensors for family in families[:1]) else read_any_small_file
        for name in CHECKED_FILES:
            listed = self.provenance is None or name in self.provenance.files
            if listed and _fault_of_file(self.directory, name) is None:
                self._passes(name, partial(self._read_small_file, name, documents, read))
        return {name: document for name, document in documents.items() if document is not None}

    def _read_small_file(self, name: str, documents: dict[str, Any], read: Callable[[str, bytes, str], Any]) -> None:
        limit = MAX_TEXT if read is read_small_file else limit_of(name)
        data = read_whole(LABEL, self.directory, name, self.tally, limit)
        documents[name] = read(name, data, f"output {self.directory / name}")

    def _read_header(self, name: str) -> None:
        open_shard(LABEL, self.directory, name, self.tally).source.close()

    def _read_config(self) -> None:
        where = f"output {self.directory / CONFIG}"
        text = read_whole(LABEL, self.directory, CONFIG, self.tally)
        config = load_json(text, where, "config")
        architecture_of(config).counts(config, where)

    def _passes(self, name: str, check: Callable[[], object]) -> bool:
        try:
            check()
        except MachineError:
            raise
        except HsaError as error:
            self.problems.add(name, str(error))
            return False
        return True

    def _target_checks(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[], None]]]:
        problems, record = self.problems, None if self.provenance is None else self.provenance.record
        problems.add_all(CONFIG, output_checks.structure_faults(checkpoint))
        if record is not None:
            problems.add_all(PROVENANCE, record_checks.setting_faults(record))
            problems.add_all(PROVENANCE, record_checks.target_faults(record, checkpoint))
        for ref, place, groups in output_checks.merged_tensors(checkpoint, record):
            name = checkpoint.shards[ref.shard].name
            self.total += ref.nbytes
            yield name, partial(self._check_finite, checkpoint, name, place, ref, groups)

    def _check_finite(
        self, checkpoint: Checkpoint, name: str, place: TensorPlace | None, ref: TensorRef, heads: int
    ) -> None:
        if not self.stop.is_set():
            self.problems.add_all(name, output_checks.finite_faults(checkpoint, place, ref, heads))
            with self._lock:
                self.done += ref.nbytes
