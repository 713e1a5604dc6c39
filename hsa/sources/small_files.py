"""Choose the small files beside the weights: configs, tokenizer and processor files, and the source of each.

Tokenizer, feature extractor and processor each come whole from one source: their files refer to one another, and
programs differ in which of them they read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.errors import SourceChanged
from hsa.sources import any_small_files
from hsa.sources.any_small_files import AnySelectedFiles
from hsa.sources.checkpoint import CONFIG, Checkpoint, read_whole, resolve_inside
from hsa.sources.roles import Role
from hsa.sources.selected_files import AssetFolder, SelectedFiles, note_origin
from hsa.sources.small_file_checks import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    MERGES,
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    VOCABULARY,
    ModelSizes,
    contradictions,
    features_of,
)
from hsa.sources.source_folder import entry_names
from hsa.sources.source_set import Sources
from hsa.system.fsio import Tally
from hsa.system.strict_json import load_json

PROCESSOR_FILES = (PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES)
SMALL_FILES = (CONFIG, GENERATION_CONFIG, *PROCESSOR_FILES)
"""Every small file that a merge may write beside the weights, their index, the card and the provenance."""


def names_for(sources: Sources) -> tuple[str, ...]:
    """Return the names of all small files that a merge of these sources may write. For a family whose files are not
    known, these include the suitable files in the owner's directory."""
    if sources.architecture.lists_tensors:
        return SMALL_FILES
    anchor = sources.anchor_checkpoint
    names = any_small_files.wanted(entry_names(anchor.config_from or anchor.path), anchor.config)
    return tuple(dict.fromkeys((CONFIG, GENERATION_CONFIG, *any_small_files.NAMES, *names)))


_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Keys of a `config.json` that name the element type of the weights."""

FEATURES = (PREPROCESSOR, PROCESSOR)
TOKENS = (TOKENIZER_JSON, VOCABULARY)

GENERATION_SETTINGS: Mapping[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_decoder_ids": None,
    "forced_eos_token_id": None,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "pad_token_id": None,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "suppress_tokens": None,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
"""Settings that transformers takes from `config.json` if `generation_config.json` is missing. The values are its
defaults if neither file gives them (its GenerationConfig)."""


@dataclass(frozen=True)
class Assets:
    """The small files by name, as bytes in the order of writing, with notes and warnings for the user."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def collect(sources: Sources, owner: Role, assets_from: Role, dtype: str | None, tally: Tally) -> Assets:
    """Read every small file of the output, and check that it can be loaded.

    `config.json` is the owner's, with its dtype replaced if `dtype` is given. `generation_config.json` is the owner's,
    else base's unless the owner's `config.json` has other generation settings. Tokenizer, feature extractor and
    processor each come whole from `assets_from`, else from its parent directory, else from base. Notes name what does
    not come from `assets_from` or is left out. Warnings name what contradicts the model.

    Raises SourceError if a selected file cannot be loaded.
    """
    requested = sources.of(assets_from)
    known = requested.architecture.lists_tensors
    selection = SelectedFiles(tally) if known else AnySelectedFiles(tally)
    config = _config(sources.of(owner), dtype, tally)
    _choose_generation_config(selection, sources, owner)
    folders = [
        AssetFolder(requested.role, requested.path, assets_from),
        AssetFolder(requested.role, requested.path.parent, f"the directory above {assets_from}"),
    ]
    if sources.base is not None and sources.base_checkpoint.path not in [folder.directory for folder in folders]:
        folders.append(AssetFolder(sources.base, sources.base_checkpoint.path, sources.base))
    if known:
        tokenizer = choose_processor(selection, folders, requested.architecture.model_class({}).processor)
    else:
        tokenizer = any_small_files.choose(selection, folders, sources.of(owner))
    contradicting = list(contradictions(selection.documents, ModelSizes.of(sources.of(owner))))
    if tokenizer is not None and not contradicting:
        contradicting += _other_vocabulary(sources, owner, tokenizer)
    files = {CONFIG: config, **selection.files}
    return Assets(files, tuple(selection.notes), (*selection.warnings, *contradicting))


