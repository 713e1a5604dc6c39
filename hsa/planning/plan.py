"""Turn settings and headers into an immutable plan: what is merged, and the contents of every output byte.

No tensor data is read, except that reference numerics compare a stored output projection with the embedding. The dry
run, the error messages and the tests all use the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hsa.architectures.base import Partition
from hsa.errors import MismatchError, SourceError
from hsa.methods.base import Method
from hsa.methods.registry import method_named
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.option_names import option
from hsa.planning import reference_script
from hsa.planning.file_layout import Computed, Content, Copy, OutputFile, TensorContent, pack, pieces_of
from hsa.planning.tasks import TaskFinder, check_candidate, stored_names
from hsa.sources import structure
from hsa.sources.source_set import Sources
from hsa.system.dtypes import ARITHMETIC, NAMES

Route = Literal["patch", "rewrite"]

MOST_SHAPES = 5
"""The number of tensors with other shapes that notes name for each source."""


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do.

    `targets` are the tensors that are merged and listed in the record. `route` is `patch` when the output is the
    anchor's files with target ranges overwritten, `rewrite` when every tensor streams through. `weight_bytes_read`
    counts tensor data per source. `output_dtype` is the element type that the written config.json must name, or None to
    leave it unchanged.
    """

    method: Method[Any, Any]
    settings: Settings
    route: Route
    targets: tuple[TensorTask, ...]
    files: tuple[OutputFile, ...]
    index: bytes | None
    weight_bytes_read: Mapping[str, int]
    output_dtype: str | None
    notes: tuple[str, ...]

    @property
    def bytes_to_write(self) -> int:
        return sum(file.size for file in self.files) + len(self.index or b"")

    def with_settings(self, settings: Settings) -> Plan:
        """The same plan under other settings of the same structure (`Settings.structure`); nothing is read again.

        Raises RequestError where settings per tensor do not fit the targets.
        """
        check_candidate(self.settings, settings, self.targets)
        return replace(self, settings=settings)


def make_plan(settings: Settings, sources: Sources, max_shard_size: int | None = None) -> Plan:
    """Check that the sources fit together and lay out the output.

    Raises MismatchError if a tensor differs between sources (it names each source's value), or if the anchor's tensors
    do not fit its config.json. Raises SourceError if there is no target or an element type cannot be merged, and
    RequestError if settings per tensor fit no target.
    """
    method = method_named(settings.method)
    finder = TaskFinder(method, settings, sources)
    targets = finder.targets()
    check_structure(settings, sources)
    by_name = {task.name: task for task in targets}
    scripted = not method.elementwise
    owner = sources.base_checkpoint if scripted else sources.anchor_checkpoint
    names = reference_script.output_names(sources) if scripted else dict(stored_names(owner))
    contents: dict[str, TensorContent] = {}
    for name, stored in names.items():
        if name in by_name:
            task = by_name[name]
            contents[name] = TensorContent(stored, task.out_code, task.shape, pieces_of(task))
        elif scripted:
            contents[name] = reference_script.other_content(name, stored, finder)
        else:
            contents[name] = _other_content(name, stored, finder)
    files, index = pack(owner, contents, max_shard_size, sources.base_checkpoint if sources.base else None)
    written = [piece for content in contents.values() for piece in content.pieces]
    streamed = any(isinstance(piece, Computed) and not piece.whole for piece in written)
    rewritten = streamed or scripted or max_shard_size is not None or owner.kind != "safetensors"
    return Plan(
        method=method,
        settings=settings,
        route="rewrite" if rewritten else "patch",
        targets=tuple(targets),
        files=files,
        index=index,
        weight_bytes_read=_bytes_read(written, sources),
        output_dtype=_output_dtype(settings, finder.load_codes, sources),
        notes=tuple(_notes(sources, by_name, names, finder)),
    )


MOST_NAMED = 5
"""The number of tensors that a note names."""


def some(names: Sequence[str]) -> str:
    """The first of many names, and the number of the others."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def check_structure(settings: Settings, sources: Sources) -> None:
    """Raise MismatchError unless a checkpoint contains what its config.json promises, and all configs name the same
    heads. The anchor is checked, and also base if the output takes base's config.json."""
    structure.require_whole(sources.anchor_checkpoint)
    if not method_named(settings.method).elementwise:
        structure.require_whole(sources.base_checkpoint)
    if sources.base is not None and getattr(settings, "num_heads", None) is None:
        check_heads(sources)


