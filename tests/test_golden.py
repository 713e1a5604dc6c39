"""Golden digests: what a merge writes stays the same, byte for byte, while the code behind it changes.

`tests/golden/digests.json` holds SHA-256 digests of the outputs of many configurations: every weights file whole,
config.json and every other small file, the rows of patches, and the selected heads with their scores. It leaves out
what describes a run and may change with its format: hsa_merge.json, the card (README.md), the header of a patch, and
the index of a sweep or a release. The digests of the inputs are listed too, so that a change of the synthetic models is
told from a change of the merge.

Where a test fails, the merge writes other bytes than it did. That is a defect, unless the change is meant: then say so
in the changelog, and write the data file again by

    python tests/test_golden.py

The digests hold on every machine. Exact numerics promise their bits. Reference numerics are elementwise operations of
torch, which IEEE 754 determines, after a selection of heads; only the sums behind the scores depend, in their last
bits, on how wide a CPU's vectors are. So no scores of reference numerics are listed, and those of the synthetic models
lie too far apart for the selection to depend on these bits. (The file came out the same with numpy's and torch's vector
instructions on and off.) Whether reference numerics are the reference script's is what test_reference.py tests, against
the oracle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import edit_json, read_safetensors, read_tensors, write_adapter, write_openai, write_pickle
from safetensors.numpy import load_file, save_file

import hsa
from hsa.testing.whisper_checkpoints import WhisperShape, write_checkpoint, write_triple

DATA = Path(__file__).resolve().parent / "golden" / "digests.json"
REWRITE = "if the change is meant, write tests/golden/digests.json again by `python tests/test_golden.py`"
DESCRIBING = {"hsa_merge.json", "README.md", "index.json", "index.csv"}
"""Files that describe how an output was made. They are not covered."""

SHAPE = WhisperShape(
    d_model=32,
    encoder_layers=3,
    decoder_layers=2,
    encoder_heads=4,
    decoder_heads=8,
    ffn_dim=48,
    vocab_size=268,
    num_mel_bins=16,
    max_source_positions=50,
    max_target_positions=16,
)
SEED = 20260
DELTA = 0.03
"""Of the fine-tunes: so large that `M1 - B` rounds."""
ENCODER_QKV = [
    f"model.encoder.layers.{layer}.self_attn.{name}"
    for layer in range(SHAPE.encoder_layers)
    for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias")
]
PER_TENSOR = {name: [0.25, 0.5, 0.75, 1.0][place % 4] for place, name in enumerate(ENCODER_QKV)}

Digests = dict[str, str]
Triple = dict[str, Path]


@dataclass(frozen=True)
class Case:
    """A merge: which inputs (see `write_inputs`), and its parameters."""

    inputs: str = "float32"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return self.parameters.get("numerics") != "reference"


def case(inputs: str = "float32", **parameters: Any) -> Case:
    return Case(inputs, parameters)


CASES: dict[str, Case] = {
    "encoder-qkv": case(),
    "attention-qkv": case(targets="attention-qkv"),
    "attention-all": case(targets="attention-all"),
    "k 0": case(k=0),
    "k 0.25": case(k=0.25),
    "k 0.375 attention-all": case(k=0.375, targets="attention-all"),
    "k 1": case(k=1.0),
    "k 75 percent": case(k=75),
    "k 100 percent": case(k=100),
    "lambda 0": case(lam=0.0),
    "lambda 1": case(lam=1.0),
    "lambda 0.1 alpha 1": case(lam=0.1, alpha=1.0),
    "lambda 0.3 alpha 0": case(lam=0.3, alpha=0.0),
    "lambda 0.9 alpha 3 attention-all": case(lam=0.9, alpha=3.0, targets="attention-all"),
    "per tensor": case(k=PER_TENSOR, lam={name: 1 - 0.9 * k for name, k in PER_TENSOR.items()}, alpha=0.7),
    "2 heads": case(num_heads=2, targets="attention-all"),
    "7 layers": case(num_layers=7, targets="attention-all"),
    "attention scale": case(attention_scale=0.5, targets="attention-qkv"),
    "attention scale, negative": case(attention_scale=-1.75),
    "non-attention scale": case(non_attention_scale=1.25),
    "both scales and float16": case(attention_scale=0.8, non_attention_scale=0.3, dtype="float16"),
    "to float16": case(dtype="float16"),
    "to bfloat16": case(dtype="bfloat16", targets="attention-all"),
    "float16": case("float16", targets="attention-all"),
    "bfloat16": case("bfloat16", targets="attention-all"),
    "bfloat16 to float32": case("bfloat16", dtype="float32"),
    "mixed element types": case("mixed", targets="attention-all"),
    "mixed element types to float32": case("mixed", dtype="float32", non_attention_scale=0.5),
    "shards": case("shards", targets="attention-all"),
    "shards to one file": case("shards", max_shard_size="1GB"),
    "one file to shards": case(max_shard_size="30KB", targets="attention-all"),
    "assets from secondary": case(assets_from="secondary"),
    "assets from base": case(assets_from="base"),
    "pickled": case("pickled", targets="attention-all"),
    "OpenAI's file": case("openai", targets="attention-qkv"),
    "adapter": case("adapter", targets="attention-all"),
    "reference": case(numerics="reference"),
    "reference attention-all": case(numerics="reference", targets="attention-all", k=0.25, lam=0.3, alpha=1.0),
    "reference k 100 percent": case(numerics="reference", k=100),
    "reference scales": case(numerics="reference", attention_scale=0.8, non_attention_scale=1.25),
    "reference float16": case("float16", numerics="reference", targets="attention-all"),
    "reference bfloat16": case("bfloat16", numerics="reference", targets="attention-all", non_attention_scale=0.5),
    "reference mixed element types": case("mixed", numerics="reference"),
    "reference bfloat16, loaded as float32": case("bfloat16", numerics="reference", load_dtype="float32"),
}
ALIKE: list[set[str]] = [
    {"attention-qkv", "OpenAI's file"},
    {"attention-all", "pickled"},
    {"k 1", "k 100 percent"},
    {"lambda 1", "lambda 0.3 alpha 0"},
    {"bfloat16 to float32", "reference bfloat16, loaded as float32"},
]
"""The cases that must give the same files; all others must not."""

PATCHES = (
    "encoder-qkv",
    "attention-all",
    "k 0",
    "k 0.25",
    "k 100 percent",
    "lambda 0.1 alpha 1",
    "per tensor",
    "2 heads",
    "float16",
    "bfloat16",
    "mixed element types",
    "shards",
    "assets from secondary",
)
"""The cases of which a patch is made and applied too."""

GRID: dict[str, Any] = {
    "k": (0.25, 60),
    "lam": (0.1, 0.5),
    "alpha": (1.0,),
    "targets": ("encoder-qkv", "attention-all"),
}
RECIPE = """\
title: Golden
defaults:
  group: first
  base: {inputs}/float32/base
  primary: {inputs}/float32/primary
  secondary: {inputs}/float32/secondary
  lambda: 0.3
