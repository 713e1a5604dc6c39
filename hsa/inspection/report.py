"""The report of an inspection: immutable values, and the dictionary from which every view is made."""

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
"""Projections whose heads are compared within a layer. `out_proj` is left out, because its heads are columns."""


@dataclass(frozen=True)
class RecordedSelection:
    """The recorded selection of a tensor: how many heads were to be merged, and which were merged."""

    keep: int
    selected: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"keep": self.keep, "selected": list(self.selected)}


@dataclass(frozen=True)
class TensorInspection:
    """One target tensor: its place, its parameters, every head's score, and the selection at its `k`.

    `scores` are L2 norms. `squared` are the squared scores, by which heads are compared; it is None if only a
    provenance was read, which holds only the norms. `coefficient` is lambda_i in float64. `geometry` is known only with
    sources, `recorded` only with an output.
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
        """The short name of the tensor's row of heat maps, such as `encoder self_attn q_proj weight`."""
        p = self.projection
        return f"{p.stack} {p.block} {p.module} {p.part}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """Each head's rank by score, 1 for the highest; equal scores share a rank."""
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
    """The agreement of q, k and v of one attention block on the selected heads; weights and biases are separate.

    `jaccard` is the size of the intersection of all over that of their union, and `pairs` is the same for each pair;
    None if no head is selected at all. `expected_common` is the expected number of common heads if each had drawn as
    many heads at random.
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
    """The distribution of one fine-tune's task vector over the whole model: squared L2 norms in float64.

    `inside` is the part in the target tensors, and `selected` the part in their selected heads. `groups` splits `total`
    by stack and kind of tensor. `skipped` are tensors that cannot be subtracted: missing from base, of another shape or
    element type, or holding NaN or Inf.
    """

    role: Role
    total: float
    inside: float
    selected: float
    groups: Mapping[str, float]
    skipped: tuple[str, ...]

    def share(self, part: float) -> float | None:
        """The share of a part in the total; None if the task vector is zero."""
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
    """The inspection of a merge's heads, from sources or from a finished output.

    `origin` is `sources`, `output`, or `output and sources`. `parameters` are those of the shown selection, under their
    command-line names. `sources` holds the identity of each source. `tensors` is keyed by primary's tensor names.
    `energy` is None if it was not requested or is not available. `bytes_read` counts all bytes that were read.

    Example:
        >>> found = hsa.inspect(base="whisper-small", primary="m1", secondary="m2")
        >>> found.tensors["model.encoder.layers.0.self_attn.q_proj.weight"].selected
        (0, 2)
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
        """The tensor with the smallest margin; None if no tensor has a margin."""
        return narrowest(self.tensors.values())

    @property
    def agreement(self) -> tuple[Agreement, ...]:
        return tuple(agreements(self.tensors.values()))

    def as_dict(self) -> dict[str, Any]:
        """The inspection as `hsa inspect --json` prints it. Numbers are float64 and parse back exactly."""
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
    """The size of the intersection over that of the union; None if the union is empty."""
    union = set().union(*sets)
    return len(set.intersection(*map(set, sets))) / len(union) if union else None


def agreements(tensors: Iterable[TensorInspection]) -> Iterator[Agreement]:
    """The agreement of each block of each layer, separately for weights and biases, if at least two of q, k and v are
    targets."""
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
    """The tensors by name, in reading order: by stack in the family's order, then by block, layer, kind and part."""
    stacks, blocks = architecture.all_stacks, architecture.blocks

    def sort_key(tensor: TensorInspection) -> tuple[Any, ...]:
        p = tensor.projection
        return stacks.index(p.stack), blocks.index(p.block), p.layer, KINDS.index(p.kind), p.part != "weight"

    return {tensor.name: tensor for tensor in sorted(tensors, key=sort_key)}
