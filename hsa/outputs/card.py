"""The model card of an output: Hub metadata, the method with its exact parameters, and the heads merged."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from hsa.architectures.base import Architecture, ModelClass
from hsa.errors import RequestError, is_text, shown
from hsa.methods.all_settings import all_settings
from hsa.methods.selection import count_heads
from hsa.option_names import option
from hsa.outputs.provenance import SETTINGS, Record, TargetRecord
from hsa.sources.identity import Identity, is_hub_id
from hsa.sources.roles import BASE, Role
from hsa.sources.small_files import FEATURES, TOKENS

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
)
"""What `--card FIELD=VALUE` may set; `language` may hold several, separated by commas."""

PAPER = """@article{shankar2026compositional,
  title   = {Compositional domain adaptation for automatic speech recognition with headwise selective
             attention merging},
  author  = {Shankar, Natarajan Balaji and Wang, Zilai and Eren, Eray and Alwan, Abeer},
  journal = {Computer Speech \\& Language},
  pages   = {102012},
  year    = {2026},
  doi     = {10.1016/j.csl.2026.102012}
}"""


def parse_fields(pairs: Iterable[str]) -> dict[str, str]:
    """`FIELD=VALUE` strings as a mapping; RequestError for an unknown field or a missing `=`."""
    fields: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"{option('card')} takes FIELD=VALUE, got {shown(pair)}")
        fields[name] = value
    return check_fields(fields)


def check_fields(fields: Mapping[str, str]) -> dict[str, str]:
    """The fields, when every name is known; RequestError otherwise."""
    for name, value in fields.items():
        if not isinstance(value, str) or not value.strip():
            raise RequestError(f"card field {name} must be a text that says something, got {shown(value)}")
        if not is_text(value):
            raise RequestError(f"card field {name} is {shown(value)}, which is not valid UTF-8; give it as UTF-8")
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise RequestError(f"card field {shown(unknown[0])} is unknown; there are {', '.join(FIELDS)}")
    return dict(fields)


def render(record: Record, files: Collection[str], config: Mapping[str, Any]) -> bytes:
    """The card's bytes. `files` are the output's file names, `config` is what its `config.json` says; the card's fields
    are among the record's parameters."""
    model = record.architecture.model_class(config)
    fields: Mapping[str, str] = record.parameters["card"]
    extra: dict[str, str | list[str]] = {}
    if "language" in fields:
        languages = [tag.strip() for tag in fields["language"].split(",") if tag.strip()]
        extra["language"] = languages[0] if len(languages) == 1 else languages
    if "license" in fields:
        extra["license"] = fields["license"]
    ids = [source.identity.id for source in record.sources.values()]
    head = metadata(filter(is_hub_id, ids), extra, model.task, record.architecture.tags)
    return f"{head}\n\n{_body(record, files, fields, model)}".encode()


def unlinked(record: Record) -> tuple[Role, ...]:
    """The sources that the card does not link to the Hub, because only a directory's name is known of them."""
    return tuple(role for role, source in record.sources.items() if not is_hub_id(source.identity.id))


