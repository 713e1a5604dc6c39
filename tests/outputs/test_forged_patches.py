"""Patches that somebody rewrote, every digest made to fit: `hsa apply` refuses each lie, and `hsa verify` names it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forger import Forger
from helpers import poke, run_hsa, snapshot

import hsa
from hsa.outputs import patch_format
from hsa.sources import small_files
from hsa.sources.checkpoint import CONFIG
from hsa.system.digests import digest_of

Triple = dict[str, Path]
NAME = "p.safetensors"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def made(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / NAME
    hsa.merge_patch(**shared_triple, output=place, sync=False)
    return place


@pytest.fixture
def forger(made: Path, tmp_path: Path) -> Forger:
    """The sound patch, copied to where a test may rewrite it."""
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / NAME).write_bytes(made.read_bytes())
    return Forger.of(tmp_path / "place" / NAME)


def test_what_the_forger_leaves_as_it_was_is_applied(shared_triple: Triple, forger: Forger) -> None:
    """So that each refusal below is of the lie, and not of how it is written."""
    forger.write()
    hsa.apply(shared_triple["primary"], forger.path, output=forger.path.parent / "out", sync=False)


# --- lies ---------------------------------------------------------------------------------------------------------


def element(value: float, place: int) -> Callable[[Forger], None]:
    """One element of the rows of a target."""

    def lie(forged: Forger) -> None:
        rows = forged.array(forged.target)
        rows.reshape(-1)[place] = value
        forged.put(forged.target, rows)

    return lie


def parameter(**changes: Any) -> Callable[[Forger], None]:
    return lambda forged: forged.document["parameters"].update(changes)


def listed(number: int, change: Callable[[Any], Any]) -> Callable[[Forger], None]:
    """Heads, heads to select or lambda_i (0, 1, 2) of a target."""

    def lie(forged: Forger) -> None:
        entry = forged.document["targets"][forged.target]
        entry[number] = change(entry[number])

    return lie


def files(**changes: str | None) -> Callable[[Forger], None]:
    def lie(forged: Forger) -> None:
        for name, digest in changes.items():
            forged.document["files"].pop(name, None)
            if digest is not None:
                forged.document["files"][name] = digest

    return lie


def other_heads(forged: Forger) -> None:
    forged.put(patch_format.SELECTED, 1 - forged.array(patch_format.SELECTED))


def one_head_less(forged: Forger) -> None:
    """A head and its rows left out of one target, where the selection says the same."""
    rows, flags = forged.array(forged.target), forged.array(patch_format.SELECTED)
    first = 0
    for name, (heads, _, _) in forged.document["targets"].items():
        if name == forged.target:
            flags[first + int(np.flatnonzero(flags[first : first + heads])[0])] = 0
        first += heads
    forged.put(forged.target, rows[1:])
    forged.put(patch_format.SELECTED, flags)


def score(value: float) -> Callable[[Forger], None]:
    """The largest squared score of all."""

    def lie(forged: Forger) -> None:
        scores = forged.array(patch_format.SCORES)
        scores[int(scores.argmax())] = value
        forged.put(patch_format.SCORES, scores)

    return lie


def a_target_less(forged: Forger) -> None:
    names = list(forged.document["targets"])
    first = sum(forged.document["targets"][n][0] for n in names[: names.index(forged.target)])
    heads = forged.document["targets"].pop(forged.target)[0]
    del forged.tensors[forged.target]
    for name in (patch_format.SCORES, patch_format.SELECTED):
        code, shape, _ = forged.tensors[name]
        rest = np.delete(forged.array(name), slice(first, first + heads))
        forged.tensors[name] = (code, [len(rest), *shape[1:]], rest.tobytes())


def renamed_target(forged: Forger) -> None:
    """The rows of an encoder's target given as those of the decoder."""
    name = forged.target.replace("encoder", "decoder")
    for held in (forged.tensors, forged.document["targets"]):
        items = [(name if key == forged.target else key, value) for key, value in held.items()]
        held.clear()
        held.update(items)


def type_of_integers(forged: Forger) -> None:
    code, shape, data = forged.tensors[forged.target]
    assert code == "F32"
    forged.tensors[forged.target] = ("I32", shape, data)


def fewer_columns(forged: Forger) -> None:
    forged.put(forged.target, forged.array(forged.target)[:, :, 1:])


