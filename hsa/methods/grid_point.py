"""One setting of a grid of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from hsa.architectures.base import Preset
from hsa.methods.hsa import HsaSettings

LONGEST_NAME = 200
"""Letters of a point's name: with what else a file's name holds, fewer than any filesystem allows."""


@dataclass(frozen=True)
class GridPoint:
    """One setting of a grid."""

    targets: Preset
    k: float
    lam: float
    alpha: float

    @property
    def name(self) -> str:
        """Names its files; the same in every grid that has it."""
        return f"{self.targets}_k{decimal_text(self.k)}_lambda{decimal_text(self.lam)}_alpha{decimal_text(self.alpha)}"

    def config(self, num_heads: int | None, num_layers: int | None) -> HsaSettings:
        return HsaSettings(
            k=self.k, lam=self.lam, alpha=self.alpha, targets=self.targets, num_heads=num_heads, num_layers=num_layers
        )


def decimal_text(value: float) -> str:
    """A number in decimal digits, without an exponent: 0.25, 1."""
    text = format(Decimal(repr(float(value))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
