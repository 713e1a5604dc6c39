"""Plans reference numerics: what the reference script would load, keep and write.

Names, head and layer counts and the output's element type are base's; each source is cast to the element type
that the script's loader would have given it; every tensor goes through the arithmetic.
Source: the released script of the paper in SPEC section 1, and the loading rules of transformers 4 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping

from hsa.errors import MismatchError, RequestError, SourceError, shown
from hsa.methods.hsa import HsaSettings
from hsa.option_names import option
from hsa.planning.file_layout import TensorContent, slices
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system.dtypes import ARITHMETIC, CODES

COMPARE_BYTES = 1 << 20
"""Bytes of two tensors that are compared at a time."""


def load_codes(config: HsaSettings, sources: Sources) -> Mapping[Role, str]:
    """The element type each source is cast to before any arithmetic.

    `auto`: what its config.json names (`dtype`, else `torch_dtype`), else the first floating tensor by name of
    its first shard, as transformers 5 does. `float32`: that, as transformers 4 does. RequestError for a source that the
    script could not load.
    """
    for source in sources:
        if source.kind in ("openai", "adapter"):
            raise RequestError(
                f"{source.role} {source.path}: numerics 'reference' repeats a script that loads Hugging Face "
                f"checkpoints, not OpenAI's files or adapters; give a checkpoint directory, or use numerics 'exact'"
            )
    if config.load_dtype == "float32":
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


def output_names(sources: Sources) -> dict[str, str]:
    """Canonical and stored names of the output: base's, as transformers saves them, tied tensors once."""
    base = sources.base_checkpoint
    untied = _is_untied(base)
    prefix, tie = base.architecture.prefix, base.architecture.tie
    output = None if tie is None else tie.output
    ordered = sorted(base.tensors.items(), key=lambda item: (item[1].shard, item[1].offset))
    return {name: name if name == output else f"{prefix}{name}" for name, _ in ordered if name != output or untied}


def other_content(
    name: str, stored: str, sources: Sources, config: HsaSettings, load_codes: Mapping[Role, str]
) -> TensorContent:
    """A tensor that is no target: `B + scale * (M1 - B)` in the script's arithmetic."""
    base = sources.base_checkpoint.tensors[name]
    primary = sources.anchor_checkpoint.tensors.get(name)
    code = load_codes["base"]
    tie = sources.architecture.tie
    if tie is not None and name == tie.output and (primary is None or not _is_untied(sources.anchor_checkpoint)):
        return TensorContent(stored, code, base.shape, slices(base, None, code, load_codes=load_codes, role="base"))
    if primary is None:
        raise MismatchError(f"tensor {base.name} is missing from primary, and numerics 'reference' needs it")
    for source, ref in ((sources.base_checkpoint, base), (sources.anchor_checkpoint, primary)):
        if ref.code not in ARITHMETIC:
            raise SourceError(
                f"{source.file_of(ref)}: tensor {ref.name} has dtype {ref.code}, numerics 'reference' needs one of "
                f"{', '.join(ARITHMETIC)}"
            )
    base = sources.base_of(name, primary, "numerics 'reference'")
    pieces = slices(primary, base, code, scale=config.non_attention_scale, load_codes=load_codes)
    return TensorContent(stored, code, base.shape, pieces)


def _is_untied(source: Checkpoint) -> bool:
    """Whether transformers would keep the output projection apart from the embedding."""
    output, embedding = source.untied_output, source.embedding
    if output is None:
        return False
    if not source.architecture.is_tied(source.config) or embedding is None:
        return True
    if (output.code, output.shape) != (embedding.code, embedding.shape):
        return True
    for start in range(0, output.nbytes, COMPARE_BYTES):
        count = min(COMPARE_BYTES, output.nbytes - start)
        output_bytes, embedding_bytes = bytearray(count), bytearray(count)
        source.read_into(output, memoryview(output_bytes), start)
        source.read_into(embedding, memoryview(embedding_bytes), start)
        if output_bytes != embedding_bytes:
            return True
    return False