def key(name: str, value: Any) -> Callable[[Forger], None]:
    return lambda forged: forged.document.update({name: value})


def source(role: str, **changes: Any) -> Callable[[Forger], None]:
    return lambda forged: forged.document["sources"][role].update(changes)


ZEROS = "0" * 64
LIES: dict[str, tuple[Callable[[Forger], Any], str]] = {
    "NaN in the rows": (element(NAN, 0), "head 0 hold NaN or Inf|head . hold NaN or Inf"),
    "Inf at the end of the rows": (element(INF, -1), "hold NaN or Inf"),
    "minus Inf in the rows": (element(-INF, 100), "hold NaN or Inf"),
    "another lambda_i": (listed(2, lambda c: c / 2), "the parameters give"),
    "lambda_i next to the right one": (listed(2, lambda c: math.nextafter(c, 0)), "the parameters give"),
    "one head more to select": (listed(1, lambda keep: keep + 1), "do not follow from its scores"),
    "one head less to select": (listed(1, lambda keep: keep - 1), "do not follow from its scores"),
    "twice the heads": (listed(0, lambda heads: 2 * heads), "promises|expected"),
    "another k": (parameter(k=0.9), "the parameters give"),
    "another lambda": (parameter(**{"lambda": 0.25}), "the parameters give"),
    "another alpha": (parameter(alpha=0.3), "the parameters give"),
    "more targets": (parameter(targets="attention-qkv"), "are not listed"),
    "another number of heads": (parameter(num_heads=2), "expected 2"),
    "another number of layers": (parameter(num_layers=9), "the parameters give"),
    "fewer layers": (parameter(num_layers=1), "the parameters give"),
    "k of an unknown tensor": (parameter(k={"x": 0.5}), "no target of 'encoder-qkv'|no value for target"),
    "attention_scale": (parameter(attention_scale=0.5), "attention_scale moves the heads"),
    "non_attention_scale": (parameter(non_attention_scale=2.0), "non_attention_scale moves every other"),
    "a cast": (parameter(dtype="float16"), "dtype casts every tensor"),
    "reference numerics": (parameter(numerics="reference", load_dtype="auto"), "computes every tensor"),
    "a load dtype": (parameter(load_dtype="auto"), "load_dtype"),
    "an unknown parameter": (parameter(note="x"), "'note' is none that hsa records"),
    "another backend": (parameter(backend="triton"), "made on the CPU"),
    "assets from nobody": (parameter(assets_from="../"), "assets_from must be one of"),
    "a shard size in words": (parameter(max_shard_size="5GB"), "max_shard_size"),
    "a shard size of nothing": (parameter(max_shard_size=0), "max_shard_size"),
    "an unknown card field": (parameter(card={"base_model": "x"}), "'base_model' is unknown"),
    "an empty card field": (parameter(card={"title": " "}), "card field title"),
    "other heads": (other_heads, "do not follow from its scores"),
    "a head less": (one_head_less, "do not follow from its scores"),
    "a negative score": (score(-1.0), "numbers of at least 0"),
    "a score of NaN": (score(NAN), "numbers of at least 0"),
    "a score of Inf": (score(INF), "below 1e"),
    "a score that the record cannot hold": (score(1e300), "below 1e"),
    "a target less": (a_target_less, "are not listed"),
    "a target of another name": (renamed_target, "are not listed"),
    "integers": (type_of_integers, "dtype is 'I32'"),
    "fewer columns": (fewer_columns, "is listed with shape"),
    "no config.json": (files(**{CONFIG: None}), f"no {CONFIG}"),
    "no files": (key("files", {}), f"no {CONFIG}"),
    "a file of the parent directory": (files(**{"secret.txt": ZEROS}), "'secret.txt', which no merge writes"),
    "the card as a small file": (files(**{"README.md": ZEROS}), "which no merge writes"),
    "weights as a small file": (files(**{"model.safetensors": ZEROS}), "which no merge writes"),
    "the record as a small file": (files(**{"hsa_merge.json": ZEROS}), "which no merge writes"),
    "code as a small file": (files(**{"modeling.py": ZEROS}), "which no merge writes"),
    "a path": (files(**{"../vocab.json": ZEROS}), "which no merge writes"),
    "a digest of something else": (files(**{CONFIG: "x" * 64}), "expected a digest"),
    "an unknown key": (key("note", "x"), "'note' is not written as hsa writes it"),
    "distances of another stack": (key("distances", {"decoder": [0.1] * 2, "all": [0.1] * 2}), "its distances are of"),
    "distances below zero": (key("distances", {"encoder": [-0.1, 0.1], "all": [0.1, 0.1]}), "distances are"),
    "another program": (key("program", {"name": "other", "version": "1"}), "its program is 'other'"),
    "another format of base": (source("base", format="exe"), "the format of a source is 'exe'"),
    "a primary of pickles": (source("primary", format="pickle"), "no safetensors files"),
    "another size of primary": (
        lambda forged: forged.document["sources"]["primary"]["files"]["model.safetensors"].update(bytes=7),
        "the size or the header of model.safetensors differs",
    ),
    "other targets of primary": (source("primary", targets_blake3=ZEROS), "target tensors hold other values"),
}  # fmt: skip


