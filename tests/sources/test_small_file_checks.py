"""What the small files say: those that cannot be loaded are refused, those that contradict the model are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    edit_json,
    merge_arguments,
    read_safetensors,
    read_tensors,
    run_hsa,
    safetensors_bytes,
    snapshot,
    write_tensors,
)

import hsa
from hsa.sources.checkpoint import MAX_TEXT
from hsa.sources.small_file_checks import CHECKED_FILES, MAX_VOCABULARY_MARKS, read_small_file
from hsa.system.digests import digest_of
from hsa.system.manifest import document_digest, render

Triple = dict[str, Path]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"b" * 64 + b"\nsize 2128466\n"
TOKENIZER = {
    "added_tokens": [{"id": 300, "content": "<x>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}
PROCESSOR = {"feature_extractor": {"feature_size": 80, "chunk_length": 1}, "processor_class": "WhisperProcessor"}
FEATURES = "preprocessor_config.json"


def complete(directory: Path) -> None:
    """Every small file that there is, all of them sound."""
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "processor_config.json").write_text(json.dumps(PROCESSOR))
    (directory / "merges.txt").write_text("#version: 0.2\na b\nab c\n")


@pytest.fixture
def sources(triple: Triple) -> Triple:
    """A triple of which every source has every small file."""
    for path in triple.values():
        complete(path)
        assert {name for name in CHECKED_FILES if (path / name).is_file()} == set(CHECKED_FILES)
    return triple


def refusal(done: object) -> str:
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hsa: error: ")]  # type: ignore[attr-defined]
    return str(line)


def _without_end(data: bytes) -> bytes:
    return data.rstrip()[:-1]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "it is empty"),
    "cut": (_without_end, "not valid JSON"),
    "null": (lambda _: b"null", ""),
    "a list": (lambda _: b"[]", ""),
    "a Git LFS pointer": (lambda _: POINTER, "is a Git LFS pointer"),
    "a byte-order mark": (lambda data: b"\xef\xbb\xbf" + data, "byte-order mark"),
    "NaN": (lambda data: _without_end(data) + b', "nan": NaN}', "holds NaN"),
    "not UTF-8": (lambda _: b'{"\xff": 1}', "utf-8"),
    "nested beyond all": (lambda _: b'{"a":' * 100_000, "nested too deeply"),
}


# --- what cannot be loaded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [name for name in CHECKED_FILES if name != "merges.txt"])
def test_a_small_file_that_cannot_be_loaded_is_refused(sources: Triple, name: str, damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    path = sources["primary"] / name
    sound = path.read_bytes() if path.read_bytes().strip() != b"{}" else b'{"a": 1}'
    path.write_bytes(change(sound))
    before = snapshot(tmp_path)
    with pytest.raises(hsa.SourceError) as caught:
        hsa.merge(**sources, output=tmp_path / "out", sync=False)
    assert f"primary: {path}" in str(caught.value) and message in str(caught.value)
    remedies = ("copy it again", "git lfs pull", "without a byte-order mark", "write a finite number")
    assert any(remedy in str(caught.value) for remedy in remedies)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", {"model": {"vocab": {}}}, "has no model with a vocabulary"),
        ("tokenizer.json", {"added_tokens": []}, "has no model with a vocabulary"),
        ("tokenizer.json", {"model": {"vocab": "a"}}, "has no model with a vocabulary"),
        ("vocab.json", {"a": "0"}, "must map tokens to whole numbers"),
        ("vocab.json", {"a": True}, "must map tokens to whole numbers"),
        ("vocab.json", {}, "holds no token"),
        ("added_tokens.json", {"<x>": None}, "must map tokens to whole numbers"),
        ("processor_config.json", {"feature_extractor": []}, "has feature_extractor = "),
    ],
)
def test_json_that_is_no_such_file_is_refused(
    sources: Triple, name: str, text: object, message: str, tmp_path: Path
) -> None:
    (sources["primary"] / name).write_text(json.dumps(text))
    with pytest.raises(hsa.SourceError, match=f"{name}: .*{message}.*copy it again"):
        hsa.merge(**sources, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (POINTER, "is a Git LFS pointer"),
        (b"a b\nabc\nd e\n", "line 2 is 'abc', expected two tokens"),
        (b"a b\n\nd e\n", "line 2 is '', expected two tokens"),
        (b"a b c\n", "line 1 is 'a b c'"),
        (b"#version: 0.2\na b\nc", "line 3 is 'c'"),
        (b"{}", "line 1 is '{}'"),
        (b"a \xff\n", "is not UTF-8 text"),
        (b"\xef\xbb\xbfa b\n", "byte-order mark"),
    ],
)
def test_merges_that_cannot_be_loaded_are_refused(sources: Triple, data: bytes, message: str, tmp_path: Path) -> None:
    (sources["primary"] / "merges.txt").write_bytes(data)
    with pytest.raises(hsa.SourceError, match=f"primary: .*merges.txt.*{message}"):
        hsa.merge(**sources, output=tmp_path / "out")


def test_a_message_says_where_the_json_breaks(sources: Triple, tmp_path: Path) -> None:
    (sources["primary"] / "tokenizer.json").write_text('{"model":\n {"vocab": {"a": 0, }}}')
    with pytest.raises(hsa.SourceError, match=r"line 2 column \d+ \(char \d+\)"):
        hsa.merge(**sources, output=tmp_path / "out")


def test_only_what_would_be_taken_is_looked_into(sources: Triple, tmp_path: Path) -> None:
    for role in ("base", "secondary"):
        for name in CHECKED_FILES:
            (sources[role] / name).write_bytes(b"")
    hsa.merge(**sources, output=tmp_path / "out", sync=False)
    with pytest.raises(hsa.SourceError, match=r"secondary: .*it is empty"):
        hsa.merge(**sources, output=tmp_path / "other", assets_from="secondary")


def test_an_unreadable_file_is_not_passed_over_for_bases(sources: Triple, tmp_path: Path) -> None:
    """A link that leads nowhere, as a cache without its blobs has them, and a directory of that name."""
    for number, spoil in enumerate((lambda path: path.symlink_to("nowhere"), Path.mkdir)):
        path = sources["primary"] / "tokenizer.json"
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        spoil(path)
        with pytest.raises(hsa.SourceError, match=r"primary: .*tokenizer\.json"):
            hsa.merge(**sources, output=tmp_path / str(number))


@pytest.mark.parametrize("command", ["merge", "dry-run", "patch", "sweep", "full sweep", "release"])
def test_every_command_refuses_an_empty_tokenizer(sources: Triple, command: str, tmp_path: Path) -> None:
    (sources["primary"] / "tokenizer.json").write_bytes(b"")
    roles = [f"--{role}={path}" for role, path in sources.items()]
    recipe = tmp_path / "recipe.yaml"
    inner = ", ".join(f"{role}: {path}" for role, path in sources.items())
    recipe.write_text(f"merges:\n  - {{name: n, group: g, {inner}}}\n")
    arguments = {
        "merge": ["merge", *roles, f"--output={tmp_path / 'out'}"],
        "dry-run": ["merge", *roles, f"--output={tmp_path / 'out'}", "--dry-run"],
        "patch": ["merge", *roles, f"--output={tmp_path / 'p.safetensors'}", "--patch"],
        "sweep": ["sweep", *roles, "--lambda=0.1,0.2", f"--output={tmp_path / 'out'}"],
        "full sweep": ["sweep", *roles, "--lambda=0.1,0.2", "--full", f"--output={tmp_path / 'out'}"],
        "release": ["release", str(recipe), f"--output={tmp_path / 'out'}"],
    }
    before = snapshot(tmp_path)
    done = run_hsa(*arguments[command])
    assert done.returncode == 2, done.stderr
    assert "tokenizer.json" in done.stderr and "it is empty" in done.stderr and "copy it again" in done.stderr
    assert snapshot(tmp_path) == before


def forged(output: Path, name: str, data: bytes) -> None:
    """Change a file of an output, and its digest in the provenance, as an earlier version would have written it."""
    (output / name).write_bytes(data)
    path = output / "hsa_merge.json"
    document = json.loads(path.read_text())
    document["files"][name] = {"blake3": digest_of(data)}
    document["digest"] = document_digest(document)
    path.write_bytes(render(document))


@pytest.mark.parametrize("name", CHECKED_FILES)
def test_verify_finds_a_small_file_that_cannot_be_loaded(sources: Triple, name: str, tmp_path: Path) -> None:
    hsa.merge(**sources, output=tmp_path / "out", sync=False)
    assert hsa.verify(tmp_path / "out").ok
    forged(tmp_path / "out", name, b"[")
    (problem,) = hsa.verify(tmp_path / "out").problems
    assert problem.file == name and "damaged" in problem.what


def test_apply_refuses_a_patch_that_took_an_empty_tokenizer(sources: Triple, tmp_path: Path) -> None:
    """An earlier version made the patch."""
    path = tmp_path / "p.safetensors"
    hsa.merge_patch(**sources, output=path, sync=False)
    header, data = read_safetensors(path)
    document = json.loads(header["__metadata__"]["hsa_patch"])
    document["files"]["tokenizer.json"] = digest_of(b"")
    document["digest"] = document_digest(document)
    header["__metadata__"]["hsa_patch"] = json.dumps(document, separators=(",", ":"))
    path.write_bytes(safetensors_bytes(header, data))
    (sources["primary"] / "tokenizer.json").write_bytes(b"")
    with pytest.raises(hsa.SourceError, match=r"primary: .*tokenizer\.json: .*it is empty.*copy it again"):
        hsa.apply(sources["primary"], path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what contradicts the model ----------------------------------------------------------------------------------


def warned(triple: Triple, tmp_path: Path, **options: object) -> str:
    """The one warning of a merge, of the dry run and of `apply`; `hsa verify` has it as a note of a sound output."""
    report = hsa.merge(**triple, output=tmp_path / "out", sync=False, **options)  # type: ignore[arg-type]
    (warning,) = report.warnings
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    dry = run_hsa(*merge_arguments(triple, tmp_path / "dry", "--dry-run", "--json", *flags))
    assert json.loads(dry.stdout)["warnings"] == [warning]
    verified = hsa.verify(tmp_path / "out")
    assert verified.ok
    if "the tokenizer is" not in warning:
        assert warning in verified.notes
    return warning


def test_a_feature_extractor_of_another_number_of_mel_bins_is_told(triple: Triple, tmp_path: Path) -> None:
    edit_json(triple["primary"] / FEATURES, feature_size=128)
    warning = warned(triple, tmp_path)
    assert "preprocessor_config.json has feature_size 128" in warning and "80 mel bins" in warning


def test_a_feature_extractor_without_a_size_means_80(triple: Triple, tmp_path: Path) -> None:
    for role, path in triple.items():
        tensors = read_tensors(path)
        name = "model.encoder.conv1.weight"
        write_tensors(path, {**tensors, name: torch.zeros(tensors[name].shape[0], 128, 3)})
        edit_json(path / "config.json", num_mel_bins=128)
        edit_json(path / FEATURES, feature_size=None if role == "primary" else 128)
    assert "no feature_size, which means 80" in warned(triple, tmp_path)


def test_a_feature_extractor_within_a_processor_is_checked_too(triple: Triple, tmp_path: Path) -> None:
    (triple["primary"] / FEATURES).unlink()
    nested = {"feature_extractor": {"feature_size": 128, "chunk_length": 1}}
    (triple["primary"] / "processor_config.json").write_text(json.dumps(nested))
    assert "processor_config.json has feature_size 128" in warned(triple, tmp_path)


def test_a_feature_extractor_of_another_length_is_told(triple: Triple, tmp_path: Path) -> None:
    edit_json(triple["primary"] / FEATURES, chunk_length=30)
    assert "3000 frames" in warned(triple, tmp_path)


def test_a_feature_extractor_of_another_kind_is_told(triple: Triple, tmp_path: Path) -> None:
    edit_json(triple["primary"] / FEATURES, feature_extractor_type="Wav2Vec2FeatureExtractor")
    assert "Wav2Vec2FeatureExtractor" in warned(triple, tmp_path)


def test_two_forms_of_one_feature_extractor_that_differ_are_told(triple: Triple, tmp_path: Path) -> None:
    nested = {"feature_extractor": {"feature_size": 80, "chunk_length": 1, "dither": 0.25}}
    (triple["primary"] / "processor_config.json").write_text(json.dumps(nested))
    assert "differ in 'dither'" in warned(triple, tmp_path)


def _rows(path: Path) -> int:
    return int(json.loads((path / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize("name", ["vocab.json", "added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_more_tokens_than_the_embedding_has_rows_are_told(triple: Triple, name: str, tmp_path: Path) -> None:
    """By the first id that has no row; the last one that has gives no warning."""
    primary, rows = triple["primary"], _rows(triple["primary"])

    def add(number: int) -> None:
        if name == "tokenizer_config.json":
            edit_json(primary / name, added_tokens_decoder={str(number): {"content": "<x>"}})
        elif name == "tokenizer.json":
            tokens = [{"id": number, "content": "<x>"}]
            (primary / name).write_text(json.dumps({**TOKENIZER, "added_tokens": tokens}))
        else:
            edit_json(primary / name, **{"<x>": number})

    add(rows)
    warning = warned(triple, tmp_path)
    assert f"{name} has token ids up to {rows} and the embedding only {rows} rows" in warning
    add(rows - 1)
    assert hsa.merge(**triple, output=tmp_path / "fits", sync=False).warnings == ()


def test_secondarys_tokenizer_with_more_tokens_than_rows_is_told(triple: Triple, tmp_path: Path) -> None:
    rows = _rows(triple["secondary"])
    edit_json(triple["secondary"] / "added_tokens.json", **{"<x>": rows, "<y>": rows + 1})
    assert f"up to {rows + 1} " in warned(triple, tmp_path, assets_from="secondary")
    assert hsa.merge(**triple, output=tmp_path / "own", sync=False).warnings == ()


def test_bases_tokenizer_for_a_primary_with_more_tokens_is_told(triple: Triple, tmp_path: Path) -> None:
    primary = triple["primary"]
    tensors = read_tensors(primary)
    name = "model.decoder.embed_tokens.weight"
    grown = torch.cat([tensors[name], tensors[name][:2]])
    write_tensors(primary, {**tensors, name: grown})
    edit_json(primary / "config.json", vocab_size=len(grown))
    for small in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        (primary / small).unlink()
    (primary / "normalizer.json").unlink()
    warning = warned(triple, tmp_path)
    assert f"the tokenizer is base's, whose embedding has {len(grown) - 2} rows" in warning


def test_a_processor_that_names_another_tokenizer_class_is_told(triple: Triple, tmp_path: Path) -> None:
    processor = triple["primary"] / "processor_config.json"
    processor.write_text(json.dumps({"tokenizer_class": "Wav2Vec2CTCTokenizer"}))
    assert "names the tokenizer class 'Wav2Vec2CTCTokenizer'" in warned(triple, tmp_path)
    processor.write_text(json.dumps({"tokenizer_class": "WhisperTokenizerFast"}))
    assert hsa.merge(**triple, output=tmp_path / "fits", sync=False).warnings == ()


def test_apply_tells_of_contradictions_too(triple: Triple, tmp_path: Path) -> None:
    edit_json(triple["primary"] / FEATURES, feature_size=128)
    made = hsa.merge_patch(**triple, output=tmp_path / "p.safetensors", sync=False)
    done = hsa.apply(triple["primary"], tmp_path / "p.safetensors", output=tmp_path / "out", sync=False)
    assert made.warnings == done.warnings and "feature_size 128" in done.warnings[0]


# --- sound files, and how much is read ---------------------------------------------------------------------------


def test_real_small_files_are_sound(real: Triple) -> None:
    for name in CHECKED_FILES:
        if (real["primary"] / name).is_file():
            read_small_file(name, (real["primary"] / name).read_bytes(), name)


def test_a_cut_real_tokenizer_is_refused_at_its_end(real: Triple) -> None:
    data = (real["primary"] / "tokenizer.json").read_bytes()[:1_000_000]
    with pytest.raises(hsa.SourceError, match=r"not valid JSON \(.*char 9[0-9]{5}\)"):
        read_small_file("tokenizer.json", data, "primary: tokenizer.json")


def test_what_transformers_5_saves_is_sound(triple: Triple, tmp_path: Path) -> None:
    from transformers import WhisperProcessor

    processor = WhisperProcessor.from_pretrained(triple["primary"])
    for name in CHECKED_FILES:
        (triple["primary"] / name).unlink(missing_ok=name != "generation_config.json")
    processor.save_pretrained(triple["primary"])
    report = hsa.merge(**triple, output=tmp_path / "out", sync=False)
    assert report.warnings == () and hsa.verify(tmp_path / "out").notes == ()
    assert WhisperProcessor.from_pretrained(tmp_path / "out").tokenizer.decode([40, 41]) == processor.decode([40, 41])


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_vocabulary_beyond_the_limits_is_refused(name: str) -> None:
    for data in (b" " * (MAX_TEXT + 1), b"[" * (MAX_VOCABULARY_MARKS + 1)):
        with pytest.raises(hsa.SourceError, match=f"at most {MAX_TEXT} and {MAX_VOCABULARY_MARKS} are read"):
            read_small_file(name, data, "here")
