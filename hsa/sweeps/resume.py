"""Resume a sweep: find the points that an earlier run, killed or finished, completed in the directory.

`sweep` asks `ExistingPoints` for each point of its grid. A complete point that this run would build in the same way is
skipped. A damaged point is rebuilt. A point built with other settings is replaced with `overwrite`, and refused
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hsa.actions.patch import PatchSources
from hsa.actions.request import Request
from hsa.engine.source_norms import source_norms
from hsa.errors import DestinationError, HeaderError, PatchError, ProvenanceError, RequestError
from hsa.methods.geometry import Norms
from hsa.methods.tensors import TensorTask
from hsa.option_names import option
from hsa.outputs import sweep_index
from hsa.outputs.grid_point import GridPoint, axes
from hsa.outputs.patch_checks import require_sound
from hsa.outputs.patch_format import Distances, OtherPatchFormat
from hsa.outputs.patch_reader import SUFFIX, digest_range, is_patch, open_patch
from hsa.outputs.provenance import Provenance
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.record import Record
from hsa.outputs.recording import PROGRAM, libraries, source_record, tensors_digest
from hsa.outputs.source_record import SourceRecord
from hsa.outputs.sweep_index import SweepEntry, entry_of, is_point, point_of
from hsa.planning.tensor_digests import digest_by_ranges
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.sweeps.whole_points import has_patches
from hsa.system import fsio
from hsa.system.destinations import check_destination, check_replaceable, refuse_inside_output
from hsa.system.manifest import PROVENANCE
from hsa.system.memory import PeakMemory
from hsa.system.staging import STAGING
from hsa.system.threads import default_threads
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.problems import Problems
from hsa.verification.recompute import recompute
from hsa.verification.verify import verify

SWEEP_STAGING = f".sweep{STAGING}"


def check_directory(request: Request, sources: Sources) -> Path:
    """The directory of a sweep: new, empty, or an earlier sweep's. Raises DestinationError."""
    folders = [source.path for source in sources]
    directory = check_destination(request.output, folders, overwrite=False, adding=True)
    refuse_inside_output(directory / SWEEP_STAGING, f"output {directory}")
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    foreign = [name for name in names if name != SWEEP_STAGING and not is_point(directory / name)]
    index = sweep_index.JSON in names
    if index and not sweep_index.is_index(directory / sweep_index.JSON):
        raise DestinationError(f"{directory / sweep_index.JSON} is no index of a sweep; choose another output")
    if foreign and not index:
        raise DestinationError(
            f"output {directory} is no earlier sweep: it holds {', '.join(foreign[:3])} and no {sweep_index.JSON}; "
            f"choose another directory"
        )
    return directory


