"""Copy the small files of models whose family hsa does not know, unchanged.

The files that such a model needs beside its weights depend on its class: a tokenizer of one of many kinds, an image or
audio processor, chat templates, its own code. Files that belong together come from one source.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hsa.errors import SourceError
from hsa.sources.checkpoint import MAX_TEXT, Checkpoint, read_whole
from hsa.sources.selected_files import AssetFolder, SelectedFiles, note_origin
from hsa.sources.small_file_checks import (
    ADDED_TOKENS,
    MERGES,
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    VOCABULARY,
    read_any_small_file,
)
from hsa.sources.source_folder import entry_names

_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm")
VOCABULARIES = (TOKENIZER_JSON, VOCABULARY, "vocab.txt", *_MODELS)
"""Vocabulary files; any one of them is enough for a tokenizer."""

TOKENIZER = (*TOKENIZER_FILES, "vocab.txt", *_MODELS, "bpe.codes", "chat_template.jinja", "chat_template.json")
"""Files of a tokenizer, in the order in which they are written."""

PROCESSORS = (PREPROCESSOR, PROCESSOR, "video_preprocessor_config.json")
"""Processor files for images and sound."""

NAMES = (*TOKENIZER, *PROCESSORS)
"""Files with the same name in all models."""

_TOKENIZER_ENDINGS = (".model", ".tiktoken", ".spm")
"""Suffixes of vocabularies under other names. These are only taken from a model's own directory."""

_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([-_.][A-Za-z0-9._-]{1,40})?")

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Pattern for the names of files that are selected by suffix."""

_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_RELATIVE_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+\.(\w{1,100})[ \t]+import\b|import[ \t]+\.(\w{1,100})\b)", re.MULTILINE
)
"""How model code imports a file in the same directory; source: transformers' dynamic_module_utils."""

MAX_CODE_FILES = 64
"""The most code files that are followed from the one that a config names."""

MAX_TOKENIZER = 64 << 20
"""The largest tokenizer file in bytes: twice the size of the largest published ones."""

MAX_BYTES = 128 << 20
"""The most bytes of all small files of an output; they are in memory at the same time."""

MAX_FILES = 128
"""The most small files of an output."""


class AnySelectedFiles(SelectedFiles):
    """Small files of any model. Parsed content is kept only for files in Whisper's format."""

    def read(self, folder: AssetFolder, name: str) -> tuple[bytes, Any]:
        """Return the bytes of a folder's file and its parsed content, None if the content's format is unknown."""
        path = folder.directory / name
        if path not in self._read:
            data = read_whole(folder.role, folder.directory, name, self.tally, limit_of(name))
            self._read[path] = data, read_any_small_file(name, data, f"{folder.role}: {path}")
        return self._read[path]

    def take(self, folder: AssetFolder, names: Iterable[str]) -> None:
        """Read these files of a folder. Raises SourceError if one is damaged, or if they are too many or too large."""
        for name in names:
            super().take(folder, [name])
            held = sum(map(len, self.files.values()))
            if len(self.files) > MAX_FILES or held > MAX_BYTES:
                raise SourceError(
                    f"{folder.role}: {folder.directory} has more small files than an output takes: {len(self.files)} "
                    f"of {held} bytes, at most {MAX_FILES} of {MAX_BYTES}; keep those alone that the model needs"
                )
        self.documents = {name: document for name, document in self.documents.items() if document is not None}


def limit_of(name: str) -> int:
    """Return the most bytes that are read of a small file with this name."""
    return MAX_TOKENIZER if name in TOKENIZER or name.endswith(_TOKENIZER_ENDINGS) else MAX_TEXT


def is_vocabulary(name: str) -> bool:
    """Whether a tokenizer can be built from a file of that name."""
    return name in VOCABULARIES or (name.endswith(_TOKENIZER_ENDINGS) and _PLAIN.fullmatch(name) is not None)


def is_licence(name: str) -> bool:
    """Whether a file of that name states the terms under which a model may be used.

    Example:
        >>> is_licence("LICENSE"), is_licence("LICENSE.md"), is_licence("license_plates.json")
        (True, True, False)
    """
    return _LICENCE.fullmatch(name) is not None


def describe(name: str) -> str:
    """Describe the content of a small file with that name, for the card.

    Example:
        >>> describe("modeling_mine.py")
        'code of the model'
    """
    if is_licence(name):
        return "terms of use"
    if name.endswith(".py"):
        return "code of the model"
    if name.startswith("chat_template"):
        return "chat template"
    return "processor" if name in PROCESSORS else "tokenizer"


