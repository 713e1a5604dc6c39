"""What a merge method is: the sources it takes, its settings, and how it measures, decides and applies.

A method looks at a tensor block by block and measures sums; decides from them, for each tensor, by plain values that
the provenance records; and applies the decision element by element. Reading, slicing, threads, element types, patches
and verification are the engine's, so that a method is one file of this package.
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
    """A model that a method tells apart by name, such as HSA's primary: the role, and one sentence for help.

    Where `several` models may be given under the name, those after the first have roles by their place.
    """

    name: str
    help: str
    several: bool = False


@dataclass(frozen=True)
class Contract:
    """The sources that a method takes.

    Args:
        base: whether it needs the base model, can use it, or has no use for it.
        least, most: how many models it merges, base not counted.
        named: models with roles of their own, in order; the others are `model1`, `model2` and so on, by their place.
            Only the last of them may stand for several models.

    The first model is the anchor: its names, config, small files, shards and element types are the output's.
    """

    base: Literal["required", "optional", "none"] = "optional"
    least: int = 2
    most: int = 8
    named: tuple[ModelRole, ...] = ()

    def roles(self, count: int) -> tuple[str, ...]:
        """The roles of so many models, in the order in which they are given.

        Example:
            >>> Contract(named=(ModelRole("primary", "The anchor."),)).roles(3)
            ('primary', 'model2', 'model3')
        """
        return tuple(self.named[n].name if n < len(self.named) else f"model{n + 1}" for n in range(count))

    def roles_of(self, name: str, count: int) -> tuple[str, ...]:
        """The roles of so many models that are given under one name.

        Example:
            >>> Contract(named=(ModelRole("primary", ""), ModelRole("secondary", "", several=True))).roles_of(
            ...     "secondary", 2
            ... )
            ('secondary', 'model3')
        """
        first = [role.name for role in self.named].index(name)
        return self.roles(first + count)[first:]

    def check(self, method: str, *, base: bool, models: int) -> None:
        """RequestError unless this is a base, or none, and a number of models that the method takes."""
        if self.base == "required" and not base:
            raise RequestError(f"method {method} needs base, the model that the others were trained from; give it")
        if self.base == "none" and base:
            raise RequestError(f"method {method} takes no base; leave it out, or give it as one of the models")
        if not self.least <= models <= self.most:
            span = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
            raise RequestError(f"method {method} merges {span} model{'s' * (self.most > 1)}, got {models}")


@dataclass(frozen=True)
class Treatment:
    """What a method does with a tensor.

    `keep`: the anchor's values, in the output's element type. `merge`: computed from the tensors of `roles` (all
    sources where it is None), cut into blocks as `layout` says, after `passes` passes of measuring. The record lists a
    merged tensor with its decision where it is `listed`. `needed_by` says what needs the tensor in all these roles, for
    the error where it is missing or has another shape; where it is empty, such a tensor stays the anchor's.
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
    """One block of a tensor, cut by the treatment's layout (`hsa.methods.tensors.Layout`). Where the groups are heads,
    some rows and columns of one of them, or of neighbouring ones that are treated alike.

    Arrays are float32 [rows, columns]. They are the worker's memory, valid until the next block. `weights` must not be
    written to. `task_vector` may be overwritten in `measure`; in `apply` several decisions may share it, so that what
    is made from it goes into its `room`. numpy's warnings of overflow and the like are off: results are checked.
    `first` is the flat index of the block's first element in the tensor.
    """

    task: TensorTask
    group: int
    first: int

    @abstractmethod
    def weights(self, role: str) -> Float32:
        """The tensor of a source, widened exactly."""

    @abstractmethod
    def task_vector(self, role: str) -> Float32:
        """What a model changed: its weights minus base's, rounded to float32; computed once for a block."""

    @abstractmethod
    def room(self, role: str) -> Float32:
        """In `apply`: memory of the block's shape for a value that is made from the task vector of a model. It may be
        that task vector's own memory: write it by one elementwise operation, and do not ask for the vector again."""

    @abstractmethod
    def wide(self) -> Array:
        """Uninitialised float64 memory of the block's shape; the same at every call."""

    def kept(self, key: Hashable, make: Callable[[], Arrays]) -> Arrays:
        """Arrays that depend on the sources of the block alone, whatever the settings. Where sources stay in memory for
        many merges, those that an earlier merge made for this key may be given again: they must not be written to."""
        return make()

    @property
    def models(self) -> tuple[str, ...]:
        """The roles of the models, in order."""
        return tuple(role for role in self.task.sources if role != BASE)


class NotFiniteSums(Exception):
    """Raised by `gather` where the sums of a group are not finite: a source holds NaN or Inf there."""

    def __init__(self, group: int) -> None:
        super().__init__(group)
        self.group = group


S = TypeVar("S", bound=Settings)
D = TypeVar("D")


