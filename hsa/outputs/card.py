"""The model card of an output: Hub metadata, the method with its exact parameters, and the merged models."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hsa.architectures.base import Architecture, ModelClass
from hsa.errors import RequestError, is_text, listed, shown
from hsa.methods.all_settings import all_settings
from hsa.methods.markdown import bullets, code, escape, fence, table
from hsa.methods.tensors import CardText
from hsa.option_names import option
from hsa.outputs.record import OPTIONAL_SETTINGS, SETTINGS, Record
from hsa.sources.any_small_files import describe, is_vocabulary
from hsa.sources.identity import Identity, is_hub_id
from hsa.sources.roles import Role
from hsa.sources.small_files import FEATURES, TOKENS
from hsa.system.manifest import PROVENANCE

FIELDS = (
    "title",
    "language",
    "license",
    "release_group",
    "role",
    "adaptation_context",
    "source_artifact",
    "intended_use",
    "limitations",
    "citation",
    "model_index",
)
"""The fields that `--card FIELD=VALUE` may set. `language` may hold several, separated by commas. `model_index` is the
Hub's list of measured results as JSON, as `hsa search` writes it."""

MAX_MODEL_INDEX = 1 << 18
"""Maximum length of a `model_index` in characters: enough for about a hundred sets."""


def parse_fields(pairs: Iterable[str]) -> dict[str, str]:
    """Parse `FIELD=VALUE` strings into a mapping; RequestError for an unknown field or a missing `=`."""
    fields: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"{option('card')} takes FIELD=VALUE, got {shown(pair)}")
        fields[name] = value
    return check_fields(fields)


def check_fields(fields: Mapping[str, str]) -> dict[str, str]:
    """Return the fields if every name is known; RequestError otherwise."""
    for name, value in fields.items():
        if not isinstance(value, str) or not value.strip():
            raise RequestError(f"card field {name} must be a text that says something, got {shown(value)}")
        if not is_text(value):
            raise RequestError(f"card field {name} is {shown(value)}, which is not valid UTF-8; give it as UTF-8")
    if "model_index" in fields:
        model_index_of(fields["model_index"])
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise RequestError(f"card field {shown(unknown[0])} is unknown; there are {', '.join(FIELDS)}")
    return dict(fields)


def model_index_of(text: str) -> list[dict[str, Any]]:
    """Parse the measured results in a card field, in the Hub's schema. RequestError for anything else.

    Example:
        >>> model_index_of('[{"name": "merged", "results": []}]')
        [{'name': 'merged', 'results': []}]
    """
    found: Any = None
    if len(text) <= MAX_MODEL_INDEX:
        with suppress(ValueError, RecursionError):
            found = json.loads(text)
    entries: list[Any] = found if isinstance(found, list) and found else [None]
    if not all(isinstance(each, dict) and each.keys() == {"name", "results"} for each in entries):
        raise RequestError(
            f"card field model_index must be a list of objects with name and results, as JSON of at most "
            f"{MAX_MODEL_INDEX} characters, got {shown(text)}"
        )
    if not all(isinstance(each["name"], str) and isinstance(each["results"], list) for each in entries):
        raise RequestError(f"card field model_index must name a model and list its results, got {shown(text)}")
    return entries


def render(record: Record, files: Collection[str], config: Mapping[str, Any]) -> bytes:
    """Render the card as bytes.

    `files` are the output's file names, and `config` is the content of its `config.json`. The card's fields are among
    the record's parameters."""
    model = record.architecture.model_class(config)
    fields: Mapping[str, str] = record.parameters["card"]
    extra: dict[str, Any] = {}
    if "language" in fields:
        languages = [tag.strip() for tag in fields["language"].split(",") if tag.strip()]
        extra["language"] = languages[0] if len(languages) == 1 else languages
    if "license" in fields:
        extra["license"] = fields["license"]
    if "model_index" in fields:
        extra["model_index"] = model_index_of(fields["model_index"])
    ids = [source.identity.id for source in record.sources.values()]
    tags = record.architecture.tags, record.method.tags
    head = metadata(filter(is_hub_id, ids), extra, model.task, *tags, library=model.library)
    return f"{head}\n\n{_body(record, files, fields, model)}".encode()


def unlinked(record: Record) -> tuple[Role, ...]:
    """The sources that the card does not link to the Hub, because only their directory names are known."""
    return tuple(role for role, source in record.sources.items() if not is_hub_id(source.identity.id))


