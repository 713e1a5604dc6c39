"""Plan reference numerics: what the reference script would load, keep and write.

Names, head and layer counts and the output's element type are base's. Each source is cast to the element type that the
script's loader would have given it. Every tensor goes through the arithmetic.
Source: the released script of Shankar et al., Computer Speech & Language, 2026, 102012, and the loading rules of
transformers 4 and 5.
"""

from __future__ import annotations

from hsa.architectures.base import Partition
from hsa.errors import MismatchError, SourceError
from hsa.methods.tensors import TensorTask
from hsa.planning.file_layout import TensorContent, pieces_of
from hsa.planning.tasks import TaskFinder
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.source_set import Sources
from hsa.sources.tied_tensors import same_bytes
from hsa.system.dtypes import ARITHMETIC


def output_names(sources: Sources) -> dict[str, str]:
    """Canonical and stored names of the output: base's, as transformers saves them, with tied tensors only once."""
    base, family = sources.base_checkpoint, sources.architecture
    output = None if family.tie is None else family.tie.output
    untied = _is_untied(base)
    ordered = sorted(base.tensors.items(), key=lambda item: (item[1].shard, item[1].offset))
    return {
        name: name if name == output else f"{family.prefix}{name}" for name, _ in ordered if name != output or untied
    }


def other_content(name: str, stored: str, finder: TaskFinder) -> TensorContent:
    """A tensor that is no target: `B + scale * (M1 - B)` in the script's arithmetic."""
    sources = finder.sources
    base = sources.base_checkpoint.tensors[name]
    primary = sources.anchor_checkpoint.tensors.get(name)
    refs = {sources.base or "": base}
    tie = sources.architecture.tie
    if not (tie is not None and name == tie.output and (primary is None or not _is_untied(sources.anchor_checkpoint))):
        if primary is None:
            raise MismatchError(
                f"tensor {base.name} is missing from {sources.anchor}, and numerics 'reference' needs it"
            )
        for source, ref in ((sources.base_checkpoint, base), (sources.anchor_checkpoint, primary)):
            if ref.code not in ARITHMETIC:
                raise SourceError(
                    f"{source.file_of(ref)}: tensor {ref.name} has dtype {ref.code}, numerics 'reference' needs one of "
                    f"{', '.join(ARITHMETIC)}"
                )
        sources.base_of(name, primary, "numerics 'reference'")
        refs[sources.anchor] = primary
    code = finder.out_code(base.code)
    task = TensorTask(
        name=name,
        place=None,
        layers=0,
        shape=base.shape,
        partition=Partition(),
        sources=refs,
        anchor=next(reversed(refs)),
        out_code=code,
        output_name=stored,
        listed=False,
        load_codes=finder.load_codes,
    )
    return TensorContent(stored, code, base.shape, pieces_of(task))


def _is_untied(source: Checkpoint) -> bool:
    """Whether transformers would keep the output projection separate from the embedding."""
    tie = source.architecture.tie
    if tie is None:
        return False
    output, embedding = source.tensors.get(tie.output), source.tensors.get(tie.embedding)
    if output is None:
        return False
    if not source.architecture.is_tied(source.config) or embedding is None:
        return True
    return not same_bytes(source, output, embedding)
