"""The report of an inspection of whole models: immutable values, and the dictionary from which every view is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsa._version import __version__
from hsa.architectures.base import KINDS, Architecture
from hsa.errors import one_line
from hsa.findings import counted
from hsa.inspection.vector_sums import KeptSums, VectorSums
from hsa.sources.roles import Role

FORMAT = 1

ATTENTION = {"self_attn": "self-attention", "encoder_attn": "cross-attention"}
"""Readable names of attention blocks; other blocks keep their own names."""

BY_MODULE = ("attention", "feed-forward")
"""Kinds of tensors that are listed by module, if the family does not know their heads."""


@dataclass(frozen=True)
class Spot:
    """The position of a tensor: its stack, its layer (None outside of layers), and the readable name of its kind.

    `group` is the coarser kind that is used in sums over the whole model.
    """

    stack: str
    layer: int | None
    kind: str
    group: str


def spot_of(architecture: Architecture, name: str) -> Spot:
    """The position of the tensor with a canonical name.

    Example:
        >>> from hsa.architectures.registry import named
        >>> spot_of(named("whisper"), "decoder.layers.3.encoder_attn.q_proj.bias")
        Spot(stack='decoder', layer=3, kind='cross-attention q', group='cross-attention q, k, v')
    """
    stack, group = architecture.group_of(name)
    layer = architecture.layer_of(name)
    place, kind = architecture.place(name), group
    if place is not None:
        kind = f"{ATTENTION.get(place.block, place.block)} {place.kind}"
    elif group in BY_MODULE and layer is not None:
        kind = f"{group} {name.split('.')[-2]}"
    return Spot(stack, None if layer is None else layer[1], kind, group)


@dataclass(frozen=True)
class Group:
    """Sums over some tensors, of which `copied` are equal in all sources. `vectors` and `kept` are None if they are not
    known for any tensor."""

    tensors: int = 0
    copied: int = 0
    elements: int = 0
    vectors: VectorSums | None = None
    kept: KeptSums | None = None

    @classmethod
    def of(cls, tensors: Iterable[TensorVectors]) -> Group:
        """Sum over these tensors, in their order."""
        count = copied = elements = 0
        vectors: VectorSums | None = None
        kept: KeptSums | None = None
        for each in tensors:
            count, copied, elements = count + 1, copied + each.copied, elements + each.elements
            if each.vectors is not None:
                vectors = each.vectors if vectors is None else vectors.plus(each.vectors)
            if each.kept is not None:
                kept = each.kept if kept is None else kept.plus(each.kept)
        return cls(count, copied, elements, vectors, kept)

    def as_dict(self, models: tuple[Role, ...], *, based: bool) -> dict[str, Any]:
        """The numbers as JSON values. With `based`, the vectors are task vectors, whose signs can be compared."""
        return {
            "tensors": self.tensors,
            "copied": self.copied,
            "elements": self.elements,
            **vectors_dict(self.vectors, models, based=based),
            "kept": kept_dict(self.kept, models),
        }


@dataclass(frozen=True)
class TensorVectors:
    """A merged tensor, by its name in the anchor.

    `decision` is the decision as a merge records it, None if it was left open. `coefficients` are the decided
    coefficients by role. `angle` is the angle between base and the only model, in radians. `recorded` is the decision
    in an output's provenance.
    """

    name: str
    spot: Spot
    shape: tuple[int, ...]
    dtype: str
    copied: bool
    vectors: VectorSums | None
    kept: KeptSums | None
    angle: float | None
    decision: Mapping[str, Any] | None
    coefficients: Mapping[Role, float]
    recorded: Mapping[str, Any] | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def as_dict(self, models: tuple[Role, ...], *, based: bool) -> dict[str, Any]:
        """The tensor as `--json` prints it; `based` as in `Group.as_dict`."""
        return {
            "stack": self.spot.stack,
            "layer": self.spot.layer,
            "kind": self.spot.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            **Group.of([self]).as_dict(models, based=based),
            "angle": self.angle,
            "coefficients": dict(self.coefficients),
            "decision": None if self.decision is None else dict(self.decision),
            "recorded": None if self.recorded is None else dict(self.recorded),
        }


@dataclass(frozen=True)
class ModelInspection:
    """The inspection of a merge of whole models, from sources or from a finished output.

    `origin` is `sources`, `output`, or `output and sources`. `method` is the name of the method, and `models` are the
    roles of the merged models in order. `based` says whether a base was given. The vectors are then task vectors;
    without a base they are the models themselves. `tensors` is keyed by the anchor's tensor names. `bytes_read` counts
    all bytes that were read.

    Example:
        >>> found = hsa.inspect(method="ties", base="whisper-small", models=["m1", "m2"])
        >>> found.method, found.models
        ('ties', ('model1', 'model2'))
    """

    title: str
    origin: str
    method: str
    models: tuple[Role, ...]
    based: bool
    written_by: Mapping[str, Any] | None
    parameters: Mapping[str, Any]
    sources: Mapping[Role, Mapping[str, Any]]
    tensors: Mapping[str, TensorVectors]
    files: Mapping[str, str | None] | None
    bytes_read: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    whole: Group = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", Group.of(self.tensors.values()))

    def __repr__(self) -> str:
        what = f"{len(self.tensors)} tensors of {len(self.models)} models by {self.method}"
        return one_line(f"<hsa.ModelInspection of {self.title}: {what}{counted(self.warnings)}>")

    def groups(self, key: Callable[[Spot], Any]) -> dict[Any, Group]:
        """Sums over the tensors with the same value of `key`, in the order in which the values first appear.

        Example:
            >>> found.groups(lambda spot: spot.kind)["feed-forward fc1"].vectors.conflict  # doctest: +SKIP
            0.4821
        """
        members: dict[Any, list[TensorVectors]] = {}
        for tensor in self.tensors.values():
            members.setdefault(key(tensor.spot), []).append(tensor)
        return {value: Group.of(each) for value, each in members.items()}

    @property
    def coefficients(self) -> dict[Role, tuple[float, float, float]]:
        """The minimum, mean and maximum of the decided coefficients by role; each tensor has the same weight."""
        by_role: dict[Role, list[float]] = {}
        for tensor in self.tensors.values():
            for role, value in tensor.coefficients.items():
                by_role.setdefault(role, []).append(value)
        return {role: (min(each), math.fsum(each) / len(each), max(each)) for role, each in by_role.items()}

    @property
    def angles(self) -> tuple[float, ...]:
        """For one model, the angles between base's tensors and its own, in radians, where neither is zero."""
        return tuple(each.angle for each in self.tensors.values() if each.angle is not None)

    def as_dict(self) -> dict[str, Any]:
        """The inspection as `hsa inspect --json` prints it. Numbers are float64 and parse back exactly."""

        def entry(group: Group) -> dict[str, Any]:
            return group.as_dict(self.models, based=self.based)

        cells = self.groups(lambda spot: (spot.stack, spot.layer, spot.kind))
        layers = self.groups(lambda spot: (spot.stack, spot.layer))
        kinds = self.groups(lambda spot: (spot.stack, spot.kind))
        return {
            "format": FORMAT,
            "version": __version__,
            "title": self.title,
            "origin": self.origin,
            "method": self.method,
            "models": list(self.models),
            "vectors": "task vectors" if self.based else "models",
            "written_by": None if self.written_by is None else dict(self.written_by),
            "parameters": dict(self.parameters),
            "sources": {role: dict(source) for role, source in self.sources.items()},
            "whole": entry(self.whole),
            "coefficients": {
                role: dict(zip(("least", "mean", "greatest"), each, strict=True))
                for role, each in self.coefficients.items()
            },
            "by_layer": [{"stack": s, "layer": n, **entry(group)} for (s, n), group in layers.items()],
            "by_kind": [{"stack": s, "kind": kind, **entry(group)} for (s, kind), group in kinds.items()],
            "by_layer_and_kind": [
                {"stack": s, "layer": n, "kind": kind, **entry(group)} for (s, n, kind), group in cells.items()
            ],
            "tensors": {name: each.as_dict(self.models, based=self.based) for name, each in self.tensors.items()},
            "files": None if self.files is None else dict(self.files),
            "bytes_read": self.bytes_read,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def vectors_dict(sums: VectorSums | None, models: tuple[Role, ...], *, based: bool) -> dict[str, Any]:
    """Norms, cosines and conflicts as JSON values; None for unknown values."""
    if sums is None:
        return dict.fromkeys(("base_norm", "norms", "relative", "moved", "cosines", "conflicts"))
    numbers = range(len(models))
    conflicts = {"shared": sums.shared, "disagreeing": sums.disagreeing, "share": sums.conflict}
    return {
        "base_norm": None if sums.base is None else math.sqrt(sums.base),
        "norms": {role: math.sqrt(square) for role, square in zip(models, sums.squares, strict=True)},
        "relative": {role: sums.relative(n) for n, role in enumerate(models)} if based else None,
        "moved": dict(zip(models, sums.moved, strict=True)) if based else None,
        "cosines": [[sums.cosine(one, two) for two in numbers] for one in numbers],
        "conflicts": conflicts if based else None,
    }


def kept_dict(sums: KeptSums | None, models: tuple[Role, ...]) -> dict[str, Any] | None:
    """The kept shares of each model as JSON values; None for unknown values."""
    if sums is None:
        return None
    return {
        role: {
            "elements": sums.elements[n],
            "kept": sums.kept[n],
            "share": sums.share(n),
            "energy": sums.energy(n),
            "agreeing": sums.agreement(n),
        }
        for n, role in enumerate(models)
    }


ORDER = ("convolution", "embedding", "self-attention", "cross-attention", "attention", "feed-forward", "norm")
"""Kinds of tensors in the order of reports; others come last."""


def in_model_order(tensors: Iterable[TensorVectors], architecture: Architecture) -> dict[str, TensorVectors]:
    """The tensors by name, in model order: by stack, and in each stack the tensors before the layers, each layer, and
    those after.

    Within each of these, they are sorted by kind and then by name, so that sums over tensors do not depend on the order
    of files.
    """
    stacks = {stack: number for number, stack in enumerate(architecture.all_stacks)}

    def sort_key(tensor: TensorVectors) -> tuple[int, int, int, int, str]:
        spot = tensor.spot
        after = architecture.follows_layers(architecture.canonical(tensor.name))
        layer = spot.layer if spot.layer is not None else (1 << 30 if after else -1)
        first, _, last = spot.kind.partition(" ")
        kind = ORDER.index(first) if first in ORDER else len(ORDER)
        return stacks.get(spot.stack, len(stacks)), layer, kind, KINDS.index(last) if last in KINDS else 0, tensor.name

    return {tensor.name: tensor for tensor in sorted(tensors, key=sort_key)}
