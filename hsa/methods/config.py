"""The parameters of a merge, validated once and frozen."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from hsa.architectures.base import MAX_COUNT, Preset
from hsa.errors import RequestError, shown
from hsa.findings import Findings
from hsa.option_names import as_keys, option, spelled

Numerics = Literal["exact", "reference"]
LoadDtype = Literal["auto", "float32"]
OutputDtype = Literal["auto", "float32", "float16", "bfloat16"]
PerTensor = float | Mapping[str, float]


LEAST_PLAUSIBLE_PERCENTAGE = 10
"""A `k` above 1 and below this is a warning: so few percent of a model's 6 to 20 heads are one head or two."""

MAX_NAMED = 3
"""Values that one message names."""

MAX_SCALE = (2.0 - 2.0**-23) * 2.0**127
"""The largest float32: the arithmetic of a merge is float32's."""


@dataclass(frozen=True)
class MergeConfig:
    """Parameters of one merge; SPEC section 1 gives their meaning.

    `k`, `lam` and `alpha` are numbers, or mappings from target tensor name (with or without the leading
    `model.`) to number, which must then name every target. `k` above 1 is a percentage. `num_heads` and
    `num_layers` override what the config files say, for both stacks.

    Raises RequestError when a value is out of range or not finite, or when options exclude each other.
    """

    k: PerTensor = 0.6
    lam: PerTensor = 0.5
    alpha: PerTensor = 0.2
    targets: Preset = "encoder-qkv"
    attention_scale: float = 1.0
    non_attention_scale: float = 1.0
    num_heads: int | None = None
    num_layers: int | None = None
    numerics: Numerics = "exact"
    load_dtype: LoadDtype = "auto"
    dtype: OutputDtype = "auto"

    def __post_init__(self) -> None:
        _per_tensor("k", self.k, 0.0, 100.0)
        _per_tensor("lam", self.lam, 0.0, 1.0)
        _per_tensor("alpha", self.alpha, 0.0, math.inf)
        _number(option("attention_scale"), self.attention_scale, -MAX_SCALE, MAX_SCALE)
        _number(option("non_attention_scale"), self.non_attention_scale, -MAX_SCALE, MAX_SCALE)
        _choice("targets", self.targets, get_args(Preset))
        _choice("numerics", self.numerics, get_args(Numerics))
        _choice("dtype", self.dtype, get_args(OutputDtype))
        for name, count in (("num_heads", self.num_heads), ("num_layers", self.num_layers)):
            whole = isinstance(count, int) and not isinstance(count, bool)
            if count is not None and not (whole and 1 <= count <= MAX_COUNT):
                raise RequestError(f"{option(name)} must be a whole number from 1 to {MAX_COUNT}, got {shown(count)}")
        _choice("load_dtype", self.load_dtype, get_args(LoadDtype))
        if self.load_dtype != "auto" and self.numerics != "reference":
            raise RequestError(
                f"{option('load_dtype')} says how the reference script's loader reads checkpoints and has a meaning "
                f"with numerics 'reference' alone; add {option('numerics', 'reference')}, or use {option('dtype')} "
                f"for the output"
            )
        if self.numerics == "reference" and self.dtype != "auto":
            raise RequestError(
                f"numerics 'reference' writes base's dtype, as the reference script does, so {option('dtype')} must be "
                f"'auto', got {shown(self.dtype)}; use {option('load_dtype')}, or numerics 'exact'"
            )

    def of(self, parameter: Literal["k", "lam", "alpha"], name: str) -> float:
        """The value of a parameter for the target tensor of that canonical name (no leading `model.`)."""
        value: PerTensor = getattr(self, parameter)
        if not isinstance(value, Mapping):
            return float(value)
        for key in (name, f"model.{name}"):
            if key in value:
                return float(value[key])
        raise RequestError(f"{option(parameter)} is given per tensor but has no value for target tensor {name}")

    def check_names(self, names: set[str]) -> None:
        """Refuse a per-tensor parameter that names a tensor which is no target."""
        for parameter in ("k", "lam", "alpha"):
            value = getattr(self, parameter)
            if isinstance(value, Mapping):
                unknown = [key for key in value if key.removeprefix("model.") not in names]
                if unknown:
                    raise RequestError(
                        f"{option(parameter)} is given for {shown(unknown[0])}, which is no target of "
                        f"{shown(self.targets)}"
                    )

    def as_dict(self) -> dict[str, Any]:
        """The parameters under their command-line names, for reports and provenance."""
        return {
            "k": _plain(self.k),
            "lambda": _plain(self.lam),
            "alpha": _plain(self.alpha),
            "targets": self.targets,
            "attention_scale": float(self.attention_scale),
            "non_attention_scale": float(self.non_attention_scale),
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "numerics": self.numerics,
            "load_dtype": self.load_dtype if self.numerics == "reference" else None,
            "dtype": self.dtype,
        }

    @classmethod
    def from_dict(cls, parameters: Mapping[str, Any]) -> MergeConfig:
        """The config whose `as_dict` gave these parameters; others among them are left aside.

        Raises RequestError when one is missing or out of range.
        """
        try:
            fields = {"lam" if name == "lambda" else name: parameters[name] for name in cls().as_dict()}
        except KeyError as error:
            raise RequestError(f"parameter {error} is missing") from error
        with spelled(as_keys(parameters)):
            return cls(**{**fields, "load_dtype": fields["load_dtype"] or "auto"})


