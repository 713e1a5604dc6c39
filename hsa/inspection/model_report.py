"""The report of an inspection of whole models: frozen values, and the one dictionary that every view is drawn from."""

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
"""Attention blocks in a reader's words; others are called by their own names."""

BY_MODULE = ("attention", "feed-forward")
"""Kinds of tensors whose modules are told apart, where the family does not know their heads."""


@dataclass(frozen=True)
class Spot:
    """Where a tensor lies: its stack, its layer there (None outside of layers), and its kind in a reader's words.

    `group` is the coarser kind, as in sums over the whole model.
    """

    stack: str
    layer: int | None
    kind: str
    group: str


def spot_of(architecture: Architecture, name: str) -> Spot:
    """Where the tensor of a canonical name lies.

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
    """Sums over some tensors, of which `copied` are equal in all sources. `vectors` and `kept` are None where they are
    not known of any."""

    tensors: int = 0
    copied: int = 0
    elements: int = 0
    vectors: VectorSums | None = None
    kept: KeptSums | None = None

    @classmethod
    def of(cls, tensors: Iterable[TensorVectors]) -> Group:
        """The sums over these tensors, in their order."""
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
        """The numbers as JSON values. `based`: the vectors are task vectors, which have signs to compare."""
        return {
            "tensors": self.tensors,
            "copied": self.copied,
            "elements": self.elements,
            **vectors_dict(self.vectors, models, based=based),
            "kept": kept_dict(self.kept, models),
        }


@dataclass(frozen=True)
class TensorVectors:
    """One tensor that is merged, by its name in the anchor.

    `decision` is what a merge records of it, None where it was left open; `coefficients` are the decided ones by role.
    `angle` is that between base and the only model, in radians. `recorded` is the decision of an output's provenance.
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
        """What `--json` prints of it; `based` as in `Group.as_dict`."""
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
    """What there is to know of a merge of whole models, of sources or of a finished output.

    `origin` is `sources`, `output`, or `output and sources`; `method` is the name of the method, `models` are the roles
    of the merged models in order. `based`: a base was given, so that vectors are task vectors; without one they are the
    models themselves. `tensors` is keyed by tensor name as the anchor stores it; `bytes_read` counts all that was read.
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
        """Sums over the tensors with one value of `key`, in the order in which these appear.

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
        """The least, the mean and the greatest of the tensors' decided coefficients, by role; a tensor counts once."""
        by_role: dict[Role, list[float]] = {}
        for tensor in self.tensors.values():
            for role, value in tensor.coefficients.items():
                by_role.setdefault(role, []).append(value)
        return {role: (min(each), math.fsum(each) / len(each), max(each)) for role, each in by_role.items()}

    @property
    def angles(self) -> tuple[float, ...]:
        """Of one model: the angles between base's tensors and its own, in radians, where neither is zero."""
        return tuple(each.angle for each in self.tensors.values() if each.angle is not None)

    def as_dict(self) -> dict[str, Any]:
        """What `hsa inspect --json` prints; numbers are float64 and read back exactly."""

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
    """Norms, cosines and conflicts as JSON values; None for what is not known."""
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
    """What is kept of each model, as JSON values; None for what is not known."""
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
"""Kinds of tensors in a reader's order; others come last."""


def in_model_order(tensors: Iterable[TensorVectors], architecture: Architecture) -> dict[str, TensorVectors]:
    """By stack, what stands before the layers, each layer, then what comes after; in each by kind and then by name, so
    that sums over tensors do not depend on the order of files."""
    stacks = {stack: number for number, stack in enumerate(architecture.all_stacks)}

    def sort_key(tensor: TensorVectors) -> tuple[int, int, int, int, str]:
        spot = tensor.spot
        after = architecture.follows_layers(architecture.canonical(tensor.name))
        layer = spot.layer if spot.layer is not None else (1 << 30 if after else -1)
        first, _, last = spot.kind.partition(" ")
        kind = ORDER.index(first) if first in ORDER else len(ORDER)
        return stacks.get(spot.stack, len(stacks)), layer, kind, KINDS.index(last) if last in KINDS else 0, tensor.name

    return {tensor.name: tensor for tensor in sorted(tensors, key=sort_key)}
