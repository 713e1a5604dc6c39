"""How a tensor is treated: as its method says, within the part of the model that the settings limit the merge to."""

from __future__ import annotations

from typing import Any

from hsa.architectures.base import Architecture, TensorInfo
from hsa.methods.base import KEEP, Method, Treatment
from hsa.methods.settings import Settings


def treatment_of(
    method: Method[Any, Any], settings: Settings, info: TensorInfo, architecture: Architecture
) -> Treatment:
    """How a method treats a tensor, within the part of the model that the settings limit the merge to. `info.name` is
    canonical."""
    if settings.limited and not settings.limits(info.name, architecture.layer_of(info.name)):
        return KEEP
    return method.treatment(info, architecture.place(info.name), settings)
