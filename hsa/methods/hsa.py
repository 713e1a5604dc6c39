"""Headwise Selective Attention (HSA): blends the task vectors of two fine-tunes in the heads where they are largest.

For each target tensor by itself, with `B` the base and `tv1`, `tv2` the task vectors of primary and secondary:

    proxy = |tv1| + |tv2|;  score[h] = L2 norm of proxy over head h;  the k * H heads with the largest scores are merged
    lambda_i = lambda ** (alpha * (i + 1) / L)   in layer i of L
    merged heads:  B + attention_scale * (lambda_i * tv1 + (1 - lambda_i) * tv2)
    other heads:   B + attention_scale * tv1
    other tensors: B + non_attention_scale * tv1

Source: Shankar, Wang, Eren, Alwan, Compositional domain adaptation for automatic speech recognition with headwise
selective attention merging, Computer Speech & Language, 2026, 102012.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from hsa.architectures.base import MAX_COUNT, Preset, TensorInfo, TensorPlace
from hsa.errors import RequestError, shown
from hsa.methods.base import BASE, KEEP, Block, Contract, ModelRole, NotFiniteSums, Treatment
from hsa.methods.geometry import Geometry, Norms, Sums, squares_of, tile_sums
from hsa.methods.hsa_formula import rounded_pair, settings_of, squared_score
from hsa.methods.hsa_reports import HsaReports
from hsa.methods.json_fields import between, count, number
from hsa.methods.selection import MAX_SCORE, Selection, select
from hsa.methods.settings import MAX_FLOAT32, PerTensor, Settings, setting
from hsa.methods.tensors import TensorRecord, TensorTask
from hsa.option_names import option

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

PRIMARY, SECONDARY = "primary", "secondary"
ROLES = (BASE, PRIMARY, SECONDARY)
"""The sources of an HSA merge: the base, and the two fine-tunes in the order of the formula."""

TARGET = Treatment("merge", layout="heads", passes=1)
BlockSums = tuple["Array", "Sums", tuple[bool, bool]]
"""Of one block: the squares of the proxy summed down its columns in float64, the sums of `geometry`, and whether each
task vector has a nonzero element."""

Numerics = Literal["exact", "reference"]
LoadDtype = Literal["auto", "float32"]


@dataclass(frozen=True)
class HsaSettings(Settings):
    """Settings of an HSA merge.

    `k`, `lam` and `alpha` are numbers, or mappings from target tensor name (with or without the leading `model.`) to
    number, which must then name every target. `k` above 1 is a percentage. `num_heads` and `num_layers` override what
    the config files say, for both stacks.

    Raises RequestError when a value is out of range or not finite, or when options exclude each other.
    """

    k: PerTensor = setting(
        0.6,
        "Share of heads merged per tensor, 0 to 1; above 1 a percentage.",
        low=0.0,
        high=100.0,
        per_tensor=True,
        axis=True,
        search=(0.1, 1.0),
    )
    lam: PerTensor = setting(
        0.5,
        "Weight of primary in a merged head, 0 to 1.",
        low=0.0,
        high=1.0,
        per_tensor=True,
        axis=True,
        search=(0.0, 1.0),
    )
    alpha: PerTensor = setting(
        0.2, "Layer exponent, at least 0.", low=0.0, per_tensor=True, axis=True, search=(0.0, 2.0)
    )
    targets: Preset = setting(
        "encoder-qkv",
        "encoder-qkv, attention-qkv or attention-all.",
        choices=get_args(Preset),
        structural=True,
        axis=True,
        metavar="PRESET",
    )
    attention_scale: float = setting(
        1.0,
        "Factor on the task vectors of the targets.",
        low=-MAX_FLOAT32,
        high=MAX_FLOAT32,
        patchable=False,
        group="numerics",
    )
    non_attention_scale: float = setting(
        1.0,
        "Factor on primary's task vector elsewhere.",
        low=-MAX_FLOAT32,
        high=MAX_FLOAT32,
        patchable=False,
        structural=True,
        group="numerics",
    )
    num_heads: int | None = setting(
        None,
        "Heads, instead of config.json's.",
        whole=True,
        low=1,
        high=MAX_COUNT,
        structural=True,
        group="sources",
        metavar="N",
    )
    num_layers: int | None = setting(
        None,
        "Layers L, instead of config.json's.",
        whole=True,
        low=1,
        high=MAX_COUNT,
        structural=True,
        group="sources",
        metavar="N",
    )
    numerics: Numerics = setting(
        "exact",
        "The exact formula, or the reference script's operations.",
        choices=("exact", "reference"),
        patchable=False,
        summary=True,
        structural=True,
        group="numerics",
        metavar="exact|reference",
    )
    load_dtype: LoadDtype = setting(
        "auto",
        "With reference numerics: how its loader reads.",
        choices=("auto", "float32"),
        patchable=False,
        structural=True,
        group="numerics",
        metavar="auto|float32",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_dtype != "auto" and self.numerics != "reference":
            raise RequestError(
                f"{option('load_dtype')} says how the reference script's loader reads checkpoints and has a meaning "
                f"with numerics 'reference' alone; add {option('numerics', 'reference')}, or use {option('dtype')} "
                f"for the output"
            )
        if self.numerics == "reference" and self.limited:
            raise RequestError(
                f"numerics 'reference' writes every tensor as the reference script does, so {option('only')}, "
                f"{option('exclude')}, {option('layers')} and {option('stack')} have no meaning; use numerics 'exact'"
            )
        if self.numerics == "reference" and self.dtype != "auto":
            raise RequestError(
                f"numerics 'reference' writes base's dtype, as the reference script does, so {option('dtype')} must be "
                f"'auto', got {shown(self.dtype)}; use {option('load_dtype')}, or numerics 'exact'"
            )

    @property
    def method(self) -> str:  # type: ignore[override]
        """`hsa_script` with reference numerics: the same formula by other operations is another method."""
        return "hsa" if self.numerics == "exact" else "hsa_script"

    def as_dict(self) -> dict[str, Any]:
        """The settings under their names in records; `load_dtype` is None where it means nothing."""
        values = super().as_dict()
        return values if self.numerics == "reference" else {**values, "load_dtype": None}

    @classmethod
    def from_dict(cls, parameters: Mapping[str, Any]) -> HsaSettings:
        """See `Settings.from_dict`; here `load_dtype` may be None."""
        return super().from_dict({**parameters, "load_dtype": parameters.get("load_dtype") or "auto"})


@dataclass(frozen=True)
class HeadScores:
    """What is measured of a target: the squared scores of its heads, whether any element of each task vector is
    nonzero, and how the task vectors lie to each other."""

    squared: tuple[float, ...]
    primary_differs: bool
    secondary_differs: bool
    geometry: Geometry
    _selections: dict[int, Selection] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def largest(self) -> float:
        """The largest score of a head."""
        return math.sqrt(max(self.squared))

    def select(self, keep: int) -> Selection:
        """The selection of so many heads; made once for each number, since candidates often share it."""
        if keep not in self._selections:
            self._selections[keep] = select(self.squared, keep)
        return self._selections[keep]


@dataclass(frozen=True)
class HsaDecision:
    """What is merged in one target.

    `keep` is how many heads were to be, `coefficient` lambda_i in float64, `c1` and `c2` are lambda_i and 1 - lambda_i
    rounded to float32, `scale` is the factor on the task vectors. `selected` are the merged heads.
    """

    keep: int
    coefficient: float
    c1: float
    c2: float
    scale: float
    selection: Selection
    measured: HeadScores | None = None
    """What was measured; None where the decision comes from a record."""

    @property
    def selected(self) -> tuple[int, ...]:
        return self.selection.selected

    @property
    def scores(self) -> tuple[float, ...]:
        return self.selection.scores

    @property
    def margin(self) -> float | None:
        return self.selection.margin


@dataclass(frozen=True)
class ScaleDecision:
    """A tensor that is no target: B + scale * tv1."""

    scale: float


class Hsa(HsaReports["HsaDecision | ScaleDecision"]):
    """HSA in exact numerics."""

    name = "hsa"
    title = "Headwise Selective Attention (HSA) merge"
    formula = (
        "B + lambda_i * d_1 + (1 - lambda_i) * d_2 in the share k of heads where |d_1| + |d_2| is largest, "
        "lambda_i = lambda ** (alpha * (i + 1) / L) in layer i of L; M_1 elsewhere"
    )
    source = "Shankar et al., Computer Speech & Language, 2026, 102012"
    contract = Contract(
        base="required",
        least=2,
        most=2,
        named=(
            ModelRole(PRIMARY, "Anchor fine-tune: kept wherever nothing is merged."),
            ModelRole(SECONDARY, "Fine-tune blended into the selected heads."),
        ),
    )
    Settings = HsaSettings
    writes_out_last = True
    checks_sources = True
    bound_settings = ("attention_scale",)

    def treatment(self, info: TensorInfo, place: TensorPlace | None, settings: HsaSettings) -> Treatment:
        if place is not None and settings.targets in place.presets:
            return TARGET
        if settings.non_attention_scale != 1.0 and info.code.startswith(("F", "BF")):
            return scaled(f"{option('non_attention_scale')} {settings.non_attention_scale:g}")
        return KEEP

    def needs_whole(self, settings: HsaSettings, role: str) -> bool:
        return role == BASE and settings.non_attention_scale != 1.0

    def measure(self, block: Block, number: int, so_far: HsaDecision | ScaleDecision | None) -> BlockSums:
        import numpy as np

        tv1, tv2 = block.task_vector(PRIMARY), block.task_vector(SECONDARY)
        sums = tile_sums(block.weights(BASE), tv1, tv2)
        differ = bool(tv1.any()), bool(tv2.any())
        np.abs(tv1, out=tv1)
        np.abs(tv2, out=tv2)
        proxy = np.add(tv1, tv2, out=tv1)
        square = block.wide()
        np.copyto(square, proxy)
        np.multiply(square, square, out=square)
        return np.add.reduce(square, axis=0), sums, differ

    def gather(self, task: TensorTask, sums: Sequence[Sequence[BlockSums]]) -> HeadScores:
        squared = tuple(squared_score([columns for columns, _, _ in blocks]) for blocks in sums)
        for head, score in enumerate(squared):
            if not math.isfinite(score):
                raise NotFiniteSums(head)
        flags = [differ for blocks in sums for _, _, differ in blocks]
        geometry = Geometry.of([[tile for _, tile, _ in blocks] for blocks in sums])
        return HeadScores(squared, any(one for one, _ in flags), any(two for _, two in flags), geometry)

    def decide(
        self, task: TensorTask, measured: HeadScores | None, settings: HsaSettings, so_far: object
    ) -> HsaDecision | ScaleDecision:
        if measured is None:
            return ScaleDecision(settings.non_attention_scale)
        keep, _ = settings_of(task, settings)
        return decision_of(task, settings, measured.select(keep), measured)

    def apply(self, block: Block, decision: HsaDecision | ScaleDecision, out: Float32) -> None:
        import numpy as np

        base, tv1 = block.weights(BASE), block.task_vector(PRIMARY)
        if isinstance(decision, HsaDecision) and block.group in decision.selection.merged:
            delta = np.multiply(tv1, np.float32(decision.c1), out=block.room(PRIMARY))
            other = np.multiply(block.task_vector(SECONDARY), np.float32(decision.c2), out=block.room(SECONDARY))
            np.add(delta, other, out=delta)
            if decision.scale != 1.0:
                np.multiply(delta, np.float32(decision.scale), out=delta)
        else:
            delta = np.multiply(tv1, np.float32(decision.scale), out=block.room(PRIMARY))
        np.add(base, delta, out=out)

    def untouched(self, groups: int, decision: HsaDecision | ScaleDecision) -> frozenset[int]:
        if isinstance(decision, ScaleDecision) or decision.scale != 1.0:
            return frozenset()
        return frozenset(range(groups)) - decision.selection.merged

    def as_dict(self, decision: HsaDecision | ScaleDecision) -> dict[str, Any]:
        assert isinstance(decision, HsaDecision)
        return {
            "keep": decision.keep,
            "lambda_i": decision.coefficient,
            "selected": list(decision.selected),
            "scores": list(decision.scores),
            "margin": decision.margin,
        }

    def largest_result(
        self, task: TensorTask, measured: HeadScores, settings: HsaSettings, largest: Mapping[str, float]
    ) -> float:
        """A head's score is at least |tv1| + |tv2| of each of its elements, and a merged value is base plus the scale
        times at most that."""
        return largest[BASE] + abs(settings.attention_scale) * measured.largest

    def measure_distances(self, block: Block) -> tuple[float, float, float]:
        return squares_of(block.weights(PRIMARY), block.weights(SECONDARY), block.wide())

    def distance_sums(self, task: TensorTask, sums: Sequence[Sequence[tuple[float, float, float]]]) -> Norms:
        return Norms.of(sums)

    def from_dict(self, entry: Mapping[str, Any], groups: int, settings: HsaSettings) -> HsaDecision:
        scores = tuple(between(score, 0.0, MAX_SCORE) for score in entry["scores"])
        selected = tuple(map(count, entry["selected"]))
        if len(scores) != groups or list(selected) != sorted(set(selected)) or any(head >= groups for head in selected):
            raise ValueError(f"{groups} heads, {len(scores)} scores and selected heads {shown(selected)} do not fit")
        margin = None if entry["margin"] is None else number(entry["margin"])
        selection = Selection(tuple(score * score for score in scores), selected, margin, scores)
        coefficient = between(entry["lambda_i"], 0.0, MAX_SCORE)
        keep = count(entry["keep"])
        return HsaDecision(keep, coefficient, *rounded_pair(coefficient), settings.attention_scale, selection)

    def longest(self, task: TensorTask, number: float) -> HsaDecision:
        heads = task.partition.groups
        selection = Selection((number,) * heads, tuple(range(heads)), number, (number,) * heads)
        return HsaDecision(heads, number, number, number, 1.0, selection)

    def distances(self, targets: Sequence[tuple[TensorRecord, Norms]]) -> dict[str, dict[str, float | None]]:
        from hsa.methods.hsa_distances import by_stack

        return by_stack(targets)

    def touched_count(self, task: TensorTask, settings: HsaSettings) -> int:
        return settings_of(task, settings)[0]

    def record_faults(self, record: TensorRecord, settings: HsaSettings, layers: int) -> Iterator[str]:
        from hsa.methods.hsa_checks import decision_faults

        return decision_faults(record, settings, layers)

    def patch_obstacles(self, settings: HsaSettings) -> Iterator[str]:
        if settings.numerics != "exact":
            yield "numerics 'reference' computes every tensor"
        if settings.attention_scale != 1.0:
            yield f"{option('attention_scale')} moves the heads that are not merged"
        if settings.non_attention_scale != 1.0:
            yield f"{option('non_attention_scale')} moves every other tensor"


def decision_of(task: TensorTask, settings: HsaSettings, selection: Selection, measured: HeadScores) -> HsaDecision:
    """The decision for a target whose heads are selected."""
    keep, coefficient = settings_of(task, settings)
    return HsaDecision(keep, coefficient, *rounded_pair(coefficient), settings.attention_scale, selection, measured)


def scaled(needed_by: str) -> Treatment:
    """What is done with a tensor that is no target and moves along primary's task vector."""
    return Treatment("merge", roles=(BASE, PRIMARY), listed=False, needed_by=needed_by)
