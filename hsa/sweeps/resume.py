"""What stands in a sweep's directory: whose points they are, and whether they are whole and as they would be."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsa.actions.patch import OpenedSources
from hsa.actions.request import Request
from hsa.architectures.base import Preset
from hsa.engine.source_norms import source_norms
from hsa.errors import DestinationError, HeaderError, PatchError, ProvenanceError, RequestError
from hsa.methods.config import MergeConfig
from hsa.methods.geometry import Norms
from hsa.methods.grid_point import GridPoint
from hsa.option_names import option
from hsa.outputs import distances, provenance, sweep_index
from hsa.outputs.distances import Distances
from hsa.outputs.patch_checks import require_sound
from hsa.outputs.patch_format import OtherPatchFormat
from hsa.outputs.patch_reader import SUFFIX, digest_range, is_patch, open_patch
from hsa.outputs.provenance import Record, SourceRecord
from hsa.outputs.recording import PROGRAM, libraries, source_record, tensors_digest
from hsa.outputs.sweep_index import SweepEntry, entry_of, is_point, point_of
from hsa.planning.plan import find_targets
from hsa.sources.roles import ROLES, Role
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.destinations import check_destination, check_replaceable, refuse_inside_output
from hsa.system.manifest import PROVENANCE
from hsa.system.staging import STAGING
from hsa.verification.verify import verify

SWEEP_STAGING = f".sweep{STAGING}"


def check_directory(request: Request, sources: Sources) -> Path:
    """The directory of a sweep: new, empty, or an earlier sweep's. Raises DestinationError."""
    folders = [source.path for source in sources]
    directory = check_destination(request.output, folders, overwrite=False, adding=True)
    refuse_inside_output(directory / SWEEP_STAGING, f"output {directory}")
    held = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    foreign = [name for name in held if name != SWEEP_STAGING and not is_point(directory / name)]
    index = sweep_index.JSON in held
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
    """The points in a sweep's directory, asked after one by one; `notes` are of damaged ones."""

    request: Request
    configs: Mapping[GridPoint, MergeConfig]
    opened: OpenedSources
    directory: Path
    tally: fsio.Tally
    notes: list[str] = field(default_factory=list)
    _digests: dict[Role, dict[str, str]] = field(default_factory=dict)
    _norms: dict[str, Norms] = field(default_factory=dict)

    def patch(self, point: GridPoint) -> SweepEntry | None:
        """The entry of a point whose patch stands and is what would be made; None where it is to be made.

        Every byte is looked at. Raises DestinationError for what is no patch, or was made otherwise and may not be
        overwritten.
        """
        place = self.directory / f"{point.name}{SUFFIX}"
        if not fsio.exists(place):
            return None
        self._check_kind(place, place.is_file())
        try:
            with ExitStack() as stack:
                patch = open_patch(place, self.tally, stack)
                require_sound(patch, self.opened.sources.primary)
                patch.check_rows()
                differs = self._differs(point, patch.record)
                if dict(patch.contents.files) != self.opened.files:
                    differs.append("configs or tokenizer files")
                return None if self._remake(place, differs) else entry_of(point, patch)
        except OtherPatchFormat as error:
            raise DestinationError(f"{error}; choose another output") from error
        except (PatchError, HeaderError) as error:
            if not is_patch(place):
                raise DestinationError(
                    f"{place} is no patch of hsa, or too damaged to tell ({error}); move it away"
                ) from error
            self.notes.append(f"{place.name} is damaged and made anew: {error}")
            return None

    def checkpoint(self, point: GridPoint) -> SweepEntry | None:
        """The same of a point's checkpoint; the merge is computed again and every byte compared."""
        place = self.directory / point.name
        if not fsio.exists(place):
            return None
        self._check_kind(place, place.is_dir() and fsio.exists(place / PROVENANCE))
        entry = self._verified(point, place)
        if entry is None:  # before anything is computed
            check_replaceable(place, overwrite=True)
        return entry

    def _verified(self, point: GridPoint, place: Path) -> SweepEntry | None:
        try:
            held = provenance.load(place)
        except ProvenanceError:  # it lists no files that could be replaced, which the caller says
            return None
        differs = self._differs(point, held.record)
        if not differs:
            threads = self.request.threads
            problems = verify(place, threads=threads).problems
            damage = [problem for problem in problems if problem.file in held.files]
            if damage:
                self.notes.append(f"{place.name} is damaged and made anew: {damage[0].file}: {damage[0].what}")
                return None
            ids = self.request.ids or {}
            given: dict[str, Any] = {role: self.request.sources[role] for role in ROLES}
            given |= {f"{role}_id": ids.get(role) for role in ROLES}
            if problems:
                differs.append("list of files")
            elif not verify(place, threads=threads, **given).ok:
                differs.append("copied tensors or small files")
        if self._remake(place, differs):
            return None
        return SweepEntry.of(point, place.name, held.record, held.digest, self._distances(point, held.record))

    def others(self, *, full: bool) -> list[SweepEntry]:
        """Points that this sweep does not make, of earlier ones: their records are read, not their bytes.

        Raises DestinationError where their sources are others.
        """
        found: list[SweepEntry] = []
        own = {point.name if full else f"{point.name}{SUFFIX}" for point in self.configs}
        for place in sorted(self.directory.iterdir()):
            if place.name in own or place.is_symlink() or not is_point(place) or place.name.startswith("."):
                continue
            try:
                with ExitStack() as stack:
                    patch = open_patch(place, self.tally, stack) if place.is_file() else None
                    held = provenance.load(place) if patch is None else None
                    record = held.record if held is not None else patch.record  # type: ignore[union-attr]
                    point = point_of(record)
                    if point.name != place.name.removesuffix(SUFFIX):
                        continue
                    if dict(record.sources) != self.sources(point.targets):
                        raise DestinationError(
                            f"output {self.directory} holds points of other sources, such as {place.name}; choose "
                            f"another directory for these"
                        )
                    if patch is not None:
                        found.append(entry_of(point, patch))
                    elif held is not None:
                        far = self._distances(point, held.record)
                        found.append(SweepEntry.of(point, place.name, held.record, held.digest, far))
            except (PatchError, HeaderError, ProvenanceError, RequestError) as error:
                if isinstance(error, DestinationError):
                    raise
                self.notes.append(f"{place.name} is not listed, for it is damaged: {error}")
        return found

    def _check_kind(self, place: Path, right: bool) -> None:
        if place.is_symlink() or not right:
            raise DestinationError(f"{place} stands there and is no point of a sweep; move it away")

    def _remake(self, place: Path, differs: list[str]) -> bool:
        """Whether a point is to be made anew for what differs; DestinationError where that may not be."""
        if differs and not self.request.overwrite:
            raise DestinationError(
                f"{place} stands there and was made otherwise: its {', '.join(differs)} differ; choose another output, "
                f"or give {option('overwrite', True)} to replace it"
            )
        return bool(differs)

    def _differs(self, point: GridPoint, record: Record) -> list[str]:
        """Which of program, libraries, parameters and sources are not those that the point would be made with."""
        pairs: tuple[tuple[str, object, object], ...] = (
            ("program", dict(record.program), PROGRAM),
            ("libraries", dict(record.libraries), libraries()),
            ("parameters", dict(record.parameters), {**self.configs[point].as_dict(), **self.opened.settings}),
            ("sources", dict(record.sources), self.sources(point.targets)),
        )
        return [name for name, one, two in pairs if one != two]

    def sources(self, preset: Preset) -> dict[Role, SourceRecord]:
        """The records of the sources, with the digests of a preset's targets; the targets are read for it once."""
        targets = find_targets(self._any(preset), self.opened.sources)
        found = {}
        for role in ROLES:
            source, known = self.opened.sources.of(role), self._digests.setdefault(role, {})
            lines = []
            for target in targets:
                ref, name = target.ref(role), target.projection.name
                if name not in known:
                    known[name] = digest_range(source.shards[ref.shard].source, ref.offset, ref.nbytes)
                lines.append((name, ref.code, ref.shape, known[name]))
            found[role] = source_record(source, tensors_digest(lines))
        return found

    def _any(self, preset: Preset) -> MergeConfig:
        config = self.request.config
        return MergeConfig(targets=preset, num_heads=config.num_heads, num_layers=config.num_layers)

    def _distances(self, point: GridPoint, record: Record) -> Mapping[str, Distances]:
        names = {target.projection.name for target in record.targets}
        if not names <= self._norms.keys():
            every = find_targets(self._any(point.targets), self.opened.sources)
            missing = [target for target in every if target.projection.name not in self._norms]
            self._norms.update(source_norms(missing, self.opened.sources))
        return distances.by_stack(
            distances.DistanceInputs(t.projection.stack, t.coefficient, t.selected, self._norms[t.projection.name])
            for t in record.targets
        )
