"""Correctness gates: no merge is timed before its result has been compared with what it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from cases import ALPHA, LAM, K
from mergekit_merge import WEIGHT
from safetensors import safe_open

from hsa.actions.merge import Request, dry_run
from hsa.methods.hsa import HsaSettings
from hsa.methods.tensors import TensorTask
from hsa.reference import MergedTensor, merge_tensor

ROLES = ("base", "primary", "secondary")
Tensors = Mapping[str, torch.Tensor]
Check = Callable[[Path], None]


class Checkpoint:
    """Tensors of a checkpoint directory by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


class Gate:
    """What the outputs of all programs on one triple should be, on the tensors that are compared.

    `names` are all tensors, or of a large model a few: targets of the first and the last layer, and others of every
    kind. The outputs are compared with the formula written in plain torch.
    """

    def __init__(self, triple: Path, *, every: bool) -> None:
        self.sources = [Checkpoint(triple / role) for role in ROLES]
        plan = dry_run(
            Request(
                sources={role: triple / role for role in ROLES},
                output=triple / "never",
                settings=HsaSettings(k=K, lam=LAM, alpha=ALPHA),
            )
        )
        self.targets: dict[str, TensorTask] = {task.stored.name: task for task in plan.targets}
        names = list(self.sources[1].files)
        self.names = names if every else _few(names, list(self.targets))
        self.layers = 1 + max(task.place.layer for task in plan.targets if task.place is not None)

    def hsa(self, out: Path) -> None:
        """The exact result: the oracle's bits in targets, primary's bits elsewhere."""
        for name, values, merged in self._each(out, "hsa merge"):
            expected = values[1] if name not in self.targets else self._oracle(name, values)
            if not torch.equal(_bits(expected), _bits(merged)):
                raise SystemExit(f"correctness gate: {name} of hsa merge differs from the oracle; nothing is reported")

    def full_load(self, out: Path) -> None:
        """The same up to the rounding of the tensors' dtype: every tensor is written as B + (M1 - B)."""
        for name, values, merged in self._each(out, "the full load"):
            expected = values[1] if name not in self.targets else self._oracle(name, values)
            _close(name, merged, expected, values, "the full load")

    def task_arithmetic(self, out: Path) -> None:
        """Base and half of each task vector, in every tensor."""
        for name, values, merged in self._each(out, "mergekit"):
            base, primary, secondary = (value.double() for value in values)
            _close(name, merged, base + WEIGHT * (primary - base) + WEIGHT * (secondary - base), values, "mergekit")

    def compare_targets(self, state: Tensors) -> None:
        """Targets in memory: the oracle's bits."""
        for name in self.names:
            if name in self.targets:
                values = [source[name] for source in self.sources]
                if not torch.equal(_bits(self._oracle(name, values)), _bits(state[name])):
                    raise SystemExit(f"correctness gate: {name} in memory differs from the oracle; nothing is reported")

    def patch(self, path: Path) -> None:
        """The rows of a patch: the oracle's bits of the heads that it selects."""
        with safe_open(path, "pt") as file:
            if set(file.keys()) != self.targets.keys():
                raise SystemExit(f"correctness gate: {path.name} holds other tensors than the targets")
            for name in self.names:
                if name in self.targets:
                    merged = self._merged(name, [source[name] for source in self.sources])
                    whole = merged.value.view(self.targets[name].partition.groups, -1)
                    rows = file.get_tensor(name)
                    expected = whole[list(merged.selected)].reshape(rows.shape)
                    if not torch.equal(_bits(expected), _bits(rows)):
                        raise SystemExit(f"correctness gate: {name} of a patch differs from the oracle")

    def _each(self, out: Path, program: str) -> list[tuple[str, list[torch.Tensor], torch.Tensor]]:
        written = Checkpoint(out)
        missing = self.sources[1].files.keys() ^ written.files.keys()
        if missing:
            raise SystemExit(f"correctness gate: {program} wrote another set of tensors: {sorted(missing)[:3]}")
        return [(name, [source[name] for source in self.sources], written[name]) for name in self.names]

    def _oracle(self, name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._merged(name, values).value

    def _merged(self, name: str, values: Sequence[torch.Tensor]) -> MergedTensor:
        task = self.targets[name]
        assert task.place is not None
        layer, heads = task.place.layer, task.partition.groups
        return merge_tensor(*values, k=K, lam=LAM, alpha=ALPHA, layer=layer, layers=self.layers, heads=heads)


def _few(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Six targets of both ends of the stack, and the first tensor of each of some other kinds."""
    kinds = ("conv1.weight", "encoder.layers.0.fc1.weight", "encoder_attn.q_proj.weight", "layer_norm.bias")
    others = [next(name for name in names if kind in name) for kind in kinds]
    return [*targets[:3], *targets[-3:], *others]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _close(name: str, merged: torch.Tensor, expected: torch.Tensor, values: Sequence[torch.Tensor], who: str) -> None:
    """Within four roundings of the largest number that the formula adds up; another head differs by far more."""
    largest = max(float(value.abs().max()) for value in values)
    allowed = 4 * torch.finfo(merged.dtype).eps * largest
    worst = float((merged.double() - expected.double()).abs().max())
    if not worst <= allowed:
        raise SystemExit(
            f"correctness gate: {name} of {who} is off by {worst:g}, allowed are {allowed:g}; nothing is reported"
        )
