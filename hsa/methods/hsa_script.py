"""HSA with the operations of the paper's released script: reference numerics, to reproduce published checkpoints.

The script works on whole tensors in torch, computes every tensor of the model, and writes base's names, config and
element types. Source: the released script of Shankar et al., Computer Speech & Language, 2026, 102012.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsa.architectures.base import TensorInfo, TensorPlace
from hsa.methods.base import BASE, Treatment
from hsa.methods.hsa import TARGET, Hsa, HsaSettings, Numerics, scaled
from hsa.methods.settings import setting

SCALED = scaled("numerics 'reference'")


@dataclass(frozen=True)
class ScriptSettings(HsaSettings):
    """Settings of an HSA merge in reference numerics."""

    numerics: Numerics = setting(
        "reference",
        "The reference script's operations.",
        choices=("reference",),
        patchable=False,
        summary=True,
        structural=True,
        group="numerics",
        metavar="reference",
    )


class HsaScript(Hsa):
    """HSA in reference numerics. A backend computes it with torch; `apply` of exact numerics is not used."""

    name = "hsa_script"
    title = "Headwise Selective Attention (HSA) merge, by the reference script's operations"
    contract = replace(Hsa.contract, most=2)
    Settings = ScriptSettings
    elementwise = False
    gpu_models = None
    libraries = ("torch",)

    def treatment(self, info: TensorInfo, place: TensorPlace | None, settings: HsaSettings) -> Treatment:
        """Merge the targets, and compute every other tensor from primary's task vector alone."""
        return TARGET if place is not None and settings.targets in place.presets else SCALED

    def needs_whole(self, settings: HsaSettings, role: str) -> bool:
        return role == BASE
