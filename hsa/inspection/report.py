"""The report of an inspection: frozen values, and the one dictionary that every view is drawn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from hsa._version import __version__
from hsa.architectures.base import KINDS, Architecture, TensorPlace
from hsa.errors import one_line
from hsa.findings import counted
from hsa.methods.geometry import Geometry
from hsa.methods.selection import count_heads, narrowest
from hsa.sources.roles import Role

FORMAT = 1
AGREEING = ("q", "k", "v")
"""Projections whose heads are compared within a layer; `out_proj` splits its columns, another axis."""


@dataclass(frozen=True)
class RecordedSelection:
    """What an output's provenance says of a tensor: how many heads were to be merged, and which were merged."""

    keep: int
    selected: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"keep": self.keep, "selected": list(self.selected)}


@dataclass(frozen=True)
class TensorInspection:
    """One target tensor: its place, its parameters, every head's score, and the selection at its `k`.

    `scores` are L2 norms; `squared` are the squared scores that heads are compared by, None where only a provenance
    file was read, which holds the norms alone. `coefficient` is lambda_i in float64. `geometry` needs the
    sources, `recorded` an output.
    """

    name: str
    projection: TensorPlace
    shape: tuple[int, ...]
    dtype: str
    heads: int
    layers: int
    k: float
    lam: float
    alpha: float
    keep: int
    coefficient: float
    scores: tuple[float, ...]
    squared: tuple[float, ...] | None
    selected: tuple[int, ...]
    margin: float | None
    geometry: Geometry | None
    recorded: RecordedSelection | None

    @property
    def label(self) -> str:
        """Short name of the row of heat maps that the tensor lies in, such as `encoder self_attn q_proj weight`."""
        p = self.projection
        return f"{p.stack} {p.block} {p.module} {p.part}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """Each head's place by score, 1 for the highest; equal scores share a place."""
        by = self.scores if self.squared is None else self.squared
        return tuple(1 + sum(other > own for other in by) for own in by)

    def as_dict(self) -> dict[str, Any]:
        p = self.projection
        return {
            "stack": p.stack,
            "layer": p.layer,
            "layers": self.layers,
            "block": p.block,
            "kind": p.kind,
            "part": p.part,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "heads": self.heads,
            "k": self.k,
            "lambda": self.lam,
            "alpha": self.alpha,
            "keep": self.keep,
            "lambda_i": self.coefficient,
            "selected": list(self.selected),
            "margin": self.margin,
            "scores": list(self.scores),
            "squared_scores": None if self.squared is None else list(self.squared),
            "ranks": list(self.ranks),
            "recorded": None if self.recorded is None else self.recorded.as_dict(),
            **({} if self.geometry is None else self.geometry.as_dict()),
        }


@dataclass(frozen=True)
class Agreement:
    """How far q, k and v of one attention block choose the same heads, weights and biases each by themselves.

    `jaccard` is the size of the intersection of all over that of their union, `pairs` the same two by two; None where
    no head is selected at all. `expected_common` is how many heads would be common if each had drawn as many at random.
    """

    stack: str
    layer: int
    block: str
    part: str
    heads: int
    selected: Mapping[str, tuple[int, ...]]

    @property
    def common(self) -> tuple[int, ...]:
        return tuple(sorted(set.intersection(*map(set, self.selected.values()))))

    @property
    def jaccard(self) -> float | None:
        return jaccard(*self.selected.values())

    @property
    def pairs(self) -> dict[str, float | None]:
        return {f"{a}{b}": jaccard(self.selected[a], self.selected[b]) for a, b in combinations(self.selected, 2)}

    @property
    def expected_common(self) -> float:
        return self.heads * math.prod(len(chosen) / self.heads for chosen in self.selected.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "stack": self.stack,
            "layer": self.layer,
            "block": self.block,
            "part": self.part,
            "selected": {kind: list(chosen) for kind, chosen in self.selected.items()},
            "common": list(self.common),
            "jaccard": self.jaccard,
            "pairs": self.pairs,
            "expected_common": self.expected_common,
        }


@dataclass(frozen=True)
class Energy:
    """Where one fine-tune's task vector lies: squared L2 norms in float64, of the whole model.

    `inside` lies in the target tensors, `selected` in their selected heads. `groups` splits `total` by stack and kind
    of tensor. `skipped` are tensors that cannot be subtracted: missing from base, of another shape or element type, or
    holding NaN or Inf.
    """

    role: Role
    total: float
    inside: float
    selected: float
    groups: Mapping[str, float]
    skipped: tuple[str, ...]

    def share(self, part: float) -> float | None:
        """A part of the whole; None where the task vector is zero."""
        return part / self.total if self.total > 0 else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "norm": math.sqrt(self.total),
            "inside": self.share(self.inside),
            "selected": self.share(self.selected),
            "elsewhere": self.share(max(0.0, self.total - self.inside)),
            "groups": {name: self.share(part) for name, part in self.groups.items()},
            "skipped": list(self.skipped),
        }


