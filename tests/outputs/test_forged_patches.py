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
from hsa.sources import small_files
from hsa.sources.checkpoint import CONFIG
from hsa.system.digests import digest_of

Triple = dict[str, Path]
NAME = "p.safetensors"
TARGET = "model.encoder.layers.1.self_attn.v_proj.weight"
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


def decided(name: str, change: Callable[[Any], Any]) -> Callable[[Forger], None]:
    """What the decision for a target says under a key."""
    return lambda forged: forged.decision.update({name: change(forged.decision[name])})


def listed(**changes: Any) -> Callable[[Forger], None]:
    """What the document says of a target beside its decision."""
    return lambda forged: forged.entry.update(changes)


def files(**changes: str | None) -> Callable[[Forger], None]:
    def lie(forged: Forger) -> None:
        for name, digest in changes.items():
            forged.document["files"].pop(name, None)
            if digest is not None:
                forged.document["files"][name] = digest

    return lie


def other_heads(forged: Forger) -> None:
    """As many as were selected, so that the rows have the right shape."""
    others = [head for head in range(4) if head not in forged.decision["selected"]]
    forged.decision["selected"] = others[: len(forged.decision["selected"])]


def other_heads_and_rows(forged: Forger) -> None:
    """One head instead of another, and its rows made up."""
    other_heads(forged)
    forged.put(forged.target, forged.array(forged.target)[::-1].copy())


def one_head_less(forged: Forger) -> None:
    """A head and its rows left out of one target, where the selection says the same."""
    del forged.decision["selected"][0]
    forged.put(forged.target, forged.array(forged.target)[1:])


def one_head_less_to_keep(forged: Forger) -> None:
    """The same, where the number of heads to merge and the margin say so too."""
    last = min(forged.decision["selected"], key=lambda head: forged.decision["scores"][head])
    row = forged.decision["selected"].index(last)
    forged.decision["selected"].remove(last)
    forged.decision["keep"] -= 1
    forged.fit_margin()
    forged.put(forged.target, np.delete(forged.array(forged.target), row, axis=0))


def score(value: float) -> Callable[[Forger], None]:
    """The largest score of a target, on which the margin does not depend."""

    def lie(forged: Forger) -> None:
        scores = forged.decision["scores"]
        scores[scores.index(max(scores))] = value

    return lie


