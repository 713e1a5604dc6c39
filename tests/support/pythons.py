"""Every CPU command on each Python that is found here, with the lowest versions that setup.py allows and without torch.

    python tests/support/pythons.py [3.10 3.11 ...]

`make test-pythons` runs it. It needs a package index and is no part of `make test`. An interpreter that is missing is
said to be, and skipped. What each Python writes must be, byte for byte, what this one writes.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from helpers import snapshot

from hsa.testing.whisper_checkpoints import SHAPES, write_triple

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
LEFT_OUT = ("torch", "triton")
WEIGHTS_AND_HEADS = re.compile(r"/model[^/]*\.safetensors$|^heads\.csv$")
ENVIRONMENTS = ROOT / ".venv-pythons"


def requirements() -> list[str]:
    """The lowest versions of setup.py's dependencies, but for `LEFT_OUT`, with their markers."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (found,) = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "install_requires"]
    lowest = [re.sub(r">=([\w.]+)(,<[\w.]+)?", r"==\1", text) for text in ast.literal_eval(found)]
    return [text for text in lowest if not text.startswith(LEFT_OUT)]


def interpreter(version: str) -> str | None:
    """A Python of that version, or None: on the PATH, of pyenv, or of uv."""
    ours = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    places = [shutil.which(f"python{version}"), *map(str, ours)]
    if uv := shutil.which("uv"):
        found = subprocess.run([uv, "python", "find", version], capture_output=True, text=True, check=False)
        places.append(found.stdout.strip())
    for place in filter(None, places):
        probe = [place, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(probe, capture_output=True, text=True, check=False).stdout.strip() == version:
            return place
    return None


def environment(version: str, python: str) -> Path:
    """The interpreter of a virtual environment with the lowest requirements; made once for each list of them."""
    folder = ENVIRONMENTS / version
    own, made, wanted = folder / "bin" / "python", folder / "made", "\n".join(requirements())
    if not made.is_file() or made.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        install = [own, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--only-binary=:all:"]
        subprocess.run([*install, *requirements()], check=True)
        made.write_text(wanted, encoding="utf-8")
    return own


def commands(triple: dict[str, Path], place: Path) -> Iterator[list[str]]:
    """Every command that needs no GPU and neither torch nor transformers, in an order in which each finds its input."""
    sources = [f"--{role}={path}" for role, path in triple.items()]
    primary = str(triple["primary"])
    yield ["--help"]
    yield ["--version"]
    yield ["help", "merge"]
    yield ["--show-completion", "bash"]
    yield ["merge", *sources, f"--output={place / 'planned'}", "--dry-run"]
    yield ["merge", *sources, f"--output={place / 'merged'}"]
    yield ["merge", *sources, f"--output={place / 'cast'}", "--dtype=float16", "--max-shard-size=50KB", "--backend=cpu"]
    yield ["merge", *sources, f"--output={place / 'patch.safetensors'}", "--patch"]
    yield ["apply", primary, str(place / "patch.safetensors"), f"--output={place / 'applied'}"]
    yield ["sweep", *sources, f"--output={place / 'sweep'}", "--lambda=0:1:0.5"]
    yield ["sweep", *sources, f"--output={place / 'full'}", "--alpha=0.2,0.4", "--full"]
    yield ["verify", str(place / "merged"), "--sources", *sources]
    yield ["inspect", str(place / "merged"), f"--csv={place / 'heads.csv'}", f"--html={place / 'heads.html'}"]
    yield ["inspect", *sources, "--json"]
    yield ["inspect", "--diff", str(place / "merged"), str(place / "applied")]
    yield ["release", str(place.parent / "recipe.yaml"), f"--output={place / 'tree'}"]


def written(python: str | Path, triple: dict[str, Path], place: Path) -> dict[str, str]:
    """Weights and tables of heads that the commands write, by path, with a digest of their bytes. All else records the
    versions of Python and libraries, and differs."""
    place.mkdir()
    for command in commands(triple, place):
        run = [python, "-m", "hsa", *command]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode != 0:
            raise SystemExit(f"hsa {' '.join(command)} failed with {done.returncode}:\n{done.stderr}")
    return {name: digest for name, digest in snapshot(place).items() if WEIGHTS_AND_HEADS.search(name)}


def main(versions: Sequence[str]) -> int:
    failed = False
    with tempfile.TemporaryDirectory(prefix="hsa-pythons-") as folder:
        triple = write_triple(Path(folder), SHAPES["test"])
        lines = [f"    {role}: {path}" for role, path in triple.items()]
        recipe = "\n".join(["merges:", "  - name: a", "    group: g", *lines])
        Path(folder, "recipe.yaml").write_text(recipe, encoding="utf-8")
        expected = written(sys.executable, triple, Path(folder, "here"))
        for version in versions:
            python = interpreter(version)
            if python is None:
                print(f"python {version}: skipped, for no interpreter of it is found (PATH, pyenv, uv)")
                continue
            own = environment(version, python)
            found = written(own, triple, Path(folder, version))
            differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            failed |= bool(differing)
            what = f"of which differ {', '.join(differing)}" if differing else "byte for byte those written here"
            print(f"python {version}: {len(found)} files, {what}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    sys.exit(main(parser.parse_args().versions))
