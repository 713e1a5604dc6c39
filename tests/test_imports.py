"""What is imported when, and which way the arrows between modules point."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import merge_arguments

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "triton", "transformers", "huggingface_hub", "mergekit", "matplotlib", "ray")

ARROWS = {
    "errors": (),
    "option_names": (),
    "findings": (),
    "arguments": ("errors", "option_names"),
    "system": ("errors", "option_names"),
    "architectures": ("errors", "system"),
    "sources": ("errors", "option_names", "architectures", "system"),
    "methods": ("errors", "option_names", "arguments", "findings", "architectures", "system"),
    "planning": ("methods", "sources"),
    "backends": ("planning",),
    "outputs": ("planning",),
    "engine": ("outputs", "backends"),
    "actions": ("engine", "arguments"),
    "verification": ("actions",),
    "sweeps": ("evaluation",),
    "releases": ("verification",),
    "evaluation": ("views",),
    "searches": ("evaluation",),
    "inspection": ("verification",),
    "integrations": ("verification",),
    "views": ("inspection",),
    "testing": ("reference", "verification"),
    "cli": ("sweeps", "releases", "integrations", "testing", "searches"),
    "__main__": ("cli",),
    "reference": (),
    "_version": (),
}
"""The packages of hsa, and the modules beside them: each imports from those named, from what these import from, from
itself, and from nothing else. `_version` is open to all, and `kernels` to `backends` alone."""

AT_IMPORT = {
    "torch": {
        *(f"hsa.reference.{path.stem}" for path in (ROOT / "hsa" / "reference").glob("[a-z]*.py")),
        "hsa.backends.torch_cpu",
        "hsa.backends.torch_geometry",
        "hsa.backends.resident",
        "hsa.backends.triton",
        "hsa.actions.merger.writable_targets",
        "hsa.actions.merger.loaded_models",
        "hsa.actions.merger.places",
        "hsa.actions.merger.merger",
        "hsa.actions.merger.read_sources",
        "hsa.actions.merger.spot_check",
        "hsa.actions.merger.shared_memory",
        "hsa.actions.merger.already_merged",
        "hsa.searches.resident_model",
        "hsa.integrations.transformers",
    }
}
"""Which modules may import a heavy library when they are imported themselves; no merge in exact numerics does."""

ANYWHERE = {
    "torch": {
        *AT_IMPORT["torch"],
        "hsa.testing.demo",
        "hsa.testing.conformance",
        "hsa.testing.drawn_models",
        "hsa.backends.choose",
        "hsa.sources.peft_adapter",
        "hsa.integrations.mergekit_method",
        "hsa.evaluation.decoding",
        "hsa.evaluation.encoders",
        "hsa.evaluation.recognizers",
        "hsa.evaluation.speculative",
        "hsa.evaluation.transformers_calls",
        "hsa.searches.encoder_states",
        "hsa.searches.own_models",
        "hsa.searches.setups",
    },
    "triton": {"hsa.backends.triton"},
    "transformers": {
        "hsa.testing.demo",
        "hsa.sources.peft_adapter",
        "hsa.evaluation.normalizers",
        "hsa.evaluation.decoding",
        "hsa.evaluation.model_kinds",
        "hsa.evaluation.recognizers",
        "hsa.evaluation.speculative",
        "hsa.evaluation.transformers_calls",
        "hsa.searches.own_models",
    },
    "huggingface_hub": {
        "hsa.sources.hub.range_requests",
        "hsa.sources.hub.client",
        "hsa.sources.hub.downloads",
        "hsa.sources.hub.weight_ranges",
        "hsa.sources.hub.errors",
        "hsa.sources.hub.repository",
    },
    "mergekit": {
        "hsa.integrations.mergekit",
        "hsa.integrations.mergekit_method",
        "hsa.integrations.mergekit_recipe",
    },
    "matplotlib": {"hsa.views.picture"},
    "ray": {"hsa.system.ray_cluster"},
    "hsa.reference": {"hsa.reference", "hsa.reference.linear_combinations", "hsa.testing.demo"},
    "hsa.kernels": {"hsa.backends.triton"},
}
"""Which modules may import these at all, inside a function included."""


# --- fresh processes ------------------------------------------------------------------------------------------


def fresh(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def loaded_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh process that ran `code`."""
    done = fresh(f"{code}\nimport json, sys\nprint(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_probe_sees_what_is_imported() -> None:
    assert "numpy" in loaded_after("import numpy")
    assert "torch" in loaded_after("import hsa.reference")


def test_import_hsa_is_light() -> None:
    assert not loaded_after("import hsa") & {*HEAVY, "numpy", "typer", "safetensors"}


def test_the_api_is_light() -> None:
    assert not loaded_after("import hsa; hsa.merge; hsa.HsaSettings; hsa.MergeReport") & set(HEAVY)


def test_every_public_name_resolves() -> None:
    done = fresh(
        "import hsa\n"
        "for name in hsa.__all__: getattr(hsa, name)\n"
        "assert set(hsa.__all__) <= set(dir(hsa))\n"
        "for name in ('nothing', '__wrapped__'):\n"
        "    assert not hasattr(hsa, name)\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["merge", "--help"],
        ["inspect", "--help"],
        ["mergekit", "--help"],
        ["release", "--help"],
        ["sweep", "--help"],
        ["search", "--help"],
        ["apply", "--help"],
        ["verify", "--help"],
        ["help", "merge"],
        ["--version"],
        [],
    ],
    ids=" ".join,
)
def test_help_needs_neither_torch_nor_numpy(arguments: list[str]) -> None:
    done = fresh(
        "import sys\nfrom hsa.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code or 0\n"
        "found = sorted({n.partition('.')[0] for n in sys.modules})\n"
        "import json; print(); print(json.dumps([code, found]))\n",
        *arguments,
    )
    assert done.returncode == 0, done.stderr
    code, found = json.loads(done.stdout.splitlines()[-1])
    assert code == (0 if arguments else 2)
    assert "typer" in found
    assert not set(found) & {*HEAVY, "numpy", "safetensors", "blake3", "rich"}
    assert len(done.stdout) > len("0.1.0")


