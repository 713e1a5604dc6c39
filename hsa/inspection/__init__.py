"""`hsa.inspect`: what a merge of three sources would select and why, or what a finished output says of itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from hsa import provenance
from hsa._version import __version__
from hsa.checkpoint import ROLES, Checkpoint, Role, Sources
from hsa.config import MergeConfig, PerTensor, Preset, keep_count, layer_coefficient
from hsa.errors import HsaError, MismatchError, ProvenanceError, RequestError
from hsa.fsio import Tally
from hsa.hub import Hub, Want, find_id
from hsa.inspection.measure import Buffers, Measured, elsewhere, elsewhere_bytes, measure
from hsa.inspection.model import Agreement, Energy, Geometry, Inspection, Recorded, TensorInspection, in_order
from hsa.plan import find_targets
from hsa.provenance import Provenance, TargetRecord, tensors_digest
from hsa.target import TIE_RISK, Target, of_selected, select
from hsa.whisper import group_of

__all__ = ["Agreement", "Energy", "Geometry", "Inspection", "TensorInspection", "inspect"]

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]

NO_SOURCES = (
    "cosines, relative sizes and the share of energy need the sources: give base, primary and secondary too"
)
ROOTS = (
    "a provenance holds norms, not their squares: heads whose squares differ in the last bit or two may look tied here "
    "at a k other than the recorded one"
)


def inspect(
    output: PathLike | None = None,
    *,
    base: PathLike | None = None,
    primary: PathLike | None = None,
    secondary: PathLike | None = None,
    k: PerTensor | None = None,
    lam: PerTensor | None = None,
    alpha: PerTensor | None = None,
    targets: Preset | None = None,
    num_heads: int | None = None,
    num_layers: int | None = None,
    energy: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """Scores, selection, margins and task vectors of every head, of three sources, of a finished output, or of both.

    Args:
        output: a directory that `hsa.merge` wrote; alone, nothing but its provenance is read.
        base, primary, secondary: as for `hsa.merge`, all or none. With `output` they must be what it was made from, and
            tell what a provenance does not hold: cosines, relative sizes, energies.
        k, lam, alpha: the selection to show, by default the output's own, or that of `hsa.merge`.
        targets, num_heads, num_layers: as for `hsa.merge`; an output has its own.
        energy: read the whole of local sources for the share of each task vector inside the targets. Of sources on the
            Hub only targets are fetched, and it is left out.
        progress: called now and then with bytes done and bytes in all.

    Scores are those of exact numerics, bit for bit those of a merge; memory holds one target at a time.

    Raises RequestError, SourceError, MachineError or a subclass; MismatchError where the sources are not the output's.
    """
    given: dict[Role, PathLike | None] = {"base": base, "primary": primary, "secondary": secondary}
    lacking = [role for role, path in given.items() if path is None]
    if output is None and len(lacking) == len(ROLES):
        raise RequestError("there is nothing to inspect; give an output, or base, primary and secondary")
    if lacking and len(lacking) < len(ROLES):
        raise RequestError(f"{' and '.join(lacking)} not given; base, primary and secondary are needed together")
    paths = {role: path for role, path in given.items() if path is not None}
    if output is None:
        defaults = MergeConfig()
        config = MergeConfig(
            k=defaults.k if k is None else k,
            lam=defaults.lam if lam is None else lam,
            alpha=defaults.alpha if alpha is None else alpha,
            targets=defaults.targets if targets is None else targets,
            num_heads=num_heads,
            num_layers=num_layers,
        )
        return _from_sources(paths, config, None, None, energy, progress)
    if targets is not None or num_heads is not None or num_layers is not None:
        raise RequestError("targets, num_heads and num_layers are recorded in an output; leave them out")
    directory = Path(output).expanduser()
    tally = Tally()
    record = provenance.load(directory)
    tally.add_read("output", (directory / provenance.PROVENANCE).stat().st_size)
    config = _recorded_config(record, directory)
    changed = {"k": k, "lam": lam, "alpha": alpha}
    asked = _changed(config, {name: value for name, value in changed.items() if value is not None})
    if paths:
        return _from_sources(paths, asked, record, directory, energy, progress)
    return _from_output(record, directory, config, asked, tally)


# --- from an output alone -----------------------------------------------------------------------------------------


def _recorded_config(record: Provenance, directory: Path) -> MergeConfig:
    try:
        return MergeConfig.from_dict(record.record.parameters)
    except (HsaError, TypeError) as error:
        raise ProvenanceError(f"{directory / provenance.PROVENANCE}: {error}; it is no provenance of hsa") from error


def _changed(config: MergeConfig, values: Mapping[str, PerTensor]) -> MergeConfig:
    from dataclasses import replace

    return replace(config, **values) if values else config  # type: ignore[arg-type]


def _layers(config: MergeConfig, records: Sequence[TargetRecord]) -> dict[str, int]:
    """L of each stack: a merge is refused unless every layer that the config promises has its targets."""
    found: dict[str, int] = {}
    for each in records:
        stack = each.projection.stack
        found[stack] = max(found.get(stack, 0), each.projection.layer + 1)
    return {stack: config.num_layers or count for stack, count in found.items()}


def _from_output(
    record: Provenance, directory: Path, config: MergeConfig, asked: MergeConfig, tally: Tally
) -> Inspection:
    layers = _layers(config, record.record.targets)
    tensors = [_recorded_tensor(each, layers, config, asked, directory) for each in record.record.targets]
    notes = [NO_SOURCES]
    if asked.k != config.k:
        notes.append(ROOTS)
    return Inspection(
        title=directory.resolve().name,
        origin="output",
        numerics=config.numerics,
        written_by={**record.record.program, "libraries": dict(record.record.libraries)},
        parameters=_parameters(record, asked),
        sources={role: source.as_dict() for role, source in record.record.sources.items()},
        tensors=in_order(tensors),
        energy=None,
        files=record.files,
        bytes_read=tally.read,
        notes=tuple(notes),
        warnings=(*_close(tensors), *_unlike(tensors, record.record.targets, config, layers, asked)),
    )


def _recorded_tensor(
    each: TargetRecord, layers: Mapping[str, int], config: MergeConfig, asked: MergeConfig, directory: Path
) -> TensorInspection:
    name, stack = each.projection.name, each.projection.stack
    try:
        k, lam, alpha = asked.of("k", name), asked.of("lam", name), asked.of("alpha", name)
        own = config.of("k", name), config.of("lam", name), config.of("alpha", name)
    except RequestError as error:
        raise ProvenanceError(f"{directory / provenance.PROVENANCE}: {error}") from error
    selected, margin, keep = each.selected, each.margin, each.keep
    if k != own[0]:
        keep = keep_count(k, each.heads)
        chosen = select(each.scores, keep).selected
        selected, margin = chosen, of_selected([score * score for score in each.scores], chosen).margin
    coefficient = each.coefficient
    if (lam, alpha) != own[1:]:
        coefficient = layer_coefficient(lam, alpha, each.projection.layer, layers[stack])
    return TensorInspection(
        name=each.name,
        projection=each.projection,
        shape=each.shape,
        dtype=each.code,
        heads=each.heads,
        layers=layers[stack],
        k=k,
        lam=lam,
        alpha=alpha,
        keep=keep,
        coefficient=coefficient,
        scores=each.scores,
        squared=None,
        selected=selected,
        margin=margin,
        geometry=None,
        recorded=Recorded(each.keep, each.selected),
    )


def _unlike(
    tensors: Sequence[TensorInspection],
    records: Sequence[TargetRecord],
    config: MergeConfig,
    layers: Mapping[str, int],
    asked: MergeConfig,
) -> Iterator[str]:
    """What in a record does not follow from its own parameters: nothing, in a record that hsa wrote."""
    for each in records:
        name, p = each.projection.name, each.projection
        keep = keep_count(config.of("k", name), each.heads)
        value = layer_coefficient(config.of("lam", name), config.of("alpha", name), p.layer, layers[p.stack])
        if each.keep != keep or abs(each.coefficient - value) > 1e-12:
            yield (
                f"{each.name}: {each.keep} heads kept and lambda_i {each.coefficient!r} are recorded, its parameters "
                f"give {keep} and {value!r}; shown is what is recorded"
            )
            return


# --- from sources -------------------------------------------------------------------------------------------------


def _from_sources(
    paths: Mapping[Role, PathLike],
    config: MergeConfig,
    record: Provenance | None,
    directory: Path | None,
    energy: bool,
    progress: Progress | None,
) -> Inspection:
    tally, hub = Tally(), Hub(bars=progress is not None)
    remote = [role for role, path in paths.items() if find_id(path)]
    with ExitStack() as stack:
        if remote:  # whatever headers can refuse is refused before targets are fetched
            with ExitStack() as trial:
                find_targets(config, _open(paths, config, Tally(), hub, trial, headers_only=True))
        sources = _open(paths, config, tally, hub, stack, headers_only=False)
        found = find_targets(config, sources)
        whole = energy and not remote
        total = sum(target.ref(role).nbytes for target in found for role in ROLES)
        total += elsewhere_bytes(sources, found) if whole else 0
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        buffers = Buffers()
        measured = dict(zip((t.projection.name for t in found), measure(sources, found, buffers, step), strict=True))
        layers = _stack_layers(config, sources)
        recorded = {} if record is None else {t.projection.name: t for t in record.record.targets}
        warnings: list[str] = []
        if record is not None and directory is not None:
            _check_sources(record, directory, found, measured)
            warnings += _unlike_record(recorded, found, measured, _recorded_config(record, directory))
        tensors = [
            _tensor(target, measured[target.projection.name], layers, config, recorded.get(target.projection.name))
            for target in found
        ]
        energies = _energies(sources, found, tensors, buffers, step) if whole else None
        sources.check_unchanged()
        identities = {source.role: _identity(source) for source in sources}
    notes = [*hub.notes, *(note for source in sources for note in source.notes)]
    if remote and energy:
        notes.append(
            f"the share of energy is left out: of {' and '.join(remote)}, on the Hub, only targets were fetched; "
            f"download the models and give their directories"
        )
    warnings += [*_close(tensors), *_still(measured)]
    return Inspection(
        title=directory.resolve().name if directory else " + ".join(str(identities[r]["id"]) for r in ROLES[1:]),
        origin="output and sources" if directory else "sources",
        numerics=config.numerics,
        written_by=None
        if record is None
        else {**record.record.program, "libraries": dict(record.record.libraries)},
        parameters=config.as_dict() if record is None else _parameters(record, config),
        sources=identities,
        tensors=in_order(tensors),
        energy=energies,
        files=None if record is None else record.files,
        bytes_read=tally.read,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _open(
    paths: Mapping[Role, PathLike], config: MergeConfig, tally: Tally, hub: Hub, stack: ExitStack, *, headers_only: bool
) -> Sources:
    want = Want(need="targets", preset=config.targets, headers_only=headers_only)

    def opened(role: Role, base: Checkpoint | None = None) -> Checkpoint:
        return stack.enter_context(hub.open(role, paths[role], tally, want, None, base))

    base = opened("base")
    return Sources(base, opened("primary", base), opened("secondary", base))


def _stack_layers(config: MergeConfig, sources: Sources) -> dict[str, int]:
    from hsa.whisper import architecture

    counts = architecture(sources.primary.config, "primary").layers
    return {stack: config.num_layers or count for stack, count in counts.items()}


def _identity(source: Checkpoint) -> dict[str, object]:
    return {
        "id": source.identity.id,
        "revision": source.identity.revision,
        "format": source.kind,
        "tensors": len(source.tensors),
    }


def _tensor(
    target: Target,
    found: Measured,
    layers: Mapping[str, int],
    config: MergeConfig,
    recorded: TargetRecord | None,
) -> TensorInspection:
    name = target.projection.name
    selection = select(found.squared, target.keep)
    squared: tuple[float, ...] | None = found.squared
    scores, selected, margin = selection.scores, selection.selected, selection.margin
    if recorded is not None and config.numerics == "reference":  # its scores are torch's own, and so is its choice
        squared, scores = None, recorded.scores
        selected, margin = recorded.selected, recorded.margin
        if target.keep != recorded.keep:
            selected = select(scores, target.keep).selected
            margin = of_selected([score * score for score in scores], selected).margin
    return TensorInspection(
        name=target.primary.name if recorded is None else recorded.name,
        projection=target.projection,
        shape=target.shape,
        dtype=target.out_code if recorded is None else recorded.code,
        heads=target.heads,
        layers=layers[target.projection.stack],
        k=target.k,
        lam=config.of("lam", name),
        alpha=config.of("alpha", name),
        keep=target.keep,
        coefficient=target.coefficient,
        scores=scores,
        squared=squared,
        selected=selected,
        margin=margin,
        geometry=found.geometry,
        recorded=None if recorded is None else Recorded(recorded.keep, recorded.selected),
    )


def _check_sources(
    record: Provenance, directory: Path, targets: Sequence[Target], measured: Mapping[str, Measured]
) -> None:
    """MismatchError unless these are the target bytes that the output was made from."""
    for role in ROLES:
        lines = []
        for target in targets:
            ref = target.ref(role)
            lines.append((target.projection.name, ref.code, ref.shape, measured[target.projection.name].digests[role]))
        if tensors_digest(lines) != record.record.sources[role].targets:
            was = record.record.sources[role].identity.id
            raise MismatchError(
                f"{role}: its target tensors are not those that {directory} was made from ({was}); give that source, "
                f"or inspect the sources without the output"
            )


def _unlike_record(
    recorded: Mapping[str, TargetRecord],
    targets: Sequence[Target],
    measured: Mapping[str, Measured],
    config: MergeConfig,
) -> Iterator[str]:
    """Recorded heads that the sources do not give; only exact numerics can be repeated here."""
    if config.numerics == "reference":
        return
    for target in targets:
        own = recorded.get(target.projection.name)
        if own is None:
            continue
        keep = keep_count(config.of("k", target.projection.name), target.heads)
        again = select(measured[target.projection.name].squared, keep)
        if again.selected != own.selected:
            yield (
                f"{own.name}: heads {list(own.selected)} are recorded and the sources give {list(again.selected)} "
                f"(margin {again.margin}); another backend may differ at so small a margin, else this is a bug"
            )


def _energies(
    sources: Sources,
    targets: Sequence[Target],
    tensors: Sequence[TensorInspection],
    buffers: Buffers,
    step: Callable[[int], None],
) -> tuple[Energy, ...]:
    outside = elsewhere(sources, targets, buffers, step)
    energies = []
    for role in ROLES[1:]:
        groups = dict(outside[role].groups)
        inside = selected = 0.0
        for tensor in tensors:
            assert tensor.geometry is not None
            heads = tensor.geometry.primary if role == "primary" else tensor.geometry.secondary
            group = " ".join(group_of(tensor.projection.name))
            groups[group] = groups.get(group, 0.0) + sum(heads)
            inside += sum(heads)
            selected += sum(heads[head] for head in tensor.selected)
        total = inside + sum(outside[role].groups.values())
        ordered = dict(sorted(groups.items(), key=lambda item: -item[1]))
        energies.append(Energy(role, total, inside, selected, ordered, tuple(outside[role].skipped)))
    return tuple(energies)


# --- of both ------------------------------------------------------------------------------------------------------


def _parameters(record: Provenance, asked: MergeConfig) -> dict[str, object]:
    """The recorded parameters, those of the shown selection in their places."""
    shown = {key: value for key, value in asked.as_dict().items() if key in ("k", "lambda", "alpha")}
    return {**record.record.parameters, **shown}


def _close(tensors: Sequence[TensorInspection]) -> Iterator[str]:
    close = [tensor for tensor in tensors if tensor.margin is not None and tensor.margin < TIE_RISK]
    if close:
        yield (
            f"{len(close)} tensors have a margin below {TIE_RISK:g}, such as {close[0].name}: another backend or "
            f"machine could select other heads there"
        )


def _still(measured: Mapping[str, Measured]) -> Iterator[str]:
    for role in ROLES[1:]:
        if not any(found.moved[role] for found in measured.values()):
            yield f"base and {role} are equal on all {len(measured)} target tensors: is {role} a fine-tune of this base?"
