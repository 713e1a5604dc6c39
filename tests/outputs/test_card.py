"""The model card: Hub metadata that parses back, every section, and nothing that a hostile word can break."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import merge_arguments, read_tensors, run_hsa, snapshot, write_tensors
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

import hsa
from hsa.methods import markdown
from hsa.outputs import card

Triple = dict[str, Path]
SECTIONS = [
    "Model details",
    "Method",
    "Merged heads",
    "Intended use",
    "How to load",
    "Files",
    "Limitations",
    "Citation",
]
"""What the metadata of a card holds, in this order."""

HOSTILE = [
    "<script>alert(1)</script>",
    "a\n---\nlicense: evil\n---\n# Injected heading",
    "x\r\n\r\n## Injected heading\r\n",
    "```\n# Injected heading\n<b>bold</b>\n```",
    "````\n# Injected heading\n",
    "~~~\n# Injected heading",
    "[click](javascript:alert(1)) ![image](http://x/y.png)",
    "| cell | cell |\n| --- | --- |",
    "`code` *em* _em_ **strong** ~~strike~~ <!-- comment -->",
    "{{ jinja }} {% raw %} ${x} &amp; &lt;b&gt; \\ $x$",
    "'single' \"double\" : # - ? ! % @ & *",
    "\u202eright to left\u200b\ufeff\x00\x1b[31m\u2028line\u2029paragraph\x85next",
    "  ",
    "yes",
    "null",
    "1.0",
    "- item",
    "é 日本語 🎙",
]
HUB_IDS = ("null/yes", "1.0/no", "yes/1.0")
"""What the Hub would take as names, and YAML in parts for something else."""

IDS = [str(n) for n in range(len(HOSTILE))]


def merge(triple: Triple, output: Path, **options: Any) -> ModelCard:
    """Merge and load the card as the Hub's own library does."""
    hsa.merge(**triple, output=output, sync=False, **options)
    return ModelCard.load(output / "README.md")


def headings(text: str) -> list[tuple[str, str]]:
    """Level and text of every heading, as a Markdown parser sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [
        (token.tag, tokens[position + 1].content)
        for position, token in enumerate(tokens)
        if token.type == "heading_open"
    ]


def active(text: str) -> set[str]:
    """The kinds of markup in a text that could carry a script, a picture or a link."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    return {token.type for token in [*tokens, *inline]} & {"html_block", "html_inline", "image", "link_open"}


def section(text: str, name: str) -> str:
    """The text under a heading."""
    return text.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0].strip()


def check_structure(loaded: ModelCard, title: str | None = None) -> None:
    """Exactly our headings, and no active markup."""
    found = headings(loaded.text)
    assert [text for tag, text in found if tag == "h2"] == SECTIONS
    assert [tag for tag, _ in found] == ["h1"] + ["h2"] * len(SECTIONS)
    assert active(loaded.text) == set()
    if title is not None:
        assert found[0] == ("h1", title)


# --- content --------------------------------------------------------------------------------------------------


def test_metadata_parses_back(shared_triple: Triple, tmp_path: Path) -> None:
    loaded = merge(
        shared_triple,
        tmp_path / "out",
        base_id="openai/whisper-tiny",
        primary_id="org/first@main",
        secondary_id="org/second",
        card={"language": "en", "license": "apache-2.0"},
    )
    data = loaded.data.to_dict()
    assert data["base_model"] == ["openai/whisper-tiny", "org/first", "org/second"]
    assert data["base_model_relation"] == "merge"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "automatic-speech-recognition")
    assert (data["language"], data["license"]) == ("en", "apache-2.0")
    assert {"whisper", "merge", "headwise-selective-attention"} <= set(data["tags"])
    check_structure(loaded)
    details = section(loaded.text, "Model details")
    assert "- Primary: `org/first` at revision `main`" in details
    assert "- Base: `openai/whisper-tiny`\n" in details


def test_several_languages_and_no_fields(shared_triple: Triple, tmp_path: Path) -> None:
    loaded = merge(shared_triple, tmp_path / "several", card={"language": "en, de ,,fr"})
    assert loaded.data.to_dict()["language"] == ["en", "de", "fr"]
    plain = merge(shared_triple, tmp_path / "plain").data.to_dict()
    assert not {"language", "license"} & plain.keys()
    assert not {"base_model", "base_model_relation"} & plain.keys()


def test_a_source_named_twice_is_one_parent(shared_triple: Triple, tmp_path: Path) -> None:
    ids = {"base_id": "org/base", "primary_id": "org/same@a", "secondary_id": "org/same@b"}
    loaded = merge(shared_triple, tmp_path / "out", **ids)
    assert loaded.data.to_dict()["base_model"] == ["org/base", "org/same"]


