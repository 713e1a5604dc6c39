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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hsa.architectures.base import MAX_COUNT, Preset
from hsa.errors import RequestError, shown
from hsa.methods.settings import MAX_FLOAT32, PerTensor, Settings, setting
from hsa.option_names import option

Numerics = Literal["exact", "reference"]
LoadDtype = Literal["auto", "float32"]

ROLES = ("base", "primary", "secondary")
"""The sources of an HSA merge: the base, and the two fine-tunes in the order of the formula."""


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
