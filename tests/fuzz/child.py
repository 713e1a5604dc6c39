"""One process that runs inputs through targets.

    child.py replay PLACE FILE...          each file through the target that its directory is named after; JSON lines
    child.py fuzz PLACE TARGET CORPUS SECONDS [libFuzzer's options]    with atheris

A finding ends the process with an exit code other than 0, after a traceback.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from targets import Target

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(HERE.parents[1])]

TIMEOUT = 20
"""Seconds that one input may take, instrumented, on a busy machine."""
PARTIAL = ("weights", "zip")
"""Targets whose first seed is too small to be a whole model."""
SHARED = 1.5
"""How much longer an input may take where tests run beside one another: they share caches and memory."""

INSTRUMENTED = 10.0
"""Times as long that code may take under atheris's instrumentation."""
ROOM = 3 << 30
"""Bytes of memory of a fuzzer, its own corpus, mutations and counters included."""
MAX_LENGTH = 1 << 17
"""Bytes of an input that is made up; larger ones are in tests/fuzz/test_corpus.py."""


def replay(place: Path, files: list[Path]) -> None:
    from arena import Arena
    from guard import Finding, cpu_seconds, peak
    from targets import TARGETS

    arena = Arena(place)
    sound = {}
    for name in {file.parent.name: None for file in files}:
        sound[name] = next(iter(TARGETS[name].seeds(arena)))
        said = TARGETS[name].run(arena, sound[name])  # what is imported late, is so before memory and time count
        if said != "success" and name not in PARTIAL:
            raise Finding(f"of the sound {name} came: {said}")
    last = ""
    for file in files:
        target = TARGETS[file.parent.name]
        if file.parent.name != last:
            last = file.parent.name
            arena.guard.measure(lambda target=target, data=sound[last]: target.run(arena, data), SHARED)
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        started, began = time.monotonic(), cpu_seconds()
        try:
            said = target.run(arena, file.read_bytes())
        except Finding as error:
            said = f"FINDING: {error}"
        except Exception as error:
            said = f"FINDING: {type(error).__name__}: {error}"
        faulthandler.cancel_dump_traceback_later()
        spent = {"seconds": round(time.monotonic() - started, 3), "cpu": round(cpu_seconds() - began, 3)}
        print(json.dumps({"file": str(file), "said": said[:500], "peak": peak(), **spent}), flush=True)


def fuzz(place: Path, name: str, corpus: Path, seconds: float, options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["hsa", "zipfile"]):
        import zipfile  # noqa: F401

        from arena import Arena
        from targets import TARGETS
    target, arena = TARGETS[name], Arena(place)
    seeds = list(target.seeds(arena))
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
        target.run(arena, seed)
    arena.guard.measure(lambda: target.run(arena, seeds[0]), INSTRUMENTED)
    arena.guard.settle()

    # a fuzzer that eats the machine is worse than none: what the mutations take is bounded too, if loosely
    resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))

    def attempt(data: bytes) -> None:
        target.run(arena, data)

    fixed = [f"-max_total_time={int(seconds)}", f"-timeout={TIMEOUT}", f"-max_len={MAX_LENGTH}", "-rss_limit_mb=0"]
    if target.tokens:
        fixed.append(f"-dict={_dictionary(place, target.tokens)}")
    arguments = [sys.argv[0], str(corpus), *fixed, "-print_final_stats=1", "-len_control=0", *options]
    atheris.Setup(arguments, attempt, **_mutator(target))
    atheris.Fuzz()


def _mutator(target: Target) -> dict[str, Callable[..., bytes]]:
    """libFuzzer's own mutations with the target's words; for JSON, three times out of four ones that leave it JSON."""
    import atheris
    from mutate import mutate_json

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        changed = mutate_json(data, limit, seed, target.tokens) if seed % 4 else None
        return atheris.Mutate(data, limit) if changed is None else changed

    return {"custom_mutator": mutate} if target.kind == "json" else {}


def _dictionary(place: Path, tokens: Sequence[str]) -> Path:
    """A file of words that libFuzzer puts into bytes. Source: llvm.org/docs/LibFuzzer.html#dictionaries."""
    path = place / "words.dict"
    escaped = ["".join(f"\\x{byte:02x}" for byte in token.encode()) for token in tokens]
    path.write_text("".join(f'"{word}"\n' for word in escaped), encoding="ascii")
    return path


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    place = Path(sys.argv[2]).absolute()
    if sys.argv[1] == "replay":
        replay(place, [Path(file).absolute() for file in sys.argv[3:]])
    else:
        fuzz(place, sys.argv[3], Path(sys.argv[4]).absolute(), float(sys.argv[5]), sys.argv[6:])