def choose_processor(selection: SelectedFiles, folders: Sequence[AssetFolder], processor: str) -> AssetFolder | None:
    """Take tokenizer, feature extractor and processor, each whole from the first folder that has it.

    `processor` is the transformers class that needs them, for the warning if they are missing. Returns the folder of
    the tokenizer.
    """
    features = _choose_features(selection, folders)
    tokenizer = _choose_tokenizer(selection, folders)
    missing = [what for what, folder in (("feature extractor", features), ("tokenizer", tokenizer)) if folder is None]
    if missing:
        selection.warnings.append(
            f"no source has {' or '.join(missing)} files ({', '.join(FEATURES + TOKENS)}); the output holds weights "
            f"and configs, and {processor} cannot be loaded from it: copy these files in from the pretrained model"
        )
    return tokenizer


def _choose_tokenizer(selection: SelectedFiles, folders: Sequence[AssetFolder]) -> AssetFolder | None:
    """Take the tokenizer's files. Those of an incomplete one are left out: they are useless without its vocabulary."""
    for folder in folders:
        present = folder.holds(TOKENIZER_FILES)
        if TOKENIZER_JSON in present or {VOCABULARY, MERGES} <= set(present):
            selection.take(folder, present)
            note_origin(selection, "tokenizer", present, folder, folders)
            return folder
        if present:
            for name in present:
                resolve_inside(folder.role, folder.directory, name)
            messages = selection.warnings if {VOCABULARY, ADDED_TOKENS} & set(present) else selection.notes
            messages.append(
                f"{', '.join(present)} of {folder.label} {_is_or_are(present)} left out: without {TOKENIZER_JSON}, or "
                f"{VOCABULARY} and {MERGES}, no tokenizer can be loaded from {'it' if len(present) == 1 else 'them'}"
            )
    return None


def _choose_features(selection: SelectedFiles, folders: Sequence[AssetFolder]) -> AssetFolder | None:
    """Take feature extractor and processor. transformers 5 keeps the extractor in the processor's file, which then
    takes precedence over `preprocessor_config.json`."""
    extractor_folder: AssetFolder | None = None
    nested = False
    earlier: list[AssetFolder] = []
    for folder in folders:
        if folder.has(PROCESSOR):
            nested = features_of({PROCESSOR: selection.read(folder, PROCESSOR)[1]}, PROCESSOR) is not None
        if nested or folder.has(PREPROCESSOR):
            extractor_folder = folder
            break
        if folder.has(PROCESSOR):
            earlier.append(folder)
    if extractor_folder is None:
        for folder in earlier:
            selection.notes.append(
                f"{PROCESSOR} of {folder.label} is left out, for there is no feature extractor for it"
            )
        return None
    present = extractor_folder.holds(FEATURES)
    names = present if nested or not earlier else [PREPROCESSOR]
    selection.take(extractor_folder, names)
    note_origin(selection, "feature extractor", names, extractor_folder, folders)
    later = folders[folders.index(extractor_folder) + 1 :]
    if nested:
        for folder in earlier:
            selection.notes.append(
                f"{PROCESSOR} of {folder.label} is left out, for that of {extractor_folder.label} holds the feature "
                f"extractor"
            )
        for folder in later if PREPROCESSOR not in present else ():
            if folder.has(PREPROCESSOR):
                selection.notes.append(
                    f"{PREPROCESSOR} of {folder.label} is left out, for {PROCESSOR} of {extractor_folder.label} holds "
                    f"a feature extractor"
                )
    elif PROCESSOR not in selection.files:
        _choose_processor_config(selection, extractor_folder, [*earlier, *later], folders)
    return extractor_folder


