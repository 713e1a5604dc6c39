"""The interface of a merge method: its sources, its settings, and how it measures, decides and applies.

A method measures sums of a tensor block by block, decides on plain values for each tensor, and applies the decision
element by element. The engine does everything else, so a method is one file of this package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from hsa.architectures.base import Architecture, TensorInfo, TensorPlace
from hsa.errors import RequestError
from hsa.findings import Findings
from hsa.methods import source_warnings
from hsa.methods.merged_tensors import TensorCount
from hsa.methods.settings import Settings
from hsa.methods.tensors import BASE as BASE
from hsa.methods.tensors import CardText, Layout, Outcome, Summary, TensorRecord, TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Arrays, Float32


@dataclass(frozen=True)
class ModelRole:
    """A model that a method distinguishes by name, such as HSA's primary: its role, and one sentence of help.

    If `several` models may be given under the name, those after the first get their roles by position.
    """

    name: str
    help: str
    several: bool = False


@dataclass(frozen=True)
class Contract:
    """The sources that a method accepts.

    Args:
        base: whether it needs the base model, can use it, or has no use for it.
        least, most: how many models it merges, base not counted.
        named: models with roles of their own, in order. The others are `model1`, `model2` and so on, by position. Only
            the last named role may stand for several models.

    The first model is the anchor: the output takes its tensor names, config, small files, shards and element types.
    """

    base: Literal["required", "optional", "none"] = "optional"
    least: int = 2
    most: int = 8
    named: tuple[ModelRole, ...] = ()

    def roles(self, count: int) -> tuple[str, ...]:
        """The roles of `count` models, in the order in which they are given.

        Example:
            >>> Contract(named=(ModelRole("primary", "The anchor."),)).roles(3)
            ('primary', 'model2', 'model3')
        """
        return tuple(self.named[n].name if n < len(self.named) else f"model{n + 1}" for n in range(count))

    def roles_of(self, name: str, count: int) -> tuple[str, ...]:
        """The roles of `count` models that are given under one name.

        Example:
            >>> Contract(named=(ModelRole("primary", ""), ModelRole("secondary", "", several=True))).roles_of(
            ...     "secondary", 2
            ... )
            ('secondary', 'model3')
        """
        first = [role.name for role in self.named].index(name)
        return self.roles(first + count)[first:]

    def check(self, method: str, *, base: bool, models: int) -> None:
        """Raise RequestError unless the method accepts this number of models, with or without a base as given."""
        if self.base == "required" and not base:
            raise RequestError(f"method {method} needs base, the model that the others were trained from; give it")
        if self.base == "none" and base:
            raise RequestError(f"method {method} takes no base; leave it out, or give it as one of the models")
        if not self.least <= models <= self.most:
            span = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
            raise RequestError(f"method {method} merges {span} model{'s' * (self.most > 1)}, got {models}")


@dataclass(frozen=True)
class Treatment:
    """How a method treats a tensor.

    `keep`: take the anchor's values, in the output's element type. `merge`: compute the values from the tensors of
    `roles` (all sources if None), in blocks cut by `layout`, after `passes` measuring passes. If `listed`, the record
    contains the merged tensor with its decision. `needed_by` says what needs the tensor in all these roles; the error
    quotes it if the tensor is missing or has another shape. If `needed_by` is empty, such a tensor keeps the anchor's
    values.
    """

    kind: Literal["keep", "merge"]
    layout: Layout = "flat"
    passes: int = 0
    roles: tuple[str, ...] | None = None
    listed: bool = True
    needed_by: str = ""

    @property
    def by_heads(self) -> bool:
        return self.layout == "heads"


KEEP = Treatment("keep")


class Block(ABC):
    """One block of a tensor, cut by the treatment's layout (`hsa.methods.tensors.Layout`). If the groups are heads, a
    block has some rows and columns of one head, or of neighbouring heads that are treated alike.

    Arrays are float32 [rows, columns]. They are the worker's memory and valid only until the next block. `weights` is
    read-only. `task_vector` may be overwritten in `measure`. In `apply`, several decisions may share it, so values
    computed from it must be written to its `room`. numpy's warnings about overflow and the like are off, because
    results are checked. `first` is the flat index of the block's first element in the tensor.
    """

    task: TensorTask
    group: int
    first: int

    @abstractmethod
    def weights(self, role: str) -> Float32:
        """The tensor of a source, widened exactly."""

    @abstractmethod
    def task_vector(self, role: str) -> Float32:
        """The change that a model made: its weights minus base's, rounded to float32. It is computed once per block."""

    @abstractmethod
    def room(self, role: str) -> Float32:
        """In `apply`: memory of the block's shape for a value computed from a model's task vector. It may be the task
        vector's own memory. Write it with one elementwise operation, and do not ask for the task vector again."""

    @abstractmethod
    def wide(self) -> Array:
        """Uninitialised float64 memory of the block's shape. Every call returns the same memory."""

    def kept(self, key: Hashable, make: Callable[[], Arrays]) -> Arrays:
        """Arrays that depend only on the sources of the block, not on the settings. They are read-only: if the sources
        stay in memory for many merges, the arrays of an earlier merge for this key may be returned."""
        return make()

    @property
    def models(self) -> tuple[str, ...]:
        """The roles of the models, in order."""
        return tuple(role for role in self.task.sources if role != BASE)


