"""Hostile outputs: records, patches, indexes of sweeps and releases, and the words of a card."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from arena import QUIETLY, Arena, sound_bytes
from guard import Finding
from targets_weights import split_header

from hsa.cli import app
from hsa.outputs import card, provenance
from hsa.outputs.record import Record
from hsa.outputs.source_record import SourceRecord
from hsa.sources.checkpoint import WEIGHTS
from hsa.sources.identity import Identity
from hsa.system import manifest
from hsa.system.strict_json import count_marks

# Provenance ----------------------------------------------------------------------------------------------------------


def read_provenance(arena: Arena, data: bytes) -> str:
    """As it stands; and with its digest made right, so that what a forger can write is looked at too."""
    seen = arena.call(lambda: _use(data))
    if count_marks(data) < 10_000:
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(data)
            if isinstance(document, dict):
                document["digest"] = manifest.document_digest(document)
                seen = arena.call(lambda: _use(manifest.render(document)))
    return seen


def _use(text: bytes) -> None:
    """Read a provenance and write it again, as whoever holds a record does: the same record comes back."""
    found = provenance.loads(text, "out/hsa_merge.json")
    again = provenance.loads(found.record.with_files(found.files), "out/hsa_merge.json")
    if (again.record, again.files) != (found.record, found.files):
        raise Finding("another record comes back from the provenance")
    _check_card(card.render(found.record, ["README.md", *found.files], {}), found.record.parameters["card"])


def provenance_seeds(arena: Arena) -> Iterable[bytes]:
    said = arena.merge()
    assert said == "success", said
    yield (arena.output / "hsa_merge.json").read_bytes()
    said = arena.merge("--targets=attention-all", "--no-hash", "--card=language=en,de", base=arena.openai)
    assert said == "success", said
    yield (arena.output / "hsa_merge.json").read_bytes()


# Outputs that are verified and inspected -----------------------------------------------------------------------------


def verify(arena: Arena, data: bytes) -> str:
    """`hsa verify` of an output whose provenance says what the input says, with a digest that fits."""
    return _forged(arena, data, "verify", str(arena.output), "--json", "--threads=1")


def recompute(arena: Arena, data: bytes) -> str:
    """The same against the sources, from which the output is made again as the record says."""
    sources = [f"--{role}={path}" for role, path in arena.triple.items()]
    return _forged(arena, data, "verify", str(arena.output), "--sources", *sources, "--json", "--threads=1")


def inspect(arena: Arena, data: bytes) -> str:
    """`hsa inspect` of such an output, as a page: no element and no handler in it is a stranger's."""
    page = arena.output.parent / "page.html"
    page.unlink(missing_ok=True)
    said = _forged(arena, data, "inspect", str(arena.output), "--no-verify", f"--html={page}")
    if said != "success":
        return said
    parser = _Elements()
    parser.feed(page.read_text(encoding="utf-8"))
    page.unlink()
    own = {"script": 2, "link": 1, "form": 1, "iframe": 0, "object": 0, "embed": 0, "img": 0, "base": 0, "a": 0}
    if any(parser.found[tag] > count for tag, count in own.items()):
        raise Finding(f"the page holds {dict(parser.found)}")
    if parser.handlers or parser.marked:
        raise Finding(f"the page holds {parser.handlers or parser.marked}, which a stranger wrote")
    return said