def keep_count(k: float, heads: int) -> int:
    """How many heads are merged of `heads`: max(1, round half to even of k * heads); none at k = 0."""
    share = k / 100.0 if k > 1.0 else k
    if share <= 0.0:
        return 0
    if share >= 1.0:
        return heads
    return max(1, round(share * heads))


def percentage_findings(values: Iterable[PerTensor]) -> Findings:
    """What is said of values of `k` above 1: a note, and below `LEAST_PLAUSIBLE_PERCENTAGE` a warning.

    Example:
        >>> percentage_findings([0.6, 60]).notes
        ('k = 60 is taken as a percentage, the share 0.6',)
    """
    numbers = {number for value in values for number in (value.values() if isinstance(value, Mapping) else (value,))}
    above = sorted(float(number) for number in numbers if number > 1)
    doubtful = [number for number in above if number < LEAST_PLAUSIBLE_PERCENTAGE]
    usual = [number for number in above if number >= LEAST_PLAUSIBLE_PERCENTAGE]
    hint = "; a share of heads lies between 0 and 1, such as 0.6"
    return Findings((_as_shares(usual),) if usual else (), (_as_shares(doubtful) + hint,) if doubtful else ())


def _as_shares(values: Sequence[float]) -> str:
    each = [f"k = {value:g} is taken as a percentage, the share {value / 100:g}" for value in values[:MAX_NAMED]]
    return "; ".join(each) + (f"; and {len(values) - MAX_NAMED} more" if len(values) > MAX_NAMED else "")


def layer_coefficient(lam: float, alpha: float, layer: int, layers: int) -> float:
    """lambda_i = lambda ** (alpha * ((i + 1) / L)) in float64, with 0 ** 0 = 1."""
    return math.pow(lam, alpha * ((layer + 1) / layers))


def _number(name: str, value: Any, low: float, high: float) -> None:
    limits = f"in [{low:g}, {high:g}]" if high < MAX_SCALE else "finite" if low < 0 else f"finite and at least {low:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} must be a number {limits}, got {shown(value)}")
    value = cast(float, value)
    if not -sys.float_info.max <= value <= sys.float_info.max or not low <= value <= high:
        beyond = "; float32 ends at 3.4e38" if high == MAX_SCALE else ""
        raise RequestError(f"{name} must be {limits}, got {shown(value)}{beyond}")


def _per_tensor(name: str, value: Any, low: float, high: float) -> None:
    about = option(name)
    if not isinstance(value, Mapping):
        _number(about, value, low, high)
        return
    for tensor, number in value.items():
        if not isinstance(tensor, str):
            raise RequestError(f"{about} per tensor must be given by tensor names, got the key {shown(tensor)}")
        _number(f"{about} of {shown(tensor)}", number, low, high)
        if tensor.startswith("model.") and tensor.removeprefix("model.") in value:
            raise RequestError(
                f"{about} is given for {shown(tensor)} and for {shown(tensor.removeprefix('model.'))}, which are one "
                f"tensor; give one of them"
            )


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise RequestError(f"{option(name)} must be one of {', '.join(allowed)}, got {shown(value)}")


def _plain(value: PerTensor) -> float | dict[str, float]:
    if isinstance(value, Mapping):
        return {name: float(number) for name, number in sorted(value.items())}
    return float(value)
