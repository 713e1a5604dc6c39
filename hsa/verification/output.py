"""An output against its provenance, its parts against one another, and with sources against the merge made again."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from hsa.architectures import whisper
from hsa.architectures.base import Projection
from hsa.errors import HsaError, MachineError, SourceChanged, SourceError, shown
from hsa.option_names import option, with_current_spelling
from hsa.outputs import provenance, record_checks
from hsa.outputs.provenance import Provenance
from hsa.sources.checkpoint import (
    CONFIG,
    INDEX,
    SAFETENSORS,
    WEIGHTS,
    Checkpoint,
    open_checkpoint,
    open_shard,
    read_whole,
    resolve_inside,
)
from hsa.sources.identity import is_snapshot
from hsa.sources.roles import Role
from hsa.sources.small_file_checks import CHECKED_FILES, ModelSizes, contradictions, read_small_file
from hsa.sources.tensor_places import TensorRef
from hsa.system.descriptors import reason
from hsa.system.fsio import SourceFile, exists
from hsa.system.manifest import PROVENANCE
from hsa.system.strict_json import load_json
from hsa.system.threads import out_of_memory
from hsa.verification import output_checks
from hsa.verification.output_checks import STEP
from hsa.verification.problems import Problems
from hsa.verification.report import Verified
from hsa.verification.source_checks import GivenSources, Work
from hsa.verification.unlisted_files import changes_what_is_loaded

LARGE = 64 << 20
"""Bytes of a file from which on several threads digest it."""

LABEL = cast(Role, "output")
"""What messages call the checkpoint that is verified, in the place of a source's role."""


def verify_output(directory: Path, given: GivenSources | None, work: Work) -> Verified:
    """Check an output's directory, links resolved; with sources, merge them again and compare every byte."""
    found = _provenance(directory, work.problems)
    names = [] if found is None else list(_files(directory, found, work.problems))
    _listing(directory, found, work)
    _OutputVerification(directory, found, work).go(names)
    if found is not None and not all(found.files.values()):
        work.notes.append(
            "without whole-file digests it cannot be told whether copied tensors and small files are what was written"
            + ("" if given else f"; give {option('sources')} to compare them")
        )
    compared = False
    if given and found is None:
        work.notes.append(f"nothing was recomputed, for {PROVENANCE} does not say how")
    elif given and found is not None:
        from hsa.verification.recompute import recompute

        compared = recompute(directory, found, given, work)
    return Verified(None if found is None else found.record, len(names) + (found is not None), compared)


def _provenance(directory: Path, problems: Problems) -> Provenance | None:
    wrong = _irregular(directory, PROVENANCE)
    if not os.path.lexists(directory / PROVENANCE):
        wrong = (
            "is missing: hsa did not write this checkpoint, or its record was removed. Nothing says what it should "
            "hold, so its headers, names, shapes and attention tensors alone were checked; give an output of hsa"
        )
    if wrong is not None:
        problems.add(PROVENANCE, wrong)
        return None
    try:
        return provenance.load(directory)
    except SourceError as error:
        problems.add(PROVENANCE, str(error))
        return None


def _irregular(directory: Path, name: str) -> str | None:
    """What is wrong with a file before it is opened; None for a regular file, or a link that the Hub's cache made."""
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


def _files(directory: Path, found: Provenance, problems: Problems) -> Iterator[str]:
    """The files of the provenance that can be read."""
    for name in found.files:
        if name != os.path.basename(name) or name in ("", ".", "..", PROVENANCE) or "\0" in name:
            problems.add(PROVENANCE, f"lists the file {shown(name)}; expected the plain name of another file")
            continue
        wrong = _irregular(directory, name)
        if wrong is None:
            yield name
        else:
            problems.add(name, wrong)


def _listing(directory: Path, found: Provenance | None, work: Work) -> None:
    """What lies in the directory and was not written: a problem where a loader would read it, else a note."""
    if found is None:
        return
    known = {PROVENANCE, *found.files}
    try:
        entries = sorted(entry.name for entry in os.scandir(directory) if entry.name not in known)
    except OSError as error:
        raise MachineError(f"output {directory} cannot be listed: {reason(error)}") from error
    for name in filter(changes_what_is_loaded, entries):
        work.problems.add(
            name, f"{PROVENANCE} does not know it, and loaders read files of that name; expected no file that the "
            f"merge did not write"
        )  # fmt: skip
    aside = [name for name in entries if not changes_what_is_loaded(name)]
    if aside:
        work.notes.append(f"{len(aside)} files beside the output were not looked at, such as {shown(aside[0])}")


