"""Hostile files: the corpus, the largest files that are let through, and made-up ones, through what a user would run.

All run in a process of their own, whose memory, file accesses and time are watched; see tests/fuzz.
"""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsa.architectures.whisper import WHISPER
from hsa.errors import MAX_MESSAGE, HsaError, ProvenanceError, one_line
from hsa.outputs import provenance
from hsa.planning import tasks
from hsa.sources import checkpoint, safetensors, torch_pickle
from hsa.system import manifest, strict_json

FUZZ = Path(__file__).resolve().parent
CORPUS = FUZZ.parent / "corpus"
LIMIT = 512 << 20

Judged = Mapping[Path, dict[str, Any]]


def load(name: str) -> Any:
    """A module of tests/fuzz, which is no package."""
    import importlib.util

    sys.path.insert(0, str(FUZZ))  # they import one another by name
    try:
        spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FUZZ / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FUZZ))
    return module


def replay(place: Path, files: list[Path]) -> Judged:
    """What came of each file, and the memory at the peak."""
    place.mkdir()
    done = subprocess.run(
        [sys.executable, str(FUZZ / "child.py"), "replay", str(place), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    judged = {Path(entry["file"]): entry for entry in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"{done.stderr[-3000:]}\nafter {list(judged)[-1:]}"
    assert list(judged) == files
    return judged


def findings(judged: Judged) -> list[str]:
    return [f"{path.parent.name}/{path.name}: {e['said']}" for path, e in judged.items() if "FINDING" in e["said"]]


# The corpus ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return replay(tmp_path_factory.mktemp("corpus") / "place", sorted(p for p in CORPUS.rglob("*") if p.is_file()))


def test_nothing_in_the_corpus_is_a_finding(corpus: Judged) -> None:
    assert len(corpus) >= 20
    assert findings(corpus) == []


def test_sound_seeds_succeed_and_hostile_ones_are_refused(corpus: Judged) -> None:
    said = {f"{path.parent.name}/{path.name}": entry["said"] for path, entry in corpus.items()}
    targets = {path.name for path in CORPUS.iterdir()}
    small = {"weights", "zip"}  # too small to be a whole model
    dated = {"verify", "recompute", "sweep_index", "release_index"}  # child.py runs those that are made now
    for target in targets - small - dated:
        assert said[f"{target}/seed-0"] == "success"
    assert said["provenance/format-1"] == said["inspect/format-1"] == "success"
    assert "names os.system" in said["pickle/seed-1"]
    assert all("expected the plain name" in said[f"index/seed-{number}"] for number in (1, 2, 3, 4))


def test_bombs_of_the_corpus_are_those_that_the_script_makes(tmp_path: Path) -> None:
    """Binary files explain nothing: tests/fuzz/bombs.py says what each does, and makes it."""
    load("bombs").write(tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(made) > 120
    assert made == {path: (CORPUS / path).read_bytes() for path in made}


def test_every_target_has_seeds() -> None:
    text = ast.parse((FUZZ / "targets.py").read_text(encoding="utf-8"))
    (table,) = (n for n in text.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "TARGETS")
    assert isinstance(table.value, ast.Dict)
    names = {key.value for key in table.value.keys if isinstance(key, ast.Constant)}
    assert names == {path.name for path in CORPUS.iterdir()}
    assert all(path.stat().st_size <= 20_000 for path in CORPUS.rglob("*"))


# The guard itself must be able to fail ---------------------------------------------------------------------------

BREACHES = {
    "reads": "open('/etc/hostname').read()",
    "lists": "os.listdir('/etc')",
    "writes": "open(arena / 'sources' / 'new', 'w')",
    "writes beside": "(arena / '..' / 'x').mkdir()",
    "removes": "os.unlink(arena / 'sources' / 'file')",
    "removes by its directory": "os.unlink('file', dir_fd=sources)",
    "moves by its directory": "os.rename('file', arena / 'out' / 'file', src_dir_fd=sources)",
    "follows a link": "open(arena / 'out' / 'link').read()",
    "starts a program": "subprocess.run(['true'])",
    "asks a shell": "os.system('true')",
    "connects": "socket.socket().connect_ex(('127.0.0.1', 9))",
    "unpickles": "pickle.loads(b'cos\\ngetcwd\\n.')",
    "takes memory": "bytearray(b'x' * (600 << 20))",
    "takes time": "stop = time.process_time() + 2.2\nwhile time.process_time() < stop: pass",
}


def test_the_guard_sees_what_it_forbids(tmp_path: Path) -> None:
    """Each breach is one, and reading and writing in their places is none."""
    program = f"""
import os, pathlib, pickle, socket, subprocess, sys, time
sys.path.insert(0, {str(FUZZ)!r})
from guard import Finding, Guard
arena = pathlib.Path({str(tmp_path)!r}) / "arena"
for folder in ("out", "sources"):
    (arena / folder).mkdir(parents=True)
(arena / "sources" / "file").write_text("x")
(arena / "out" / "link").symlink_to("/etc/hostname")
sources = os.open(arena / "sources", os.O_RDONLY)
guard = Guard(arena)
guard.measure(lambda: None)
def seen(work):
    try:
        with guard.watching():
            exec(work)
    except Finding:
        return True
    return False
print([name for name, work in {BREACHES!r}.items() if not seen(work)])
print(seen("open(arena / 'sources' / 'file').read(); open(arena / 'out' / 'new', 'w').write('x')"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", "False"], done.stderr


# The largest files that are let through ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def largest(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    worst, root, files = load("worst"), tmp_path_factory.mktemp("worst"), []

    def put(target: str, made: Iterator[tuple[str, bytes]]) -> None:
        (root / target).mkdir()
        for name, data in made:
            files.append(root / target / name.replace(" ", "-"))
            files[-1].write_bytes(data)

    put("header", worst.texts())
    put("config", worst.configs())
    put("index", ((name, text) for name, text in worst.texts() if name.startswith("names")))
    put("tokenizer", worst.tokenizers())
    put("pickle", worst.pickles())
    put("zip", worst.archives())
    put("recipe", worst.recipes())
    return replay(root / "place", files)


def test_the_largest_files_stay_within_memory_and_time(largest: Judged) -> None:
    assert findings(largest) == []
    peaks = {f"{path.parent.name}/{path.name}": entry["peak"] for path, entry in largest.items()}
    name = max(peaks, key=peaks.__getitem__)
    print(f"the most memory, {peaks[name] >> 20} MiB, was taken by {name}")
    assert peaks[name] <= LIMIT
    slowest = max(largest.values(), key=lambda entry: entry["cpu"])
    print(f"the most CPU time, {slowest['cpu']} s, was taken by {slowest['file']}")


def test_limits_leave_room_for_the_largest_model() -> None:
    """What large-v3 takes, times five, is let through: its headers, its index, its description as a pickle."""
    from hsa.testing.whisper_checkpoints import SHAPES, tensor_shapes

    shapes = tensor_shapes(SHAPES["large-v3"])
    entries, position = [], 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        entries.append(safetensors.TensorEntry(name, "F32", shape, position, position + size))
        position += size
    raw = safetensors.serialize(entries, {"format": "pt"})
    assert 5 * len(raw) < safetensors.MAX_HEADER and 5 * strict_json.count_marks(raw) < strict_json.MAX_MARKS
    assert 5 * len(shapes) < checkpoint.MAX_TENSORS
    assert torch_pickle.MAX_PICKLE > 5 * 170_000
    targets = [e for e in entries if WHISPER.target(e.name, "attention-all")]
    assert targets and all(2 * (e.stop - e.start) < tasks.MAX_TARGET for e in targets)
    assert safetensors.parse(raw[8:], position, "here")[0] == tuple(entries)


# Refusals of their own -------------------------------------------------------------------------------------------


def test_a_promise_of_many_layers_is_refused_at_once(triple: dict[str, Path]) -> None:
    """Layers of a stack that is not merged are counted too: a billion of them must not be gone through."""
    from helpers import edit_json

    edit_json(triple["primary"] / "config.json", decoder_layers=10**9)
    with pytest.raises(
        HsaError, match="decoder_layers = 1000000000, expected a positive whole number of at most 10000"
    ):
        merge(triple)


def test_a_target_too_large_to_hold_is_refused(triple: dict[str, Path]) -> None:
    """A sparse file costs its sender nothing, whatever its tensors claim."""
    from dataclasses import replace

    from helpers import edit_json

    from hsa.testing.whisper_checkpoints import SHAPES, tensor_shapes

    width = 2560
    shape = replace(SHAPES["test"], d_model=width, encoder_layers=1, decoder_layers=1)
    entries, position = [], 0
    for name, lengths in tensor_shapes(shape).items():
        size = 4 * math.prod(lengths)
        entries.append(safetensors.TensorEntry(name, "F32", lengths, position, position + size))
        position += size
    raw = safetensors.serialize(entries, {"format": "pt"})
    for path in triple.values():
        edit_json(path / "config.json", d_model=width, encoder_layers=1, decoder_layers=1)
        with (path / "model.safetensors").open("wb") as file:
            file.write(raw)
            file.truncate(len(raw) + position)
    with pytest.raises(HsaError, match=f"takes {4 * width * width} bytes, at most {tasks.MAX_TARGET}"):
        merge(triple)


def test_many_headers_count_as_one(triple: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import read_tensors, write_tensors

    path = triple["secondary"]
    write_tensors(path, read_tensors(path), shards=3)
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 88)
    with pytest.raises(HsaError, match=r"^secondary: .* for 89 tensors; at most \d+, \d+ and 88 are read"):
        open_secondary(path)
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 89)
    open_secondary(path)
    for name, value in (("MAX_HEADER", 9000), ("MAX_MARKS", 600)):  # one that every single header keeps
        monkeypatch.setattr(checkpoint, name, value)
        with pytest.raises(
            HsaError, match=r"^secondary: .* has headers of 95.. bytes, 66. brackets, braces and commas"
        ):
            open_secondary(path)
        monkeypatch.undo()


def open_secondary(path: Path) -> None:
    from hsa.system.fsio import Tally

    checkpoint.open_checkpoint("secondary", path, Tally()).close()


def merge(triple: dict[str, Path]) -> None:
    import hsa

    hsa.merge(**triple, output=triple["base"].parents[1] / "out", sync=False)


def test_a_config_that_can_be_read_can_be_written(triple: dict[str, Path]) -> None:
    """With --dtype it is: neither depth nor numbers may break that, or end in JSON that is none."""
    from helpers import edit_json

    import hsa

    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    path = triple["primary"] / "config.json"
    edit_json(path, deep=deep)
    out = triple["base"].parents[1] / "out"
    hsa.merge(**triple, output=out, sync=False, dtype="float16")
    assert json.loads((out / "config.json").read_text())["deep"] == deep
    for bad, said in ((("[" * 900) + "]" * 900, "nested too deeply"), ("1e400", "1e400 is out of range")):
        path.write_text(path.read_text().replace('"deep":', f'"bad": {bad}, "deep":'))
        with pytest.raises(HsaError, match=said):
            hsa.merge(**triple, output=out, sync=False, dtype="float16", overwrite=True)
        path.write_text(path.read_text().replace(f'"bad": {bad}, ', ""))


def test_long_messages_keep_both_ends() -> None:
    assert one_line("a" * MAX_MESSAGE) == "a" * MAX_MESSAGE
    said = str(HsaError("start " + "\x01" * 10**6 + " end"))
    assert said.startswith("start ") and said.endswith(" end") and " [...] " in said
    assert len(said) < 5 * MAX_MESSAGE and said.isprintable()


def test_no_program_and_no_shell_is_started() -> None:
    """Nothing that a file says can reach a shell: none is started, nor a program but where kernels are compiled."""
    package = FUZZ.parents[1]
    found = set()
    for path in sorted((package / "hsa").rglob("*.py")) + sorted((package / "kernels").rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute):
                names.append(f"{ast.unparse(node.value)}.{node.attr}")
            if isinstance(node, ast.Name):
                names.append(node.id)
            for name in names:
                started = name in ("subprocess", "pty", "multiprocessing", "eval", "exec", "commands")
                if started or name.startswith(("os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn")):
                    found.add(f"{path.relative_to(package)}: {name}")
    # The processes of a search are Python's own, started from this package, and get what pickle makes of our types.
    workers = {"hsa/searches/processes.py: multiprocessing"}
    assert found == workers | {f"kernels/compile_check.py: {name}" for name in ("multiprocessing", "subprocess")}


# Made-up files -------------------------------------------------------------------------------------------------

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63 - 1, 2**63, 10**400, -0.0, 1e308])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def changed(document: Any, draw: Any) -> bytes:
    """The document with some of its values, at any depth, replaced by anything; as JSON, repeated names included."""
    places, ahead = [], [document]
    while ahead:
        box = ahead.pop()
        for key in box if isinstance(box, dict) else range(len(box)):
            places.append((box, key))
            if isinstance(box[key], dict | list):
                ahead.append(box[key])
    for _ in range(draw.draw(st.integers(1, 3))):
        box, key = draw.draw(st.sampled_from(places))
        box[key] = draw.draw(ANYTHING)
    text = json.dumps(document)
    if draw.draw(st.integers(0, 9)) == 0 and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8")


def only_hsa_errors(work: Any) -> bool:
    """Whether the work succeeds; anything but an HsaError of one printable line goes on as it is."""
    try:
        work()
    except HsaError as error:
        assert str(error).isprintable()
        return False
    return True


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@QUICK
@given(draw=st.data())
def test_changed_json_files_are_opened_or_refused(triple: dict[str, Path], name: str, draw: Any) -> None:
    from helpers import read_tensors, write_tensors

    path = triple["base"]
    if not (path / "model.safetensors.index.json").exists():
        write_tensors(path, read_tensors(path), shards=2)
    kept = path / f"{name}.kept"
    if not kept.exists():
        kept.write_bytes((path / name).read_bytes())
    (path / name).write_bytes(changed(json.loads(kept.read_bytes()), draw))

    def work() -> None:
        from hsa.system.fsio import Tally

        checkpoint.open_checkpoint("base", path, Tally()).close()

    only_hsa_errors(work)


@QUICK
@given(draw=st.data())
def test_changed_headers_are_opened_or_refused(shared_triple: dict[str, Path], tmp_path: Path, draw: Any) -> None:
    raw = (shared_triple["base"] / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = changed(json.loads(raw[8:end]), draw)
    only_hsa_errors(lambda: safetensors.parse(text, len(raw) - end, "here"))


@pytest.mark.parametrize("seed", ["seed-0", "format-1"])
@QUICK
@given(draw=st.data())
def test_forged_provenance_is_read_or_refused(seed: str, draw: Any) -> None:
    """With a digest that fits: whoever forges one can compute it."""
    from hsa.outputs import card
    from hsa.system import strict_json

    document = json.loads((CORPUS / "provenance" / seed).read_bytes())
    text = changed(document, draw)
    only_hsa_errors(lambda: provenance.loads(text, "here"))
    try:
        document = strict_json.load_json(text, "here", "provenance")
        document["digest"] = manifest.document_digest(document)
        text = manifest.render(document)
    except (HsaError, ValueError):
        return

    def work() -> None:
        card.render(provenance.loads(text, "here").record, ["README.md"], {})

    only_hsa_errors(work)


@pytest.mark.parametrize("seed", ["seed-0", "format-1"])
def test_a_forged_score_that_no_float_holds(seed: str) -> None:
    document = json.loads((CORPUS / "provenance" / seed).read_bytes())
    target = next(iter(document["targets"].values()))
    (target if seed == "format-1" else target["decision"])["scores"][0] = 10**400
    document["digest"] = manifest.document_digest(document)
    with pytest.raises(ProvenanceError, match="expected a finite number"):
        provenance.loads(manifest.render(document), "here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.pop("card"), "card.* is missing"),
        (lambda p: p.update(card={"title": 1}), "expected a text"),
        (lambda p: p.update(card=[]), "expected an object"),
        (lambda p: p.update(k="<b>"), "k must be a number"),
        (lambda p: p.update(targets=["x"]), "targets must be one of"),
        (lambda p: p.pop("numerics"), "numerics.* is missing"),
    ],
)
def test_forged_parameters_are_refused(change: Any, said: str) -> None:
    document = json.loads((CORPUS / "provenance" / "seed-0").read_bytes())
    change(document["parameters"])
    document["digest"] = manifest.document_digest(document)
    with pytest.raises(ProvenanceError, match=said):
        provenance.loads(manifest.render(document), "here")


def test_forged_names_of_parameters_are_words_in_the_card() -> None:
    from hsa.outputs import card

    document = json.loads((CORPUS / "provenance" / "seed-0").read_bytes())
    document["parameters"]["<script>x</script>"] = "`</td><b>|"
    document["digest"] = manifest.document_digest(document)
    text = card.render(provenance.loads(manifest.render(document), "here").record, ["README.md"], {}).decode()
    assert r"| \<script\>x\</script\> | `?</td><b>?` |" in text
