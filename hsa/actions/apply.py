"""`hsa.apply`: write the output of a merge from primary and a patch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hsa.actions.keywords import APPLY, run_options
from hsa.actions.signatures import declared_keywords
from hsa.architectures.base import PRESETS
from hsa.arguments import check_functions, check_paths, check_values
from hsa.engine.patch_apply import PatchApplier, PatchRows
from hsa.engine.pipeline import Options, execute
from hsa.errors import PatchError, RequestError, SourceError, shown
from hsa.methods.tensors import TensorRecord, TensorTask
from hsa.option_names import option
from hsa.outputs import patch_format
from hsa.outputs.card import unlinked
from hsa.outputs.metadata_files import CARD, write_metadata_files
from hsa.outputs.patch_checks import require_sound
from hsa.outputs.patch_reader import SUFFIX, Patch, digest_range, is_patch, open_patch
from hsa.outputs.provenance import changed_keys
from hsa.outputs.record import Record
from hsa.outputs.record_checks import settings_of_record
from hsa.outputs.recording import source_record, tensors_digest
from hsa.outputs.report import NO_DIGESTS, MergeReport
from hsa.planning.file_layout import Content, Copy, TensorContent, pack, pieces_of
from hsa.planning.tasks import MAX_TARGET
from hsa.planning.tensor_digests import digest_by_ranges
from hsa.sources.checkpoint import CONFIG, INDEX, Checkpoint, read_whole
from hsa.sources.hub.client import Hub
from hsa.sources.hub.needs import Needs
from hsa.sources.roles import ANCHOR
from hsa.sources.small_file_checks import CHECKED_FILES, ModelSizes, contradictions, read_small_file
from hsa.sources.small_files import PROCESSOR_FILES
from hsa.sources.structure import require_whole
from hsa.sources.tensor_places import TensorRef
from hsa.system import fsio
from hsa.system.destinations import check_destination
from hsa.system.digests import digest_of
from hsa.system.manifest import PROVENANCE
from hsa.system.memory import PeakMemory
from hsa.system.publish import StagedOutput
from hsa.system.signals import deferred
from hsa.system.strict_json import load_json
from hsa.system.threads import default_threads
from hsa.system.types import PathLike, Progress


@fsio.map_os_errors()
@declared_keywords(APPLY)
def apply(
    primary: PathLike,
    patch: PathLike,
    *,
    output: PathLike,
    assets: Sequence[PathLike] = (),
    progress: Progress | None = None,
    **keywords: Any,
) -> MergeReport:
    """Make the output of a merge from primary and its patch: exactly the bytes that `hsa.merge` would have written.

    Args:
        primary: the checkpoint directory, or id on the Hub, that the patch was made with.
        patch: a file of `hsa.merge_patch` or `hsa.sweep`.
        output: the directory to write; it appears whole or not at all.
        assets: directories to look in for tokenizer and processor files that the merge took from elsewhere than
            primary or its parent directory.
        {options}
        progress: called now and then with the bytes done and the total.

    Returns the report of the merge, with the route `apply`.

    Raises PatchError if the patch is damaged, was made for another primary, or contains what no merge writes (rows with
    NaN, heads or coefficients that do not follow from its parameters, other files). Raises RequestError if primary and
    patch are swapped, SourceError if a small file of the merge cannot be found unchanged, and what `hsa.merge` raises.
    After an error, nothing is left behind.

    Example:
        >>> report = hsa.apply("m1", "sweep/encoder-qkv_k0.6_lambda0.3_alpha0.2.safetensors", output="best")
    """
    started = time.perf_counter()
    check_paths(primary=primary, patch=patch, output=output)
    check_values(assets=assets)
    for folder in assets:
        check_paths(assets=folder)
    check_functions(progress=progress)
    how = run_options(APPLY, keywords)
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        _check_order(primary, patch)
        patch_file = open_patch(patch, tally, stack)
        require_sound(patch_file)
        settings = settings_of_record(patch_file.record)
        needs = Needs("whole", getattr(settings, "targets", PRESETS[-1]), assets=True)
        source = stack.enter_context(hub.open(ANCHOR, primary, tally, needs, None))
        folders = [_folder(path) for path in assets]
        kept_apart = [source.path, patch_file.source.path.resolve(), *folders]
        destination = check_destination(output, kept_apart, overwrite=how.overwrite)
        check_primary(patch_file, source)
        small_files, warnings = _small_files(patch_file, source, folders, tally)
        options = Options(how.threads or default_threads(), how.digest, how.sync)
        record, notes = apply_to(
            patch_file,
            source,
            small_files,
            destination,
            options,
            tally,
            memory,
            overwrite=how.overwrite,
            progress=progress,
        )
    return MergeReport(
        output=destination,
        seconds=time.perf_counter() - started,
        bytes_read=tally.read,
        bytes_read_by_source=dict(tally.read_by),
        bytes_written=tally.written,
        bytes_fetched=sum(hub.fetched.values()),
        peak_memory_bytes=memory.peak,
        backend="cpu",
        device="cpu",
        route="apply",
        settings=settings,
        tensors={target.name: target for target in record.targets},
        extent=record.method.recorded_summary(record.targets),
        notes=(*hub.notes, *source.notes, *(() if how.digest else (NO_DIGESTS,)), *notes),
        warnings=warnings,
        unlinked=unlinked(record),
    )


def apply_to(
    patch: Patch,
    primary: Checkpoint,
    small_files: Mapping[str, bytes],
    destination: Path,
    options: Options,
    tally: fsio.Tally,
    memory: PeakMemory,
    *,
    overwrite: bool,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Record, Sequence[str]]:
    """Write the output of an open patch and its open primary, which was checked, with these small files.

    Returns its record, and notes on what could not be removed of an earlier output.
    """
    contents = _tensors(patch, primary)
    files, index = pack(primary, contents, patch.record.parameters["max_shard_size"])
    patch.record.check_fits([*small_files, INDEX, CARD, *(file.name for file in files)])
    total = sum(file.size for file in files)
    step = None if progress is None else lambda done: progress(done, total)
    applier = PatchApplier(primary, patch.source, _rows(patch))
    with ExitStack() as stack:
        with deferred():
            staging = stack.enter_context(StagedOutput(destination, overwrite=overwrite, sync=options.sync))
        digests = execute(files, {primary.role: primary}, primary, applier, staging, options, tally, memory, step)
        patch.check_tensors(applier.digests)
        primary.check_unchanged()
        patch.source.check_unchanged()
        record = patch.record
        all_small_files = {**small_files, **({INDEX: index} if index is not None else {})}
        weights = {file.name: digests.get(file.name) for file in files}
        write_metadata_files(staging, record, all_small_files, weights, digest=options.digest, tally=tally)
        staging.publish()
        memory.sample()
    return record, staging.notes


def _tensors(patch: Patch, primary: Checkpoint) -> dict[str, TensorContent]:
    """Every tensor of primary by canonical name, in the order of its files: copied, or with rows of the patch."""
    targets = {target.canonical: target for target in patch.contents.targets}
    contents: dict[str, TensorContent] = {}
    for name, ref in sorted(primary.tensors.items(), key=lambda item: (item[1].shard, item[1].offset)):
        pieces: tuple[Content, ...] = (Copy(primary.role, ref),)
        if name in targets:
            pieces = pieces_of(_task(targets[name], primary.role, ref))
        contents[name] = TensorContent(ref.name, ref.code, ref.shape, pieces)
    return contents


def _task(target: TensorRecord, role: str, ref: TensorRef) -> TensorTask:
    """The task of a tensor that gets rows of a patch."""
    return TensorTask(
        name=target.canonical,
        place=target.place,
        layers=0,
        shape=ref.shape,
        partition=target.partition,
        sources={role: ref},
        anchor=role,
        out_code=ref.code,
        output_name=ref.name,
        passes=1,
        layout="heads",
    )


def _rows(patch: Patch) -> dict[str, PatchRows]:
    """Where a patch holds the rows of each target, by canonical name."""
    contents = patch.contents
    return {
        target.canonical: PatchRows(contents.touched(target), patch.start(target.name)) for target in contents.targets
    }


def check_primary(patch: Patch, primary: Checkpoint) -> None:
    """Raise PatchError unless the patch was made with this primary: its files' headers are compared, then its targets.

    Raise MismatchError if primary does not contain what its config.json describes.
    """
    require_whole(primary)
    recorded = patch.record.sources[ANCHOR]
    name = shown(recorded.identity.id, 200)
    where = f"patch {patch.source.path} was made for a primary named {name}, and {primary.path} is not it"
    for target in patch.contents.targets:
        ref = primary.tensors.get(target.canonical)
        tensor = None if ref is None else (ref.name, ref.code, ref.shape)
        if tensor != (target.name, target.code, target.shape):
            what = "is missing" if ref is None else f"is {ref.name} {ref.code} {list(ref.shape)}"
            raise PatchError(f"{where}: tensor {target.name} {target.code} {list(target.shape)} {what}")
        if ref is not None and ref.nbytes > MAX_TARGET:
            raise PatchError(
                f"{primary.file_of(ref)}: target tensor {ref.name} takes {ref.nbytes} bytes, at most {MAX_TARGET} are "
                f"held in memory; is it a {primary.architecture.title} checkpoint?"
            )
    digests = [_digest_line(target, primary) for target in patch.contents.targets]
    current = source_record(primary, tensors_digest(digests))
    if current.files != recorded.files or current.kind != recorded.kind:
        different = sorted(changed_keys(current.files, recorded.files)) or ["its weights"]
        raise PatchError(f"{where}: the size or the header of {', '.join(different[:3])} differs; give that primary")
    if current.targets != recorded.targets:
        raise PatchError(
            f"{where}: its target tensors hold other values (BLAKE3 {current.targets}, expected {recorded.targets})"
        )
    require_sound(patch, primary)


def _digest_line(target: TensorRecord, primary: Checkpoint) -> tuple[str, str, Sequence[int], str]:
    ref = primary.tensors[target.canonical]
    file = primary.shards[ref.shard].source
    task = _task(target, primary.role, ref)
    digest = digest_by_ranges(task, primary.role, lambda start, count: digest_range(file, ref.offset + start, count))
    return target.canonical, ref.code, ref.shape, digest


def _folder(path: PathLike) -> Path:
    """A directory of `assets`, its links resolved."""
    try:
        folder = Path(path).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{option('assets')}: {path} cannot be found: {error}") from error
    if not folder.is_dir():
        raise SourceError(
            f"{option('assets')}: {path} is not a directory; expected one with tokenizer or processor files"
        )
    return folder


def _small_files(
    patch: Patch, primary: Checkpoint, folders: Sequence[Path], tally: fsio.Tally
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The small files as the merge wrote them, found by their digests, and warnings about what contradicts the model.

    Raises SourceError for a file that is missing or cannot be loaded.
    """
    files: dict[str, bytes] = {}
    documents: dict[str, Any] = {}
    for name, digest in patch.contents.files.items():
        parents = [primary.path.parent] if name in PROCESSOR_FILES else []  # configs come from the model itself
        for directory in (primary.path, *parents, *folders):
            if (directory / name).is_file():
                role = "assets" if directory in folders else "primary"
                data = read_whole(role, directory, name, tally)
                if digest_of(data) == digest:
                    files[name] = data
                    if name in CHECKED_FILES:
                        documents[name] = read_small_file(name, data, f"{role}: {directory / name}")
                    break
        else:
            raise SourceError(
                f"{name} as the merge of {patch_format.source_names(patch.record)} wrote it (BLAKE3 {digest}) is not "
                f"in {primary.path}{' or the directory above' if parents else ''}; give the directory that holds it "
                f"with {option('assets')}, such as the base's"
            )
    where = f"patch {patch.source.path}: the {CONFIG} of its merge"
    if load_json(files[CONFIG], where, "config") != primary.config:
        raise PatchError(
            f"{where} is not that of primary {primary.path}; a merge writes primary's, make the patch again"
        )
    sizes = ModelSizes.of(primary)
    return files, tuple(contradictions(documents, sizes))


def _check_order(primary: PathLike, patch: PathLike) -> None:
    """Raise RequestError if a patch is given as primary; PatchError if a directory is given as the patch."""
    first, second = (Path(os.path.expanduser(os.fspath(path))) for path in (primary, patch))
    if first.is_file() and is_patch(first):
        both_are_patches = second.is_file() and is_patch(second)
        remedy = "give the checkpoint that it was made with" if both_are_patches else f"exchange it and {second}"
        raise RequestError(f"primary {first} is a patch; primary comes first, then the patch: {remedy}")
    if second.is_dir():
        raise PatchError(f"patch {second} is a directory{_directory_hint(second)}")


def _directory_hint(directory: Path) -> str:
    """A hint for a directory that is given as a patch: what it contains, and what to do."""
    if (directory / PROVENANCE).is_file():
        return ": an output of hsa, which is a whole checkpoint already"
    if (directory / CONFIG).is_file():
        return " with a checkpoint; expected a patch, which is one file that hsa wrote"
    patches = sorted(path.name for path in directory.glob(f"*{SUFFIX}"))
    if patches:
        return f" with {len(patches)} patches; name one of them, such as {patches[0]}"
    return "; expected a patch, which is one file that hsa wrote"
