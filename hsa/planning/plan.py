"""From parameters and headers to an immutable plan: what is merged, and what every output byte is made of.

Reads no tensor data, except that reference numerics compare a stored output projection with the embedding. The dry
run, the error messages and the tests all come from the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hsa.architectures.base import ModelCounts, Preset, TensorPlace
from hsa.errors import MismatchError, RequestError, SourceError, shown
from hsa.methods.hsa import HsaSettings
from hsa.methods.hsa_formula import keep_count, layer_coefficient
from hsa.methods.settings import Settings
from hsa.option_names import option
from hsa.planning import reference_script
from hsa.planning.file_layout import Content, Copied, Merge, OutputFile, Slice, TensorContent, pack, slices
from hsa.planning.target import Target
from hsa.sources import structure
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system.dtypes import ARITHMETIC, CODES, NAMES

Route = Literal["patch", "rewrite"]

MAX_TARGET = 16 << 20
"""Bytes of a target tensor, which is held whole, as three sources and a result: twice what large-v3 has."""


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do.

    `route` is `patch` when the output is primary's files with target ranges overwritten, `rewrite` when every
    tensor streams through. `weight_bytes_read` counts tensor data per source. `output_dtype` is the element
    type that the written config.json must name, or None to leave it as it stands.
    """

    config: HsaSettings
    route: Route
    targets: tuple[Target, ...]
    files: tuple[OutputFile, ...]
    index: bytes | None
    weight_bytes_read: Mapping[Role, int]
    output_dtype: str | None
    notes: tuple[str, ...]

    @property
    def bytes_to_write(self) -> int:
        return sum(file.size for file in self.files) + len(self.index or b"")


def make_plan(config: HsaSettings, sources: Sources, max_shard_size: int | None = None) -> MergePlan:
    """Check that the sources fit together and lay out the output.

    Raises MismatchError (tensor, each source's value; primary's tensors and its config.json), SourceError (no target,
    an element type that cannot be merged) or RequestError (per-tensor parameters that fit no target).
    """
    load_codes = reference_script.load_codes(config, sources) if config.numerics == "reference" else None
    targets = find_targets(config, sources, load_codes)
    check_structure(config, sources)
    by_name = {target.projection.name: target for target in targets}
    owner = sources.anchor_checkpoint if load_codes is None else sources.base_checkpoint
    names = reference_script.output_names(sources) if load_codes is not None else dict(_stored_names(owner))
    contents: dict[str, TensorContent] = {}
    for name, stored in names.items():
        if name in by_name:
            target = by_name[name]
            contents[name] = TensorContent(stored, target.out_code, target.shape, (Merge(target),))
        elif load_codes is not None:
            contents[name] = reference_script.other_content(name, stored, sources, config, load_codes)
        else:
            contents[name] = _other_content(name, stored, sources, config)
    files, index = pack(owner, contents, max_shard_size, sources.base_checkpoint)
    written = [piece for content in contents.values() for piece in content.pieces]
    rewritten = any(isinstance(piece, Slice) for piece in written) or max_shard_size is not None
    rewritten = rewritten or owner.kind != "safetensors"
    return MergePlan(
        config=config,
        route="rewrite" if rewritten or load_codes is not None else "patch",
        targets=targets,
        files=files,
        index=index,
        weight_bytes_read=_bytes_read(written, sources.roles),
        output_dtype=_output_dtype(config, load_codes),
        notes=tuple(_notes(sources, set(by_name), set(names))),
    )


def check_structure(config: HsaSettings, sources: Sources) -> None:
    """MismatchError unless primary, and base too where the output takes its config.json, holds what that promises."""
    structure.require_whole(sources.anchor_checkpoint)
    if config.numerics == "reference":
        structure.require_whole(sources.base_checkpoint)
    if config.num_heads is None:
        check_heads(sources)


def check_heads(sources: Sources) -> None:
    """MismatchError where the config.json of primary has other heads than base's, of any stack: no tensor's shape tells
    how many heads there are, and with another number the same weights compute something else."""
    architecture = sources.architecture
    primary, base = (
        architecture.counts(source.config, source.role)
        for source in (sources.anchor_checkpoint, sources.base_checkpoint)
    )
    for stack in architecture.stacks(sources.anchor_checkpoint.config):
        if primary.heads[stack] != base.heads[stack]:
            raise MismatchError(
                f"primary {sources.anchor_checkpoint.path}: config.json has {architecture.heads_key(stack)} "
                f"{primary.heads[stack]}, base {sources.base_checkpoint.path} has {base.heads[stack]}; a fine-tune has "
                f"as many heads as its base: correct the one that is wrong"
            )


