"""A patch taken apart, changed, and written again with every digest computed anew: what a forger would do."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from hsa.outputs import patch_format
from hsa.outputs.recording import tensors_digest
from hsa.system import manifest
from hsa.system.manifest import PROVENANCE, document_digest

Rows = dict[str, tuple[str, list[int], bytes]]


@dataclass
class Forger:
    """The document of a patch, and its tensors: element type, shape and bytes by name, in the order of the file."""

    path: Path
    document: dict[str, Any]
    tensors: Rows
    target: str
    """A target of which some heads are selected and some are not."""

    @property
    def entry(self) -> dict[str, Any]:
        """What the document says of the target."""
        found: dict[str, Any] = self.document["targets"][self.target]
        return found

    @property
    def decision(self) -> dict[str, Any]:
        """What it says was decided for the target."""
        found: dict[str, Any] = self.entry["decision"]
        return found

    def fit_margin(self) -> None:
        """Make the margin of the target what its scores and selected heads give."""
        scores, selected = self.decision["scores"], self.decision["selected"]
        last = min(scores[head] for head in selected) ** 2
        dropped = max(score for head, score in enumerate(scores) if head not in selected) ** 2
        self.decision["margin"] = (last - dropped) / last

    @classmethod
    def of(cls, path: Path) -> Forger:
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        document = json.loads(header.pop("__metadata__")[patch_format.KEY])
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            tensors[name] = (entry["dtype"], entry["shape"], raw[start + first : start + last])
        target = next(n for n in document["targets"] if "layers.1" in n and n.endswith("v_proj.weight"))
        return cls(path, document, tensors, target)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of the elements of a float32 tensor."""
        _, shape, data = self.tensors[name]
        return np.frombuffer(data, np.float32).reshape(shape).copy()

    def put(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Replace the elements of a tensor."""
        self.tensors[name] = (self.tensors[name][0], list(array.shape), array.tobytes())

    def write(self) -> None:
        """Write the patch, each digest made to fit."""
        listed = [(n, code, shape, blake3(data).hexdigest()) for n, (code, shape, data) in self.tensors.items()]
        self.document["tensors_blake3"] = tensors_digest(listed)
        with suppress(ValueError):  # of NaN and Inf there is no digest
            self.document["digest"] = document_digest(self.document)
        text = json.dumps(self.document, separators=(",", ":"))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", patch_format.KEY: text}}
        stop = 0
        for name, (code, shape, data) in self.tensors.items():
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [stop, stop + len(data)]}
            stop += len(data)
        raw = json.dumps(header).encode()
        self.path.write_bytes(
            len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in self.tensors.values())
        )


def forge(directory: Path, **changes: Any) -> None:
    """Change a provenance and give it a digest that is right again."""
    document = json.loads((directory / PROVENANCE).read_text())
    for path, value in changes.items():
        place = document
        *parents, last = path.split("__")
        for key in parents:
            place = place[key]
        place[last] = value
    document["digest"] = manifest.document_digest(document)
    (directory / PROVENANCE).write_bytes(manifest.render(document))


HOSTILE = "[red]x[/red]\x1b[31m<img src=x onerror=hit()>"
"""A text that is markup, an escape sequence and a tag at once."""