WATCHED_MERGE = """
import json, os, sys
from pathlib import Path
seen = {}
busy = False
HEAVY = ("torch", "triton", "transformers", "huggingface_hub", "safetensors")

def hook(event, arguments):
    global busy
    if busy or event != "open":
        return
    busy = True
    try:
        if isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, flags = Path(os.fsdecode(arguments[0])), arguments[2]
            if path.suffix == ".safetensors" and flags & os.O_CREAT and "first" not in seen:
                seen["first"] = [name for name in HEAVY if name in sys.modules]
    finally:
        busy = False

sys.addaudithook(hook)
from hsa.cli.app import run
code = run(sys.argv[1:-1])
print(json.dumps({"code": code, "seen": seen, "end": [name for name in HEAVY if name in sys.modules]}))
"""


@pytest.mark.parametrize("more", [[], ["--dtype=float16", "--max-shard-size=50KB"]], ids=["patch", "rewrite"])
def test_an_exact_merge_of_directories_needs_no_heavy_library(
    shared_triple: dict[str, Path], more: list[str], tmp_path: Path
) -> None:
    arguments = merge_arguments(shared_triple, tmp_path / "out", "--quiet", "--no-sync", *more)
    done = fresh(WATCHED_MERGE, *arguments, str(tmp_path))
    assert done.returncode == 0, done.stderr
    watched = json.loads(done.stdout.splitlines()[-1])
    assert watched["code"] == 0
    assert watched["seen"]["first"] == watched["end"] == []


def test_reference_numerics_need_torch_and_not_transformers(shared_triple: dict[str, Path], tmp_path: Path) -> None:
    arguments = merge_arguments(shared_triple, tmp_path / "out", "--quiet", "--no-sync", "--numerics=reference")
    done = fresh(WATCHED_MERGE, *arguments, str(tmp_path))
    assert done.returncode == 0, done.stderr
    watched = json.loads(done.stdout.splitlines()[-1])
    assert watched["seen"]["first"] == ["torch"]
    assert "transformers" not in watched["end"]