def find_targets(
    config: HsaSettings, sources: Sources, load_codes: Mapping[Role, str] | None = None
) -> tuple[Target, ...]:
    """The target tensors in the order of primary's files, checked to agree; see `make_plan` for what it raises.

    `load_codes` gives the element types that reference numerics cast each source to, None in exact numerics.
    """
    architecture = sources.architecture
    projections: dict[str, TensorPlace] = {}
    for source in sources:
        for name in source.tensors:
            projection = architecture.target(name, config.targets)
            if projection is not None:
                projections[name] = projection
    if not projections:
        wrapped = structure.wrapped_name(sources.anchor_checkpoint, architecture.first_target)
        remedy = "" if wrapped is None else f"; it holds {wrapped:.300}: save the model without what wraps it"
        raise SourceError(
            f"primary {sources.anchor_checkpoint.path} holds no tensor that {shown(config.targets)} would merge "
            f"(looked for names like {architecture.prefix}{architecture.first_target}){remedy}; is it a "
            f"{architecture.title} checkpoint?"
        )
    check_tensor_names(config, set(projections), config.targets)
    _check_complete(config, sources, set(projections))
    shapes = {role: architecture.counts(sources.of(role).config, role) for role in sources.roles}
    targets = [make_target(p, config, sources, shapes, load_codes) for p in projections.values()]
    return tuple(sorted(targets, key=lambda t: (t.primary.shard, t.primary.offset)))


def check_tensor_names(settings: Settings, names: Collection[str], preset: Preset) -> None:
    """RequestError where a setting is given for a tensor that is not among these names, the targets of a preset."""
    for name, values in settings.per_tensor():
        unknown = [key for key in values if key.removeprefix("model.") not in names]
        if unknown:
            raise RequestError(
                f"{option(name)} is given for {shown(unknown[0])}, which is no target of {shown(preset)}"
            )


def _check_complete(config: HsaSettings, sources: Sources, names: set[str]) -> None:
    """Every layer that primary's config promises must have its targets: a merge of half a model is no model."""
    architecture = sources.architecture
    layers = architecture.counts(sources.anchor_checkpoint.config, "primary").layers
    for stack in architecture.stacks(sources.anchor_checkpoint.config):
        for name in architecture.expected_targets({stack: layers[stack]}, config.targets):
            if name not in names:
                raise MismatchError(
                    f"target tensor {name} is missing from base, primary and secondary, and the config.json of primary "
                    f"promises it ({architecture.layers_key(stack)} {layers[stack]}); the checkpoints are "
                    f"incomplete, fetch them again or correct config.json"
                )


def make_target(
    projection: TensorPlace,
    config: HsaSettings,
    sources: Sources,
    shapes: Mapping[Role, ModelCounts],
    load_codes: Mapping[Role, str] | None = None,
) -> Target:
    """One target, checked to agree in the three sources, whose heads and layers `shapes` gives; see `find_targets`."""
    name, stack = projection.name, projection.stack
    refs = {role: sources.of(role).tensors.get(name) for role in sources.roles}
    present = {role: ref for role, ref in refs.items() if ref is not None}
    if len(present) < len(sources.roles):
        missing = ", ".join(role for role in sources.roles if role not in present)
        misnamed = [
            (role, structure.wrapped_name(sources.of(role), name)) for role in sources.roles if role not in present
        ]
        instead = "".join(f"; {role} holds {stored:.300} instead" for role, stored in misnamed if stored is not None)
        raise MismatchError(
            f"target tensor {name} is missing from {missing} and stands in {', '.join(present)}{instead}; the three "
            f"must be fine-tunes of one model with one naming"
        )
    _require_equal(name, "shape", {role: list(ref.shape) for role, ref in present.items()})
    if config.num_heads is None:
        _require_equal(name, "number of heads", {role: shapes[role].heads[stack] for role in sources.roles})
    for role, ref in present.items():
        if ref.code not in ARITHMETIC:
            raise SourceError(
                f"{sources.of(role).file_of(ref)}: target tensor {ref.name} has dtype {ref.code}, expected one of "
                f"{', '.join(ARITHMETIC)}"
            )
        if ref.nbytes > MAX_TARGET:
            raise SourceError(
                f"{sources.of(role).file_of(ref)}: target tensor {ref.name} of shape {list(ref.shape)} takes "
                f"{ref.nbytes} bytes, at most {MAX_TARGET} are held in memory; is it a "
                f"{sources.architecture.title} checkpoint?"
            )
    owner: Role = "primary" if load_codes is None else "base"
    heads = config.num_heads or shapes[owner].heads[stack]
    layers = config.num_layers or shapes[owner].layers[stack]
    shape = present["primary"].shape
    if len(shape) != (2 if projection.part == "weight" else 1) or 0 in shape:
        raise MismatchError(f"target tensor {name} has shape {list(shape)}, expected a matrix weight or a vector bias")
    width = shape[projection.head_axis]
    if width % heads:
        raise SourceError(
            f"target tensor {name} of shape {list(shape)} cannot be split into {heads} heads: {width} is not a "
            f"multiple of {heads}; is the number of heads right?"
        )
    if projection.layer >= layers:
        raise MismatchError(
            f"target tensor {name} lies in layer {projection.layer}, but the {stack} has {layers} layers by "
            f"{option('num_layers') if config.num_layers else f'the config.json of {owner}'}"
        )
    cast = CODES[config.dtype] if config.dtype != "auto" else present["primary"].code
    return Target(
        projection=projection,
        shape=shape,
        heads=heads,
        **_settings(config, projection, heads, layers),
        scale=config.attention_scale,
        base=present["base"],
        primary=present["primary"],
        secondary=present["secondary"],
        out_code=cast if load_codes is None else load_codes["base"],
        load_codes=load_codes,
    )


