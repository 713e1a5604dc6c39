"""Headwise Selective Attention (HSA): blends the task vectors of fine-tunes in the heads where they are largest.

For each target tensor separately, with `B` the base and `tv1`, `tv2` the task vectors of primary and secondary:

    proxy = |tv1| + |tv2|;  score[h] = L2 norm of proxy over head h;  the k * H heads with the largest scores are merged
    lambda_i = lambda ** (alpha * (i + 1) / L)   in layer i of L
    merged heads:  B + attention_scale * (lambda_i * tv1 + (1 - lambda_i) * tv2)
    other heads:   B + attention_scale * tv1
    other tensors: B + non_attention_scale * tv1

With several secondaries, with weights w, the proxy is the sum of |tv| of all models, and 1 - lambda_i is divided among
the secondaries: sum of (1 - lambda_i) * w_j / (sum of w) * tv_j. That is this program's extension, not the paper's.

Source: Shankar, Wang, Eren, Alwan, Compositional domain adaptation for automatic speech recognition with headwise
selective attention merging, Computer Speech & Language, 2026, 102012.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from hsa.architectures.base import MAX_COUNT, Preset, TensorInfo, TensorPlace
from hsa.errors import RequestError, shown
from hsa.methods.base import BASE, KEEP, Block, Contract, ModelRole, NotFiniteSums, Treatment
from hsa.methods.geometry import Norms, Sums, geometry_of, squares_of, tile_sums
from hsa.methods.hsa_decision import HeadScores, HsaDecision, ScaleDecision, decision_of
from hsa.methods.hsa_formula import SOLE, coefficients_of, normalized, settings_of, shares_of, squared_score
from hsa.methods.hsa_reports import HsaReports
from hsa.methods.json_fields import between, count, number
from hsa.methods.model_method import Weights, weights_setting
from hsa.methods.selection import MAX_SCORE, Selection
from hsa.methods.settings import MAX_FLOAT32, PerTensor, Settings, setting
from hsa.methods.tensors import TensorRecord, TensorTask
from hsa.methods.values import is_per_model
from hsa.option_names import option

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

PRIMARY, SECONDARY = "primary", "secondary"
ROLES = (BASE, PRIMARY, SECONDARY)
"""The sources of an HSA merge of two fine-tunes: the base, then the models in the order of the formula."""

TARGET = Treatment("merge", layout="heads", passes=1)
BlockSums = tuple["Array", "Sums", tuple[bool, ...]]
"""The sums of one block: the squares of the proxy, summed down its columns in float64; the sums of `geometry`; and
whether each task vector has a nonzero element."""

MAX_SHARE = 1e10
"""Upper limit of the magnitude of a secondary's share, which none reaches: see `hsa_formula.CANCELLING`."""

_USE_EXACT = "give one secondary, or use numerics 'exact'"

Numerics = Literal["exact", "reference"]
LoadDtype = Literal["auto", "float32"]