class NotFiniteSums(Exception):
    """Raised by `gather` if the sums of a group are not finite, because a source contains NaN or Inf there."""

    def __init__(self, group: int) -> None:
        super().__init__(group)
        self.group = group


S = TypeVar("S", bound=Settings)
D = TypeVar("D")


class Method(ABC, Generic[S, D]):
    """A merge method. A subclass in a file of this package is found by its `name`.

    `version` is increased when the same settings give other bytes. `source` is the paper or program that it comes from.

    Example:
        >>> class Mean(Method[Settings, None]):  # the mean of all models
        ...     name, title, Settings = "mean", "Mean", MeanSettings
        ...     def apply(self, block, decision, out):
        ...         np.mean([block.weights(role) for role in block.models], axis=0, out=out)
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    title: ClassVar[str]
    known_as: ClassVar[str] = ""
    """The name of the method in the index of a release, if it is not the title."""
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    """BibTeX of the paper, for cards."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Tags of a model card, for the Hub."""
    contract: ClassVar[Contract] = Contract()
    Settings: ClassVar[type[Any]]
    libraries: ClassVar[tuple[str, ...]] = ()
    """Packages besides numpy that the bytes of an output depend on. The record names their versions. `lapack` stands
    for the library behind numpy's linear algebra, which then runs with one thread so that results are reproducible."""
    elementwise: ClassVar[bool] = True
    """Whether measure, decide and apply define the method completely. Other methods work on whole tensors, by a
    backend's own code."""
    writes_out_last: ClassVar[bool] = False
    """Whether `apply` writes `out` only in its last operation, elementwise. Then `out` may be the memory of a room or
    of the anchor's own tensor, which saves a copy."""
    needs_heads: ClassVar[bool] = False
    """Whether it merges attention heads, and so accepts only models of families whose heads are known."""
    selects_heads: ClassVar[bool] = False
    """Whether its decisions say which attention heads are merged, and by which scores, as `inspect` shows them."""
    gpu_models: ClassVar[int | None] = None
    """The number of models that a GPU merges with the method's own kernels; None if it has no kernels."""
    tolerance: ClassVar[float] = 0.0
    """For tensors that are computed whole: the largest difference from another machine's values, relative to the
    tensor's norm. 0 if every machine gives the same bytes."""
    approximate: ClassVar[tuple[str, ...]] = ()
    """Keys of recorded decisions whose numbers may differ between machines by `tolerance`, relative to themselves."""
    checks_sources: ClassVar[bool] = False
    """Whether `gather` detects non-finite sources by the sums, so that the engine need not search for them."""

    bound_settings: ClassVar[tuple[str, ...] | None] = None
    """The settings that `largest_result` reads. Candidates with equal values of them share the bounds. None if a bound
    is computed for each candidate."""

    def copies_equal(self, settings: S) -> bool:
        """Whether a tensor that is equal in all sources is copied instead of computed. It reads only structural
        settings."""
        return False

    def treatment(self, info: TensorInfo, place: TensorPlace | None, settings: S) -> Treatment:
        """How a tensor is treated. By default every floating-point tensor is merged. `info.name` is canonical."""
        return Treatment("merge") if info.code in ("F32", "F16", "BF16") else KEEP

    def needs_whole(self, settings: S, role: str) -> bool:
        """Whether a source is read beyond the targets of a preset. For methods whose settings have a preset."""
        return True

    def measure(self, block: Block, number: int, so_far: D | None) -> Any:
        """Measure sums over one block in pass `number`. `so_far` is the decision after the previous pass."""
        raise NotImplementedError(f"method {self.name} measures nothing")

    def gather(self, task: TensorTask, sums: Sequence[Sequence[Any]]) -> Any:
        """Combine the sums of each group's blocks, in order, into the measurement of a tensor that `decide` needs. It
        is small enough to be kept for other settings. Raises NotFiniteSums."""
        return sums

    def decide(self, task: TensorTask, measured: Any, settings: S, so_far: D | None) -> D:
        """The decision for a tensor. `measured` is the result of `gather`, or None for a tensor without passes."""
        return None  # type: ignore[return-value]

    @abstractmethod
    def apply(self, block: Block, decision: D, out: Float32) -> None:
        """Write the merged values of a block into `out`, float32 of the block's shape."""

    def untouched(self, groups: int, decision: D) -> frozenset[int]:
        """The groups of a target that keep the anchor's values. `groups` is the number of its groups."""
        return frozenset()

    def as_dict(self, decision: D) -> dict[str, Any]:
        """The decision as the provenance records it: JSON values."""
        return {}

    def from_dict(self, entry: Mapping[str, Any], groups: int, settings: S) -> D:
        """The decision that `as_dict` recorded for a tensor of `groups` groups. Raises KeyError, TypeError or
        ValueError if the entry is no decision."""
        return None  # type: ignore[return-value]

    def applied(self, recorded: D, decision: D) -> D:
        """The decision to apply if the sources give another than the record: the recorded one. If the record contains
        too little to apply, such as a digest, the decision of the sources is applied, and its digest is compared."""
        return recorded

    @property
    def records_decisions(self) -> bool:
        """Whether `from_dict` restores decisions. If not, code that needs them must decide again."""
        return type(self).from_dict is not Method.from_dict

    def longest(self, task: TensorTask, number: float) -> D:
        """A decision whose `as_dict` is at least as long as any other for this tensor. `number` has the most digits."""
        return None  # type: ignore[return-value]

    def patch_obstacles(self, settings: S) -> Iterator[str]:
        """The reasons why a patch, which contains only touched groups, cannot hold a merge. Yields nothing if it
        can."""
        yield f"method {self.name} changes whole tensors"

    def measure_distances(self, block: Block) -> Any:
        """For patches: the sums over one block that `distances` needs."""
        raise NotImplementedError(f"method {self.name} has no patches")

    def distance_sums(self, task: TensorTask, sums: Sequence[Sequence[Any]]) -> Any:
        """For patches: the sums of a tensor, from those of each group's blocks."""
        raise NotImplementedError(f"method {self.name} has no patches")

    def distances(self, targets: Sequence[tuple[TensorRecord, Any]]) -> dict[str, dict[str, float | None]]:
        """For patches: the distance of merged targets from each model, by stack (and for `all`) and role:
        |merged - model| / |model|, or None if this ratio is undefined. Each target comes with its `distance_sums`."""
        raise NotImplementedError(f"method {self.name} has no patches")

    def kept(self, block: Block, decision: D) -> Iterator[Array | None] | None:
        """For inspections: the kept elements of each model's task vector, one bool array of the block's shape per
        model, valid until the next. An array is None if all elements are kept. The result is None if the method drops
        nothing."""
        return None

    def agreeing(self, block: Block, decision: D) -> Iterator[Array] | None:
        """The elements with the elected sign, in the form of `kept`; None if the models do not vote on the sign."""
        return None

    def kept_counts(self, decision: D) -> tuple[int, ...] | None:
        """The number of kept elements of each model's task vector; None if the decision does not say."""
        return None

    def coefficients_of(self, decision: D, models: Sequence[str]) -> dict[str, float]:
        """The decided coefficients of a tensor by role, including base's if it has one; empty if there are none."""
        return {}

    def touched_count(self, task: TensorTask, settings: S) -> int:
        """For patches: the approximate number of groups of a target that will be touched."""
        return task.partition.groups

    def largest_result(
        self, task: TensorTask, measured: Any, settings: S, largest: Mapping[str, float]
    ) -> float | None:
        """A bound on the magnitude of a tensor's merged values, from the largest magnitudes in the sources; None if it
        is unknown. A tensor that might overflow is computed in separate memory before it is written to its place."""
        return None

    def work_bytes(self, task: TensorTask, settings: S) -> int:
        """Bytes of memory for computing a tensor, besides its bytes in the sources and in the output. 0 if a few blocks
        of it suffice."""
        return 0

    # --- reports on a merge --------------------------------------------------------------------------------------

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        """The formula of a merge with these parameters; `formula` is that of the defaults."""
        return self.formula

    def settings_findings(self, candidates: Sequence[S]) -> Findings:
        """Findings that follow from the settings alone, of one merge or of several."""
        return Findings()

    def planned_findings(self, tasks: Sequence[TensorTask], settings: S) -> Findings:
        """Findings that follow from the settings and the targets, before any tensor is read."""
        return Findings()

    def source_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        """Findings that follow from the values of the sources, whatever the settings. Warnings mean a doubtful
        merge."""
        return source_warnings.source_findings(outcomes)

    def result_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        """Findings about a finished merge, such as that it changes nothing. A sweep names the point that they are
        about."""
        return source_warnings.change_findings(outcomes)

    def decision_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        """Findings about single decisions, such as that one was close. A sweep reports them once for all points."""
        return Findings()

    def planned_summary(self, tasks: Sequence[TensorTask], settings: S) -> Summary:
        """How much a merge will merge, as far as the settings show it."""
        return TensorCount(len(tasks), planned=True)

    def planned_entry(self, task: TensorTask, settings: S) -> dict[str, Any]:
        """The entry of a dry run for one target, as far as the settings determine it: JSON values."""
        return {}

    def summary(self, outcomes: Sequence[Outcome]) -> Summary:
        """How much a finished merge merged."""
        return TensorCount.of(outcomes)

    def recorded_summary(self, records: Sequence[TensorRecord]) -> Summary:
        """How much a merge merged, as far as its record shows it."""
        return TensorCount.of_records(records)

    def summary_range(self, summaries: Mapping[str, Summary]) -> str | None:
        """One line on how much the merges of a sweep differ, from their summaries by point. None if there is none."""
        return None

    def hint(self, settings: S, summary: Summary) -> str | None:
        """A hint at settings that would merge more, for users of the defaults; None if there is none."""
        return None

    def card_text(
        self, parameters: Mapping[str, Any], records: Sequence[TensorRecord], architecture: Architecture
    ) -> CardText:
        """The model card's text about a merge with these parameters."""
        formula = f": `{self.formula_with(parameters)}`" if self.formula else ""
        source = f" Source: {self.source}." if self.source else ""
        return CardText(f"{self.title}{formula}.{source}")

    def comparison_notes(self, records: Sequence[TensorRecord]) -> Iterator[str]:
        """Notes on decisions for a comparison of an output with its sources, such as which decisions were close."""
        yield from ()

    def models_decided(self, decision: D) -> int | None:
        """The number of models that a recorded decision is for; None if it does not say."""
        return None

    def record_faults(self, record: TensorRecord, settings: S, layers: int) -> Iterator[str]:
        """Contradictions of a recorded decision to the settings or itself. `layers` counts those of its stack, or 0."""
        return iter(())