def test_a_refused_merge_and_a_dry_run_need_no_heavy_library(shared_triple: dict[str, Path], tmp_path: Path) -> None:
    for more in (["--dry-run"], ["--k=-1"]):
        done = fresh(WATCHED_MERGE, *merge_arguments(shared_triple, tmp_path / "out", "--quiet", *more), str(tmp_path))
        watched = json.loads(done.stdout.splitlines()[-1])
        assert watched["end"] == []
        assert watched["code"] == (2 if "--k=-1" in more else 0)


def test_a_sweep_that_is_not_evaluated_needs_no_heavy_library(shared_triple: dict[str, Path], tmp_path: Path) -> None:
    _, *arguments = merge_arguments(shared_triple, tmp_path / "out", "--quiet", "--no-sync", "--lambda=0.1,0.5")
    done = fresh(WATCHED_MERGE, "sweep", *arguments, str(tmp_path))
    assert done.returncode == 0, done.stderr
    watched = json.loads(done.stdout.splitlines()[-1])
    assert watched["code"] == 0
    assert watched["seen"]["first"] == watched["end"] == []


def test_the_transformers_integration_imports_neither_transformers_nor_peft() -> None:
    loaded = loaded_after("import hsa.integrations.transformers")
    assert "torch" in loaded
    assert not loaded & {"transformers", "peft", "accelerate", "huggingface_hub"}


