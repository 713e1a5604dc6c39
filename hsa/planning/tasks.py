"""Find the tensors that a method computes: compare the tensors of the sources, and make tasks of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.architectures.base import ModelCounts, Partition, TensorInfo, TensorPlace
from hsa.errors import MismatchError, RequestError, SourceError, listed, shown
from hsa.methods.base import Method, Treatment
from hsa.methods.settings import Settings, declared
from hsa.methods.tensors import LayerSpan, TensorTask
from hsa.option_names import option
from hsa.planning.heads import require_heads
from hsa.planning.quantized import refuse_quantized
from hsa.planning.script_dtypes import load_codes
from hsa.planning.treatments import treatment_of
from hsa.sources import structure
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import ARITHMETIC, CODES

MAX_TARGET = 16 << 20
"""The most bytes of a target tensor, which is in memory whole for every source and as a result: twice what large-v3
has."""

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Targets:
    """The tensors that a method merges and records, in the order of the anchor's files, and the settings.

    `tasks` depend only on the structure of the settings (see `Settings.structure`), so candidates share them.
    """

    method: Method[Any, Any]
    settings: Settings
    tasks: tuple[TensorTask, ...]

    def with_settings(self, settings: Settings) -> Targets:
        """The same targets under other settings of the same structure.

        Raises RequestError where settings per tensor do not fit the targets.
        """
        check_candidate(self.settings, settings, self.tasks)
        return Targets(self.method, settings, self.tasks)


def check_candidate(planned: Settings, settings: Settings, tasks: Sequence[TensorTask]) -> None:
    """Raise ValueError if a plan for some settings is not valid for others, and RequestError as `check_names`."""
    if not planned.serves(settings):
        raise ValueError("these settings need a plan of their own")
    check_names(settings, tasks)


def check_names(settings: Settings, tasks: Sequence[TensorTask]) -> None:
    """Raise RequestError if a setting is given for a tensor that is no target, has no value for a target, or has values
    for another number of models than are merged."""
    if any(settings.per_tensor()):
        refuse_unknown_names(settings, {task.name for task in tasks})
    for each in declared(type(settings)):
        value = getattr(settings, each.name)
        if each.about.form is not None or not isinstance(value, (Mapping, tuple)):
            continue
        for task in tasks:
            if each.about.per_model:
                settings.each(each.name, task)
            else:
                settings.of(each.name, task)


def refuse_unknown_names(settings: Settings, names: Collection[str]) -> None:
    """Raise RequestError if a setting is given for a tensor whose canonical name is not among these."""
    for name, values in settings.per_tensor():
        unknown = [key for key in values if key.removeprefix("model.") not in names]
        if unknown:
            preset = getattr(settings, "targets", None)
            of = "" if preset is None else f" of {shown(preset)}"
            raise RequestError(f"{option(name)} is given for {shown(unknown[0])}, which is no target{of}")


def _depth(span: LayerSpan | None) -> float:
    """How far down the layers of its stack a tensor lies, as in mergekit: 0.0 outside of layers, 1.0 in a stack of one
    layer."""
    if span is None:
        return 0.0
    return span.layer / (span.layers - 1) if span.layers > 1 else 1.0


def find_targets(method: Method[Any, Any], settings: Settings, sources: Sources) -> Targets:
    """The targets of a merge, checked to agree in the sources.

    Raises MismatchError if a tensor differs between sources (it names each source's value), SourceError if there is no
    target or an element type cannot be merged, and RequestError if settings per tensor fit no target.
    """
    return Targets(method, settings, tuple(task for task in TaskFinder(method, settings, sources).targets()))


class TaskFinder:
    """Makes the tasks of a merge from the headers of its sources."""

    def __init__(self, method: Method[Any, Any], settings: Settings, sources: Sources) -> None:
        self.method, self.settings, self.sources = method, settings, sources
        self.family = sources.architecture
        for source in sources:
            require_heads(method, source)
        self.load_codes = None if method.elementwise else load_codes(settings, sources)
        self.preset: str | None = getattr(settings, "targets", None)
        self._heads: int | None = getattr(settings, "num_heads", None)
        self._layers: int | None = getattr(settings, "num_layers", None)
        self._counts: dict[str, ModelCounts] = {}
        self.skipped: list[str] = []
        self.reduced: list[str] = []
        self._least = method.contract.least
        self._spans: dict[str, int] = {}

    def targets(self) -> list[TensorTask]:
        """Every task that is listed in the record, in the order of the anchor's files; at least one."""
        if not self.method.needs_heads:  # methods that need heads check each target instead
            refuse_quantized(self.sources, self.method.name, self._is_merged)
        names: dict[str, tuple[TensorPlace | None, Treatment]] = {}
        for source in self.sources:
            for name, ref in source.tensors.items():
                if name not in names:
                    treatment = self.treatment(name, ref)
                    if treatment.kind == "merge" and treatment.listed:
                        names[name] = self.family.place(name), treatment
        if not names:
            raise self._nothing_to_merge()
        refuse_unknown_names(self.settings, names)
        if self.preset is not None and not self.settings.limited:
            self._check_complete(set(names))
        tasks = [self.task(name, place, treatment) for name, (place, treatment) in names.items()]
        merged = [task for task in tasks if task is not None]
        if not merged:
            raise self._nothing_in_common()
        merged.sort(key=lambda task: (task.sources[task.anchor].shard, task.sources[task.anchor].offset))
        check_names(self.settings, merged)
        return merged

    def treatment(self, name: str, ref: TensorRef) -> Treatment:
        """How the method treats a tensor of that canonical name."""
        return treatment_of(self.method, self.settings, TensorInfo(name, ref.code, ref.shape), self.family)

    def _is_merged(self, info: TensorInfo) -> bool:
        return treatment_of(self.method, self.settings, info, self.family).kind == "merge"

    def task(self, name: str, place: TensorPlace | None, treatment: Treatment) -> TensorTask | None:
        """One task, checked to agree in its sources. None if they disagree and the method can do without the tensor, or
        if the tensor has no elements."""
        roles = treatment.roles or self.sources.roles
        refs = {role: ref for role in roles if (ref := self.sources.of(role).tensors.get(name)) is not None}
        if treatment.by_heads:
            self._check_present(name, refs, roles)
            _require_equal(name, "shape", {role: list(ref.shape) for role, ref in refs.items()})
        else:
            fitting = self._fitting(name, refs, roles)
            if fitting is None:
                return None
            refs = fitting
        shape = refs[self.sources.anchor].shape
        if 0 in shape and not treatment.by_heads:
            return None  # it has no elements
        partition, layers = self._partition(name, place, shape, treatment, refs)
        span = self._span(name)
        models = [role for role in self.sources.roles if role != self.sources.base]
        return TensorTask(
            name=name,
            place=place,
            layers=layers,
            shape=shape,
            partition=partition,
            sources=refs,
            anchor=self.sources.anchor,
            out_code=self.out_code(refs[self.sources.anchor].code),
            output_name=refs[self.sources.anchor].name if self.load_codes is None else f"{self.family.prefix}{name}",
            passes=treatment.passes,
            load_codes=self.load_codes,
            layout=treatment.layout,
            numbers=tuple(number for number, role in enumerate(models) if role in refs),
            models_given=len(models),
            span=span,
            depth=_depth(span),
            follows_layers=span is None and self.family.follows_layers(name),
        )

    def _fitting(self, name: str, refs: Mapping[str, TensorRef], roles: Sequence[str]) -> dict[str, TensorRef] | None:
        """The tensors that a merge of whole tensors uses: those of all sources, or of the sources that agree with the
        anchor. None if the anchor's tensor is kept."""
        anchor, base = self.sources.anchor, self.sources.base
        if anchor not in refs:
            return None
        shape = refs[anchor].shape
        fitting = {role: ref for role, ref in refs.items() if ref.shape == shape and ref.code in ARITHMETIC}
        if len(fitting) == len(roles):
            return fitting
        mode = getattr(self.settings, "on_mismatch", "first")
        if mode == "error":
            each = ", ".join(
                f"{role} {f'{refs[role].code} {list(refs[role].shape)}' if role in refs else 'nothing'}"
                for role in roles
            )
            raise MismatchError(
                f"tensor {name} is not the same in all sources: {each}; give {option('on_mismatch', 'first')} to keep "
                f"{anchor}'s"
            )
        models = [role for role in fitting if role != base]
        nothing = 0 in shape or (base in roles and base not in fitting)
        if mode == "skip-model" and not nothing and anchor in fitting and len(models) >= max(2, self._least):
            self.reduced.append(name)
            return fitting
        self.skipped.append(name)
        return None

    def _span(self, name: str) -> LayerSpan | None:
        """The layer of a tensor. The number of layers of a stack comes from the names of the anchor's tensors."""
        place = self.family.layer_of(name)
        if place is None:
            return None
        if not self._spans:
            for other in self.sources.anchor_checkpoint.tensors:
                if (found := self.family.layer_of(other)) is not None:
                    self._spans[found[0]] = max(self._spans.get(found[0], 0), found[1] + 1)
        stack, layer = place
        return LayerSpan(stack, layer, self._spans.get(stack, layer + 1))

    def out_code(self, code: str) -> str:
        """The element type of the output for a tensor that the anchor stores in `code`."""
        if self.load_codes is not None:
            return self.load_codes[self.sources.base or self.sources.anchor]
        dtype = self.settings.dtype
        return CODES[dtype] if dtype != "auto" and code.startswith(("F", "BF")) else code

    def counts(self, role: str) -> ModelCounts:
        """Heads and layers by a source's config."""
        if role not in self._counts:
            self._counts[role] = self.family.counts(self.sources.of(role).config, role)
        return self._counts[role]

    def _partition(
        self,
        name: str,
        place: TensorPlace | None,
        shape: tuple[int, ...],
        treatment: Treatment,
        refs: Mapping[str, TensorRef],
    ) -> tuple[Partition, int]:
        """How a tensor is split, and how many layers its stack has."""
        owner = self.sources.anchor if self.load_codes is None else self.sources.base or self.sources.anchor
        layers = 0 if place is None else self._layers or self.counts(owner).layers[place.stack]
        if treatment.by_heads and treatment.passes:
            self._check_measurable(refs)
        if not treatment.by_heads or place is None or not place.has_heads:
            return Partition(), layers
        if self._heads is None:
            heads_by_role = {role: self.counts(role).heads[place.stack] for role in refs}
            _require_equal(name, "number of heads", heads_by_role)
        heads = self._heads or self.counts(owner).heads[place.stack]
        if len(shape) != (2 if place.part == "weight" else 1) or 0 in shape:
            raise MismatchError(
                f"target tensor {name} has shape {list(shape)}, expected a matrix weight or a vector bias"
            )
        width = shape[place.head_axis]
        if width % heads:
            raise SourceError(
                f"target tensor {name} of shape {list(shape)} cannot be split into {heads} heads: {width} is not a "
                f"multiple of {heads}; is the number of heads right?"
            )
        if place.layer >= layers:
            raise MismatchError(
                f"target tensor {name} lies in layer {place.layer}, but the {place.stack} has {layers} layers by "
                f"{option('num_layers') if self._layers else f'the config.json of {owner}'}"
            )
        return Partition(place.head_axis, heads), layers

    def _check_present(self, name: str, refs: Mapping[str, TensorRef], roles: Sequence[str]) -> None:
        if len(refs) == len(roles):
            return
        missing = [role for role in roles if role not in refs]
        misnamed = [(role, structure.wrapped_name(self.sources.of(role), name)) for role in missing]
        instead = "".join(f"; {role} holds {stored:.300} instead" for role, stored in misnamed if stored is not None)
        raise MismatchError(
            f"target tensor {name} is missing from {', '.join(missing)} and stands in {', '.join(refs)}{instead}; the "
            f"{COUNTS[len(roles)]} must be fine-tunes of one model with one naming"
        )

    def _check_measurable(self, refs: Mapping[str, TensorRef]) -> None:
        for role, ref in refs.items():
            file = self.sources.of(role).file_of(ref)
            if ref.code not in ARITHMETIC:
                raise SourceError(
                    f"{file}: target tensor {ref.name} has dtype {ref.code}, expected one of {', '.join(ARITHMETIC)}"
                )
            if ref.nbytes > MAX_TARGET:
                raise SourceError(
                    f"{file}: target tensor {ref.name} of shape {list(ref.shape)} takes {ref.nbytes} bytes, at most "
                    f"{MAX_TARGET} are held in memory; is it a {self.family.title} checkpoint?"
                )

    def _nothing_to_merge(self) -> SourceError:
        anchor, family = self.sources.anchor_checkpoint, self.family
        wrapped = structure.wrapped_name(anchor, family.first_target) if family.first_target else None
        remedy = "" if wrapped is None else f"; it holds {wrapped:.300}: save the model without what wraps it"
        what = f"method {self.method.name}" if self.preset is None else shown(self.preset)
        problem = f"{anchor.role} {anchor.path} holds no tensor that {what} would merge"
        if not family.first_target:
            return SourceError(f"{problem}; it holds {len(anchor.tensors)} tensors, is it a whole model?")
        return SourceError(
            f"{problem} (looked for names like {family.prefix}{family.first_target}){remedy}; is it a {family.title} "
            f"checkpoint?"
        )

    def _nothing_in_common(self) -> MismatchError:
        *some, last = (f"{source.role} {source.path}" for source in self.sources)
        names = [next(iter(source.tensors), "none") for source in self.sources]
        return MismatchError(
            f"{', '.join(some)} and {last} have no tensor in common that method {self.method.name} would merge: none "
            f"has one name, one shape and a floating element type in all (such as {listed(dict.fromkeys(names))}); are "
            f"they fine-tunes of one model?"
        )

    def _check_complete(self, names: set[str]) -> None:
        """Raise MismatchError if a layer that the anchor's config promises lacks targets: half a model is no valid
        result."""
        anchor, family = self.sources.anchor_checkpoint, self.family
        layers = family.counts(anchor.config, anchor.role).layers
        for stack in family.stacks(anchor.config):
            for name in family.expected_targets({stack: layers[stack]}, self.preset):  # type: ignore[arg-type]
                if name not in names:
                    *some, last = self.sources.roles
                    raise MismatchError(
                        f"target tensor {name} is missing from {', '.join(some)} and {last}, and the config.json of "
                        f"{anchor.role} promises it ({family.layers_key(stack)} {layers[stack]}); the checkpoints are "
                        f"incomplete, fetch them again or correct config.json"
                    )


def _require_equal(name: str, what: str, values: Mapping[str, object]) -> None:
    if len({str(value) for value in values.values()}) > 1:
        each = ", ".join(f"{role} {value}" for role, value in values.items())
        raise MismatchError(f"target tensor {name}: the {what} differs: {each}; the {COUNTS[len(values)]} must agree")


def stored_names(owner: Any) -> Iterator[tuple[str, str]]:
    """Canonical and stored names of a checkpoint's tensors, in the order of its files."""
    for name, ref in sorted(owner.tensors.items(), key=lambda item: (item[1].shard, item[1].offset)):
        yield name, ref.name
