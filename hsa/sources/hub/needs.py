"""What a run needs of a source's weights: all of them, or the headers and the target tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hsa.architectures import whisper
from hsa.architectures.base import Preset
from hsa.sources.safetensors import Header


@dataclass(frozen=True)
class Needs:
    """What is needed of a source's weights: all, or the headers and the targets of a preset.

    `headers_only`: nothing but the headers now; what else a merge would fetch is counted. `compare`: the tensors too
    that reference numerics compare to plan. `assets`: the tokenizer and processor files as well.
    """

    need: Literal["whole", "targets"]
    preset: Preset
    assets: bool = False
    headers_only: bool = False
    compare: bool = False

    def names(self, headers: Mapping[str, Header]) -> Callable[[str], bool]:
        """Which tensors to fetch now, given the headers of all weights files."""
        if not self.headers_only:
            return self.target
        names = (entry.name for header in headers.values() for entry in header.entries)
        untied = any(whisper.canonical(name) == whisper.UNTIED_OUTPUT for name in names)
        compared = {whisper.UNTIED_OUTPUT, whisper.EMBEDDING} if self.compare and untied else set()
        return lambda name: whisper.canonical(name) in compared

    def target(self, name: str) -> bool:
        """Whether a preset merges the tensor of this name."""
        projection = whisper.parse(name)
        return projection is not None and whisper.is_target(projection, self.preset)
