"""A merge by mergekit's own command line, of Whisper checkpoints.

    PYTHON bench/mergekit_merge.py METHOD OUTPUT BASE MODEL [MODEL ...] [--dtype float32]

Run by a Python that has mergekit. As released, 0.1.5 stops on every Whisper model: its definition gives the decoder's
tensors the prefix "model.decoder" without the dot. It is mended here in the process, nothing on disk changes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WEIGHT = 0.5
"""Of each task vector in task arithmetic."""

DENSITY = 0.5
"""Of ties."""

T = 0.5
"""How far slerp goes from base to the model."""


def config_of(method: str, base: str, models: Sequence[str], dtype: str) -> dict[str, Any]:
    """What mergekit's configuration file says; JSON is YAML too."""
    every: dict[str, Any] = {"merge_method": method, "base_model": base, "dtype": dtype}
    of_a_model: dict[str, dict[str, Any]] = {
        "linear": {"weight": 1.0},
        "task_arithmetic": {"weight": WEIGHT},
        "ties": {"weight": 1.0, "density": DENSITY},
    }
    entries = [{"model": model, "parameters": of_a_model.get(method, {})} for model in models]
    if method == "linear":
        del every["base_model"]
    if method == "slerp":
        entries.insert(0, {"model": base, "parameters": {}})
        every["parameters"] = {"t": T}
    return {**every, "models": entries}


def mend() -> None:
    """Put the missing dot behind the decoder's prefix."""
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    for definition in NAME_TO_ARCH["WhisperForConditionalGeneration"]:
        for name, module in list(definition.modules.items()):
            prefix = module.weight_prefix
            if prefix and not prefix.endswith("."):
                definition.modules[name] = module.model_copy(update={"weight_prefix": f"{prefix}."})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("output", type=Path)
    parser.add_argument("base")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    from mergekit.scripts.run_yaml import main as run_yaml

    mend()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yml"
        path.write_text(json.dumps(config_of(options.method, options.base, options.models, options.dtype)))
        run_yaml([str(path), str(options.output)], standalone_mode=False)


if __name__ == "__main__":
    sys.exit(main())
