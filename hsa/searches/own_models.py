"""Load a model of any transformers family, for the caller's own scoring function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsa.errors import SourceError, listed, shown
from hsa.evaluation.transformers_calls import explained, quiet_transformers
from hsa.sources.checkpoint import CONFIG, read_config
from hsa.system.fsio import Tally


def load_any_model(folder: Path, device: str, dtype: str) -> Any:
    """Load the model of a checkpoint directory, of the class that its config names.

    Raises SourceError if transformers has no such class, or the checkpoint is incomplete.

    Example:
        >>> load_any_model(Path("llama"), "cpu", "auto")  # doctest: +SKIP
    """
    import torch
    import transformers

    stated = read_config("model", folder, Tally()).get("architectures")
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    owner = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if owner is None:
        what = f"says {listed(map(shown, names))}" if names else "names no architectures"
        raise SourceError(f"{folder}: its {CONFIG} {what}, expected a class of transformers to load the model with")
    wanted: Any = ("float32" if device == "cpu" else "auto") if dtype == "auto" else dtype
    wanted = wanted if wanted == "auto" else getattr(torch, wanted)
    with quiet_transformers(), explained(folder):
        model, info = owner.from_pretrained(
            folder, dtype=wanted, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise SourceError(f"{folder} lacks {len(missing)} tensors of a {owner.__name__}, such as {missing[0]}")
        return model.to(device).eval()
