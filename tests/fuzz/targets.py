"""What is fuzzed: one entry for each kind of file that a stranger may have written.

A target puts the bytes in their place in an otherwise sound source, runs what a user would run, and returns what came
of it: a word for success, or the HsaError. Any other exception, and whatever `guard` forbids, is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from guard import Finding, Guard

from hsa.cli import app
from hsa.errors import HsaError
from hsa.outputs import card, provenance
from hsa.releases import recipe
from hsa.sources.checkpoint import ADAPTER_CONFIG, CONFIG, INDEX, PICKLES, WEIGHTS
from hsa.sources.lora import WEIGHTS as ADAPTER_WEIGHTS
from hsa.system.strict_json import count_marks
from hsa.testing.whisper_checkpoints import SHAPES, write_triple


@dataclass(frozen=True)
class Target:
    """`run` takes an arena and the file's bytes, in one attempt; `seeds` are sound files; `kind` chooses the mutations.

    `tokens` are words that stand in such files.
    """

    run: Callable[[Arena, bytes], str]
    seeds: Callable[[Arena], Iterable[bytes]]
    kind: str = "json"
    tokens: tuple[str, ...] = ()


SMALL: Mapping[str, Any] = {
    "tokenizer.json": {
        "added_tokens": [{"id": 3, "content": "<x>", "special": True}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    },
    "processor_config.json": {
        "feature_extractor": {"feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 1},
        "processor_class": "WhisperProcessor",
    },
}
"""Small files that the made-up triple lacks."""

QUIETLY = ("--no-sync", "--threads=1", "--json")


class Arena:
    """Sound sources in every form, made once below `place/arena`, and the destination that each attempt writes."""

    def __init__(self, place: Path) -> None:
        import torch
        from helpers import read_tensors, write_adapter, write_openai, write_pickle, write_tensors

        root = place / "arena"
        self.sources = root / "sources"
        self.triple = write_triple(self.sources, SHAPES["test"])
        base = self.triple["base"]
        tensors = read_tensors(base)
        self.sharded, self.pickled = self._copy("sharded"), self._copy("pickled")
        write_tensors(self.sharded, tensors, shards=2)
        write_pickle(self.pickled, tensors)
        self.tokenized = self._copy("tokenized")
        for name, document in SMALL.items():
            (self.tokenized / name).write_text(json.dumps(document), encoding="utf-8")
        self.adapter = self.sources / "adapter"
        adapted = {name: tensor for name, tensor in tensors.items() if name.endswith("encoder.layers.0.fc1.weight")}
        matrices = write_adapter(self.adapter, adapted or dict(list(tensors.items())[:0]))
        self.pickled_adapter = Path(shutil.copytree(self.adapter, self.sources / "pickled_adapter"))
        (self.pickled_adapter / ADAPTER_WEIGHTS[0]).unlink()
        torch.save(matrices, self.pickled_adapter / ADAPTER_WEIGHTS[1])
        self.openai = write_openai(self.sources / "openai" / "small.pt", base)
        (place / "secret").mkdir()
        shutil.copy(base / WEIGHTS, place / "secret" / WEIGHTS)
        (self.sources / "link").symlink_to(place / "secret")
        (root / "out").mkdir()
        self.output = root / "out" / "merged"
        os.chdir(root / "out")
        self.guard = Guard(root)
        self._sound: dict[Path, bytes] = {}

    def _copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.triple["primary"], self.sources / name))

    def merge(self, *more: str, **sources: Path) -> str:
        """`hsa merge` in this process, as the command line does it; the destination is there, whole, or absent."""
        given = {**self.triple, **sources}
        arguments = ["merge", *(f"--{role}={path}" for role, path in given.items()), f"--output={self.output}"]
        return self.command(*arguments, *QUIETLY, *more)

    def command(self, *arguments: str) -> str:
        """A command line that writes the destination, which is there afterwards, whole, or absent: success, or the line
        of an error that is the input's fault."""
        shutil.rmtree(self.output, ignore_errors=True)
        code, said, lines = self.run(*arguments)
        failed = [line for line in lines if line.startswith("hsa: error: ")]
        if len(failed) != (code == 2):
            raise Finding(f"exit code {code} with {lines!r:.500}")
        left = {path.name for path in self.output.parent.iterdir()} - {self.output.name}
        if left:
            raise Finding(f"left behind {left}")
        if self.output.exists() != (code == 0):
            raise Finding(f"exit code {code}, and the destination is {'there' if code else 'not there'}")
        for file in _OURS if code == 0 else ():
            if (self.output / file).exists():
                json.loads((self.output / file).read_bytes(), parse_constant=_no_constant)
        if code == 0:
            json.loads(said)
        return failed[0] if failed else "success"

    def run(self, *arguments: str, codes: tuple[int, ...] = (0, 2)) -> tuple[int, str, list[str]]:
        """A command line in this process: exit code, one of `codes`; what it says; printable lines on stderr."""
        said, errors = io.StringIO(), io.StringIO()
        with self.guard.watching(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = app.run(arguments)
        lines = errors.getvalue().splitlines()
        if code not in codes or any(not line.startswith("hsa: ") for line in lines):
            raise Finding(f"exit code {code} with {lines!r:.500}")
        if any(not line.isprintable() for line in lines):
            raise Finding(f"control characters in {lines!r:.500}")
        return code, said.getvalue(), lines

    def call(self, work: Callable[[], object]) -> str:
        """Work of this package without a command: success, or an HsaError."""
        try:
            with self.guard.watching():
                work()
        except HsaError as error:
            if not str(error).isprintable():
                raise Finding(f"control characters in {str(error)!r:.500}") from error
            return str(error)
        return "success"


_OURS = (CONFIG, INDEX, "hsa_merge.json")
"""Files that are written anew from what was read, and must be JSON whatever that was."""


def _no_constant(name: str) -> None:
    raise Finding(f"wrote {name} into JSON")


# Safetensors -----------------------------------------------------------------------------------------------------


def _split(raw: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def _sound(arena: Arena, path: Path) -> bytes:
    """The bytes of a sound file, from before anything wrote over it."""
    return arena._sound.setdefault(path, path.read_bytes())


def _header(arena: Arena, data: bytes) -> str:
    path = arena.sharded / "model-00001-of-00002.safetensors"
    _, tensors = _split(_sound(arena, path))
    path.write_bytes(len(data).to_bytes(8, "little") + data + tensors)
    try:
        return arena.merge(primary=arena.sharded)
    finally:
        path.write_bytes(_sound(arena, path))


def _header_seeds(arena: Arena) -> Iterable[bytes]:
    yield _split((arena.sharded / "model-00001-of-00002.safetensors").read_bytes())[0]
    yield b"{}"


def _weights(arena: Arena, data: bytes) -> str:
    path = arena.triple["secondary"] / WEIGHTS
    sound = _sound(arena, path)
    path.write_bytes(data)
    try:
        return arena.merge()
    finally:
        path.write_bytes(sound)


def _weights_seeds(arena: Arena) -> Iterable[bytes]:
    yield b"\x02\0\0\0\0\0\0\0{}"
    header = b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
    yield len(header).to_bytes(8, "little") + header + b"\0\x3c\0\x3c"
    yield (arena.triple["secondary"] / WEIGHTS).read_bytes()


# The JSON files of a source --------------------------------------------------------------------------------------


def _placed(place: Callable[[Arena], Path], run: Callable[[Arena], str]) -> Callable[[Arena, bytes], str]:
    """A target that writes its bytes over one sound file."""

    def attempt(arena: Arena, data: bytes) -> str:
        path = place(arena)
        sound = _sound(arena, path)
        path.write_bytes(data)
        try:
            return run(arena)
        finally:
            path.write_bytes(sound)

    return attempt


def _index_seeds(arena: Arena) -> Iterable[bytes]:
    text = (arena.sharded / INDEX).read_bytes()
    yield text
    for name in ("../../secret/model.safetensors", "/etc/passwd", "../link/model.safetensors", "x\0.safetensors"):
        yield text.replace(b"model-00002-of-00002.safetensors", json.dumps(name)[1:-1].encode(), 3)


def _config_seeds(arena: Arena) -> Iterable[bytes]:
    text = (arena.triple["primary"] / CONFIG).read_bytes()
    yield text
    document = json.loads(text)
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    yield json.dumps({**document, "deep": deep, "dtype": "float16", "tie_word_embeddings": False}).encode()


def _merge_config(arena: Arena) -> str:
    return arena.merge("--dtype=float16")


def _merge_tokenized(arena: Arena) -> str:
    """With the small files of primary; what is written, `hsa verify` calls sound."""
    said = arena.merge(primary=arena.tokenized)
    if said == "success":
        code, _, lines = arena.run("verify", str(arena.output))
        if code:
            raise Finding(f"merge wrote what verify refuses: {lines!r:.500}")
    return said


def _merge_adapter(arena: Arena) -> str:
    return arena.merge(secondary=arena.adapter)


# Provenance ------------------------------------------------------------------------------------------------------


def _provenance(arena: Arena, data: bytes) -> str:
    """As it stands; and with its digest made right, so that what a forger can write is looked at too."""
    seen = arena.call(lambda: _use(data))
    if count_marks(data) < 10_000:
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(data)
            if isinstance(document, dict):
                document["digest"] = provenance.document_digest(document)
                seen = arena.call(lambda: _use(provenance.render(document)))
    return seen


def _use(text: bytes) -> None:
    """Read a provenance and write it again, as whoever holds a record does: the same record comes back."""
    found = provenance.loads(text, "out/hsa_merge.json")
    again = provenance.loads(found.record.with_files(found.files), "out/hsa_merge.json")
    if (again.record, again.files) != (found.record, found.files):
        raise Finding("another record comes back from the provenance")
    _check_card(card.render(found.record, ["README.md", *found.files]), found.record.parameters["card"])


def _provenance_seeds(arena: Arena) -> Iterable[bytes]:
    said = arena.merge()
    assert said == "success", said
    yield (arena.output / "hsa_merge.json").read_bytes()
    said = arena.merge("--targets=attention-all", "--no-hash", "--card=language=en,de", base=arena.openai)
    assert said == "success", said
    yield (arena.output / "hsa_merge.json").read_bytes()


# Recipes ---------------------------------------------------------------------------------------------------------


def _recipe(arena: Arena, data: bytes) -> str:
    """Read alone: what a recipe names as sources is its author's to say, and may lie anywhere."""
    return arena.call(lambda: recipe.loads(data, "recipe.yaml", arena.sources))


def _recipe_seeds(arena: Arena) -> Iterable[bytes]:
    yield (Path(__file__).resolve().parents[2] / "examples" / "whisper-scaling.yaml").read_bytes()
    yield b"merges: [{name: a, group: b, base: x/a, primary: ~/b, secondary: ../c, k: 60, card: {title: 'x'}}]\n"
    yield b"a: &a [x, x]\nb: &b [*a, *a]\nmerges: [*b, *b]\n"
    yield b"!!python/object/apply:os.system ['true']\n"


def _release(arena: Arena, data: bytes) -> str:
    """`hsa release` of a recipe whose only entry says what the input says, but for its sources, which are the sound
    ones: any other input is the recipe, where its entries can name no source that is there."""
    sources = {role: str(path) for role, path in arena.triple.items()}
    if count_marks(data) < 10_000:
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            entry = {"name": "a", "group": "g", **json.loads(data), **sources}
            data = json.dumps({"merges": [{k: v for k, v in entry.items() if k != "assets_from"}]}).encode()
    shutil.rmtree(arena.output, ignore_errors=True)
    path = arena.output.parent / "recipe.yaml"
    path.write_bytes(data)
    try:
        code, _, lines = arena.run("release", str(path), f"--output={arena.output}", "--quiet", codes=(0, 1, 2))
    finally:
        path.unlink()
        shutil.rmtree(arena.output, ignore_errors=True)
    return "success" if code == 0 else lines[-1] if lines else "refused"


def _release_seeds(arena: Arena) -> Iterable[bytes]:
    yield b'{"k": 0.6, "lambda": 0.5, "max_shard_size": "50KB", "card": {"title": "x"}}'
    yield b'{"name": "../b", "group": "<b>", "targets": "attention-all", "dtype": "float16", "lambda": {}}'


# Outputs ---------------------------------------------------------------------------------------------------------


def _verify(arena: Arena, data: bytes) -> str:
    """`hsa verify` of an output whose provenance says what the input says, with a digest that fits."""
    return _forged(arena, data, "verify", str(arena.output), "--json", "--threads=1")


def _recompute(arena: Arena, data: bytes) -> str:
    """The same against the sources, from which the output is made again as the record says."""
    sources = [f"--{role}={path}" for role, path in arena.triple.items()]
    return _forged(arena, data, "verify", str(arena.output), "--sources", *sources, "--json", "--threads=1")


def _inspect(arena: Arena, data: bytes) -> str:
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
            document["digest"] = provenance.document_digest(document)
            data = provenance.render(document)
    path.write_bytes(data)
    try:
        code, _, lines = arena.run(*arguments)
    finally:
        path.write_bytes(sound)
    return "success" if code == 0 else lines[0] if lines else "refused"


def _inspect_seeds(arena: Arena) -> Iterable[bytes]:
    (sound,) = _verify_seeds(arena)
    yield sound
    document = json.loads(sound)
    document["sources"]["primary"].update(id="</script><x-a onload=x>", revision="<x-b>")
    document["parameters"]["card"] = {"title": "</script><script>x</script>"}
    yield json.dumps(document).encode()


def _verify_seeds(arena: Arena) -> Iterable[bytes]:
    assert arena.merge() == "success"
    yield (arena.output / "hsa_merge.json").read_bytes()


# Patches ---------------------------------------------------------------------------------------------------------


def _patch(arena: Arena, data: bytes) -> str:
    """`hsa verify` and `hsa apply` with a patch whose header and document are the input's, each with a digest that
    fits; any other input is the header itself."""
    sound = _sound(arena, _patch_file(arena))
    _, tensors = _split(sound)
    header = data
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
        made = json.loads(data)
        document = dict(made["document"])
        document["digest"] = provenance.document_digest(document)
        about = {"format": "pt", "hsa_patch": json.dumps(document)}
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


def _patch_seeds(arena: Arena) -> Iterable[bytes]:
    header = json.loads(_split(_patch_file(arena).read_bytes())[0])
    document = json.loads(header.pop("__metadata__")["hsa_patch"])
    yield json.dumps({"document": document, "header": header}).encode()


# Indexes of sweeps and releases ----------------------------------------------------------------------------------


def _listed(name: str, folder: Callable[[Arena], Path]) -> Callable[[Arena, bytes], str]:
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


def _sweep(arena: Arena) -> Path:
    given = [f"--{role}={path}" for role, path in arena.triple.items()]
    return _made(arena, "sweep", ["sweep", *given, "--k=0.3,0.6"])


def _tree(arena: Arena) -> Path:
    path = arena.sources / "recipe.yaml"
    entry = {"name": "a", "group": "g", **{role: str(path) for role, path in arena.triple.items()}}
    path.write_text(json.dumps({"merges": [entry]}), encoding="utf-8")
    return _made(arena, "tree", ["release", str(path)])


# Pickles ---------------------------------------------------------------------------------------------------------


def _records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(records: Mapping[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return held.getvalue()


def _described(data: bytes, sound: bytes) -> bytes:
    """A sound archive with another description of its tensors, padded like the sound one so that places still fit."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        (record,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    if len(data) > record.file_size:
        return _archive({**records, record.filename: data})
    start = record.header_offset + 30 + int.from_bytes(sound[record.header_offset + 26 :][:2], "little")
    start += int.from_bytes(sound[record.header_offset + 28 :][:2], "little")
    return sound[:start] + data.ljust(record.file_size, b"\0") + sound[start + record.file_size :]


def _pickle(arena: Arena, data: bytes) -> str:
    path = arena.pickled / PICKLES.weights
    sound = _sound(arena, path)
    path.write_bytes(_described(data, sound))
    try:
        return arena.merge(secondary=arena.pickled)
    finally:
        path.write_bytes(sound)


def _pickle_seeds(arena: Arena) -> Iterable[bytes]:
    (text,) = (data for name, data in _records(arena.pickled / PICKLES.weights).items() if name.endswith("data.pkl"))
    yield text
    yield b"\x80\x02cos\nsystem\nX\x04\0\0\0trueR."
    yield b"\x80\x02cbuiltins\neval\nX\x01\0\0\0" + b"1\x85R."
    yield b"\x80\x02}."


def _zip_seeds(arena: Arena) -> Iterable[bytes]:
    import torch

    held = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)}, held)
    yield held.getvalue()
    yield _archive({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"little", "a/version": b"3\n"})


def _openai(arena: Arena, data: bytes) -> str:
    sound = _sound(arena, arena.openai)
    arena.openai.write_bytes(_described(data, sound))
    try:
        return arena.merge(secondary=arena.openai)
    finally:
        arena.openai.write_bytes(sound)


def _adapter_pickle(arena: Arena, data: bytes) -> str:
    path = arena.pickled_adapter / ADAPTER_WEIGHTS[1]
    sound = _sound(arena, path)
    path.write_bytes(_described(data, sound))
    try:
        return arena.merge(secondary=arena.pickled_adapter)
    finally:
        path.write_bytes(sound)


def _adapter_pickle_seeds(arena: Arena) -> Iterable[bytes]:
    records = _records(arena.pickled_adapter / ADAPTER_WEIGHTS[1])
    yield next(data for name, data in records.items() if name.endswith("data.pkl"))


def _openai_seeds(arena: Arena) -> Iterable[bytes]:
    yield next(data for name, data in _records(arena.openai).items() if name.endswith("data.pkl"))


# The card --------------------------------------------------------------------------------------------------------


def _card(arena: Arena, data: bytes) -> str:
    """Words for the fields of a card, for ids, revisions and file names, one a line: nothing of them is markup."""
    words = [*data.decode("utf-8", "replace").split("\n"), "x", "x", "x", "x"]
    fields = {name: word for name, word in zip(card.FIELDS, words, strict=False) if word.strip()}
    record = _sound_record(arena)
    primary = record.sources["primary"]
    named = provenance.Identity(words[-5] or "x", words[-6] if len(words) > 5 and words[-6] else None)
    sources = {
        **record.sources,
        "primary": provenance.SourceRecord(named, primary.kind, primary.files, primary.targets),
    }
    record = provenance.Record(
        record.program, record.libraries, {**record.parameters, "card": fields}, sources, record.targets
    )
    rendered: list[bytes] = []
    files = [WEIGHTS, "README.md", words[0] + ".safetensors"]
    said = arena.call(lambda: rendered.append(card.render(record, files)))
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


_RECORDS: list[provenance.Record] = []


def _sound_record(arena: Arena) -> provenance.Record:
    if not _RECORDS:
        arena.merge()
        _RECORDS.append(provenance.load(arena.output).record)
    return _RECORDS[0]


def _card_seeds(arena: Arena) -> Iterable[bytes]:
    yield "\n".join(card.FIELDS).encode()
    yield b"<script>alert(1)</script>\nen,de\nmit\n[a](javascript:b)\n![a](b)\n```\n<!--\n**b**\n| a |\n---\norg/name"


TARGETS: Mapping[str, Target] = {
    "header": Target(_header, _header_seeds, tokens=("dtype", "shape", "data_offsets", "__metadata__", "F16", "BF16")),
    "weights": Target(_weights, _weights_seeds, "bytes"),
    "index": Target(
        _placed(lambda arena: arena.sharded / INDEX, lambda arena: arena.merge(primary=arena.sharded)),
        _index_seeds,
        tokens=("weight_map", "metadata", "../", "/", "model-00001-of-00002.safetensors", "model.safetensors"),
    ),
    "config": Target(
        _placed(lambda arena: arena.triple["primary"] / CONFIG, _merge_config),
        _config_seeds,
        tokens=("dtype", "torch_dtype", "encoder_layers", "decoder_layers", "tie_word_embeddings", "whisper"),
    ),
    "tokenizer": Target(
        _placed(lambda arena: arena.tokenized / "tokenizer.json", _merge_tokenized),
        lambda arena: [(arena.tokenized / "tokenizer.json").read_bytes()],
        tokens=("model", "vocab", "merges", "added_tokens", "id", "content"),
    ),
    "processor": Target(
        _placed(lambda arena: arena.tokenized / "processor_config.json", _merge_tokenized),
        lambda arena: [(arena.tokenized / "processor_config.json").read_bytes()],
        tokens=("feature_extractor", "audio_processor", "feature_size", "hop_length", "tokenizer_class"),
    ),
    "merges": Target(
        _placed(lambda arena: arena.tokenized / "merges.txt", _merge_tokenized),
        lambda arena: [b"#version: 0.2\na b\nab \xc4\xa0\n"],
        "bytes",
        ("#version", "\r\n", " ", "\ufeff"),
    ),
    "adapter_config": Target(
        _placed(lambda arena: arena.adapter / ADAPTER_CONFIG, _merge_adapter),
        lambda arena: [(arena.adapter / ADAPTER_CONFIG).read_bytes()],
        tokens=("r", "lora_alpha", "use_rslora", "peft_type", "LORA", "bias"),
    ),
    "provenance": Target(_provenance, _provenance_seeds, tokens=("digest", "blake3", "selected", "scores", "revision")),
    "recipe": Target(
        _recipe, _recipe_seeds, "bytes", ("merges:", "- name: ", "&a", "*a", "<<: ", "!!", "|", "card: {")
    ),
    "verify": Target(_verify, _verify_seeds, tokens=("files", "../x", "/etc/passwd", "blake3", "scores", "parameters")),
    "recompute": Target(_recompute, _verify_seeds, tokens=("max_shard_size", "dtype", "targets", "k", "card", "files")),
    "release": Target(_release, _release_seeds, tokens=("max_shard_size", "dtype", "targets", "k", "lambda", "card")),
    "inspect": Target(_inspect, _inspect_seeds, tokens=("<x-a>", "</script><x-b>", '"onload="x', "scores", "id", "k")),
    "patch": Target(_patch, _patch_seeds, tokens=("targets", "files", "hsa.scores", "max_shard_size", "parameters")),
    "sweep_index": Target(
        _listed("index.csv", _sweep),
        lambda arena: [(_sweep(arena) / "index.csv").read_bytes()],
        "bytes",
        ("encoder-qkv_k0.6", ",,", '"', "nan", "1e999", "../", "\n"),
    ),
    "release_index": Target(
        _listed("index.json", _tree),
        lambda arena: [(_tree(arena) / "index.json").read_bytes()],
        tokens=("entries", "path", "../x", "g/a", "complete", "provenance", "state"),
    ),
    "pickle": Target(_pickle, _pickle_seeds, "bytes", ("torch._utils\n_rebuild_tensor_v2\n", "storage", "cpu")),
    "zip": Target(
        _placed(lambda arena: arena.pickled / PICKLES.weights, lambda arena: arena.merge(secondary=arena.pickled)),
        _zip_seeds,
        "bytes",
        ("PK\x01\x02", "PK\x03\x04", "PK\x05\x06", "data.pkl", "byteorder"),
    ),
    "openai": Target(_openai, _openai_seeds, "bytes", ("dims", "n_audio_head", "model_state_dict")),
    "adapter_pickle": Target(_adapter_pickle, _adapter_pickle_seeds, "bytes", ("lora_A", "storage", "cpu")),
    "card": Target(_card, _card_seeds, "bytes", ("<b>", "](", "```", "---\n", "\n# ", "&lt;", "\u2028", "{{", "![")),
}