@dataclass(frozen=True)
class HsaSettings(Settings):
    """Settings of an HSA merge.

    `k`, `lam` and `alpha` are numbers, or mappings from target tensor names (with or without the leading `model.`) to
    numbers. A mapping must name every target. A `k` above 1 is a percentage. `num_heads` and `num_layers` override the
    config files, for both stacks. `weights` has one number for each secondary, and their sum must not be 0.

    Raises RequestError when a value is out of range or not finite, or when options exclude each other.

    Example:
        >>> HsaSettings(lam=0.3).lam
        0.3
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
    weights: Weights = weights_setting(
        "Weight of each secondary, in their order; repeat.", silent=True, entries="secondary"
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
        if self.numerics == "reference" and self.weights != 1.0:
            raise RequestError(f"numerics 'reference' merges one secondary, without {option('weights')}; {_USE_EXACT}")
        weights = self.weights if isinstance(self.weights, tuple) else (self.weights,)
        if all(isinstance(weight, Real) for weight in weights):
            normalized(weights)

    def check_models(self, count: int) -> None:
        """Raise RequestError if reference numerics cannot merge so many models, or if a list of weights has another
        length than the number of secondaries."""
        if self.numerics == "reference" and count > 2:
            raise RequestError(
                f"numerics 'reference' repeats the reference script, which merges 2 models, got {count}; {_USE_EXACT}"
            )
        weights: Any = self.weights
        if is_per_model(weights) and len(weights) != count - 1:
            raise RequestError(
                f"{option('weights')} must have as many values as there are secondaries, {count - 1}, got "
                f"{len(weights)}"
            )

    def each(self, name: str, task: TensorTask) -> tuple[float, ...]:
        """See `Settings.each`. `weights` are those of the secondaries: all models except the first."""
        if name != "weights":
            return super().each(name, task)
        self.check_models(task.models_given)
        secondaries = tuple(number - 1 for number in task.numbers if number)
        weights = super().each(name, replace(task, numbers=secondaries, models_given=task.models_given - 1))
        normalized(weights, f" for tensor {task.name}")
        return weights

    @property
    def method(self) -> str:  # type: ignore[override]
        """`hsa_script` with reference numerics: the same formula with other operations counts as another method."""
        return "hsa" if self.numerics == "exact" else "hsa_script"

    def as_dict(self) -> dict[str, Any]:
        """The settings under their names in records. `load_dtype` is None if it does not apply."""
        values = super().as_dict()
        return values if self.numerics == "reference" else {**values, "load_dtype": None}

    @classmethod
    def from_dict(cls, parameters: Mapping[str, Any]) -> HsaSettings:
        """See `Settings.from_dict`; here `load_dtype` may be None."""
        return super().from_dict({**parameters, "load_dtype": parameters.get("load_dtype") or "auto"})


class Hsa(HsaReports["HsaDecision | ScaleDecision"]):
    """HSA in exact numerics."""

    name = "hsa"
    title = "Headwise Selective Attention (HSA) merge"
    formula = (
        "B + lambda_i * d_1 + (1 - lambda_i) * mean(d_j of the others by weight) in the share k of heads where the "
        "sum of |d| is largest, lambda_i = lambda ** (alpha * (i + 1) / L) in layer i of L; M_1 elsewhere"
    )
    source = "Shankar et al., Computer Speech & Language, 2026, 102012"
    contract = Contract(
        base="required",
        least=2,
        most=8,
        named=(
            ModelRole(PRIMARY, "Anchor fine-tune: kept wherever nothing is merged."),
            ModelRole(SECONDARY, "Fine-tune blended into the selected heads.", several=True),
        ),
    )
    Settings = HsaSettings
    writes_out_last = True
    checks_sources = True
    gpu_models: ClassVar[int | None] = 2
    bound_settings = ("attention_scale", "weights")

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

        vectors = [block.task_vector(role) for role in block.models]
        sums = tile_sums(block.weights(BASE), *vectors)
        differ = tuple(bool(vector.any()) for vector in vectors)
        proxy = np.abs(vectors[0], out=vectors[0])
        for vector in vectors[1:]:
            np.add(proxy, np.abs(vector, out=vector), out=proxy)
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
        geometry = geometry_of([[tile for _, tile, _ in blocks] for blocks in sums], len(flags[0]))
        return HeadScores(squared, tuple(map(any, zip(*flags, strict=True))), geometry)

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
            delta = np.multiply(tv1, np.float32(decision.coefficients[0]), out=block.room(PRIMARY))
            for role, coefficient in zip(block.models[1:], decision.coefficients[1:], strict=True):
                other = np.multiply(block.task_vector(role), np.float32(coefficient), out=block.room(role))
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
            **({"shares": list(decision.shares)} if len(decision.shares) > 1 else {}),
            "selected": list(decision.selected),
            "scores": list(decision.scores),
            "margin": decision.margin,
        }

    def largest_result(
        self, task: TensorTask, measured: HeadScores, settings: HsaSettings, largest: Mapping[str, float]
    ) -> float:
        """Each element's sum of |tv| over the models is at most its head's score. A merged value is base plus at most
        the scale times that sum, if no share is above 1."""
        largest_share = max(1.0, *map(abs, shares_of(task, settings)))
        return largest[BASE] + abs(settings.attention_scale) * largest_share * measured.largest

    def measure_distances(self, block: Block) -> Sums:
        return squares_of([block.weights(role) for role in block.models], block.wide())

    def distance_sums(self, task: TensorTask, sums: Sequence[Sequence[Sums]]) -> Norms:
        return Norms.of(sums, len(task.sources) - 1)

    def from_dict(self, entry: Mapping[str, Any], groups: int, settings: HsaSettings) -> HsaDecision:
        scores = tuple(between(score, 0.0, MAX_SCORE) for score in entry["scores"])
        selected = tuple(map(count, entry["selected"]))
        if len(scores) != groups or list(selected) != sorted(set(selected)) or any(head >= groups for head in selected):
            raise ValueError(f"{groups} heads, {len(scores)} scores and selected heads {shown(selected)} do not fit")
        margin = None if entry["margin"] is None else number(entry["margin"])
        selection = Selection(tuple(score * score for score in scores), selected, margin, scores)
        coefficient = between(entry["lambda_i"], 0.0, MAX_SCORE)
        shares = tuple(between(share, -MAX_SHARE, MAX_SHARE) for share in entry.get("shares", SOLE))
        coefficients = coefficients_of(coefficient, shares)
        keep, scale = count(entry["keep"]), settings.attention_scale
        return HsaDecision(keep, coefficient, coefficients, scale, selection, shares=shares)

    def longest(self, task: TensorTask, number: float) -> HsaDecision:
        heads, models = task.partition.groups, max(2, len(task.numbers))
        selection = Selection((number,) * heads, tuple(range(heads)), number, (number,) * heads)
        return HsaDecision(
            heads, number, (number,) * models, 1.0, selection, shares=SOLE if models == 2 else (number,) * (models - 1)
        )

    def distances(self, targets: Sequence[tuple[TensorRecord, Norms]]) -> dict[str, dict[str, float | None]]:
        from hsa.methods.hsa_distances import by_stack

        counts = {len(norms.models) for _, norms in targets}
        return by_stack(targets, self.contract.roles(max(counts, default=2)))

    def touched_count(self, task: TensorTask, settings: HsaSettings) -> int:
        return settings_of(task, settings)[0]

    def models_decided(self, decision: HsaDecision | ScaleDecision) -> int | None:
        return len(decision.coefficients) if isinstance(decision, HsaDecision) else None

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


def scaled(needed_by: str) -> Treatment:
    """The treatment of a tensor that is no target but moves along primary's task vector."""
    return Treatment("merge", roles=(BASE, PRIMARY), listed=False, needed_by=needed_by)