# --- arrows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """`module` imports `target`: dotted names; `lazy` inside a function, `checked` for type checkers alone."""

    module: str
    target: str
    line: int
    lazy: bool
    checked: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("hsa", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_checkers(node: ast.AST) -> bool:
    """Whether the body of this node is for type checkers alone; what stands in its `else` is not."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(path: Path) -> Iterator[Import]:
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool, checked: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typed = checked or (is_for_checkers(node) and child in getattr(node, "body", ()))
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, inside, typed)
            elif isinstance(child, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                start = ".".join([*parents, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield Import(module, f"{start}.{alias.name}", child.lineno, inside, typed)
            yield from visit(child, inside, typed)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), lazy=False, checked=False)


SOURCES = sorted([*(ROOT / "hsa").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
IMPORTS = [found for path in SOURCES for found in imports_of(path)]
MODULES = {module_name(path) for path in SOURCES}


def unit(module: str) -> str | None:
    """The module or package right below hsa; None for hsa itself and for anything else."""
    parts = module.split(".")
    return parts[1] if parts[0] == "hsa" and len(parts) > 1 else None


def reaches(found: Import, name: str) -> bool:
    return found.target == name or found.target.startswith(f"{name}.")


def where(found: Import) -> str:
    return f"{found.module}:{found.line} imports {found.target}"


def test_the_parser_finds_the_imports() -> None:
    pairs = {(found.module, found.target) for found in IMPORTS}
    assert ("hsa.actions.merge", "hsa.planning.plan.make_plan") in pairs
    assert ("hsa.backends.cpu", "hsa.backends.base.TaskBuffers") in pairs
    lazy = {(found.module, found.target.partition(".")[0]) for found in IMPORTS if found.lazy}
    assert ("hsa.outputs.card", "yaml") in lazy
    assert ("hsa.actions.merge", "time") not in lazy


def below(name: str) -> set[str]:
    """Every package that one may import from, itself included."""
    return {name, "_version"}.union(*(below(each) for each in ARROWS[name]))


def test_every_package_has_its_arrows() -> None:
    units = {name for module in MODULES if (name := unit(module)) is not None} - {"kernels"}
    assert units - ARROWS.keys() == set(), "give each new package its arrows in ARROWS"
    assert ARROWS.keys() - units == set(), "ARROWS names packages that are gone"
    beside = sorted(path.name for path in (ROOT / "hsa").glob("*.py"))
    assert len(beside) <= 10, f"at most ten modules stand beside the packages, there are {beside}"


def test_imports_follow_the_arrows() -> None:
    wrong = []
    for found in IMPORTS:
        importer, target = unit(found.module), unit(found.target)
        if importer is None or importer == "kernels" or not reaches(found, "hsa"):
            continue
        if target is None or not any(name in MODULES for name in (found.target, found.target.rpartition(".")[0])):
            wrong.append(f"{where(found)}: import modules of hsa, not its lazy names")
        elif target != "kernels" and target not in below(importer):
            wrong.append(where(found))
    assert wrong == []


def test_methods_know_no_family_of_models_and_nothing_of_the_machine() -> None:
    narrow = {"architectures": ("hsa.architectures.base",), "system": ("hsa.system.dtypes", "hsa.system.digests")}
    methods = [found for found in IMPORTS if unit(found.module) == "methods"]
    assert methods
    wrong = [
        where(found)
        for found in methods
        for name, allowed in narrow.items()
        if reaches(found, f"hsa.{name}") and not any(reaches(found, one) for one in allowed)
        if not (found.module == "hsa.methods.registry" and reaches(found, "hsa.system.plugins"))
    ]
    assert wrong == []


def test_no_module_outside_architectures_knows_a_family_of_models() -> None:
    """They take a family as a value, from a config through the registry. OpenAI's files are always Whisper's."""
    general = ("hsa.architectures.base", "hsa.architectures.registry")
    own = {("hsa.sources.openai_file", "hsa.architectures.openai_whisper")}
    outside = [found for found in IMPORTS if unit(found.module) not in ("architectures", "testing")]
    found = [each for each in outside if reaches(each, "hsa.architectures")]
    assert any(reaches(each, general[1]) for each in found)
    wrong = [
        where(each)
        for each in found
        if not any(reaches(each, name) for name in general)
        and not any(each.module == module and reaches(each, name) for module, name in own)
    ]
    assert wrong == []


def test_no_module_is_imported_by_a_name_in_a_string() -> None:
    """Such an import would escape the arrows. The exceptions: hsa's own lazy names, what huggingface_hub uses, and
    the modules that a registry looks through."""
    allowed = {"hsa", "hsa.sources.hub.range_requests", "hsa.system.plugins"}
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                if module_name(path) not in allowed and not (names and not str(names[0]).startswith("hsa")):
                    wrong.append(f"{module_name(path)}:{node.lineno}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    ahead = {module: set[str]() for module in MODULES}
    for found in IMPORTS:
        for target in (found.target, found.target.rpartition(".")[0]):
            if target in MODULES and target != found.module:
                ahead[found.module].add(target)
                break
    while ends := {module for module, targets in ahead.items() if not targets}:
        ahead = {module: targets - ends for module, targets in ahead.items() if module not in ends}
    assert sorted(ahead) == []


def test_kernels_know_nothing_of_hsa() -> None:
    kernels = [found for found in IMPORTS if unit(found.module) == "kernels"]
    outward = [where(f) for f in kernels if reaches(f, "hsa") and not reaches(f, "hsa.kernels")]
    assert outward == []
    assert any(module.startswith("hsa.kernels") for module in MODULES)


def test_the_oracle_shares_nothing_with_what_it_judges() -> None:
    own = [found for found in IMPORTS if unit(found.module) == "reference" and not reaches(found, "hsa.reference")]
    assert own
    assert [where(found) for found in own if reaches(found, "hsa")] == []
    allowed = {"__future__", "blake3", "collections", "dataclasses", "math", "struct", "torch", "typing"}
    assert {found.target.partition(".")[0] for found in own} <= allowed


def test_heavy_libraries_are_imported_where_they_are_allowed_alone() -> None:
    wrong = []
    for name, allowed in ANYWHERE.items():
        for found in IMPORTS:
            itself = reaches(found, "hsa.reference") and unit(found.module) == "reference"
            if reaches(found, name) and not (found.module in allowed or unit(found.module) == "kernels" or itself):
                wrong.append(where(found))
    for name in HEAVY:
        eager = [found for found in IMPORTS if reaches(found, name) and not (found.lazy or found.checked)]
        for found in eager:
            if found.module not in AT_IMPORT.get(name, set()) and unit(found.module) != "kernels":
                wrong.append(f"{where(found)} when it is imported itself")
    assert wrong == []


def test_nothing_imports_tests_or_bench() -> None:
    outside = {path.stem for folder in ("tests/support", "bench") for path in (ROOT / folder).glob("*.py")}
    outside |= {"tests", "bench", "conftest"}
    assert {"helpers", "full_load"} <= outside
    assert [where(found) for found in IMPORTS if found.target.partition(".")[0] in outside] == []


def test_the_folder_kernels_is_never_imported_by_its_bare_name() -> None:
    """Hugging Face has a package of that name; ours is hsa.kernels."""
    paths = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    found = [i for path in paths for i in imports_of(path) if i.target.partition(".")[0] == "kernels"]
    assert [where(i) for i in found] == []


# --- size, and what the page for contributors says -------------------------------------------------------------------

MOST_LINES = 400
REASON = "lines because"
"""What the docstring of a longer module says, and then why."""


def test_no_module_is_long_without_a_reason() -> None:
    for path in (*SOURCES, *(ROOT / "bench").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MOST_LINES or REASON in (ast.get_docstring(ast.parse(text)) or ""), path


def test_the_page_for_contributors_names_modules_that_exist() -> None:
    text = (ROOT / "docs" / "contributing" / "index.md").read_text(encoding="utf-8")
    rooms = {row[0]: row[1] for row in re.findall(r"^\| (`[a-z_/]+/`.*?) \| (.*) \|$", text, re.MULTILINE)}
    named = {name.strip("/") for cell in rooms for name in re.findall(r"`([a-z_/]+)`", cell)}
    packages = {path.parent.relative_to(ROOT / "hsa").as_posix() for path in (ROOT / "hsa").rglob("*/__init__.py")}
    assert packages - {"actions/merger"} <= named
    for cell, about in rooms.items():
        places = [ROOT if "kernels" in cell else ROOT / "hsa" / name for name in re.findall(r"`([a-z_/]+)/`", cell)]
        places = [ROOT / "kernels"] if "kernels" in cell else places
        for name in re.findall(r"`([a-z_]+)`", about):
            assert any((place / f"{name}.py").is_file() for place in places), f"{cell} has no module {name}"
    for name in re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text):
        assert any((ROOT / place / name).is_file() for place in ("hsa", ".")), f"the page names {name}"


# --- the wheel and the sdist -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packages are built from."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed, which builds the wheel")
    if importlib.util.find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools 77 or newer is not installed, which --no-build-isolation needs")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hsa", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_a_wheel_holds_hsa_alone(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"hsa"}
    assert len(top) == 2


def test_a_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if name.endswith(".py")}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hsa").rglob("*.py")}
    expected |= {f"hsa/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert "hsa/kernels/__init__.py" in held
    assert held == expected
    assert "hsa/py.typed" in wheel.namelist()
    pages = {
        path.relative_to(ROOT).as_posix() for kind in ("html", "css", "js") for path in ROOT.glob(f"hsa/**/*.{kind}")
    }
    assert "hsa/views/frame.html" in pages
    assert pages <= set(wheel.namelist())


def test_an_sdist_holds_every_source_file(source: Path, tmp_path: Path) -> None:
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for folder in ("hsa", "kernels") for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert len(expected) > 100
    assert expected | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= packed


def test_the_wheel_installs_the_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    texts = {name.rpartition("/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "hsa = hsa.__main__:main" in wheel.read(texts["entry_points.txt"]).decode()
    assert "LICENSE" in texts
    metadata = wheel.read(texts["METADATA"]).decode()
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", metadata, re.MULTILINE)
    (python,) = re.findall(r"^Requires-Python: (.*)$", metadata, re.MULTILINE)
    assert set(python.split(",")) == {">=3.10", "<3.14"}
