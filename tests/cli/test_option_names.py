"""Messages name Python's arguments in Python, options on the command line, and keys in a YAML file."""

from __future__ import annotations

import ast
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors, write_tensors

import hsa
from hsa import option_names
from hsa.cli import app
from hsa.integrations import reference_script
from hsa.option_names import command_line, option, spelled
from hsa.reference import layer_coefficient

ROOT = Path(__file__).resolve().parents[2]
Triple = dict[str, Path]

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(hsa.HsaError) as caught:
        call()
    return str(caught.value)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error line of a command."""
    assert app.run(list(arguments)) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hsa: error: ")]
    return line.removeprefix("hsa: error: ")


def occupied(folder: Path) -> Path:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    return folder


Case = tuple[dict[str, Any], list[str], str, str]

CASES: dict[str, Case] = {
    "lambda": ({"lam": 2.0}, ["--lambda=2"], "lam must be in [0, 1]", "--lambda must be in [0, 1]"),
    "k": ({"k": -1.0}, ["--k=-1"], "k must be in [0, 100]", "--k must be in [0, 100]"),
    "scale": (
        {"non_attention_scale": float("inf")},
        ["--non-attention-scale=inf"],
        "non_attention_scale must be finite",
        "--non-attention-scale must be finite",
    ),
    "heads": (
        {"num_heads": 0},
        ["--num-heads=0"],
        "num_heads must be a whole number",
        "--num-heads must be a whole number",
    ),
    "threads": ({"threads": 0}, ["--threads=0"], "threads must be", "--threads must be"),
    "layers": ({"num_layers": 1}, ["--num-layers=1"], "has 1 layers by num_layers", "has 1 layers by --num-layers"),
    "shards": ({"max_shard_size": "many"}, ["--max-shard-size=many"], "max_shard_size must", "--max-shard-size must"),
    "assets": ({"assets_from": "me"}, ["--assets-from=me"], "assets_from must be one", "--assets-from must be one"),
    "id": ({"base_id": "a b"}, ["--base-id=a b"], "base_id must be a hub id", "--base-id must be a hub id"),
    "loader": (
        {"load_dtype": "float32"},
        ["--load-dtype=float32"],
        "add numerics='reference', or use dtype for the output",
        "add --numerics reference, or use --dtype for the output",
    ),
    "device": (
        {"backend": "cpu", "device": "cuda"},
        ["--backend=cpu", "--device=cuda"],
        "use backend='triton' or auto",
        "use --backend triton or auto",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_error_names_what_the_caller_can_write(
    case: Case, shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, options, in_python, on_the_command_line = case
    output = tmp_path / "out"
    message = refused(lambda: hsa.merge(**shared_triple, output=output, **arguments))
    assert in_python in message
    assert not FLAG.search(message)
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    assert on_the_command_line in said(capsys, "merge", *sources, f"--output={output}", *options)
    assert not output.exists()


def test_an_occupied_destination_asks_for_overwrite_as_it_is_written_there(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = occupied(tmp_path / "out")
    message = refused(lambda: hsa.merge(**shared_triple, output=output))
    assert "give overwrite=True to replace" in message
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    assert "give --overwrite to replace" in said(capsys, "merge", *sources, f"--output={output}")
    patch = tmp_path / "p.safetensors"
    hsa.merge_patch(**shared_triple, output=patch)
    assert "or give overwrite=True" in refused(lambda: hsa.merge_patch(**shared_triple, output=patch))
    more = [f"--output={patch}", "--patch"]
    assert "or give --overwrite" in said(capsys, "merge", *sources, *more)
    more += ["--device=cuda"]
    assert "leave --backend and --device out" in said(capsys, "merge", *sources, *more)


def test_a_worker_thread_spells_options_as_its_caller_does(
    tmp_path: Path, triple: Triple, capsys: pytest.CaptureFixture[str]
) -> None:
    """The overflow is found in a thread that the merge started."""
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    for role, path in triple.items():
        tensors = {key: value.to(torch.float16) for key, value in read_tensors(path).items()}
        tensors[name] = torch.full_like(tensors[name], -60000.0 if role == "base" else 60000.0)
        write_tensors(path, tensors)
    assert 0 < layer_coefficient(0.5, 0.2, 0, 1) < 1
    output = tmp_path / "out"
    wider = {"attention_scale": 1.5}
    message = refused(lambda: hsa.merge(**triple, output=output, **wider))
    assert message.endswith("compute in a wider type (dtype='float32' or bfloat16)")
    sources = [f"--{role}={path}" for role, path in triple.items()]
    line = said(capsys, "merge", *sources, f"--output={output}", "--attention-scale=1.5")
    assert line.endswith("compute in a wider type (--dtype float32 or bfloat16)")


def test_a_command_in_one_thread_leaves_the_errors_of_another_in_python() -> None:
    inside, outside = threading.Event(), threading.Event()
    found: list[str] = []

    def command() -> None:
        with spelled(command_line):
            inside.set()
            outside.wait(10)
            found.append(option("overwrite", True))

    thread = threading.Thread(target=command)
    thread.start()
    assert inside.wait(10)
    assert option("overwrite", True) == "overwrite=True"
    outside.set()
    thread.join()
    assert found == ["--overwrite"]
    assert option("sync", False) == "sync=False"


def test_a_note_names_what_the_caller_can_write(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hsa.merge(**shared_triple, output=tmp_path / "out", digest=False, sync=False)
    assert any("give the sources to compare" in note for note in hsa.verify(tmp_path / "out").notes)
    assert app.run(["verify", str(tmp_path / "out")]) == 0
    assert "give --sources to compare" in capsys.readouterr().err


def test_a_recipe_names_its_keys_and_the_commands_own_options(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [f"    {role}: {path}" for role, path in shared_triple.items()]
    start = ["merges:", "  - name: a", "    group: g"]
    recipe.write_text("\n".join([*start, *lines, "    load_dtype: float32", "    lambda: 2"]), encoding="utf-8")
    for call in (
        lambda: refused(lambda: hsa.release(recipe, tmp_path / "tree")),
        lambda: said(capsys, "release", str(recipe), f"--output={tmp_path / 'tree'}"),
    ):
        assert f"{recipe}:8: merge 'a': lambda must be in [0, 1]" in call()
    recipe.write_text("\n".join([*start, *lines, "    load_dtype: float32"]), encoding="utf-8")
    line = said(capsys, "release", str(recipe), f"--output={tmp_path / 'tree'}")
    assert "add numerics: reference, or use dtype for the output" in line
    recipe.write_text("\n".join([*start, *lines]), encoding="utf-8")
    line = said(capsys, "release", str(recipe), f"--output={tmp_path / 'tree'}", "--threads=0")
    assert "--threads must be a whole number" in line
    assert "threads must be a whole number" in refused(lambda: hsa.release(recipe, tmp_path / "tree", threads=0))


def test_the_reference_scripts_command_line_names_its_own_options(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roles = {"base": "--pretrained-model", "primary": "--model1", "secondary": "--model2"}
    arguments = [f"{roles[role]}={path}" for role, path in shared_triple.items()] + [f"--out-path={tmp_path / 'out'}"]
    for more, expected in (
        (["--k-percent=-1"], "--k-percent must be in [0, 100]"),
        (["--num-encoder-layers=0"], "--num-encoder-layers must be a whole number"),
        (["--numerics=exact", "--load-dtype=float32"], "or use hsa merge's --dtype for the output"),
    ):
        assert reference_script.run([*arguments, *more]) == 2
        assert expected in capsys.readouterr().err
    known = {flag for action in reference_script.parser()._actions for flag in action.option_strings}
    assert set(reference_script.OPTIONS.values()) <= known


def known_options() -> set[str]:
    group = app.program()
    return {flag for command in group.commands.values() for parameter in command.params for flag in parameter.opts}


def test_the_command_line_knows_every_option_that_a_message_names() -> None:
    """Each `option("name")` of the library is an option of some command; a mistyped one would be shown to users."""
    named = set()
    for path in library():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "option":
                argument = node.args[0]
                if isinstance(argument, ast.Constant):
                    named.add(str(argument.value))
    assert {"overwrite", "threads", "dtype", "sources"} <= named
    assert {name for name in named if command_line(name) not in known_options()} == set()


OWN_COMMAND_LINES = {
    "hsa/testing/demo.py": "shows a command to type",
    "hsa/integrations/reference_script.py": "a command line with options of its own",
    "hsa/option_names.py": "the spellings",
    "hsa/views/table.py": "what hsa inspect prints",
}
"""Modules besides hsa/cli whose texts hold options as they are typed, and why."""


def library() -> list[Path]:
    paths = sorted((ROOT / "hsa").rglob("*.py"))
    return [
        path
        for path in paths
        if (name := path.relative_to(ROOT).as_posix()) not in OWN_COMMAND_LINES and not name.startswith("hsa/cli/")
    ]


def test_no_message_of_the_library_spells_an_option_itself() -> None:
    """Options of other programs, such as those of git, may be spelled."""
    wrong, own = [], known_options()
    for path in library():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bodies = (node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list))
        documentation = {
            id(statement.value) for body in bodies for statement in body if isinstance(statement, ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                wrong += [f"{path.name}:{node.lineno} has {flag}" for flag in FLAG.findall(node.value) if flag in own]
    assert wrong == [], "name it with hsa.option_names.option"


def test_a_value_and_a_switch_read_as_they_are_written() -> None:
    assert (option("dtype", "float32"), option("threads", 1), option("lam")) == ("dtype='float32'", "threads=1", "lam")
    with spelled(command_line):
        assert (option("dtype", "float32"), option("lam")) == ("--dtype float32", "--lambda")
        assert (option("digest", False), option("energy", False)) == ("--no-hash", "--no-energy")
        with spelled(option_names.as_keys({"lambda", "dtype"})):
            assert (option("lam"), option("dtype", "float32"), option("threads")) == (
                "lambda",
                "dtype: float32",
                "--threads",
            )
        assert option("lam") == "--lambda"
    assert option("lam") == "lam"