class _Elements(HTMLParser):
    """Counts the elements of a page, those that only the input can have named (`x-`), and attributes that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.handlers: list[str] = []
        self.marked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.marked += [tag] if tag.startswith("x-") else []


def _forged(arena: Arena, data: bytes, *arguments: str) -> str:
    if not (arena.output / "hsa_merge.json").exists():
        arena.merge()
    path = arena.output / "hsa_merge.json"
    sound = path.read_bytes()
    if count_marks(data) < 10_000:
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
            document = json.loads(data)
            document["digest"] = manifest.document_digest(document)
            data = manifest.render(document)
    path.write_bytes(data)
    try:
        code, _, lines = arena.run(*arguments)
    finally:
        path.write_bytes(sound)
    return "success" if code == 0 else lines[0] if lines else "refused"


def inspect_seeds(arena: Arena) -> Iterable[bytes]:
    (sound,) = verify_seeds(arena)
    yield sound
    document = json.loads(sound)
    document["sources"]["primary"].update(id="</script><x-a onload=x>", revision="<x-b>")
    document["parameters"]["card"] = {"title": "</script><script>x</script>"}
    yield json.dumps(document).encode()


def verify_seeds(arena: Arena) -> Iterable[bytes]:
    assert arena.merge() == "success"
    yield (arena.output / "hsa_merge.json").read_bytes()


# Patches -------------------------------------------------------------------------------------------------------------


def verify_and_apply(arena: Arena, data: bytes) -> str:
    """`hsa verify` and `hsa apply` with a patch whose header and document are the input's, each with a digest that
    fits; any other input is the header itself."""
    sound = sound_bytes(arena, _patch_file(arena))
    _, tensors = split_header(sound)
    header = data
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
        made = json.loads(data)
        document = dict(made["document"])
        document["digest"] = manifest.document_digest(document)
        about = {"format": "pt", "hsa_patch": json.dumps(document, separators=(",", ":"))}
        header = json.dumps({"__metadata__": about, **made["header"]}).encode()
    path = arena.sources / "hostile.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + tensors)
    verified, _, _ = arena.run("verify", str(path), "--json", "--threads=1")
    said = arena.command("apply", str(arena.triple["primary"]), str(path), f"--output={arena.output}", *QUIETLY)
    if said == "success" and verified != 0:
        raise Finding("hsa apply takes a patch that hsa verify does not call sound")
    return said


def _patch_file(arena: Arena) -> Path:
    path = arena.sources / "patch.safetensors"
    if not path.exists():
        shutil.rmtree(arena.output, ignore_errors=True)
        given = {f"--{role}={source}": None for role, source in arena.triple.items()}
        code = app.run(["merge", *given, f"--output={arena.output}.safetensors", "--patch", "--quiet"])
        assert code == 0
        shutil.move(f"{arena.output}.safetensors", path)
    return path


def patch_seeds(arena: Arena) -> Iterable[bytes]:
    header = json.loads(split_header(_patch_file(arena).read_bytes())[0])
    document = json.loads(header.pop("__metadata__")["hsa_patch"])
    yield json.dumps({"document": document, "header": header}).encode()


# Indexes of sweeps and releases --------------------------------------------------------------------------------------


def verify_index(name: str, folder: Callable[[Arena], Path]) -> Callable[[Arena, bytes], str]:
    """`hsa verify` of a directory of points or outputs, where this file of its index is the input."""

    def run(arena: Arena, data: bytes) -> str:
        (folder(arena) / name).write_bytes(data)
        code, _, _ = arena.run("verify", str(folder(arena)), "--json", "--threads=1")
        return "success" if code == 0 else "refused"

    return run


def _made(arena: Arena, name: str, command: list[str]) -> Path:
    """What a command writes, made once among the sources."""
    place = arena.sources / name
    if not place.exists():
        shutil.rmtree(arena.output, ignore_errors=True)
        code = app.run([*command, f"--output={arena.output}", "--no-sync", "--quiet"])
        assert code == 0
        shutil.move(arena.output, place)
    return place


def sweep_folder(arena: Arena) -> Path:
    given = [f"--{role}={path}" for role, path in arena.triple.items()]
    return _made(arena, "sweep", ["sweep", *given, "--k=0.3,0.6"])


def tree_folder(arena: Arena) -> Path:
    path = arena.sources / "recipe.yaml"
    entry = {"name": "a", "group": "g", **{role: str(path) for role, path in arena.triple.items()}}
    path.write_text(json.dumps({"merges": [entry]}), encoding="utf-8")
    return _made(arena, "tree", ["release", str(path)])


# The card ------------------------------------------------------------------------------------------------------------


def render_card(arena: Arena, data: bytes) -> str:
    """Words for the fields of a card, for ids, revisions and file names, one a line: nothing of them is markup."""
    words = [*data.decode("utf-8", "replace").split("\n"), "x", "x", "x", "x"]
    fields = {name: word for name, word in zip(card.FIELDS, words, strict=False) if word.strip()}
    if "model_index" in fields:
        fields["model_index"] = json.dumps([{"name": fields["model_index"], "results": []}])
    record = _sound_record(arena)
    primary = record.sources["primary"]
    named = Identity(words[-5] or "x", words[-6] if len(words) > 5 and words[-6] else None)
    sources = {
        **record.sources,
        "primary": SourceRecord(named, primary.kind, primary.files, primary.targets),
    }
    record = replace(record, parameters={**record.parameters, "card": fields}, sources=sources)
    rendered: list[bytes] = []
    files = [WEIGHTS, "README.md", words[0] + ".safetensors"]
    said = arena.call(lambda: rendered.append(card.render(record, files, {})))
    if not rendered:
        return said
    _check_card(rendered[0], fields)
    return "success"


def _check_card(raw: bytes, fields: Mapping[str, str]) -> None:
    """Finding where a card holds markup or metadata that it was not rendered with."""
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    read = ModelCard(raw.decode("utf-8"))
    meta, body = read.data.to_dict(), read.text
    expected = {"base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "language", "license"}
    expected |= {"model-index"}
    if not isinstance(meta, dict) or not set(meta) <= expected or ("license" in meta) != ("license" in fields):
        raise Finding(f"the card's metadata is {meta!r:.300}")
    if meta.get("license", fields.get("license")) != fields.get("license"):
        raise Finding(f"the licence became {meta['license']!r:.200}, was {fields['license']!r:.200}")
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(body)
    kinds = {child.type for token in tokens for child in [token, *(token.children or [])]}
    active = kinds & {"html_block", "html_inline", "image", "link_open", "hr"}
    headings = sum(token.type == "heading_open" for token in tokens)
    if active or headings != 9:
        raise Finding(f"the card holds {active or headings} of what a stranger wrote")


_RECORDS: list[Record] = []


def _sound_record(arena: Arena) -> Record:
    if not _RECORDS:
        arena.merge()
        _RECORDS.append(provenance.load(arena.output).record)
    return _RECORDS[0]


def card_seeds(arena: Arena) -> Iterable[bytes]:
    yield "\n".join(card.FIELDS).encode()
    yield b"<script>alert(1)</script>\nen,de\nmit\n[a](javascript:b)\n![a](b)\n```\n<!--\n**b**\n| a |\n---\norg/name"