def twice_the_heads(forged: Forger) -> None:
    """Each head of a target given as two, in all that is said of it, and in its rows."""
    forged.entry["groups"] *= 2
    decision = forged.decision
    decision["scores"] = [score for score in decision["scores"] for _ in range(2)]
    decision["selected"] = [2 * head + half for head in decision["selected"] for half in range(2)]
    decision["keep"] *= 2
    rows = forged.array(forged.target)
    forged.put(forged.target, rows.reshape(2 * rows.shape[0], rows.shape[1] // 2, *rows.shape[2:]))


def a_target_less(forged: Forger) -> None:
    del forged.document["targets"][forged.target], forged.tensors[forged.target]


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
    forged.entry["dtype"] = "I32"


def fewer_columns(forged: Forger) -> None:
    fewer_columns_of_rows(forged)
    forged.entry["shape"][1] -= 1


def reference_script(forged: Forger) -> None:
    """A patch of a method that writes none."""
    forged.document["method"]["name"] = "hsa_script"
    forged.document["parameters"].update(numerics="reference", load_dtype="auto")


def fewer_columns_of_rows(forged: Forger) -> None:
    forged.put(forged.target, forged.array(forged.target)[:, :, 1:])


def key(name: str, value: Any) -> Callable[[Forger], None]:
    return lambda forged: forged.document.update({name: value})


def source(role: str, **changes: Any) -> Callable[[Forger], None]:
    return lambda forged: forged.document["sources"][role].update(changes)


ZEROS, FAR = "0" * 64, {"primary": 0.1, "secondary": 0.1}
LIES: dict[str, tuple[Callable[[Forger], Any], str]] = {
    "NaN in the rows": (element(NAN, 0), "head 0 hold NaN or Inf|head . hold NaN or Inf"),
    "Inf at the end of the rows": (element(INF, -1), "hold NaN or Inf"),
    "minus Inf in the rows": (element(-INF, 100), "hold NaN or Inf"),
    "another lambda_i": (decided("lambda_i", lambda c: c / 2), f"{TARGET} is .*the parameters give"),
    "lambda_i next to the right one": (decided("lambda_i", lambda c: math.nextafter(c, 0)), "the parameters give"),
    "one head more to select": (decided("keep", lambda keep: keep + 1), f"{TARGET} is .*the parameters give"),
    "one head less to select": (decided("keep", lambda keep: keep - 1), f"{TARGET} is .*the parameters give"),
    "twice the heads": (twice_the_heads, f"{TARGET} is listed with 8 heads; expected 4"),
    "the number of heads alone": (listed(groups=8), f"{TARGET}: 8 heads, 4 scores"),
    "groups that do not divide the shape": (listed(groups=5), f"{TARGET}: shape .* has no 5 groups along axis 0"),
    "no groups": (listed(groups=0), f"{TARGET}: shape .* has no 0 groups"),
    "another axis": (listed(axis=1), f"rows of {TARGET} have shape .* its decision gives"),
    "another shape": (listed(shape=[64, 32]), f"rows of {TARGET} have shape .* its decision gives"),
    "another dtype": (listed(dtype="F16"), "not those that its document promises"),
    "a decision without a key": (lambda forged: forged.decision.pop("margin"), "'margin' is missing"),
    "a decision without scores": (lambda forged: forged.decision.pop("scores"), "'scores' is missing"),
    "a target without a decision": (lambda forged: forged.entry.pop("decision"), "'decision' is missing"),
    "a decision with an unknown key": (lambda forged: forged.decision.update(note="x"), "not written as hsa writes it"),
    "a target with an unknown key": (listed(note="x"), "not written as hsa writes it"),
    "another method": (key("method", {"name": "hsa_script", "version": 1}), "must be one of reference, got 'exact'"),
    "an unknown method": (key("method", {"name": "soup", "version": 1}), "method is 'soup', which is none of"),
    "a later version of the method": (key("method", {"name": "hsa", "version": 2}), "by version 2 of method hsa"),
    "no version of the method": (key("method", {"name": "hsa", "version": 0}), "version 0"),
    "a later format": (key("format", 3), "format is 3, this version reads 1 and 2"),
    "format 1": (key("format", 1), "expected heads, heads to keep and lambda_i"),
    "another family": (key("architecture", "bert"), "architecture is 'bert', which is none of"),
    "another anchor": (key("anchor", "secondary"), "its anchor is 'secondary', expected primary"),
    "no base": (key("base", None), "and method hsa needs base"),
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
    "reference numerics": (parameter(numerics="reference", load_dtype="auto"), "of method hsa_script"),
    "the reference script": (reference_script, "computes every tensor"),
    "a load dtype": (parameter(load_dtype="auto"), "load_dtype"),
    "an unknown parameter": (parameter(note="x"), "'note' is none that hsa records"),
    "another backend": (parameter(backend="triton"), "made on the CPU"),
    "assets from nobody": (parameter(assets_from="../"), "assets_from must be one of"),
    "a shard size in words": (parameter(max_shard_size="5GB"), "max_shard_size"),
    "a shard size of nothing": (parameter(max_shard_size=0), "max_shard_size"),
    "an unknown card field": (parameter(card={"base_model": "x"}), "'base_model' is unknown"),
    "an empty card field": (parameter(card={"title": " "}), "card field title"),
    "other heads": (other_heads, f"{TARGET}: heads .* are not the 2 with the largest scores"),
    "other heads and their rows": (other_heads_and_rows, f"{TARGET}: heads .* are not the 2 with the largest scores"),
    "a head twice": (decided("selected", lambda heads: heads[:1] * 2), "selected heads .* do not fit"),
    "a head that is none": (decided("selected", lambda heads: [*heads[:-1], 4]), "selected heads .* do not fit"),
    "a head less": (one_head_less, f"{TARGET}: heads .* are not the 2 with the largest scores"),
    "a head less to keep": (one_head_less_to_keep, f"{TARGET} is listed with keep 1 .*the parameters give 2"),
    "a score less": (decided("scores", lambda scores: scores[1:]), "4 heads, 3 scores"),
    "another margin": (decided("margin", lambda margin: margin / 2), f"{TARGET}: margin .* is listed, the scores give"),
    "no margin": (decided("margin", lambda margin: None), f"{TARGET}: margin None is listed, the scores give"),
    "scores that give another margin": (decided("scores", lambda s: [x + 1 for x in s]), f"{TARGET}: margin .* listed"),
    "a negative score": (score(-1.0), f"{TARGET}: expected a number from 0 to 1e.150, found -1"),
    "a score of NaN": (score(NAN), "NaN"),
    "a score of Inf": (score(INF), "Infinity"),
    "a score that the record cannot hold": (score(1e300), "expected a number from 0 to 1e.150"),
    "a target less": (a_target_less, "are not listed"),
    "a target of another name": (renamed_target, "are not listed"),
    "integers": (type_of_integers, "dtype is 'I32'"),
    "fewer columns": (fewer_columns, f"{TARGET} is listed with shape .*64, 63"),
    "fewer columns of the rows alone": (fewer_columns_of_rows, f"rows of {TARGET} have shape .*63"),
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
    "distances of another stack": (key("distances", {"decoder": FAR, "all": FAR}), "its distances are of"),
    "distances below zero": (key("distances", {"encoder": {**FAR, "primary": -0.1}, "all": FAR}), "distances are"),
    "distances of one model": (key("distances", {"encoder": {"primary": 0.1}, "all": FAR}), "distances are"),
    "distances without roles": (key("distances", {"encoder": [0.1] * 2, "all": [0.1] * 2}), "distances"),
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
    head = min({0, 1, 2, 3} - set(forger.decision["selected"]))
    _, columns = forger.array(forger.target).shape[1:]
    width = forger.array(forger.target).shape[1]
    poke(triple["primary"] / "model.safetensors", forger.target, head * width * columns + 1, bits)
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