def metadata(
    parents: Iterable[str], extra: Mapping[str, str | list[str]], task: str, family_tags: Sequence[str]
) -> str:
    """The block of YAML that a card begins with, for a merge of these Hub ids; source: the Hub's model card schema.

    `task` is one of the Hub's names of tasks, `family_tags` are those of the models' family.

    Written by YAML's own library: huggingface_hub's would take longer to import than a small model to merge.
    """
    import yaml

    base_models = list(dict.fromkeys(parents))
    fields = {
        "base_model": base_models,
        "language": extra.get("language"),
        "library_name": "transformers",
        "license": extra.get("license"),
        "pipeline_tag": task,
        "tags": [*family_tags, "merge", "model-merging", "headwise-selective-attention", "hsa-merge"],
        "base_model_relation": "merge" if base_models else None,
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
    intended = escape(fields["intended_use"]) if "intended_use" in fields else f"{model.use} {INTENDED_USE}"
    models = " and ".join(identity.id for role, identity in identities.items() if role != BASE)
    title = fields.get("title", f"HSA merge of {models}")
    sections = [
        f"# {escape(title)}",
        "## Model details",
        _bullets(details),
        "## Method",
        _method(record.parameters),
        table(("parameter", "value"), _parameters(record.parameters)),
        "## Merged heads",
        f"{count_heads(record.targets)} heads in {len(record.targets)} target tensors. Scores and margins are in "
        f"`hsa_merge.json`.",
        _heads(record.targets, record.architecture),
        "## Intended use",
        intended,
        "## How to load",
        _loading(files, model),
        "## Files",
        _bullets([(f"`{code(file)}`", _FILE_TEXT.get(file, _kind(file))) for file in sorted(files)]),
        "## Limitations",
        escape(fields["limitations"]) if "limitations" in fields else LIMITATIONS,
        "## Citation",
        f"```bibtex\n{fence(fields.get('citation', PAPER))}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _method(parameters: Mapping[str, Any]) -> str:
    if parameters["attention_scale"] == parameters["non_attention_scale"] == 1.0:
        rest = "Everything else stays primary's."
    else:
        rest = (
            "Other heads of these tensors become `B + attention_scale * tv1`, all other tensors\n"
            "`B + non_attention_scale * tv1`."
        )
    if parameters["numerics"] == "reference":
        rest += (
            "\nComputed with the reference script's own operations, which write every tensor as `B + scale * tv1` and\n"
            "so may differ from primary in the last bit."
        )
    return f"{METHOD} {rest}"


METHOD = """Headwise Selective Attention (HSA) merge composes two fine-tunes of one pretrained model without
retraining. With `B` the base, `tv1` and `tv2` the task vectors of primary and secondary, each target tensor
ranks its attention heads by the L2 norm of `|tv1| + |tv2|`. The selected heads become
`B + attention_scale * (lambda_i * tv1 + (1 - lambda_i) * tv2)` with
`lambda_i = lambda ** (alpha * (i + 1) / L)` in layer `i` of `L`."""

INTENDED_USE = """in the domains that primary and secondary were adapted to, and research on
model merging. Measure it on your own data before you rely on it."""

LIMITATIONS = """No weight was trained for this checkpoint, and no accuracy is claimed for it here: whether the
merge helps, and with which parameters, is a question of measurement on data from the intended domain. It inherits
the limits, biases and licence terms of base, primary and secondary."""


def _parameters(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table of settings; one that has a default and no value means nothing in this merge."""
    defaulted = {each.key for each in all_settings().values() if each.default is not None}
    shown = {
        name: value
        for name, value in parameters.items()
        if name not in SETTINGS and not (value is None and name in defaulted)
    }
    return [(name if name.isidentifier() else escape(name), _value(value)) for name, value in shown.items()]


def _loading(files: Collection[str], model: ModelClass) -> str:
    """How to load the output with what is in it: some models need features and tokens, others features alone."""
    complete, parts = bool({*FEATURES} & {*files}), "The feature extractor is"
    if model.reads_tokens:
        complete, parts = complete and bool({*TOKENS} & {*files}), "Tokenizer and feature extractor are"
    names = sorted([model.name, model.processor] if complete else [model.name])
    lines = [
        "```python",
        f"from transformers import {', '.join(names)}",
        "",
        'path = "path/to/this/directory"',
        f"model = {model.name}.from_pretrained(path)",
        *([f"processor = {model.processor}.from_pretrained(path)"] if complete else []),
        "```",
    ]
    if not complete:
        lines += ["", f"{parts} not part of this checkpoint: take the pretrained model's."]
    return "\n".join(lines)


def _heads(targets: Sequence[TargetRecord], architecture: Architecture) -> str:
    stacks: dict[tuple[str, str, int], dict[str, str]] = {}
    columns: list[str] = []
    for target in targets:
        p = target.projection
        column = f"{p.kind} {p.part}"
        if column not in columns:
            columns.append(column)
        heads = " ".join(map(str, target.selected)) or "none"
        stacks.setdefault((p.stack, p.block, p.layer), {})[column] = heads
    columns.sort(key=lambda column: ("qkvo".index(column[0]), column.endswith("bias")))
    rows = []
    for (stack, block, layer), cells in sorted(
        stacks.items(), key=lambda item: (architecture.all_stacks.index(item[0][0]), *item[0][1:])
    ):
        rows.append((f"{stack} {block.replace('_', ' ')}", str(layer), *(cells.get(column, "") for column in columns)))
    return table(("attention", "layer", *columns), rows)


def _identity(identity: Identity) -> str:
    text = f"`{code(identity.id)}`"
    return f"{text} at revision `{code(identity.revision)}`" if identity.revision else text


def _value(value: Any) -> str:
    if value is None:
        return "from config.json"
    if isinstance(value, dict):
        return "given per tensor, see `hsa_merge.json`"
    return f"`{code(str(value)) or ' '}`"


def _kind(file: str) -> str:
    return "weights" if file.endswith(".safetensors") else "tokenizer and feature extractor"


_FILE_TEXT = {
    "config.json": "architecture",
    "generation_config.json": "generation defaults",
    "model.safetensors.index.json": "which weights file holds which tensor",
    "hsa_merge.json": "provenance: sources, parameters, heads, scores and digests",
    "README.md": "this card",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bullets(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {label}: {text}" for label, text in pairs)


def escape(text: str) -> str:
    """Text from users and files as plain words in Markdown: no markup, no HTML, one line."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$-])", r"\\\1", flat)


def code(text: str) -> str:
    """Text from users and files for a code span, in a table too."""
    return "".join(c if c.isprintable() and c not in "`|" else "?" for c in text)


def fence(text: str) -> str:
    """Text from users for a fenced block, which it cannot end."""
    return "".join(c for c in text if c.isprintable() or c == "\n").replace("```", "'''").strip()