def test_sections_say_what_was_done(shared_triple: Triple, tmp_path: Path) -> None:
    parameters = {"k": 0.3, "lam": 0.45, "alpha": 0.35, "attention_scale": 0.9, "non_attention_scale": 1.1}
    report = hsa.merge(
        **shared_triple,
        output=tmp_path / "out",
        sync=False,
        targets="attention-all",
        dtype="bfloat16",
        max_shard_size=100_000,
        **parameters,  # type: ignore[arg-type]
    )
    loaded = ModelCard.load(tmp_path / "out" / "README.md")
    check_structure(loaded, "HSA merge of primary and secondary")
    method = section(loaded.text, "Method")
    for name, value in (
        *parameters.items(),
        ("targets", "attention-all"),
        ("dtype", "bfloat16"),
        ("numerics", "exact"),
    ):
        shown = {"lam": "lambda"}.get(name, name)
        assert re.search(rf"\| {shown} \| `{re.escape(str(value))}` \|", method), name
    heads = section(loaded.text, "Merged heads")
    assert f"{report.selected_heads} of {report.total_heads} heads in {len(report.tensors)} target tensors" in heads
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in heads.splitlines() if line.startswith("|")
    ]
    columns, table = rows[0], {(row[0], row[1]): row for row in rows[2:]}
    assert len(table) == 6  # two layers of self-attention in both stacks, two of cross-attention
    assert sum(cell != "" for row in table.values() for cell in row[2:]) == len(report.tensors)
    for tensor in report.tensors.values():
        place = tensor.projection
        row = table[f"{place.stack} {place.block.replace('_', ' ')}", str(place.layer)]
        cell = row[columns.index(f"{place.module.removesuffix('_proj')} {place.part}")]
        assert cell == " ".join(map(str, tensor.selected)), tensor.name
    files = section(loaded.text, "Files")
    listed = set(re.findall(r"^- `([^`]+)`", files, re.MULTILINE))
    assert listed == {path.name for path in (tmp_path / "out").iterdir()}
    load = section(loaded.text, "How to load")
    assert "WhisperForConditionalGeneration.from_pretrained" in load and "WhisperProcessor.from_pretrained" in load
    assert "10.1016/j.csl.2026.102012" in section(loaded.text, "Citation")
    for name in ("Intended use", "Limitations"):
        assert len(section(loaded.text, name)) > 80


def test_the_code_in_the_card_runs(shared_triple: Triple, tmp_path: Path) -> None:
    loaded = merge(shared_triple, tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", loaded.text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/directory", str(tmp_path / "out")), names)
    assert type(names["model"]).__name__ == "WhisperForConditionalGeneration"
    assert type(names["processor"]).__name__ == "WhisperProcessor"


def test_none_selected_and_per_tensor_parameters(shared_triple: Triple, tmp_path: Path) -> None:
    loaded = merge(shared_triple, tmp_path / "none", k=0)
    assert "| none |" in section(loaded.text, "Merged heads")
    names = [n for n in read_tensors(shared_triple["base"]) if re.search(r"encoder.*\.self_attn\.[qkv]_proj", n)]
    loaded = merge(shared_triple, tmp_path / "each", lam=dict.fromkeys(names, 0.25))
    assert re.search(r"\| lambda \| given per tensor", section(loaded.text, "Method"))


def test_fields_reach_their_places(shared_triple: Triple, tmp_path: Path) -> None:
    values = {
        field: f"Words of {field.replace('_', ' ')}"
        for field in card.FIELDS
        if field not in ("language", "license", "model_index")
    }
    loaded = merge(shared_triple, tmp_path / "out", card=values)
    check_structure(loaded, "Words of title")
    details = section(loaded.text, "Model details")
    for field, label in (
        ("release_group", "Release group"),
        ("role", "Role"),
        ("adaptation_context", "Adaptation context"),
        ("source_artifact", "Source artifact"),
    ):
        assert f"- {label}: {values[field]}" in details
    assert section(loaded.text, "Intended use") == values["intended_use"]
    assert section(loaded.text, "Limitations") == values["limitations"]
    assert section(loaded.text, "Citation") == f"```bibtex\n{values['citation']}\n```"


def model_index(word: str) -> str:
    """Measured results in which a word stands wherever one may."""
    dataset = {"type": "own", "name": word, "split": "test"}
    result = {
        "task": {"type": "automatic-speech-recognition", "name": word},
        "dataset": dataset,
        "metrics": [{"type": "wer", "value": 4.53, "name": word}],
    }
    return json.dumps([{"name": word, "results": [result]}])