def check_heads(sources: Sources) -> None:
    """Raise MismatchError if the anchor's config.json has other heads than base's, in any stack. No tensor's shape
    shows the number of heads, and with another number the same weights compute something else."""
    family, anchor, base = sources.architecture, sources.anchor_checkpoint, sources.base_checkpoint
    own, other = (family.counts(source.config, source.role).heads for source in (anchor, base))
    for stack in family.stacks(anchor.config):
        if own[stack] != other[stack]:
            raise MismatchError(
                f"{anchor.role} {anchor.path}: config.json has {family.heads_key(stack)} {own[stack]}, {base.role} "
                f"{base.path} has {other[stack]}; a fine-tune has as many heads as its base: correct the one that is "
                f"wrong"
            )


def _other_content(name: str, stored: str, finder: TaskFinder) -> TensorContent:
    """A tensor that the record does not list: the anchor's bytes, cast or computed if the settings require it."""
    anchor = finder.sources.anchor_checkpoint
    ref = anchor.tensors[name]
    code = finder.out_code(ref.code)
    treatment = finder.treatment(name, ref)
    merged = treatment.kind == "merge" and not treatment.listed
    if code == ref.code and not merged:
        return TensorContent(stored, code, ref.shape, (Copy(anchor.role, ref),))
    if ref.code not in ARITHMETIC:
        raise SourceError(
            f"{anchor.file_of(ref)}: tensor {ref.name} has dtype {ref.code}, which can be copied but not cast or "
            f"scaled; drop {option('dtype')} and {option('non_attention_scale')}"
        )
    refs = {anchor.role: ref}
    if merged:
        base = finder.sources.base_of(name, ref, treatment.needed_by)
        refs = {finder.sources.base or "": base, anchor.role: ref}
    task = TensorTask(
        name=name,
        place=None,
        layers=0,
        shape=ref.shape,
        partition=Partition(),
        sources=refs,
        anchor=anchor.role,
        out_code=code,
        output_name=stored,
        merged=merged,
        listed=False,
    )
    return TensorContent(stored, code, ref.shape, pieces_of(task))


def _bytes_read(pieces: Sequence[Content], sources: Sources) -> dict[str, int]:
    totals = dict.fromkeys(sources.roles, 0)
    for piece in pieces:
        for role, count in piece.reads():
            totals[role] += count
    return totals


def _output_dtype(settings: Settings, load_codes: Mapping[str, str] | None, sources: Sources) -> str | None:
    if load_codes is not None:
        return NAMES[load_codes[sources.base or sources.anchor]]
    return None if settings.dtype == "auto" else settings.dtype


def _notes(
    sources: Sources, targets: Mapping[str, TensorTask], written: Mapping[str, str], finder: TaskFinder
) -> Iterator[str]:
    anchor = sources.anchor_checkpoint
    for source in sources:
        yield from source.notes
    for other in sources:
        if other is anchor:
            continue
        missing = [name for name in anchor.tensors if name not in other.tensors]
        if missing:
            yield f"{len(missing)} tensors of {anchor.role} are missing from {other.role}, such as {missing[0]}"
        unlike = [
            f"{name} has shape {list(ref.shape)} in {anchor.role} and {list(counterpart.shape)} in {other.role}"
            for name, ref in anchor.tensors.items()
            if name not in targets
            and (counterpart := other.tensors.get(name)) is not None
            and counterpart.shape != ref.shape
        ]
        yield from unlike[:MOST_SHAPES]
        if len(unlike) > MOST_SHAPES:
            yield f"{len(unlike) - MOST_SHAPES} more tensors have other shapes in {anchor.role} and {other.role}"
    yield from mismatch_notes(finder)
    tie = sources.architecture.tie
    if tie is not None and tie.output in written:
        yield f"{tie.output} is stored beside {tie.embedding} and written as a tensor of its own"
    elif tie is not None and tie.output in anchor.tensors:
        yield f"{anchor.role}'s {tie.output} is left out, for base ties it to {tie.embedding}"


def mismatch_notes(finder: TaskFinder) -> Iterator[str]:
    """Notes on tensors that differ between the sources."""
    if finder.skipped:
        yield (
            f"{len(finder.skipped)} tensors stay {finder.sources.anchor}'s, for another source lacks them or has them "
            f"in another shape or type: {some(finder.skipped)}"
        )
    if finder.reduced:
        yield (
            f"{len(finder.reduced)} tensors are merged of some of the models, for the others lack them or have them in "
            f"another shape or type: {some(finder.reduced)}"
        )