class _OutputVerification:
    """The checks that read weights, spread over threads: digests of files, and finite targets."""

    def __init__(self, directory: Path, found: Provenance | None, work: Work) -> None:
        self.directory, self.found, self.work = directory, found, work
        self.problems, self.tally = work.problems, work.tally
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self.done = self.total = 0

    def go(self, names: list[str]) -> None:
        tasks: list[tuple[str, Callable[[], None]]] = []
        with ExitStack() as stack:
            for name in names:
                tasks += self._digest_task(name)
            checkpoint = self._open(stack)
            documents = self._documents()
            if checkpoint is not None:
                tasks += self._checks(checkpoint)
                sizes = ModelSizes.of(checkpoint.config, checkpoint.tensors.get(whisper.EMBEDDING))
                self.work.notes.extend(contradictions(documents, sizes))
            pool = stack.enter_context(ThreadPoolExecutor(self.work.threads))
            stack.callback(self.stop.set)
            ahead: set[Future[None]] = {
                pool.submit(with_current_spelling(self._guarded), name, task) for name, task in tasks
            }
            while ahead:
                finished, ahead = wait(ahead, timeout=0.02)
                for future in finished:
                    future.result()
                self.work.memory.sample()
                if self.work.progress is not None:
                    self.work.progress(self.done, self.total)

    def _guarded(self, name: str, task: Callable[[], None]) -> None:
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
        assert self.found is not None
        expected = self.found.files[name]
        if expected is None:
            return []
        with suppress(OSError):
            self.total += os.stat(self.directory / name).st_size
        return [(name, partial(self._check_digest, name, expected))]

    def _check_digest(self, name: str, expected: str) -> None:
        from blake3 import blake3

        source = SourceFile(resolve_inside(LABEL, self.directory, name), LABEL, self.tally)
        try:
            hasher = blake3(max_threads=self.work.threads if source.size >= LARGE else 1)
            buffer = memoryview(bytearray(min(STEP, source.size)))
            for start in range(0, source.size, STEP):
                if self.stop.is_set():
                    return
                part = buffer[: min(STEP, source.size - start)]
                source.read_into(part, start)
                hasher.update(part)
                with self._lock:
                    self.done += len(part)
            source.check_unchanged()
        finally:
            source.close()
        digest = hasher.hexdigest()
        if digest != expected:
            self.problems.add(
                name, f"its BLAKE3 is {digest}, {PROVENANCE} says {expected} ({source.size} bytes); it was changed"
            )

    def _open(self, stack: ExitStack) -> Checkpoint | None:
        """The output as a checkpoint, when its headers, index and config are sound."""
        directory, problems = self.directory, self.problems
        single, index = (exists(directory / name) for name in (WEIGHTS, INDEX))
        if not single and not index:
            problems.add(WEIGHTS, f"is missing, and so is {INDEX}; expected one of them")
            return None
        sound = True
        listed = self.found.files if self.found is not None else ()
        for name in sorted(entry for entry in listed if entry.endswith(SAFETENSORS.suffix)):
            if name == os.path.basename(name) and _irregular(directory, name) is None:
                sound &= self._sound(name, partial(self._read_header, name))
        sound &= self._sound(CONFIG, self._read_config)
        if not sound or any(_irregular(directory, n) for n in (CONFIG, WEIGHTS if single else INDEX)):
            return None
        opened: list[Checkpoint] = []
        if not self._sound(
            WEIGHTS if single else INDEX, lambda: opened.append(open_checkpoint(LABEL, directory, self.tally))
        ):
            return None
        checkpoint = stack.enter_context(opened[0])
        used = {shard.name for shard in checkpoint.shards}
        for name in listed:
            if name.endswith(SAFETENSORS.suffix) and name not in used:
                problems.add(name, "is a weights file that no index names, so that no loader reads it")
        return checkpoint

    def _documents(self) -> dict[str, Any]:
        """What the small files say, by name; those that cannot be loaded are problems."""
        documents: dict[str, Any] = {}
        for name in CHECKED_FILES:
            if (self.found is None or name in self.found.files) and _irregular(self.directory, name) is None:
                self._sound(name, partial(self._read_small_file, name, documents))
        return documents

    def _read_small_file(self, name: str, documents: dict[str, Any]) -> None:
        data = read_whole(LABEL, self.directory, name, self.tally)
        documents[name] = read_small_file(name, data, f"output {self.directory / name}")

    def _read_header(self, name: str) -> None:
        open_shard(LABEL, self.directory, name, self.tally).source.close()

    def _read_config(self) -> None:
        where = f"output {self.directory / CONFIG}"
        text = read_whole(LABEL, self.directory, CONFIG, self.tally)
        whisper.architecture(load_json(text, where, "config"), where)

    def _sound(self, name: str, look: Callable[[], object]) -> bool:
        try:
            look()
        except MachineError:
            raise
        except HsaError as error:
            self.problems.add(name, str(error))
            return False
        return True

    def _checks(self, checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[], None]]]:
        problems, record = self.problems, None if self.found is None else self.found.record
        problems.add_all(CONFIG, output_checks.keys(checkpoint))
        if record is not None:
            problems.add_all(PROVENANCE, record_checks.setting_faults(record))
            problems.add_all(PROVENANCE, record_checks.target_faults(record, checkpoint))
        heads = whisper.architecture(checkpoint.config, LABEL).heads
        given = None if record is None else record.parameters.get("num_heads")
        for projection, ref in record_checks.checkpoint_targets(checkpoint, output_checks.preset_of(record)):
            count = given if isinstance(given, int) and given > 0 else heads[projection.stack]
            name = checkpoint.shards[ref.shard].name
            self.total += ref.nbytes
            yield name, partial(self._check_finite, checkpoint, name, projection, ref, count)

    def _check_finite(
        self, checkpoint: Checkpoint, name: str, projection: Projection, ref: TensorRef, heads: int
    ) -> None:
        if not self.stop.is_set():
            self.problems.add_all(name, output_checks.finite(checkpoint, projection, ref, heads))
            with self._lock:
                self.done += ref.nbytes