def wanted(names: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """Return those of a repository's file names that are small files an output may take."""
    code = "auto_map" in config
    return [
        name
        for name in sorted(names)
        if name in NAMES or is_vocabulary(name) or is_licence(name) or (code and _is_code(name))
    ][:MAX_FILES]


def _is_code(name: str) -> bool:
    return name.endswith(".py") and _MODULE.fullmatch(name.removesuffix(".py")) is not None


def choose(selection: SelectedFiles, folders: Sequence[AssetFolder], owner: Checkpoint) -> AssetFolder | None:
    """Take the tokenizer, the processors, the owner's licence, and the code that configs name.

    The tokenizer and the processors each come whole from the first folder that has them. `folders` are the directory
    that assets come from, the one above it, and base's. Returns the folder of the tokenizer.
    """
    tokenizer = _choose_tokenizer(selection, folders)
    processors = _choose(selection, folders, "processor", PROCESSORS)
    own = AssetFolder(owner.role, owner.config_from or owner.path, owner.role)
    selection.take(own, sorted(filter(is_licence, entry_names(own.directory))))
    _take_code(selection, own, owner.config, [each for each in (tokenizer, processors) if each is not None])
    model = owner.architecture.model_class(owner.config)
    needed = (("tokenizer", tokenizer, model.reads_tokens), ("processor", processors, model.reads_features))
    missing = [what for what, folder, reads in needed if reads and folder is None]
    if missing:
        selection.warnings.append(
            f"no source has {' or '.join(missing)} files; the output holds weights and configs, and {model.processor} "
            f"cannot be loaded from it: copy these files in from the pretrained model"
        )
    return tokenizer


def _choose_tokenizer(selection: SelectedFiles, folders: Sequence[AssetFolder]) -> AssetFolder | None:
    for folder in folders:
        above = folder.directory != folders[0].directory and folder.role == folders[0].role
        others = [] if above else sorted(name for name in entry_names(folder.directory) if is_vocabulary(name))
        present = list(dict.fromkeys((*folder.holds(TOKENIZER), *others)))
        if any(map(is_vocabulary, present)):
            selection.take(folder, present)
            note_origin(selection, "tokenizer", present, folder, folders)
            return folder
    alone = [name for name in folders[0].holds(TOKENIZER) if name != ADDED_TOKENS and name != MERGES]
    selection.take(folders[0], alone)  # the vocabulary may be in the code of the model
    return None


def _choose(
    selection: SelectedFiles, folders: Sequence[AssetFolder], what: str, names: Sequence[str]
) -> AssetFolder | None:
    for folder in folders:
        present = folder.holds(names)
        if present:
            selection.take(folder, present)
            note_origin(selection, what, present, folder, folders)
            return folder
    return None


def _take_code(
    selection: SelectedFiles, own: AssetFolder, config: Mapping[str, Any], others: Sequence[AssetFolder]
) -> None:
    """Take the code files that `auto_map` names in the config and in files already taken, and what they import."""
    configs = [(own, config)]
    for name in (TOKENIZER_CONFIG, PREPROCESSOR, PROCESSOR):
        document = selection.documents.get(name)
        configs += [(folder, document) for folder in others if isinstance(document, Mapping) and folder.has(name)]
    taken: list[str] = []
    absent: list[str] = []
    for folder, document in configs:
        for module in _modules(document):
            _follow(selection, folder, module, taken, absent)
    if taken:
        selection.notes.append(
            f"code of the model's own is copied as it is ({', '.join(sorted(taken))}); who loads the output with "
            f"trust_remote_code=True runs it"
        )
    if absent:
        selection.warnings.append(
            f"configs name code that is not there ({', '.join(sorted(set(absent)))}); without it the output cannot be "
            f"loaded: copy it in from the pretrained model"
        )


def _modules(document: Mapping[str, Any]) -> Iterator[str]:
    """The modules that `auto_map` names.

    Modules of another repository (`org/name--module.Class`) are skipped, since they are fetched from there.
    """
    auto_map = document.get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, Mapping) else []
    for value in values:
        for each in value if isinstance(value, list) else [value]:
            module = each.rpartition(".")[0] if isinstance(each, str) and "--" not in each else ""
            if _MODULE.fullmatch(module):
                yield module


def _follow(selection: SelectedFiles, folder: AssetFolder, module: str, taken: list[str], absent: list[str]) -> None:
    """Take a module's file and the files that it imports from the same directory, recursively."""
    waiting = [module]
    while waiting and len(taken) < MAX_CODE_FILES:
        name = f"{waiting.pop()}.py"
        if name in selection.files or name in absent:
            continue
        if not folder.has(name):
            absent.append(name)
            continue
        selection.take(folder, [name])
        taken.append(name)
        text = selection.files[name].decode("utf-8", "replace")
        found = (first or second for first, second in _RELATIVE_IMPORT.findall(text))
        waiting += [each for each in found if _MODULE.fullmatch(each)][:MAX_CODE_FILES]