def test_measured_results_reach_the_metadata(shared_triple: Triple, tmp_path: Path) -> None:
    loaded = merge(shared_triple, tmp_path / "out", card={"model_index": model_index("my clips")})
    (result,) = loaded.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("my clips", "wer", 4.53)
    assert "my clips" not in loaded.text


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "[1]",
        '[{"name": "m"}]',
        '[{"name": 1, "results": []}]',
        '[{"name": "m", "results": {}}]',
        "[" * 9999,
    ],
)
def test_what_is_no_list_of_results_is_refused(shared_triple: Triple, text: str, tmp_path: Path) -> None:
    with pytest.raises(hsa.RequestError, match="card field model_index must"):
        merge(shared_triple, tmp_path / "out", card={"model_index": text})
    assert not (tmp_path / "out").exists()


# --- hostile words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "  ", 5, ["en", "de"], None])
def test_fields_that_say_nothing_are_refused(shared_triple: Triple, value: Any, tmp_path: Path) -> None:
    with pytest.raises(hsa.RequestError, match="card field title must be a text that says something"):
        merge(shared_triple, tmp_path / "out", card={"title": value})
    assert not (tmp_path / "out").exists()


def test_the_method_is_the_one_that_ran(shared_triple: Triple, tmp_path: Path) -> None:
    plain = merge(shared_triple, tmp_path / "plain").text
    scaled = merge(shared_triple, tmp_path / "scaled", non_attention_scale=0.5).text
    script = merge(shared_triple, tmp_path / "script", numerics="reference").text
    assert "Everything else stays primary's." in plain and "reference script" not in plain
    assert "Everything else stays primary's." not in scaled
    assert "all other tensors\n`B + non_attention_scale * tv1`" in scaled
    assert "reference script's own operations" in script


