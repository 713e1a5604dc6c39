"""What is named as a model: directories, patches, and directories that cannot transcribe, each refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import read_tensors, write_tensors
from speech_sets import write_ctc, write_set

import hsa
from hsa.errors import HsaError, RequestError, SourceError
from hsa.evaluation.decoding import load_recognizer
from hsa.evaluation.models import names_of, parse_model
from hsa.evaluation.options import DecodingOptions

Triple = dict[str, Path]
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("speech"), [0.4, 0.6])


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_patch_is_told_from_a_directory(tmp_path: Path) -> None:
    found = parse_model("m1+sweep/k0.6.safetensors")
    assert (found.source, found.patch) == ("m1", Path("sweep/k0.6.safetensors"))
    (tmp_path / "a+b.safetensors").mkdir()
    assert parse_model(tmp_path / "a+b.safetensors").patch is None
    assert parse_model("org/model").folder is None


@pytest.mark.parametrize(("model", "message"), [("", "empty path"), ("+p.safetensors", "names no primary")])
def test_what_names_no_model_is_refused(model: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_model(model)


def test_names_are_short_and_differ() -> None:
    def names(*models: str) -> list[str]:
        return names_of([parse_model(model) for model in models])

    assert names("/x/a", "/y/b") == ["a", "b"]
    assert names("/x/a", "/y/a") == ["x/a", "y/a"]
    assert names("m+s/p1.safetensors", "m+s/p2.safetensors") == ["m+p1", "m+p2"]
    assert names("/1/x/y/z/a", "/2/x/y/z/a") == ["/1/x/y/z/a", "/2/x/y/z/a"]


# --- hostile and broken directories -----------------------------------------------------------------------------------


def edit(name: str, **changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        document = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in {**document, **changes}.items() if value is not None}))

    return damage


def remove(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def without_a_tensor(folder: Path) -> None:
    tensors = read_tensors(folder)
    del tensors["model.decoder.layers.1.fc2.weight"]
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write_tensors(folder, tensors)


def names_code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")(folder)


HOSTILE: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), "config.json"),
    "no tokenizer": (remove("vocab.json"), r"has no tokenizer \(tokenizer.json or vocab.json\); copy the files"),
    "no extractor": (remove("preprocessor_config.json"), "has no feature extractor"),
    "a missing tensor": (without_a_tensor, "fc2.weight"),
    "a language model": (
        edit("config.json", architectures=["LlamaForCausalLM"]),
        "cannot transcribe: its config.json says 'LlamaForCausalLM'; expected a sequence-to-sequence speech model",
    ),
    "no architecture": (edit("config.json", architectures=None), "names no architectures"),
    "an unknown class": (edit("config.json", architectures=["NothingForCTC"]), "cannot transcribe: .*NothingForCTC"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{") and None, "config.json"),
    "a tokenizer that is none": (lambda folder: (folder / "vocab.json").write_text("[]") and None, "cannot transcribe"),
    "code of its own": (names_code, "cannot transcribe"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_directory_that_cannot_transcribe_is_refused_in_one_line(what: str, triple: Triple, table: Path) -> None:
    damage, message = HOSTILE[what]
    folder = triple["primary"]
    for generated in ("tokenizer.json",):
        (folder / generated).unlink(missing_ok=True)
    damage(folder)
    with pytest.raises(HsaError, match=message) as caught:
        hsa.evaluate(folder, table, device="cpu")
    assert isinstance(caught.value, SourceError)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert not (folder / "ran").exists()


def test_an_attention_from_the_hub_is_not_fetched(triple: Triple) -> None:
    edit("config.json", attn_implementation="nobody/nothing", _attn_implementation="nobody/nothing")(triple["primary"])
    recognizer = load_recognizer(triple["primary"], DecodingOptions(device="cpu"))
    assert recognizer.model.config._attn_implementation in ("sdpa", "eager")


def test_files_that_are_no_models_are_refused(shared_triple: Triple, table: Path, tmp_path: Path) -> None:
    patch = tmp_path / "p.safetensors"
    hsa.merge_patch(**shared_triple, output=patch, sync=False)
    with pytest.raises(RequestError, match=rf"{patch} is a patch; give PRIMARY\+{patch}"):
        hsa.evaluate(patch, table)
    with pytest.raises(RequestError, match="is a file; give a checkpoint directory"):
        hsa.evaluate(table, table)
    with pytest.raises(SourceError):
        hsa.evaluate(tmp_path / "nothing", table)


# --- digests ----------------------------------------------------------------------------------------------------------


def test_copies_share_a_digest_and_a_changed_byte_changes_it(
    shared_triple: Triple, table: Path, tmp_path: Path
) -> None:
    def digest(folder: Path) -> str:
        return hsa.evaluate(folder, table, device="cpu", limit=1).models[0].model.digest

    copy = Path(shutil.copytree(shared_triple["primary"], tmp_path / "copy"))
    (copy / "README.md").write_text("A note.")
    first = digest(shared_triple["primary"])
    assert digest(copy) == first
    edit("generation_config.json", suppress_tokens=[1])(copy)
    assert digest(copy) != first
    shutil.copyfile(shared_triple["primary"] / "generation_config.json", copy / "generation_config.json")
    assert digest(copy) == first
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert digest(copy) != first


def test_a_ctc_model_whose_processor_stands_in_one_file(tmp_path: Path, table: Path) -> None:
    folder = write_ctc(tmp_path / "model")
    names = {path.name for path in folder.iterdir()}
    assert names & {"preprocessor_config.json", "processor_config.json"}
    assert hsa.evaluate(folder, table, device="cpu").models[0].model.kind.head == "ctc"