def _choose_processor_config(
    selection: SelectedFiles,
    extractor_folder: AssetFolder,
    others: Sequence[AssetFolder],
    folders: Sequence[AssetFolder],
) -> None:
    """Take another folder's processor, unless it holds a feature extractor: that would override the chosen one."""
    for folder in others:
        if not folder.has(PROCESSOR):
            continue
        document = selection.read(folder, PROCESSOR)[1]
        if features_of({PROCESSOR: document}, PROCESSOR) is not None:
            selection.notes.append(
                f"{PROCESSOR} of {folder.label} is left out, for it holds a feature extractor that would win over that "
                f"of {extractor_folder.label}"
            )
            continue
        selection.take(folder, [PROCESSOR])
        note_origin(selection, "processor", [PROCESSOR], folder, folders)
        return


def _is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _choose_generation_config(selection: SelectedFiles, sources: Sources, owner: Role) -> None:
    source = sources.of(owner)
    own = AssetFolder(owner, source.path, owner)
    if own.has(GENERATION_CONFIG):
        selection.take(own, [GENERATION_CONFIG])
        return
    if sources.base in (None, owner):
        return
    base = AssetFolder(sources.base, sources.base_checkpoint.path, sources.base)
    if not base.has(GENERATION_CONFIG):
        return
    data, document = selection.read(base, GENERATION_CONFIG)
    borrowed = source.config_from is not None  # an adapter's config.json is base's
    overridden = [] if borrowed else _overridden(source.config, document)
    if overridden:
        selection.notes.append(
            f"{GENERATION_CONFIG} of base is left out, for {owner} has none and its {CONFIG} sets "
            f"{', '.join(overridden)} in another way, which base's would override"
        )
        return
    selection.files[GENERATION_CONFIG], selection.documents[GENERATION_CONFIG] = data, document
    selection.notes.append(f"{GENERATION_CONFIG} comes from base, for {owner} has none")


def _overridden(config: Mapping[str, Any], generation: Mapping[str, Any]) -> list[str]:
    """Return the generation settings of a `config.json` that a `generation_config.json` would override."""
    return [
        key
        for key, default in GENERATION_SETTINGS.items()
        if config.get(key) is not None and config[key] != generation.get(key, default)
    ]


def _other_vocabulary(sources: Sources, owner: Role, tokenizer: AssetFolder) -> list[str]:
    """Warn of a tokenizer whose own model has another number of tokens than the model whose weights are written."""
    rows = {}
    for source in (sources.of(owner), *(each for each in sources if each.path == tokenizer.directory)):
        embedding = source.embedding
        if embedding is not None and embedding.shape:
            rows[source.role] = embedding.shape[0]
    other = next((role for role in rows if role != owner), None)
    if owner not in rows or other is None or rows[owner] == rows[other]:
        return []
    return [
        f"the tokenizer is {other}'s, whose embedding has {rows[other]} rows, and that of {owner} has {rows[owner]}: "
        f"tokens that {owner} added or dropped are not those of this tokenizer; use the one that it was trained with"
    ]


def _config(source: Checkpoint, dtype: str | None, tally: Tally) -> bytes:
    directory = source.config_from or source.path
    raw = read_whole(source.role, directory, CONFIG, tally)
    where = f"{source.role}: {directory / CONFIG}"
    if load_json(raw, where, "config") != source.config:
        raise SourceChanged(f"{where} changed while the source was read; run the merge again")
    if dtype is None:
        return raw
    config = dict(source.config)
    keys = [key for key in _DTYPE_KEYS if key in config] or ["dtype"]
    if all(config.get(key) == dtype for key in keys):
        return raw
    config.update(dict.fromkeys(keys, dtype))
    for key, part in config.items():  # sub-configs of composite models
        if isinstance(part, dict) and key.endswith("_config"):
            config[key] = {**part, **dict.fromkeys((each for each in _DTYPE_KEYS if each in part), dtype)}
    text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    load_json(text, f"output: {CONFIG} of {source.role} with another dtype", "config")  # validates what is written
    return text