merges:
  - name: plain
  - name: cast
    k: 25
    dtype: bfloat16
    max_shard_size: 30KB
  - name: mixed
    group: second
    primary: {inputs}/mixed/primary
    secondary: {inputs}/mixed/secondary
    targets: attention-all
    alpha: 1
    lambda: null
"""


# --- the inputs -------------------------------------------------------------------------------------------------------


def write_inputs(folder: Path) -> dict[str, Triple]:
    """Every triple of sources by name. The numbers come from the raw output of a bit generator, which numpy keeps."""
    found = {
        dtype: write_triple(folder / dtype, SHAPE, dtype=dtype, seed=SEED, delta=DELTA)
        for dtype in ("float16", "bfloat16")
    }
    plain = found["float32"] = write_triple(folder / "float32", SHAPE, seed=SEED, delta=DELTA)
    _flip_last_bits(plain["primary"] / "model.safetensors")
    edit_json(plain["base"] / "normalizer.json", word="base")
    edit_json(plain["secondary"] / "normalizer.json", word="secondary")
    edit_json(plain["primary"] / "generation_config.json", max_length=12)
    mixed: Triple = {}
    for role, dtype in (("base", "float32"), ("primary", "bfloat16"), ("secondary", "float16")):
        shards = 40_000 if role == "primary" else None
        options: dict[str, Any] = {"dtype": dtype, "role": role, "seed": SEED, "delta": DELTA}
        mixed[role] = write_checkpoint(folder / "mixed" / role, SHAPE, max_shard_bytes=shards, **options)
    found["mixed"] = mixed
    found["shards"] = write_triple(folder / "shards", SHAPE, seed=SEED + 1, max_shard_bytes=50_000, prefix="")
    found["pickled"] = dict(plain)
    for role in ("primary", "secondary"):
        copy = Path(shutil.copytree(plain[role], folder / "pickled" / role))
        write_pickle(copy, read_tensors(plain[role]), shards=2 if role == "secondary" else 1)
        found["pickled"][role] = copy
    found["openai"] = {
        "base": write_openai(folder / "openai" / "base.pt", plain["base"]),
        "primary": plain["primary"],
        "secondary": write_openai(folder / "openai" / "secondary.pt", plain["secondary"]),
    }
    adapter = folder / "adapter" / "primary"
    _write_adapter(adapter, {name: tensor for name, tensor in read_tensors(plain["base"]).items() if _adapted(name)})
    found["adapter"] = {**plain, "primary": adapter}
    return found


def _flip_last_bits(file: Path) -> None:
    """Change the last bit of each float32: where `M1` is a rounded `B + delta`, `B + (M1 - B)` always gives `M1`."""
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    numbers = np.frombuffer(raw, np.uint32, offset=start)
    numbers ^= 1
    file.write_bytes(raw)


def _adapted(name: str) -> bool:
    return name.endswith(("q_proj.weight", "v_proj.weight", "fc1.weight"))


def _write_adapter(directory: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """A LoRA adapter whose numbers do not come from torch, which may draw others in another version."""
    write_adapter(directory, weights)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    numbers = np.random.SFC64(SEED)
    for name, tensor in sorted(tensors.items()):
        raw = numbers.random_raw(tensor.size).view(np.int64).astype(np.float32)
        tensors[name] = (raw * np.float32(0.02 / 2**63)).reshape(tensor.shape)
    save_file(tensors, file, metadata={"format": "pt"})


def inputs_digests(folder: Path) -> Digests:
    """The digests of all inputs. Files that another library writes are left out, but for the numbers in an adapter."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.split("/")[0] not in ("pickled", "openai", "adapter"):
            found[name] = sha256(path.read_bytes())
    tensors = load_file(folder / "adapter" / "primary" / "adapter_model.safetensors")
    found["adapter"] = sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors)))
    return found


