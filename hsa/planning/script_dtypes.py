"""The element types in which the reference script would load each source.

Source: the released script of Shankar et al., Computer Speech & Language, 2026, 102012, and the loading rules of
transformers 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping

from hsa.errors import RequestError, SourceError, shown
from hsa.methods.settings import Settings
from hsa.option_names import option
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.source_set import Sources
from hsa.system.dtypes import ARITHMETIC, CODES


def load_codes(settings: Settings, sources: Sources) -> Mapping[str, str]:
    """The element type that each source is cast to before any arithmetic.

    `auto`: the type that its config.json names (`dtype`, else `torch_dtype`), else that of the first floating-point
    tensor by name in its first shard, as transformers 5 does. `float32`: that type, as transformers 4 does. Raises
    RequestError for a source that the script could not load.
    """
    for source in sources:
        if source.kind in ("openai", "adapter"):
            raise RequestError(
                f"{source.role} {source.path}: numerics 'reference' repeats a script that loads Hugging Face "
                f"checkpoints, not OpenAI's files or adapters; give a checkpoint directory, or use numerics 'exact'"
            )
    if getattr(settings, "load_dtype", "auto") == "float32":
        return {source.role: "F32" for source in sources}
    return {source.role: _auto_code(source) for source in sources}


def _auto_code(source: Checkpoint) -> str:
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    if named is not None:
        code = CODES.get(str(named).removeprefix("torch."))
        if code is None:
            raise SourceError(
                f"{source.role} {source.path}: config.json has dtype {shown(named)}, expected one of "
                f"{', '.join(CODES)}; or give {option('load_dtype', 'float32')}"
            )
        return code
    first = sorted((ref for ref in source.tensors.values() if ref.shard == 0), key=lambda ref: ref.name)
    return next((ref.code for ref in first if ref.code in ARITHMETIC), "F32")