def test_models_that_go_by_their_place_are_called_by_name(shared_triple: Triple, tmp_path: Path) -> None:
    base, *models = shared_triple.values()
    hsa.merge(method="task_arithmetic", lam=0.5, base=base, models=models, output=tmp_path / "out", sync=False)
    text = " ".join((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split())
    assert "in the domains that `primary` and `secondary` were adapted to" in text
    assert "licence terms of `base`, `primary` and `secondary`." in text
    assert "that model1" not in text and "terms of base" not in text


def test_without_processor_files_the_card_says_so(triple: Triple, tmp_path: Path) -> None:
    for path in triple.values():
        for name in ("vocab.json", "preprocessor_config.json"):
            (path / name).unlink()
    text = merge(triple, tmp_path / "out").text
    assert "WhisperProcessor" not in text
    assert "Tokenizer and feature extractor are not part of this checkpoint" in text


@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=IDS[:-1])
def test_hostile_fields(shared_triple: Triple, word: str, tmp_path: Path) -> None:
    fields = dict.fromkeys(card.FIELDS, word)
    fields["language"] = word.replace(",", " ")
    fields["model_index"] = model_index(word)
    loaded = merge(shared_triple, tmp_path / "out", card=fields)
    check_structure(loaded)
    data = yaml.safe_load(re.split(r"^---$", loaded.content, flags=re.MULTILINE)[1])
    assert data == loaded.data.to_dict()
    assert data.keys() <= {
        *("base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "language", "license"),
        "model-index",
    }
    assert data["library_name"] == "transformers"
    assert isinstance(data["license"], str)
    assert "\x1b" not in loaded.content and "\x00" not in loaded.content
    assert "\u202e" not in loaded.text


@pytest.mark.parametrize("word", [word for word in HOSTILE if "\x00" not in word and "/" not in word and word.strip()])
def test_hostile_directory_names(shared_triple: Triple, word: str, tmp_path: Path) -> None:
    """A directory's own name is its identity, and never a model on the Hub."""
    path = Path(shutil.copytree(shared_triple["primary"], tmp_path / "sources" / word))
    loaded = merge({**shared_triple, "primary": path}, tmp_path / "out")
    check_structure(loaded)
    assert "base_model" not in loaded.data.to_dict()
    assert json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["sources"]["primary"]["id"] == word


@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip() and word.isprintable()])
def test_hostile_ids(shared_triple: Triple, word: str, tmp_path: Path) -> None:
    with pytest.raises(hsa.RequestError, match="primary_id must be a hub id"):
        merge(shared_triple, tmp_path / "out", primary_id=word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", HUB_IDS)
def test_ids_that_yaml_could_misread(shared_triple: Triple, word: str, tmp_path: Path) -> None:
    loaded = merge(shared_triple, tmp_path / "out", primary_id=word)
    check_structure(loaded)
    assert loaded.data.to_dict()["base_model"] == [word]


def test_directories_are_not_named_as_models_on_the_hub(shared_triple: Triple, tmp_path: Path) -> None:
    """A folder's name under base_model makes the Hub look for a model of that name, and push_to_hub fail."""
    places = {role: tmp_path / name for role, name in (("base", "gpt2"), ("primary", "checkpoint-500"))}
    for role, place in places.items():
        shutil.copytree(shared_triple[role], place)
    sources = {**shared_triple, **places}
    report = hsa.merge(**sources, output=tmp_path / "out", secondary_id="org/second", sync=False)
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data["base_model"] == ["org/second"]
    assert report.unlinked == ("base", "primary")
    assert "`gpt2`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_what_is_called_ready_to_publish_passes_the_hubs_own_checks(shared_triple: Triple, tmp_path: Path) -> None:
    """All that huggingface_hub checks without asking the Hub: the card's form, its data, and every id in it."""
    ids = {"base_id": "openai/whisper-tiny", "primary_id": "org/first@main", "secondary_id": "org/second"}
    hsa.merge(**shared_triple, output=tmp_path / "out", sync=False, **ids)
    loaded = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    found = loaded.data.to_dict()
    assert ModelCardData(**found).to_dict() == found
    assert "base_model" in found
    for name in found["base_model"]:
        validate_repo_id(name)
    assert found["pipeline_tag"] in {"automatic-speech-recognition", "audio-classification"}
    report = hsa.merge(**shared_triple, output=tmp_path / "again", sync=False, **ids)
    assert report.unlinked == ()


def test_the_summary_says_which_ids_to_give_before_publishing(shared_triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / "out", "--secondary-id=org/second"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "links no model for base, primary: before you publish, give --base-id, --primary-id\n" in done.stdout


@pytest.mark.parametrize(
    "word",
    [
        "",
        " ",
        "a\nb",
        "a\x1bb",
        "/root/secret/model",
        "@main",
        "../../etc/x",
        "a/b/c",
        "a--b",
        "org/name@",
        "a@b\nc",
        "-a/b",
    ],
)
def test_ids_that_are_no_ids_are_refused(shared_triple: Triple, word: str, tmp_path: Path) -> None:
    with pytest.raises(hsa.RequestError, match="primary_id"):
        merge(shared_triple, tmp_path / "out", primary_id=word)
    assert not (tmp_path / "out").exists()


def test_a_directory_name_that_is_no_text(shared_triple: Triple, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    try:
        path = Path(shutil.copytree(shared_triple["primary"], tmp_path / "sources" / name))
    except OSError:
        pytest.skip("this filesystem takes no name that is not UTF-8")
    loaded = merge({**shared_triple, "primary": path}, tmp_path / "out")
    check_structure(loaded)


@pytest.mark.parametrize(
    "name",
    [
        "a`<script>x<!--.safetensors",
        "a\n\n# Injected heading\n.safetensors",
        "[x](y) ![z](w).safetensors",
        "日本 é.safetensors",
    ],
)
def test_hostile_shard_names(triple: Triple, name: str, tmp_path: Path) -> None:
    """An index may give its shards any name; the card lists them."""
    import json

    path = triple["primary"]
    write_tensors(path, read_tensors(path), shards=2)
    index = path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    old = "model-00001-of-00002.safetensors"
    (path / old).rename(path / name)
    document["weight_map"] = {k: name if v == old else v for k, v in document["weight_map"].items()}
    index.write_text(json.dumps(document))
    loaded = merge(triple, tmp_path / "out")
    assert (tmp_path / "out" / name).exists()
    check_structure(loaded)
    files = section(loaded.text, "Files").splitlines()
    assert len(files) == len(list((tmp_path / "out").iterdir()))
    assert all(re.fullmatch(r"- `[^`]+`: [a-z :,]+", line) for line in files), files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain words", "plain words"),
        ("  many \t blanks\n and lines ", "many blanks and lines"),
        ("a_b*c", r"a\_b\*c"),
        ("<b>", r"\<b\>"),
        (r"back\slash", r"back\\slash"),
        ("\x1b[0m", r"\[0m"),
    ],
)
def test_escape(text: str, expected: str) -> None:
    assert markdown.escape(text) == expected


@pytest.mark.parametrize("word", HOSTILE, ids=IDS)
def test_escaped_text_shows_the_words_themselves(word: str) -> None:
    """What a reader sees is the text, blanks folded and control characters gone."""
    tokens = MarkdownIt("commonmark").parse(f"x {markdown.escape(word)}")
    shown = "".join(child.content for token in tokens for child in token.children or [])
    visible = " ".join("".join(c if c.isprintable() else " " for c in word).split())
    assert shown == f"x {visible}".strip()
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]


# --- fields from the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("argument", "named"), [("colour=red", "colour"), ("language", "FIELD=VALUE"), ("=x", "''")])
def test_bad_fields_are_refused(triple: Triple, argument: str, named: str, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", f"--card={argument}"))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("hsa: error: ") and named in line
    assert snapshot(tmp_path) == before


def test_fields_may_hold_equals_signs() -> None:
    assert card.parse_fields(["title=a=b", "license=mit"]) == {"title": "a=b", "license": "mit"}