@dataclass(frozen=True)
class Inspection:
    """What there is to know of a merge's heads, of sources or of a finished output.

    `origin` is `sources`, `output`, or `output and sources`; `parameters` are those of the selection shown, under their
    command-line names; `sources` says who each source is. `tensors` is keyed by tensor name as primary stores it.
    `energy` is None where it was not asked for or cannot be had; `bytes_read` counts all that was read of files.
    """

    title: str
    origin: str
    numerics: str
    written_by: Mapping[str, Any] | None
    parameters: Mapping[str, Any]
    sources: Mapping[Role, Mapping[str, Any]]
    tensors: Mapping[str, TensorInspection]
    energy: tuple[Energy, ...] | None
    files: Mapping[str, str | None] | None
    bytes_read: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        heads = f"{count_heads(self.tensors.values())} heads selected in {len(self.tensors)} tensors"
        return one_line(f"<hsa.Inspection of {self.title}: {heads}{counted(self.warnings)}>")

    @property
    def selected_heads(self) -> int:
        return count_heads(self.tensors.values()).selected

    @property
    def total_heads(self) -> int:
        return count_heads(self.tensors.values()).total

    @property
    def narrowest(self) -> TensorInspection | None:
        """The tensor with the smallest margin; None where no tensor has one."""
        return narrowest(self.tensors.values())

    @property
    def agreement(self) -> tuple[Agreement, ...]:
        return tuple(agreements(self.tensors.values()))

    def as_dict(self) -> dict[str, Any]:
        """What `hsa inspect --json` prints; numbers are float64 and read back exactly."""
        narrowest = self.narrowest
        return {
            "format": FORMAT,
            "version": __version__,
            "title": self.title,
            "origin": self.origin,
            "numerics": self.numerics,
            "written_by": None if self.written_by is None else dict(self.written_by),
            "parameters": dict(self.parameters),
            "sources": {role: dict(source) for role, source in self.sources.items()},
            "target_tensors": len(self.tensors),
            "selected_heads": self.selected_heads,
            "total_heads": self.total_heads,
            "min_margin": narrowest.margin if narrowest else None,
            "min_margin_tensor": narrowest.name if narrowest else None,
            "tensors": {name: tensor.as_dict() for name, tensor in self.tensors.items()},
            "agreement": [each.as_dict() for each in self.agreement],
            "energy": None if self.energy is None else {each.role: each.as_dict() for each in self.energy},
            "files": None if self.files is None else dict(self.files),
            "bytes_read": self.bytes_read,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def jaccard(*sets: Sequence[int]) -> float | None:
    """Size of the intersection over that of the union; None where the union is empty."""
    union = set().union(*sets)
    return len(set.intersection(*map(set, sets))) / len(union) if union else None


def agreements(tensors: Iterable[TensorInspection]) -> Iterator[Agreement]:
    """One for each block of each layer, weights and biases apart, where at least two of q, k and v are targets."""
    blocks: dict[tuple[str, int, str, str], dict[str, TensorInspection]] = {}
    for tensor in tensors:
        p = tensor.projection
        if p.kind in AGREEING:
            blocks.setdefault((p.stack, p.layer, p.block, p.part), {})[p.kind] = tensor
    names = dict.fromkeys(name for key in blocks for name in (key[0], key[2]))
    order = {name: number for number, name in enumerate((*names, "weight", "bias"))}
    for key in sorted(blocks, key=lambda key: (order[key[0]], order[key[2]], order[key[3]], key[1])):
        members = blocks[key]
        if len(members) > 1:
            selected = {kind: members[kind].selected for kind in AGREEING if kind in members}
            stack, layer, block, part = key
            yield Agreement(stack, layer, block, part, next(iter(members.values())).heads, selected)


def in_order(tensors: Iterable[TensorInspection], architecture: Architecture) -> dict[str, TensorInspection]:
    """By name, as a reader wants them: by stack, such as the encoder first, then by block, layer, kind and part."""
    stacks, blocks = architecture.all_stacks, architecture.blocks

    def sort_key(tensor: TensorInspection) -> tuple[Any, ...]:
        p = tensor.projection
        return stacks.index(p.stack), blocks.index(p.block), p.layer, KINDS.index(p.kind), p.part != "weight"

    return {tensor.name: tensor for tensor in sorted(tensors, key=sort_key)}
