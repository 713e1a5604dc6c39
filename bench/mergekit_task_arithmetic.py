"""mergekit's task_arithmetic on three Whisper checkpoints, by mergekit's own command line.

    PYTHON bench/mergekit_task_arithmetic.py BASE PRIMARY SECONDARY OUTPUT [--dtype float32]

Run by a Python that has mergekit. As released, 0.1.5 stops on every Whisper model: its definition gives the decoder's
tensors the prefix "model.decoder" without the dot. It is mended here in the process, nothing on disk changes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

WEIGHT = 0.5
"""Of each task vector."""

CONFIG = """
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {primary}
    parameters: {{weight: {weight}}}
  - model: {secondary}
    parameters: {{weight: {weight}}}
dtype: {dtype}
"""


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
    for name in ("base", "primary", "secondary", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    from mergekit.scripts.run_yaml import main as run_yaml

    mend()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yml"
        config.write_text(CONFIG.format(weight=WEIGHT, **vars(options)))
        run_yaml([str(config), str(options.output)], standalone_mode=False)


if __name__ == "__main__":
    sys.exit(main())