class Method(ABC, Generic[S, D]):
    """A merge method. Subclass it in a file of this package, and it is found by its `name`.

    `version` is raised when the same settings give other bytes. `source` is the paper or program it comes from.

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
    """What the index of a release says its models are composed with, where that is not the title."""
    formula: ClassVar[str] = ""
    source: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    """BibTeX of the paper, for cards."""
    tags: ClassVar[tuple[str, ...]] = ()
    """Tags of a model card, for the Hub."""
    contract: ClassVar[Contract] = Contract()
    Settings: ClassVar[type[Any]]
    libraries: ClassVar[tuple[str, ...]] = ()
    """Packages that the bytes of an output depend on, besides numpy; the record names their versions. `lapack` stands
    for the library behind numpy's linear algebra, which then runs with one thread, so that results repeat."""
    elementwise: ClassVar[bool] = True
    """Whether measure, decide and apply say all. Other methods work on whole tensors, by a backend's own code."""
    writes_out_last: ClassVar[bool] = False
    """Whether `apply` writes `out` by its last operation alone, elementwise, so that `out` may be the memory of a room
    or of the anchor's own tensor. Saves a copy."""
    needs_heads: ClassVar[bool] = False
    """Whether it merges attention heads, and so takes only models of the families whose heads are known."""
    selects_heads: ClassVar[bool] = False
    """Whether its decisions say which attention heads are merged, and by which scores, as `inspect` shows them."""
    gpu_models: ClassVar[int | None] = None
    """Of how many models a GPU merges by kernels of the method's own; None where it has none."""
    tolerance: ClassVar[float] = 0.0
    """How far the values of a tensor that is computed whole may lie from those of another machine, relative to the
    tensor's norm: 0 where every machine gives the same bytes."""
    approximate: ClassVar[tuple[str, ...]] = ()
    """Keys of recorded decisions whose numbers may differ between machines by as much, relative to themselves."""
    checks_sources: ClassVar[bool] = False
    """Whether `gather` finds sources that are not finite by the sums, so that the engine need not look for them."""

    bound_settings: ClassVar[tuple[str, ...] | None] = None
    """The settings that `largest_result` reads, so that candidates which share them share the bounds; None where a
    bound is worked out for each candidate."""

    def copies_equal(self, settings: S) -> bool:
        """Whether a tensor that is equal in all sources is copied instead of computed. It reads structural settings
        alone."""
        return False

    def treatment(self, info: TensorInfo, place: TensorPlace | None, settings: S) -> Treatment:
        """What is done with a tensor; by default every floating-point tensor is merged. `info.name` is canonical."""
        return Treatment("merge") if info.code in ("F32", "F16", "BF16") else KEEP

    def needs_whole(self, settings: S, role: str) -> bool:
        """Whether more of a source than the targets of a preset is read, for methods whose settings have a preset."""
        return True

    def measure(self, block: Block, number: int, so_far: D | None) -> Any:
        """Sums over one block, in pass `number`; `so_far` is what was decided after the pass before."""
        raise NotImplementedError(f"method {self.name} measures nothing")

    def gather(self, task: TensorTask, sums: Sequence[Sequence[Any]]) -> Any:
        """What a pass measured of a tensor, from the sums of each group's blocks in order: what `decide` needs, small
        enough to be kept for other settings. Raises NotFiniteSums."""
        return sums

    def decide(self, task: TensorTask, measured: Any, settings: S, so_far: D | None) -> D:
        """The decision for a tensor. `measured` is what `gather` gave, None for a tensor without passes."""
        return None  # type: ignore[return-value]

    @abstractmethod
    def apply(self, block: Block, decision: D, out: Float32) -> None:
        """Write the merged values of a block into `out`, float32 of the block's shape."""

    def untouched(self, groups: int, decision: D) -> frozenset[int]:
        """The groups of a target, of so many, that stay the anchor's values."""
        return frozenset()

    def as_dict(self, decision: D) -> dict[str, Any]:
        """The decision as the provenance records it: JSON values."""
        return {}

    def from_dict(self, entry: Mapping[str, Any], groups: int, settings: S) -> D:
        """The decision for a tensor of so many groups that `as_dict` recorded. Raises KeyError, TypeError or ValueError
        where it is none."""
        return None  # type: ignore[return-value]

    def applied(self, recorded: D, decision: D) -> D:
        """What is applied where a record holds one decision and the sources give another: what is recorded. Where the
        record holds too little for that, such as a digest, it is the other, whose digest is compared."""
        return recorded

    @property
    def records_decisions(self) -> bool:
        """Whether `from_dict` gives decisions back; where it does not, whoever needs them decides again."""
        return type(self).from_dict is not Method.from_dict

    def longest(self, task: TensorTask, number: float) -> D:
        """A decision that `as_dict` writes as long as any for this tensor; `number` is written with the most digits."""
        return None  # type: ignore[return-value]

    def patch_obstacles(self, settings: S) -> Iterator[str]:
        """Why a patch, which holds touched groups alone, cannot hold a merge; nothing where it can."""
        yield f"method {self.name} changes whole tensors"

    def measure_distances(self, block: Block) -> Any:
        """For patches: sums over one block that `distances` needs."""
        raise NotImplementedError(f"method {self.name} has no patches")

    def distance_sums(self, task: TensorTask, sums: Sequence[Sequence[Any]]) -> Any:
        """For patches: the sums of a tensor, from those of each group's blocks."""
        raise NotImplementedError(f"method {self.name} has no patches")

    def distances(self, targets: Sequence[tuple[TensorRecord, Any]]) -> dict[str, dict[str, float | None]]:
        """For patches: how far merged targets lie from each model, by stack (and of `all`) and role:
        |merged - model| / |model|, None where there is no such ratio. Each target comes with its `distance_sums`."""
        raise NotImplementedError(f"method {self.name} has no patches")

    def kept(self, block: Block, decision: D) -> Iterator[Array | None] | None:
        """For inspections: which elements of each model's task vector are kept, one model after another: bool of the
        block's shape, valid until the next, or None for all. None at all where nothing is dropped."""
        return None

    def agreeing(self, block: Block, decision: D) -> Iterator[Array] | None:
        """The same of the elements that have the elected sign, where the models vote on it."""
        return None

    def kept_counts(self, decision: D) -> tuple[int, ...] | None:
        """How many elements of each model's task vector are kept, where the decision says so."""
        return None

    def coefficients_of(self, decision: D, models: Sequence[str]) -> dict[str, float]:
        """The decided coefficients of a tensor by role, of base too where it has one; nothing where there are none."""
        return {}

    def touched_count(self, task: TensorTask, settings: S) -> int:
        """For patches: about how many groups of a target will be touched."""
        return task.partition.groups

    def largest_result(
        self, task: TensorTask, measured: Any, settings: S, largest: Mapping[str, float]
    ) -> float | None:
        """A bound on the magnitude of a tensor's merged values, by the largest magnitudes in the sources; None where it
        is not known. A tensor that might overflow is computed beside its place before it is written there."""
        return None

    def work_bytes(self, task: TensorTask, settings: S) -> int:
        """Bytes of memory that computing a tensor takes beside its bytes in the sources and in the output, where that
        is more than some blocks of it."""
        return 0

    # --- what is said of a merge ---------------------------------------------------------------------------------

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        """The formula of a merge with these parameters; `formula` is that of the defaults."""
        return self.formula

    def settings_findings(self, candidates: Sequence[S]) -> Findings:
        """What the settings of one merge, or of several, tell by themselves."""
        return Findings()

    def planned_findings(self, tasks: Sequence[TensorTask], settings: S) -> Findings:
        """What settings tell together with the targets, before any tensor is read."""
        return Findings()

    def source_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        """What the values of the sources tell, whatever the settings; warnings make a merge doubtful."""
        return source_warnings.source_findings(outcomes)

    def result_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        """What a finished merge tells, such as that it changes nothing. A sweep says which of its points it is."""
        return source_warnings.change_findings(outcomes)

    def decision_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        """What single decisions tell, such as that one was close. A sweep says it once for all points."""
        return Findings()

    def planned_summary(self, tasks: Sequence[TensorTask], settings: S) -> Summary:
        """How much a merge will merge, as far as the settings tell."""
        return TensorCount(len(tasks), planned=True)

    def planned_entry(self, task: TensorTask, settings: S) -> dict[str, Any]:
        """What a dry run says of one target, as far as the settings tell: JSON values."""
        return {}

    def summary(self, outcomes: Sequence[Outcome]) -> Summary:
        """How much a finished merge merged."""
        return TensorCount.of(outcomes)

    def recorded_summary(self, records: Sequence[TensorRecord]) -> Summary:
        """How much a merge merged, as far as its record tells."""
        return TensorCount.of_records(records)

    def summary_range(self, summaries: Mapping[str, Summary]) -> str | None:
        """How far the finished merges of a sweep lie apart, by the names of their points, in one line; None where there
        is nothing to say."""
        return None

    def hint(self, settings: S, summary: Summary) -> str | None:
        """What would merge more, for a user of the defaults; None where there is nothing to say."""
        return None

    def card_text(
        self, parameters: Mapping[str, Any], records: Sequence[TensorRecord], architecture: Architecture
    ) -> CardText:
        """What the card says of a merge with these parameters."""
        formula = f": `{self.formula_with(parameters)}`" if self.formula else ""
        source = f" Source: {self.source}." if self.source else ""
        return CardText(f"{self.title}{formula}.{source}")

    def comparison_notes(self, records: Sequence[TensorRecord]) -> Iterator[str]:
        """What a comparison of an output with its sources says of its decisions, such as which were close."""
        yield from ()

    def models_decided(self, decision: D) -> int | None:
        """Of how many models a recorded decision is; None where it does not say."""
        return None

    def record_faults(self, record: TensorRecord, settings: S, layers: int) -> Iterator[str]:
        """How a recorded decision contradicts the settings, or itself; `layers` are those of its stack, 0 outside."""
        return iter(())