# --- digests of what is written ---------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def output_digests(output: Path) -> Digests:
    """Every file of an output that does not describe how it was made."""
    return {path.name: sha256(path.read_bytes()) for path in sorted(output.iterdir()) if path.name not in DESCRIBING}


def rows_digests(patch: Path) -> Digests:
    """The rows of each target in a patch: element type, shape and bytes, without header and scores."""
    header, data = read_safetensors(patch)
    found = {}
    for name, entry in sorted(header.items()):
        if not name.startswith(("__", "hsa.")):
            start, stop = entry["data_offsets"]
            found[name] = sha256(json.dumps([entry["dtype"], entry["shape"]]).encode() + data[start:stop])
    return found


def folded(digests: Mapping[str, str]) -> str:
    """One digest of many."""
    return sha256(json.dumps(digests, sort_keys=True).encode())


def heads_digest(report: hsa.MergeReport, *, exact: bool) -> str:
    """The heads selected in each tensor, and where they are exact their scores, margins and coefficients."""
    heads = {
        name: [
            list(tensor.selected),
            *([[score.hex() for score in tensor.scores], _hex(tensor.margin), tensor.coefficient] if exact else []),
        ]
        for name, tensor in report.tensors.items()
    }
    return sha256(json.dumps(heads, sort_keys=True).encode())


def _hex(number: float | None) -> str | None:
    return None if number is None else number.hex()


# --- what is made, by the name it has in the data file ----------------------------------------------------------------


@dataclass
class Workplace:
    """The inputs, and a folder to write into; `made` numbers what was written."""

    folder: Path
    triples: dict[str, Triple]
    made: int = 0

    def place(self) -> Path:
        self.made += 1
        return self.folder / f"made-{self.made}"


def do_merge(work: Workplace, name: str) -> dict[str, Any]:
    chosen = CASES[name]
    output = work.place()
    report = hsa.merge(**work.triples[chosen.inputs], output=output, sync=False, **chosen.parameters)
    return {"files": output_digests(output), "heads": heads_digest(report, exact=chosen.exact)}


def do_patch(work: Workplace, name: str) -> str:
    chosen = CASES[name]
    patch = work.place().with_suffix(".safetensors")
    hsa.merge_patch(**work.triples[chosen.inputs], output=patch, sync=False, **chosen.parameters)
    return folded(rows_digests(patch))