ONLY_SOURCES_TELL = ("more targets", "another size of primary", "other targets of primary")
"""Lies that nothing in the patch contradicts: `hsa verify` names them where it is given the sources."""


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_whose_digests_fit_is_refused(shared_triple: Triple, forger: Forger, lie: str) -> None:
    change, message = LIES[lie]
    change(forger)
    forger.write()
    place = forger.path.parent
    before = snapshot(place)
    with pytest.raises(hsa.SourceError, match=message) as caught:
        hsa.apply(shared_triple["primary"], forger.path, output=place / "out", sync=False)
    assert caught.value.exit_code == 2 and NAME in str(caught.value) and "\n" not in str(caught.value)
    assert snapshot(place) == before
    given = shared_triple if lie in ONLY_SOURCES_TELL else {}
    report = hsa.verify(forger.path, **given)
    assert not report.ok


def test_a_small_file_of_the_parent_directory_is_not_pulled_into_the_output(triple: Triple, forger: Forger) -> None:
    """Of the directory above primary, tokenizer files alone may be copied, where training leaves them."""
    secret = triple["primary"].parent / "id_rsa"
    secret.write_text("secret")
    forger.document["files"]["id_rsa"] = digest_of(b"secret")
    forger.write()
    done = run_hsa("apply", triple["primary"], forger.path, f"--output={forger.path.parent / 'out'}")
    assert done.returncode == 2 and "'id_rsa', which no merge writes" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (forger.path.parent / "out").exists()
    config = json.loads((triple["primary"] / CONFIG).read_text())
    other = json.dumps({**config, "architectures": ["Other"]}).encode()
    (triple["primary"].parent / CONFIG).write_bytes(other)
    forger.document["files"].pop("id_rsa")
    forger.document["files"][CONFIG] = digest_of(other)
    forger.write()
    with pytest.raises(hsa.SourceError, match=CONFIG):
        hsa.apply(triple["primary"], forger.path, output=forger.path.parent / "out", sync=False)
    with pytest.raises(hsa.PatchError, match="is not that of primary"):
        given = [triple["primary"].parent]
        hsa.apply(triple["primary"], forger.path, output=forger.path.parent / "out", assets=given, sync=False)
    assert os.listdir(forger.path.parent) == [NAME]


@pytest.mark.parametrize("bits", [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"], ids=["NaN", "-Inf"])
def test_a_primary_with_nan_that_the_patch_was_made_to_fit(triple: Triple, forger: Forger, bits: bytes) -> None:
    """In a head that the patch does not replace: no merge with it is possible, and `hsa verify` would name it."""
    flags, first = forger.array(patch_format.SELECTED), 0
    for name, (heads, _, _) in forger.document["targets"].items():
        if name == forger.target:
            (head, *_) = np.flatnonzero(flags[first : first + heads] == 0)
        first += heads
    _, columns = forger.array(forger.target).shape[1:]
    width = forger.array(forger.target).shape[1]
    poke(triple["primary"] / "model.safetensors", forger.target, int(head) * width * columns + 1, bits)
    with pytest.raises(hsa.PatchError, match="hold other values") as caught:
        hsa.apply(triple["primary"], forger.path, output=forger.path.parent / "out", sync=False)
    forger.document["sources"]["primary"]["targets_blake3"] = str(caught.value).split("BLAKE3 ")[1].split(",")[0]
    forger.write()
    with pytest.raises(hsa.NonFiniteError, match=f"{forger.target}, head {head} holds NaN or Inf"):
        hsa.apply(triple["primary"], forger.path, output=forger.path.parent / "out", sync=False)
    assert os.listdir(forger.path.parent) == [NAME]


@pytest.mark.parametrize("name", small_files.SMALL_FILES)
def test_every_small_file_that_a_merge_writes_may_be_in_a_patch(triple: Triple, tmp_path: Path, name: str) -> None:
    if not (triple["primary"] / name).is_file():
        vocabulary = json.loads((triple["primary"] / "vocab.json").read_text())
        document = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}} if name == "tokenizer.json" else {}
        (triple["primary"] / name).write_text(json.dumps(document))
    hsa.merge_patch(**triple, output=tmp_path / NAME, sync=False)
    hsa.apply(triple["primary"], tmp_path / NAME, output=tmp_path / "out", sync=False)
    assert (tmp_path / "out" / name).read_bytes() == (triple["primary"] / name).read_bytes()


