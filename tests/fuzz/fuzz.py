"""Run each fuzzer for a while and print a table: `python tests/fuzz/fuzz.py [--seconds 60] [TARGET ...]`.

It needs atheris. A finding's input is kept in the folder that `--findings` names, for a look, a mend, and a place in
tests/corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE.parent / "corpus"
NO_ATHERIS = (
    "make fuzz needs atheris, which is not installed: it has wheels for Linux on x86-64 with Python 3.11 or newer. "
    "Nothing was fuzzed; `make test` replays the corpus without it."
)

sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(HERE.parents[1])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("targets", nargs="*")
    arguments = parser.parse_args()
    from targets import TARGETS

    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if importlib.util.find_spec("atheris") is None:
        parser.exit(2, f"{NO_ATHERIS}\n")
    rows, failed = [], 0
    for name in arguments.targets or TARGETS:
        count, covered, minutes, found = run(name, arguments.seconds, arguments.findings / name)
        failed += len(found)
        rows.append((name, str(count), covered, f"{minutes:.1f}", str(len(found))))
        for line in sorted(found):
            print(f"{name}: {line}", flush=True)
    rows.insert(0, ("target", "executions", "coverage", "minutes", "findings"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 1 if failed else 0


def run(name: str, seconds: float, findings: Path) -> tuple[int, str, float, set[str]]:
    """Executions, edges covered, minutes and what was found, each once; after a finding the fuzzer starts again."""
    started = time.monotonic()
    stop, executions, covered, found, dead = started + seconds, 0, "-", set[str](), 0
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for file in sorted((CORPUS / name).glob("*")):
            shutil.copy(file, corpus)
        while (left := stop - time.monotonic()) > 2 and dead < 5:
            place = Path(tempfile.mkdtemp(dir=scratch))
            command = [sys.executable, str(HERE / "child.py"), "fuzz", str(place), name, str(corpus), str(left)]
            done = subprocess.run(
                [*command, f"-artifact_prefix={place}/"], capture_output=True, text=True, errors="replace", check=False
            )
            counts = [int(count) for count in re.findall(r"^#(\d+)\s", done.stderr, re.MULTILINE)]
            executions += max(counts, default=0)
            covered = (re.findall(r"cov: (\d+)", done.stderr) or [covered])[-1]
            dead = 0 if counts else dead + 1
            if done.returncode:
                found.add(_said(done.stdout + done.stderr))
                kept = [*place.glob("crash-*"), *place.glob("timeout-*"), *place.glob("oom-*")]
                findings.mkdir(parents=True, exist_ok=True)
                for file in kept:
                    data = file.read_bytes()
                    (findings / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
                (findings / "last.log").write_text((done.stdout + done.stderr)[-20_000:], encoding="utf-8")
            shutil.rmtree(place)
    return executions, covered, (time.monotonic() - started) / 60, found


def _said(text: str) -> str:
    """The line that names a finding, and where it came from, without what differs from run to run."""
    errors = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Finding|Exception|Interrupt|Exit)\b.*)$", text, re.MULTILINE)
    places = re.findall(r'File "[^"]*/((?:hsa|tests)/[^"]+)", line (\d+)', text)
    where = ":".join(places[-1]) if places else "?"
    return f"{errors[-1] if errors else text.strip()[-200:]!r:.300} at {where}"


if __name__ == "__main__":
    sys.exit(main())