def do_apply(work: Workplace, name: str) -> Digests:
    """The files of a patch that is applied: those of the merge."""
    chosen = CASES[name]
    triple, output = work.triples[chosen.inputs], work.place()
    patch = output.with_suffix(".safetensors")
    hsa.merge_patch(**triple, output=patch, sync=False, **chosen.parameters)
    elsewhere = chosen.parameters.get("assets_from")
    assets = [triple[elsewhere]] if elsewhere else []
    hsa.apply(triple["primary"], patch, output=output, assets=assets, sync=False)
    return output_digests(output)


def do_sweep(work: Workplace) -> Digests:
    output = work.place()
    hsa.sweep(**work.triples["float32"], output=output, sync=False, **GRID)
    return {path.stem: folded(rows_digests(path)) for path in sorted(output.glob("*.safetensors"))}


def do_full_sweep(work: Workplace) -> Digests:
    output = work.place()
    hsa.sweep(**work.triples["float32"], output=output, sync=False, full=True, **GRID)
    return {path.name: folded(output_digests(path)) for path in sorted(output.iterdir()) if path.is_dir()}


def do_release(work: Workplace) -> Digests:
    output = work.place()
    recipe = work.folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(inputs=work.folder / "inputs"), encoding="utf-8")
    assert hsa.release(recipe, output, sync=False).ok
    return {
        path.relative_to(output).as_posix(): sha256(path.read_bytes())
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in DESCRIBING
    }


TREES: dict[str, Callable[[Workplace], Digests]] = {
    "sweep": do_sweep,
    "full sweep": do_full_sweep,
    "release": do_release,
}


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("golden")
    yield Workplace(folder, write_inputs(folder / "inputs"))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


def compare(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """AssertionError that names what differs."""
    differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    assert differing == [], f"{what}: {', '.join(differing[:8])} differ from the golden digests; {REWRITE}"


def test_the_inputs_are_those_of_the_golden_digests(work: Workplace, golden: dict[str, Any]) -> None:
    """Where this fails with the others, the synthetic models changed, not the merge."""
    compare(inputs_digests(work.folder / "inputs"), golden["inputs"], "inputs")


def test_the_golden_digests_are_those_of_these_cases(golden: dict[str, Any]) -> None:
    assert list(golden["merges"]) == list(CASES), REWRITE
    assert list(golden["patches"]) == list(PATCHES), REWRITE
    assert list(golden["trees"]) == list(TREES), REWRITE
    alike: dict[str, set[str]] = {}
    for name, entry in golden["merges"].items():
        alike.setdefault(folded(entry["files"]), set()).add(name)
    assert [names for names in alike.values() if len(names) > 1] == ALIKE


@pytest.mark.parametrize("name", CASES)
def test_a_merge(name: str, work: Workplace, golden: dict[str, Any]) -> None:
    found, expected = do_merge(work, name), golden["merges"][name]
    compare(found["files"], expected["files"], name)
    assert found["heads"] == expected["heads"], f"{name}: heads or scores differ from the golden digests; {REWRITE}"


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch(name: str, work: Workplace, golden: dict[str, Any]) -> None:
    assert do_patch(work, name) == golden["patches"][name], f"{name}: rows differ from the golden digests; {REWRITE}"
    compare(do_apply(work, name), golden["merges"][name]["files"], f"{name}, applied")


@pytest.mark.parametrize("name", TREES)
def test_a_tree(name: str, work: Workplace, golden: dict[str, Any]) -> None:
    compare(TREES[name](work), golden["trees"][name], name)


def test_a_changed_byte_is_found(work: Workplace, golden: dict[str, Any]) -> None:
    output = work.place()
    hsa.merge(**work.triples["float32"], output=output, sync=False)
    raw = bytearray((output / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (output / "model.safetensors").write_bytes(raw)
    with pytest.raises(AssertionError, match=r"encoder-qkv: model\.safetensors differ"):
        compare(output_digests(output), golden["merges"]["encoder-qkv"]["files"], "encoder-qkv")


def write_golden() -> None:
    """Write the data file again, from what the present code gives."""
    with tempfile.TemporaryDirectory(prefix="hsa-golden-") as folder:
        work = Workplace(Path(folder), write_inputs(Path(folder) / "inputs"))
        document = {
            "about": "SHA-256 digests of what hsa writes; see tests/test_golden.py, which also writes this file",
            "inputs": inputs_digests(work.folder / "inputs"),
            "merges": {name: do_merge(work, name) for name in CASES},
            "patches": {name: do_patch(work, name) for name in PATCHES},
            "trees": {name: do(work) for name, do in TREES.items()},
        }
    DATA.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{DATA} written", file=sys.stderr)


if __name__ == "__main__":
    write_golden()