def metadata(
    parents: Iterable[str],
    extra: Mapping[str, Any],
    task: str,
    family_tags: Sequence[str],
    method_tags: Sequence[str],
    *,
    library: str = "transformers",
) -> str:
    """The YAML block at the start of a card, for a merge of these Hub ids; source: the Hub's model card schema.

    `task` is one of the Hub's task names and `library` is the library that loads the model. `family_tags` are the tags
    of the model family, `method_tags` those of the merge method. Empty values are left out.

    The block is written by the YAML library itself. Importing huggingface_hub's writer would take longer than merging a
    small model.
    """
    import yaml

    base_models = list(dict.fromkeys(parents))
    fields = {
        "base_model": base_models,
        "language": extra.get("language"),
        "library_name": library,
        "license": extra.get("license"),
        "pipeline_tag": task,
        "tags": [*family_tags, "merge", "model-merging", *method_tags],
        "base_model_relation": "merge" if base_models else None,
        "model-index": extra.get("model_index"),
    }
    text: str = yaml.safe_dump({k: v for k, v in fields.items() if v}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _body(record: Record, files: Collection[str], fields: Mapping[str, str], model: ModelClass) -> str:
    identities = {role: source.identity for role, source in record.sources.items()}
    details = [("Model type", model.description)]
    details += [(role.capitalize(), _identity(identity)) for role, identity in identities.items()]
    details += [
        (label, escape(fields[field]))
        for field, label in (
            ("release_group", "Release group"),
            ("role", "Role"),
            ("adaptation_context", "Adaptation context"),
            ("source_artifact", "Source artifact"),
        )
        if field in fields
    ]
    text = record.method.card_text(record.parameters, record.targets, record.architecture)
    citation = fields.get("citation", record.method.citation)
    sections = [
        f"# {escape(fields.get('title', _title(text, record)))}",
        "## Model details",
        bullets(details),
        "## Method",
        text.method,
        table(("parameter", "value"), _parameters(record.parameters)),
        *(part for heading, section in text.sections for part in (f"## {heading}", section)),
        "## Intended use",
        escape(fields["intended_use"]) if "intended_use" in fields else f"{model.use} {_intended_use(record)}",
        "## How to load",
        _loading(files, model),
        "## Files",
        bullets([(f"`{code(file)}`", _file_text(file, text, record.architecture)) for file in sorted(files)]),
        "## Limitations",
        escape(fields["limitations"]) if "limitations" in fields else _limitations(record),
        *(("## Citation", f"```bibtex\n{fence(citation)}\n```") if citation else ()),
    ]
    return "\n\n".join(sections) + "\n"


def _title(text: CardText, record: Record) -> str:
    models = listed(record.sources[role].identity.id for role in _models(record))
    return f"{text.merge} of {models}" if text.merge else f"Merge of {models} by {record.method.title}"


def _models(record: Record) -> list[Role]:
    """The roles of the models that were merged."""
    return [role for role in record.sources if role != record.base]


def _intended_use(record: Record) -> str:
    adapted = "was" if len(_models(record)) == 1 else "were"
    return f"""in the domains that {listed(_called(record, _models(record)))} {adapted} adapted to, and research on
model merging. Measure it on your own data before you rely on it."""


def _limitations(record: Record) -> str:
    return f"""No weight was trained for this checkpoint, and no accuracy is claimed for it here: whether the
merge helps, and with which parameters, is a question of measurement on data from the intended domain. It inherits
the limits, biases and licence terms of {listed(_called(record, list(record.sources)))}."""


def _called(record: Record, roles: Sequence[Role]) -> list[str]:
    """The names of the sources in sentences: roles where the method names all of its models, else identities."""
    names = {role.name for role in record.method.contract.named}
    if names.issuperset(_models(record)):
        return list(roles)
    return [f"`{code(record.sources[role].identity.id)}`" for role in roles]


def _parameters(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table of settings. A setting that has a default but no value has no effect in this merge and is omitted."""
    defaulted = {each.key for each in all_settings().values() if each.default is not None}
    shown = {
        name: value
        for name, value in parameters.items()
        if name not in (*SETTINGS, *OPTIONAL_SETTINGS) and not (value is None and name in defaulted)
    }
    return [(name if name.isidentifier() else escape(name), _value(value, name)) for name, value in shown.items()]


def _loading(files: Collection[str], model: ModelClass) -> str:
    """How to load the output with the files it has. Some models need both features and tokens, others only one."""
    parts = []
    if model.reads_tokens:
        parts.append(("tokenizer", any(name in TOKENS or is_vocabulary(name) for name in files)))
    if model.reads_features:
        parts.append(("feature extractor", bool({*FEATURES} & {*files})))
    complete = all(present for _, present in parts)
    names = sorted([model.name, model.processor] if complete and model.processor else [model.name])
    trusting = ", trust_remote_code=True" if model.custom_code else ""
    variable = "tokenizer" if model.processor == "AutoTokenizer" else "processor"
    lines = [
        "```python",
        f"from transformers import {', '.join(names)}",
        "",
        'path = "path/to/this/directory"',
        f"model = {model.name}.from_pretrained(path{trusting})",
        *([f"{variable} = {model.processor}.from_pretrained(path{trusting})"] if len(names) > 1 else []),
        "```",
    ]
    if not complete:
        lines += [
            "",
            f"{_not_part([what for what, _ in parts])} not part of this checkpoint: take the pretrained model's.",
        ]
    return "\n".join(lines)


def _not_part(parts: Sequence[str]) -> str:
    return f"The {parts[0]} is" if len(parts) == 1 else f"{' and '.join(parts).capitalize()} are"


def _identity(identity: Identity) -> str:
    text = f"`{code(identity.id)}`"
    return f"{text} at revision `{code(identity.revision)}`" if identity.revision else text


def _value(value: Any, name: str) -> str:
    if value is None:
        of_sources = {each.key for each in all_settings().values() if each.about.group == "sources"}
        return "from config.json" if name in of_sources else "none"
    if isinstance(value, dict):
        return "given per tensor, see `hsa_merge.json`"
    return f"`{code(str(value)) or ' '}`"


def _file_text(file: str, text: CardText, family: Architecture) -> str:
    """The description of a file of the output."""
    if file == PROVENANCE:
        return f"provenance: sources, parameters, {text.decisions} and digests"
    if file in _FILE_TEXT:
        return _FILE_TEXT[file]
    if file.endswith(".safetensors"):
        return "weights"
    return "tokenizer and feature extractor" if family.lists_tensors else describe(file)


_FILE_TEXT = {
    "config.json": "architecture",
    "generation_config.json": "generation defaults",
    "model.safetensors.index.json": "which weights file holds which tensor",
    "README.md": "this card",
}
