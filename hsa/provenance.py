"""`hsa_merge.json`: what an output was made from, how, which heads were merged, and digests of every file.

Nothing in it depends on when or where the merge ran: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from hsa._version import __version__
from hsa.checkpoint import Checkpoint, Role, Sources
from hsa.compute import TargetOutcome
from hsa.plan import MergePlan

FORMAT = 1
DIGEST = "digest"


def build(
    plan: MergePlan,
    sources: Sources,
    outcomes: Sequence[TargetOutcome],
    files: Mapping[str, str | None],
    settings: Mapping[str, Any],
) -> bytes:
    """The file's bytes. `files` maps every other file of the output to its BLAKE3 digest, None where left out;
    `settings` is what besides the merge's own parameters shaped the output."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "program": {"name": "hsa-merge", "version": __version__},
        "libraries": _libraries(plan),
        "parameters": {**plan.config.as_dict(), **settings},
        "sources": {source.role: _source(source, outcomes) for source in sources},
        "targets": {outcome.target.primary.name: _target(outcome) for outcome in outcomes},
        "files": {name: ({"blake3": digest} if digest else {}) for name, digest in sorted(files.items())},
    }
    document[DIGEST] = digest_of(document)
    return render(document)


def render(document: Mapping[str, Any]) -> bytes:
    """The one way the document is written, so that a reader can tell any other bytes from it."""
    return (json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def digest_of(document: Mapping[str, Any]) -> str:
    """BLAKE3 of the document's canonical form (sorted keys, no spaces), its own digest left out."""
    from blake3 import blake3

    rest = {key: value for key, value in document.items() if key != DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return blake3(text.encode("ascii")).hexdigest()


def target_digest(role: Role, outcomes: Sequence[TargetOutcome]) -> str:
    """BLAKE3 over the target tensors of one source: name, element type, shape and digest of each, by name.

    Independent of how the source is split into shards.
    """
    from blake3 import blake3

    lines = []
    for outcome in outcomes:
        ref = getattr(outcome.target, role)
        line = [outcome.target.projection.name, ref.code, list(ref.shape), outcome.digests[role]]
        lines.append(json.dumps(line, separators=(",", ":")))
    return blake3("\n".join(sorted(lines)).encode("ascii")).hexdigest()


def _source(source: Checkpoint, outcomes: Sequence[TargetOutcome]) -> dict[str, Any]:
    from blake3 import blake3

    form = {} if source.kind == "safetensors" else {"format": source.kind}
    return {
        **form,
        "id": source.identity.id,
        "revision": source.identity.revision,
        "files": {
            shard.name: {"bytes": shard.source.size, "header_blake3": blake3(shard.header.raw).hexdigest()}
            for shard in source.shards
        },
        "targets_blake3": target_digest(source.role, outcomes),
    }


def _target(outcome: TargetOutcome) -> dict[str, Any]:
    target, selection = outcome.target, outcome.merged.selection
    return {
        "shape": list(target.shape),
        "dtype": target.out_code,
        "heads": target.heads,
        "keep": target.keep,
        "lambda_i": target.coefficient,
        "selected": list(selection.selected),
        "scores": list(selection.scores),
        "margin": selection.margin,
    }


def _libraries(plan: MergePlan) -> dict[str, str]:
    names = ["numpy", "blake3", "huggingface_hub"]
    if plan.config.numerics == "reference":
        names.append("torch")
    return {"python": platform.python_version(), **{name: version(name) for name in sorted(names)}}