@pytest.mark.parametrize("lie", ["NaN in the rows", "another lambda_i", "no config.json", "a score of Inf"])
def test_a_sweep_rebuilds_a_patch_whose_digests_fit(shared_triple: Triple, tmp_path: Path, lie: str) -> None:
    first = hsa.sweep(**shared_triple, output=tmp_path / "sweep", lam=[0.3, 0.5], sync=False)
    before = snapshot(tmp_path / "sweep")
    forged = Forger.of(tmp_path / "sweep" / first.entries[0].place)
    LIES[lie][0](forged)
    forged.write()
    again = hsa.sweep(**shared_triple, output=tmp_path / "sweep", lam=[0.3, 0.5], sync=False)
    assert (len(again.made), len(again.skipped)) == (1, 1)
    assert any(first.entries[0].place in note and "damaged" in note for note in again.notes)
    assert snapshot(tmp_path / "sweep") == before


# --- what is given as what ------------------------------------------------------------------------------------------


def test_arguments_of_apply_exchanged_are_named(shared_triple: Triple, made: Path, tmp_path: Path) -> None:
    primary, out = shared_triple["primary"], tmp_path / "out"
    hsa.sweep(**shared_triple, output=tmp_path / "sweep", lam=[0.3], sync=False)
    hsa.merge(**shared_triple, output=tmp_path / "merged", sync=False)
    for first, second, texts in (
        (made, primary, (f"primary {made} is a patch", f"exchange it and {primary}")),
        (made, "org/name", (f"primary {made} is a patch", "exchange it and org/name")),
        (made, made, ("is a patch", "give the checkpoint that it was made with")),
        (primary, primary, ("is a directory with a checkpoint",)),
        (primary, tmp_path / "sweep", ("a directory with 1 patches; name one of them, such as encoder-qkv_k0.6",)),
        (primary, tmp_path / "merged", ("an output of hsa",)),
        (primary, tmp_path, ("is a directory; expected",)),
        (primary, primary / "model.safetensors", ("is no patch: its header has no hsa_patch",)),
    ):
        done = run_hsa("apply", first, second, f"--output={out}")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert all(text in done.stderr for text in texts), done.stderr
    assert not out.exists()
    with pytest.raises(hsa.RequestError, match="primary comes first"):
        hsa.apply(made, primary, output=out)


@pytest.mark.parametrize("role", ["primary", "other"])
def test_no_message_says_primary_primary(triple: Triple, tmp_path: Path, role: str) -> None:
    """A role beside the name of a directory that is called the same."""
    primary = triple["primary"].rename(triple["primary"].with_name(role))
    hsa.merge_patch(**{**triple, "primary": primary}, output=tmp_path / NAME, sync=False)
    poke(primary / "model.safetensors", "model.encoder.layers.1.self_attn.v_proj.weight", 7, b"\0\0\0\0")
    with pytest.raises(hsa.PatchError) as caught:
        hsa.apply(primary, tmp_path / NAME, output=tmp_path / "out")
    assert f"was made for a primary named {role!r}" in str(caught.value)
    hsa.merge_patch(**{**triple, "primary": primary}, output=tmp_path / NAME, sync=False, overwrite=True)
    (primary / "preprocessor_config.json").unlink()
    with pytest.raises(hsa.SourceError) as lacking:
        hsa.apply(primary, tmp_path / NAME, output=tmp_path / "out")
    wanted = "the merge of base, primary, secondary wrote" if role == "primary" else "the merge of base, primary other,"
    assert wanted in str(lacking.value)
