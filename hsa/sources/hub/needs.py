"""What a run needs of a source's weights: all of them, or the headers and the target tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hsa.architectures.base import Architecture, Preset
from hsa.sources.safetensors import Header


@dataclass(frozen=True)
class Needs:
    """The parts of a source's weights that are needed: all, or the headers and the targets of a preset.

    Without a preset, every tensor is a target. `headers_only`: fetch only the headers now, and count what a merge would
    fetch later. `compare`: also fetch the tensors that reference numerics compare to plan. `assets`: also fetch the
    tokenizer and processor files.
    """

    need: Literal["whole", "targets"]
    preset: Preset | None
    assets: bool = False
    headers_only: bool = False
    compare: bool = False

    def names(self, headers: Mapping[str, Header], architecture: Architecture) -> Callable[[str], bool]:
        """Which tensors to fetch now, given the headers of all weights files and the model's family."""
        if not self.headers_only:
            return lambda name: self.target(name, architecture)
        names = (entry.name for header in headers.values() for entry in header.entries)
        tie = architecture.tie
        untied = tie is not None and any(architecture.canonical(name) == tie.output for name in names)
        compared = {tie.output, tie.embedding} if tie is not None and self.compare and untied else set()
        return lambda name: architecture.canonical(name) in compared

    def target(self, name: str, architecture: Architecture) -> bool:
        """Whether the preset merges the tensor of this name."""
        return self.preset is None or architecture.target(name, self.preset) is not None
