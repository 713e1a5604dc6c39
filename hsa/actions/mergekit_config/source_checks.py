"""Check the models of a mergekit file by their headers and small files: layers, stacks, vocabularies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hsa.actions.mergekit_config.config_request import ConfigRequest
from hsa.actions.mergekit_config.nodes import RUN_MERGEKIT
from hsa.errors import RequestError, listed, shown
from hsa.findings import Findings
from hsa.sources.checkpoint import MAX_TEXT, Checkpoint, read_whole
from hsa.sources.small_file_checks import ADDED_TOKENS, MAX_VOCABULARY_MARKS, TOKENIZER_JSON, VOCABULARY
from hsa.sources.source_set import Sources
from hsa.system.dtypes import NAMES
from hsa.system.fsio import Tally, exists
from hsa.system.strict_json import parse_json


def check_sources(config: ConfigRequest, sources: Sources, tally: Tally) -> Findings:
    """Notes on how the output differs from mergekit's. Raises RequestError if the models do not fit the file."""
    _check_layers(config, sources)
    vocabulary_notes = _check_vocabularies(config, sources, tally) if config.same_vocabulary else ()
    return Findings((*vocabulary_notes, *_notes(config, sources)))


def _notes(config: ConfigRequest, sources: Sources) -> Iterator[str]:
    anchor = sources.anchor_checkpoint
    if config.dtype != "auto":
        return
    for name, ref in anchor.tensors.items():
        codes = {other.tensors[name].code for other in sources if name in other.tensors}
        if ref.code in ("F16", "BF16") and len(codes) > 1:
            yield (
                f"{config.where} has no out_dtype and the models differ in element type: tensors such as {ref.name} "
                f"are {NAMES[ref.code]}, as in {sources.anchor}; mergekit takes the widest, for which write out_dtype: "
                f"float32"
            )
            return


# --- layers -----------------------------------------------------------------------------------------------------------


def _check_layers(config: ConfigRequest, sources: Sources) -> None:
    counts = {source.role: layer_counts(source) for source in sources}
    stacks = counts[sources.anchor]
    if config.modules:
        _check_modules(config, stacks)
    elif config.layers and len(stacks) > 1:
        raise RequestError(
            f"{config.where}: slices count the layers of one stack, and the models have {listed(map(shown, stacks))}; "
            f"write modules: {{{': ..., '.join(stacks)}: ...}}, each with slices"
        )
    for name, expected in config.layers.items():
        for role, found in counts.items():
            count = next(iter(found.values()), 0) if name is None else found.get(name, 0)
            if count != expected:
                of = "" if name is None else f" of the {name}"
                raise RequestError(
                    f"{config.where}: the slices{of} end at layer {expected} and {role} has {count} layers; every "
                    f"layer stays in its place here, so let the slices cover them all, or {RUN_MERGEKIT}"
                )


def _check_modules(config: ConfigRequest, stacks: Mapping[str, int]) -> None:
    """Raise RequestError unless every stack of the models has its module; a single module may have any name."""
    if len(config.modules) == len(stacks) == 1:
        return
    if set(config.modules) != set(stacks):
        raise RequestError(
            f"{config.where}: modules are {listed(map(shown, config.modules))}, and the models have the stacks "
            f"{listed(map(shown, stacks))}; name every one of them"
        )


def layer_counts(source: Checkpoint) -> dict[str, int]:
    """The number of layers in each stack of a model, by its tensors."""
    counts: dict[str, int] = {}
    for name in source.tensors:
        place = source.architecture.layer_of(name)
        if place is not None:
            stack = place[0].rpartition(".")[2]
            counts[stack] = max(counts.get(stack, 0), place[1] + 1)
    return dict(sorted(counts.items()))


# --- vocabularies -----------------------------------------------------------------------------------------------------


