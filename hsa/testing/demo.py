"""Run `hsa demo`: a merge of made-up models in under a minute, checked at every step."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hsa.actions.merge import merge
from hsa.errors import HsaError, MachineError, RequestError
from hsa.methods.hsa_formula import keep_count
from hsa.methods.selection import count_heads
from hsa.outputs.report import MergeReport
from hsa.system.streams import print_stdout

LOUD = tuple(
    ("encoder", layer, kind, head)
    for layer in range(4)
    for kind in "qkv"
    for head in ((layer + offset) % 6 for offset in (0, 1, 3, 4))
)
"""The heads in which the demo's fine-tunes change most: four of six per layer and projection."""


NEEDED = 150_000_000
"""The size in bytes of the triple and the merge in float16, with a reserve."""


class DemoFailed(HsaError):
    """The demo's own checks found a difference: a bug, please report it."""

    exit_code = 1


def run_demo(keep: Path | None = None) -> None:
    """Build a triple, merge it, check the result, and print what was merged.

    All files are in a temporary directory, or in `keep` (new or empty). Raises DemoFailed if the output differs from
    the oracle or from the planted heads, or does not load.
    """
    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise RequestError(f"output {keep} is not an empty directory; name a new one")
        _run(keep)
        return
    with tempfile.TemporaryDirectory(prefix="hsa-demo-") as folder:
        _run(Path(folder))


def _run(folder: Path) -> None:
    from hsa.testing.whisper_checkpoints import SHAPES, write_triple

    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < NEEDED:
        raise MachineError(f"the demo writes {NEEDED} bytes to {folder}, and {free} are free there; free some space")
    print_stdout(
        f"1. Building three made-up models in Whisper's shape, in {folder}: nothing is installed or downloaded."
    )
    print_stdout("   The two fine-tunes changed most in heads that the demo knows: four of six in each layer.")
    paths = write_triple(folder, SHAPES["demo"], dtype="float16", loud_heads=LOUD)
    size = sum(file.stat().st_size for path in paths.values() for file in path.iterdir())
    print_stdout(f"   Base, primary and secondary take {size / 1e6:.0f} MB.")
    print_stdout("2. Merging with k = 0.6, lambda = 0.5, alpha = 0.2")
    print_stdout(f"   k = 0.6 of a tensor's 6 heads is 3.6, which rounds to {keep_count(0.6, 6)}.")
    output = folder / "merged"
    report = merge(output=output, base=paths["base"], primary=paths["primary"], secondary=paths["secondary"])
    print_stdout(
        f"   {report.selected_heads} of {report.total_heads} heads are merged, in {len(report.tensors)} tensors; "
        f"{report.seconds:.2f} s, peak memory {report.peak_memory_bytes / 1e6:.0f} MB"
    )
    print_stdout("3. Checking the output, bit by bit, against the formula in plain torch")
    _check_bytes(report, paths)
    _check_heads(report)
    print_stdout("4. Loading it with transformers")
    _check_loading(output)
    weights = [tensor for tensor in report.tensors.values() if tensor.projection.part == "weight"]
    merged, heads = count_heads(weights)
    print_stdout(
        f"5. The {len(weights)} weights: {merged} of their {heads} heads are merged (#), the others stay primary's (.)."
    )
    print_stdout(f"   The {len(report.tensors) - len(weights)} biases choose theirs by themselves and are not drawn.\n")
    print_stdout(head_map(report))
    print_stdout("\nAll checks passed. The same on your own models:\n")
    print_stdout("   hsa merge --base PRETRAINED --primary FINE_TUNE_1 --secondary FINE_TUNE_2 --output MERGED")


def head_map(report: MergeReport) -> str:
    """The selected heads as text: a row for each layer, with a block of heads for each of the encoder's q, k and v
    weights."""
    weights = {
        (tensor.projection.layer, tensor.projection.kind): tensor
        for tensor in report.tensors.values()
        if tensor.projection.stack == "encoder" and tensor.projection.part == "weight"
    }
    kinds = ("q", "k", "v")
    width = next(iter(weights.values())).heads
    lines = ["   layer  " + "  ".join(f"{kind:<{width}}" for kind in kinds)]
    for layer in sorted({layer for layer, _ in weights}):
        cells = [
            "".join("#" if head in weights[layer, kind].selected else "." for head in range(width)) for kind in kinds
        ]
        lines.append(f"   {layer:>5}  " + "  ".join(cells))
    return "\n".join(lines)


def _check_bytes(report: MergeReport, paths: dict[str, Path]) -> None:
    import torch
    from safetensors import safe_open

    from hsa.reference import merge_tensor
    from hsa.testing.whisper_checkpoints import SHAPES, tensor_shapes

    files = [
        safe_open(path / "model.safetensors", "pt")
        for path in (paths["base"], paths["primary"], paths["secondary"], report.output)
    ]
    layers = 1 + max(tensor.projection.layer for tensor in report.tensors.values())
    for name in tensor_shapes(SHAPES["demo"]):
        base, primary, secondary, merged = (file.get_tensor(name) for file in files)  # type: ignore[no-untyped-call]
        tensor = report.tensors.get(name)
        if tensor is None:
            expected, selected = primary, None
        else:
            oracle = merge_tensor(
                base,
                primary,
                secondary,
                k=0.6,
                lam=0.5,
                alpha=0.2,
                layer=tensor.projection.layer,
                layers=layers,
                heads=tensor.heads,
            )
            expected, selected = oracle.value, oracle.selected
        if not torch.equal(expected.view(torch.int16), merged.view(torch.int16)):
            raise DemoFailed(f"{name} differs from the oracle's bytes; please report this")
        if tensor is not None and tensor.selected != selected:
            raise DemoFailed(f"{name}: heads {tensor.selected} were merged, the oracle selects {selected}")


def _check_heads(report: MergeReport) -> None:
    for name, tensor in report.tensors.items():
        kind = tensor.projection.kind
        planted = tuple(sorted(head for _, layer, k, head in LOUD if (layer, k) == (tensor.projection.layer, kind)))
        if tensor.selected != planted:
            raise DemoFailed(f"{name}: heads {tensor.selected} were merged, {planted} were planted")


def _check_loading(output: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    _, info = WhisperForConditionalGeneration.from_pretrained(output, output_loading_info=True, local_files_only=True)
    problems = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if problems:
        raise DemoFailed(f"transformers loads the output with {problems}; please report this")
    WhisperProcessor.from_pretrained(output, local_files_only=True)