@dataclass
class ExistingPoints:
    """The points in a sweep's directory, checked one by one; `notes` name the damaged ones."""

    request: Request
    points: Sequence[GridPoint]
    patch_sources: PatchSources
    directory: Path
    tally: fsio.Tally
    notes: list[str] = field(default_factory=list)
    _digests: dict[Role, dict[str, str]] = field(default_factory=dict)
    _norms: dict[str, Norms] = field(default_factory=dict)

    def patch(self, point: GridPoint) -> SweepEntry | None:
        """The index entry of a point, if its patch is complete and this run would write the same; None if it must be
        built.

        Every byte is read. Raises DestinationError for a file that is no patch, or that was made with other settings
        and may not be overwritten.
        """
        path = self.directory / f"{point.name}{SUFFIX}"
        if not fsio.exists(path):
            return None
        self._check_kind(path, path.is_file())
        try:
            with ExitStack() as stack:
                patch = open_patch(path, self.tally, stack)
                require_sound(patch, self.patch_sources.sources.anchor_checkpoint)
                patch.check_rows()
                differences = self._differences(point, patch.record)
                if dict(patch.contents.files) != self.patch_sources.files:
                    differences.append("configs or tokenizer files")
                return None if self._must_rebuild(path, differences) else entry_of(point, patch)
        except OtherPatchFormat as error:
            raise DestinationError(f"{error}; choose another output") from error
        except (PatchError, HeaderError) as error:
            if not is_patch(path):
                raise DestinationError(
                    f"{path} is no patch of hsa, or too damaged to tell ({error}); move it away"
                ) from error
            self.notes.append(f"{path.name} is damaged and is rebuilt: {error}")
            return None

    def checkpoint(self, point: GridPoint) -> SweepEntry | None:
        """The same for a point with a checkpoint. Its merge is recomputed and every byte is compared."""
        path = self.directory / point.name
        if not fsio.exists(path):
            return None
        self._check_kind(path, path.is_dir() and fsio.exists(path / PROVENANCE))
        entry = self._check_checkpoint(point, path)
        if entry is None:  # refuse before anything is computed
            check_replaceable(path, overwrite=True)
        return entry

    def _check_checkpoint(self, point: GridPoint, path: Path) -> SweepEntry | None:
        try:
            provenance = load_provenance(path)
        except ProvenanceError:  # without a file list it cannot be replaced, which the caller reports
            return None
        differences = self._differences(point, provenance.record)
        if not differences:
            problems = verify(path, threads=self.request.threads).problems
            damage = [problem for problem in problems if problem.file in provenance.files]
            if damage:
                self.notes.append(f"{path.name} is damaged and is rebuilt: {damage[0].file}: {damage[0].what}")
                return None
            if problems:
                differences.append("list of files")
            elif not self._follows_from_sources(path, provenance):
                differences.append("copied tensors or small files")
        if self._must_rebuild(path, differences):
            return None
        distances_of_stacks = self._distances(point, provenance.record)
        return SweepEntry.of(point, path.name, provenance.record, provenance.digest, distances_of_stacks)

    def _follows_from_sources(self, path: Path, provenance: Provenance) -> bool:
        """Whether every byte of a checkpoint matches the recomputed merge. It was already verified without sources."""
        source_paths = SourcePaths(self.request.sources, self.request.ids or {})
        threads = self.request.threads or default_threads()
        context = VerifyContext(threads, fsio.Tally(), PeakMemory(), Problems(), [])
        recompute(path, provenance, source_paths, context)
        return not context.problems.all()

    def other_entries(self, *, full: bool) -> list[SweepEntry]:
        """The index entries of points that are not in this sweep's grid. Only their records are read, not their rows.

        Raises DestinationError if they were made from other sources.
        """
        entries: list[SweepEntry] = []
        own_names = {point.name if full else f"{point.name}{SUFFIX}" for point in self.points}
        for path in sorted(self.directory.iterdir()):
            if path.name in own_names or path.is_symlink() or not is_point(path) or path.name.startswith("."):
                continue
            try:
                with ExitStack() as stack:
                    patch = open_patch(path, self.tally, stack) if path.is_file() else None
                    provenance = load_provenance(path) if patch is None else None
                    record = provenance.record if provenance is not None else patch.record  # type: ignore[union-attr]
                    point = point_of(record)
                    if point.name != path.name.removesuffix(SUFFIX):
                        continue
                    if dict(record.sources) != self.source_records(point):
                        raise DestinationError(
                            f"output {self.directory} holds points of other sources, such as {path.name}; choose "
                            f"another directory for these"
                        )
                    if patch is not None:
                        entries.append(entry_of(point, patch))
                    elif provenance is not None:
                        distances_of_stacks = self._distances(point, provenance.record)
                        entries.append(
                            SweepEntry.of(point, path.name, provenance.record, provenance.digest, distances_of_stacks)
                        )
            except (PatchError, HeaderError, ProvenanceError, RequestError) as error:
                if isinstance(error, DestinationError):
                    raise
                self.notes.append(f"{path.name} is not listed, for it is damaged: {error}")
        return entries

    def _check_kind(self, path: Path, is_point: bool) -> None:
        if path.is_symlink() or not is_point:
            raise DestinationError(f"{path} stands there and is no point of a sweep; move it away")

    def _must_rebuild(self, path: Path, differences: list[str]) -> bool:
        """Whether a point must be rebuilt because of these differences. Raises DestinationError for any without
        `overwrite`."""
        if differences and not self.request.overwrite:
            raise DestinationError(
                f"{path} stands there and was made otherwise: its {', '.join(differences)} differ; choose another "
                f"output, or give {option('overwrite', True)} to replace it"
            )
        return bool(differences)

    def _differences(self, point: GridPoint, record: Record) -> list[str]:
        """The parts of a record that differ from this run: program, libraries, method version, parameters, sources."""
        pairs: tuple[tuple[str, object, object], ...] = (
            ("program", dict(record.program), PROGRAM),
            ("libraries", dict(record.libraries), libraries(record.method.libraries)),
            (f"version of method {record.method.name}", record.version, record.method.version),
            ("parameters", dict(record.parameters), {**point.settings.as_dict(), **self.patch_sources.settings}),
            ("sources", dict(record.sources), self.source_records(point)),
        )
        return [name for name, recorded, expected in pairs if recorded != expected]

    def source_records(self, point: GridPoint) -> dict[Role, SourceRecord]:
        """The records of the sources, with the digests of a point's targets. Each target is read only once per run."""
        tasks = self.patch_sources.targets(self._settings_like(point)).tasks
        records = {}
        for source in self.patch_sources.sources:
            digests = self._digests.setdefault(source.role, {})
            lines = []
            for task in tasks:
                ref, name = task.sources[source.role], task.name
                if name not in digests:
                    digests[name] = _source_digest(source, task)
                lines.append((name, ref.code, ref.shape, digests[name]))
            records[source.role] = source_record(source, tensors_digest(lines))
        return records

    def _settings_like(self, point: GridPoint) -> Any:
        """This run's settings with the targets of a point, which may come from an earlier run."""
        chosen = [axis.name for axis in axes(type(point.settings)) if axis.about.choices]
        return replace(self.request.settings, **{name: getattr(point.settings, name) for name in chosen})

    def _distances(self, point: GridPoint, record: Record) -> Distances:
        """The distances of a checkpoint from the models; empty for methods without patches, which list none."""
        if not has_patches(record.method, [point.settings]):
            return {}
        names = {target.canonical for target in record.targets}
        if not names <= self._norms.keys():
            targets = self.patch_sources.targets(self._settings_like(point))
            missing = [task for task in targets.tasks if task.name not in self._norms]
            self._norms.update(source_norms(targets, missing, self.patch_sources.sources))
        return record.method.distances([(target, self._norms[target.canonical]) for target in record.targets])


def _source_digest(source: Checkpoint, task: TensorTask) -> str:
    """The digest of a target's bytes in a source, in the form of records."""
    ref = task.sources[source.role]
    file = source.shards[ref.shard].source
    return digest_by_ranges(task, source.role, lambda start, count: digest_range(file, ref.offset + start, count))