def _check_vocabularies(config: ConfigRequest, sources: Sources, tally: Tally) -> Iterator[str]:
    """Notes on rows of the embedding that belong to no token.

    Raises RequestError unless all tokenizers have one vocabulary, and all embeddings have the same number of rows,
    enough for the vocabulary. A model without a tokenizer is taken to have base's, as in mergekit.
    """
    first: tuple[str, Mapping[str, int]] | None = None
    for source in sources:
        vocabulary = read_vocabulary(source, tally)
        if vocabulary is None:
            continue
        if first is None:
            first = source.role, vocabulary
        elif vocabulary != first[1]:
            differing = next(
                token for token in {**first[1], **vocabulary} if first[1].get(token) != vocabulary.get(token)
            )
            raise RequestError(
                f"{config.where}: the tokenizers of {first[0]} and {source.role} differ, as in the token "
                f"{shown(differing)}, and embeddings are merged row by row here; leave tokenizer_source out, or "
                f"{RUN_MERGEKIT}"
            )
    if first is not None:
        yield from _check_rows(config, sources, first[1])


def _check_rows(config: ConfigRequest, sources: Sources, vocabulary: Mapping[str, int]) -> Iterator[str]:
    """See `_check_vocabularies`."""
    needed = max(vocabulary.values(), default=-1) + 1
    found = {source.role: shape[0] for source in sources if (shape := _embedding_shape(source))}
    for role, rows in found.items():
        if rows < needed:
            raise RequestError(
                f"{config.where}: the tokenizer of {role} has token ids up to {needed - 1} and its embedding {rows} "
                f"rows, of which mergekit would drop the tokens without one; leave tokenizer_source out, or "
                f"{RUN_MERGEKIT}"
            )
    if len(set(found.values())) > 1:
        counts = listed([f"{rows} in {role}" for role, rows in found.items()])
        raise RequestError(
            f"{config.where}: the embeddings differ in their rows ({counts}), which mergekit would cut to the "
            f"{len(vocabulary)} tokens; leave tokenizer_source out, or {RUN_MERGEKIT}"
        )
    rows = next(iter(found.values()), 0)
    if rows > len(vocabulary):
        yield (
            f"{config.where}: the tokenizers, which are the same, have {len(vocabulary)} tokens and the embeddings "
            f"{rows} rows, which are all kept and merged; mergekit would cut them to the tokens"
        )


def _embedding_shape(source: Checkpoint) -> tuple[int, ...]:
    return () if source.embedding is None else source.embedding.shape


def read_vocabulary(source: Checkpoint, tally: Tally) -> Mapping[str, int] | None:
    """The token ids of a model's tokenizer; None where it has none."""
    if not source.path.is_dir():
        return None
    if exists(source.path / TOKENIZER_JSON):
        return _of_tokenizer(_read(source, TOKENIZER_JSON, tally))
    if not exists(source.path / VOCABULARY):
        return None
    vocabulary: dict[str, int] = dict(_read(source, VOCABULARY, tally))
    if exists(source.path / ADDED_TOKENS):
        vocabulary |= _read(source, ADDED_TOKENS, tally)
    return vocabulary


def _read(source: Checkpoint, name: str, tally: Tally) -> Any:
    where = f"{source.role}: {source.path / name}"
    data = read_whole(source.role, source.path, name, tally)
    return parse_json(data, where, "tokenizer", dict, max_bytes=MAX_TEXT, max_marks=MAX_VOCABULARY_MARKS)


def _of_tokenizer(document: Any) -> dict[str, int]:
    """The token ids in a `tokenizer.json`: of its model, and those that were added."""
    model = document.get("model", {}) if isinstance(document, dict) else {}
    tokens = model.get("vocab", {})
    if isinstance(tokens, list):  # of a unigram model: pairs of tokens and scores, in the order of their ids
        tokens = {pair[0]: number for number, pair in enumerate(tokens) if isinstance(pair, list) and pair}
    found: dict[str, int] = dict(tokens)
    for added in document.get("added_tokens", ()) if isinstance(document, dict) else ():
        if isinstance(added, dict) and isinstance(added.get("content"), str) and type(added.get("id")) is int:
            found[added["content"]] = added["id"]
    return found
