"""The small files beside the weights: configs, tokenizer and processor files, from whichever source has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hsa.checkpoint import CONFIG, Checkpoint, Role, Sources, read_text
from hsa.errors import SourceChanged
from hsa.fsio import Tally
from hsa.header import load_json

GENERATION_CONFIG = "generation_config.json"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SMALL_FILES = (CONFIG, GENERATION_CONFIG, *PROCESSOR_FILES)
"""Every small file that a merge may write beside the weights, their index, the card and the provenance."""

FEATURES = ("preprocessor_config.json", "processor_config.json")
TOKENS = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Assets:
    """File name to bytes, in the order written, with what the user should know about them."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def collect(sources: Sources, owner: Role, assets_from: Role, dtype: str | None, tally: Tally) -> Assets:
    """Read every asset file of the output.

    `config.json` is the owner's, with its dtype replaced where `dtype` is given; `generation_config.json` the
    owner's, else base's. Processor files come from `assets_from`; what is missing there from its parent
    directory, then from base; a note says so for each that does not come from the place asked for.
    """
    notes: list[str] = []
    files = {CONFIG: _config(sources.of(owner), dtype, tally)}
    candidates: tuple[Role, ...] = (owner, "base")
    for role in dict.fromkeys(candidates):
        source = sources.of(role)
        if _has(source.path, GENERATION_CONFIG):
            files[GENERATION_CONFIG] = read_text(source.role, source.path, GENERATION_CONFIG, tally)
            if role != owner:
                notes.append(f"{GENERATION_CONFIG} comes from {role}, for {owner} has none")
            break
    asked = sources.of(assets_from)
    places = [
        (asked, asked.path, assets_from),
        (asked, asked.path.parent, f"the directory above {assets_from}"),
    ]
    places.append((sources.base, sources.base.path, "base"))
    for name in PROCESSOR_FILES:
        for source, directory, label in places:
            if _has(directory, name):
                files[name] = read_text(source.role, directory, name, tally)
                if directory != asked.path:
                    notes.append(f"{name} comes from {label}, for {assets_from} has none")
                break
    return Assets(files, tuple(notes), tuple(_missing(files)))


def _config(source: Checkpoint, dtype: str | None, tally: Tally) -> bytes:
    directory = source.config_from or source.path
    raw = read_text(source.role, directory, CONFIG, tally)
    where = f"{source.role}: {directory / CONFIG}"
    if load_json(raw, where, "config") != source.config:
        raise SourceChanged(f"{where} changed while the source was read; run the merge again")
    if dtype is None:
        return raw
    config = dict(source.config)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if all(config.get(key) == dtype for key in keys):
        return raw
    config.update(dict.fromkeys(keys, dtype))
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _has(directory: Path, name: str) -> bool:
    return (directory / name).is_file()


def _missing(files: Mapping[str, bytes]) -> list[str]:
    lacking = [
        what
        for what, names in (("feature extractor", FEATURES), ("tokenizer", TOKENS))
        if not any(name in files for name in names)
    ]
    if not lacking:
        return []
    return [
        f"no source has {' or '.join(lacking)} files ({', '.join(FEATURES + TOKENS)}); the output holds weights "
        f"and configs, and WhisperProcessor cannot be loaded from it: copy these files in from the pretrained model"
    ]