def with_parameters(targets: Sequence[Target], config: HsaSettings, sources: Sources) -> tuple[Target, ...]:
    """The same targets with the k, lambda and alpha of another config; nothing else of it may differ.

    Raises RequestError where per-tensor parameters do not fit the targets.
    """
    check_tensor_names(config, {target.projection.name for target in targets}, config.targets)
    layers = sources.architecture.counts(sources.anchor_checkpoint.config, "primary").layers
    return tuple(
        replace(
            target,
            **_settings(config, target.projection, target.heads, config.num_layers or layers[target.projection.stack]),
        )
        for target in targets
    )


def _settings(config: HsaSettings, projection: TensorPlace, heads: int, layers: int) -> dict[str, Any]:
    """What k, lambda and alpha make of one target, as fields of it."""
    name = projection.name
    coefficient = layer_coefficient(config.of("lam", name), config.of("alpha", name), projection.layer, layers)
    k = config.of("k", name)
    return {
        "k": k,
        "keep": keep_count(k, heads),
        "coefficient": coefficient,
        "c1": float(np.float32(coefficient)),
        "c2": float(np.float32(1.0 - coefficient)),
    }


def _require_equal(name: str, what: str, values: Mapping[Role, object]) -> None:
    if len({str(value) for value in values.values()}) > 1:
        each = ", ".join(f"{role} {value}" for role, value in values.items())
        raise MismatchError(f"target tensor {name}: the {what} differs: {each}; the three must agree")


def _stored_names(owner: Checkpoint) -> Iterator[tuple[str, str]]:
    for name, ref in sorted(owner.tensors.items(), key=lambda item: (item[1].shard, item[1].offset)):
        yield name, ref.name


def _other_content(name: str, stored: str, sources: Sources, config: HsaSettings) -> TensorContent:
    """A tensor that is no target: primary's bytes, cast or scaled where asked."""
    primary = sources.anchor_checkpoint.tensors[name]
    floating = primary.code in ARITHMETIC
    code = CODES[config.dtype] if config.dtype != "auto" and _is_float(primary.code) else primary.code
    scaled = config.non_attention_scale != 1.0 and _is_float(primary.code)
    if code == primary.code and not scaled:
        return TensorContent(stored, code, primary.shape, (Copied("primary", primary),))
    if not floating:
        raise SourceError(
            f"{sources.anchor_checkpoint.file_of(primary)}: tensor {primary.name} has dtype {primary.code}, which can "
            f"be copied but not cast or scaled; drop {option('dtype')} and {option('non_attention_scale')}"
        )
    base = (
        sources.base_of(name, primary, f"{option('non_attention_scale')} {config.non_attention_scale:g}")
        if scaled
        else None
    )
    return TensorContent(stored, code, primary.shape, slices(primary, base, code, scale=config.non_attention_scale))


def _is_float(code: str) -> bool:
    return code.startswith(("F", "BF"))


def _bytes_read(pieces: Sequence[Content], roles: Sequence[Role]) -> dict[Role, int]:
    totals: dict[Role, int] = dict.fromkeys(roles, 0)
    for piece in pieces:
        for role, count in piece.reads():
            totals[role] += count
    return totals


def _output_dtype(config: HsaSettings, load_codes: Mapping[Role, str] | None) -> str | None:
    if load_codes is not None:
        return NAMES[load_codes["base"]]
    return None if config.dtype == "auto" else config.dtype


def _notes(sources: Sources, targets: set[str], written: set[str]) -> Iterator[str]:
    primary = sources.anchor_checkpoint
    for source in sources:
        yield from source.notes
    for other in sources:
        if other.role == sources.anchor:
            continue
        missing = [name for name in primary.tensors if name not in other.tensors]
        if missing:
            yield f"{len(missing)} tensors of primary are missing from {other.role}, such as {missing[0]}"
        for name, ref in primary.tensors.items():
            counterpart = other.tensors.get(name)
            if name not in targets and counterpart is not None and counterpart.shape != ref.shape:
                yield f"{name} has shape {list(ref.shape)} in primary and {list(counterpart.shape)} in {other.role}"
    tie = sources.architecture.tie
    if tie is not None and tie.output in written:
        yield f"{tie.output} is stored beside {tie.embedding} and written as a tensor of its own"
    elif tie is not None and tie.output in primary.tensors:
        yield f"primary's {tie.output} is left out, for base ties it to {tie.embedding}"
