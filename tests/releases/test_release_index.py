"""The index of a release tree: what it says, and that hostile words stay words."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import (
    read_tensors,
)
from markdown_it import MarkdownIt
from release_trees import build, write_recipe

import hsa
from hsa.releases.index import MARKER
from hsa.system.manifest import PROVENANCE

Triple = dict[str, Path]

HOSTILE = (
    "<script>alert(1)</script> | cell |",
    "a\n---\nlicense: evil\n---\n# Injected heading",
    "```\n# Injected heading\n<b>bold</b>",
    "[click](javascript:alert(1)) ![image](http://x/y.png) --> <!--",
    "\u202eright to left\x1b[31m\u2028line {{ jinja }}",
)


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_stay_words(shared_triple: Triple, tmp_path: Path, word: str) -> None:
    fields = {"role": word, "adaptation_context": word, "citation": word, "source_artifact": word, "license": word}
    place = tmp_path / "evil | <b>|` ](x)"
    shutil.copytree(shared_triple["primary"], place)
    text = json.dumps(
        {
            "title": word,
            "merges": [
                {"name": "a", "group": "g", **{r: str(p) for r, p in shared_triple.items()}, "card": fields},
                {"name": "b", "group": "g", **{r: str(p) for r, p in shared_triple.items()}, "primary": str(place)},
            ],
        }
    )
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert build(tmp_path / "recipe.yaml", tmp_path / "tree").ok
    readme = (tmp_path / "tree" / "README.md").read_text(encoding="utf-8")
    head, body = readme.removeprefix("---\n").split("\n---\n", 1)
    data = yaml.safe_load(head)
    assert data["license"] == word
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or []]
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["g", "Citations"]
    assert [token.content.strip() for token in tokens if token.type == "html_block"] == [MARKER]
    assert {token.type for token in inline} & {"html_inline", "image"} == set()
    links = [dict(token.attrs)["href"] for token in inline if token.type == "link_open"]
    assert links == ["g/a/README.md", "g/b/README.md"]
    rows = [token for token in tokens if token.type == "tr_open"]
    cells = [token for token in tokens if token.type == "td_open"]
    assert (len(rows), len(cells)) == (3, 22)
    document = json.loads((tmp_path / "tree" / "index.json").read_text(encoding="ascii"))
    assert document["title"] == word
    assert document["entries"][0]["parameters"]["card"]["role"] == word


def test_what_the_index_says(triple: Triple, tmp_path: Path) -> None:
    names = [name for name in read_tensors(triple["base"]) if re.search(r"encoder.*self_attn\.[qkv]_proj", name)]
    merges = (
        {"name": "a", "base_id": "openai/whisper-tiny@" + "ab" * 20, "card": {"citation": "@misc{one}"}},
        {"name": "b", "group": "h", "lambda": dict.fromkeys(names, 0.25), "card": {"role": "second"}},
        {"name": "c", "k": 0.3, "card": {"citation": "@misc{one}"}},
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", triple, *merges, card={"adaptation_context": "children"})
    build(recipe, tmp_path / "tree")
    text = (tmp_path / "tree" / "README.md").read_text(encoding="utf-8")
    revision = "ab" * 20
    heads = {
        entry["name"]: f"{entry['selected_heads']} of {entry['total_heads']}"
        for entry in json.loads((tmp_path / "tree" / "index.json").read_text(encoding="utf-8"))["entries"]
    }
    base = f"[`openai/whisper-tiny` at `{revision[:12]}`](https://huggingface.co/openai/whisper-tiny/tree/{revision})"
    rest = "`primary` | `secondary`"
    assert f"| [a](g/a/README.md) |  | {base} | {rest} | 0.6 | 0.5 | 0.2 | {heads['a']} | children | 1 |\n" in text
    assert (
        f"| [b](h/b/README.md) | second | `base` | {rest} | 0.6 | per tensor | 0.2 | {heads['b']} | children | 2 |"
        in text
    )
    assert f"| [c](g/c/README.md) |  | `base` | {rest} | 0.3 | 0.5 | 0.2 | {heads['c']} | children | 1 |\n" in text
    assert text.index("## g") < text.index("[a]") < text.index("[c]") < text.index("## h") < text.index("[b]")
    assert "1.\n\n```bibtex\n@misc{one}\n```\n\n2.\n\n```bibtex\n@article{shankar2026" in text
    report = hsa.merge(**triple, output=tmp_path / "same", k=0.3, sync=False)
    assert heads["c"] == f"{report.selected_heads} of {report.total_heads}"
    for entry in json.loads((tmp_path / "tree" / "index.json").read_text(encoding="utf-8"))["entries"]:
        written = json.loads((tmp_path / "tree" / entry["path"] / PROVENANCE).read_text(encoding="utf-8"))
        assert entry["provenance"] == written["digest"]
        assert (entry["parameters"], entry["sources"]) == (written["parameters"], written["sources"])
