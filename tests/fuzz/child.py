"""One process that runs inputs through targets.

    child.py replay PLACE FILE...          each file through the target that its directory is named after; JSON lines
    child.py fuzz PLACE TARGET CORPUS SECONDS [libFuzzer's options]    atheris; without it, mutations at random

A finding ends the process with an exit code other than 0, after a traceback.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(HERE.parents[1])]

TIMEOUT = 20
"""Seconds that one input may take, instrumented, on a busy machine."""
PARTIAL = ("weights", "zip")
"""Targets whose first seed is too small to be a whole model."""
INSTRUMENTED = 10.0
"""Times as long that code may take under atheris's instrumentation."""
ROOM = 3 << 30
"""Bytes of memory of a fuzzer, its own corpus, mutations and counters included."""
LENGTH = 1 << 17
"""Bytes of an input that is made up; larger ones are in tests/fuzz/test_corpus.py."""


def replay(place: Path, files: list[Path]) -> None:
    from guard import Finding, cpu_seconds, peak
    from targets import TARGETS, Arena

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
            arena.guard.measure(lambda target=target, data=sound[last]: target.run(arena, data))
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
    guided = importlib.util.find_spec("atheris") is not None
    if guided:
        import atheris

        with atheris.instrument_imports(include=["hsa", "zipfile"]):
            import zipfile  # noqa: F401

            import targets
    else:
        import targets
    target, arena = targets.TARGETS[name], targets.Arena(place)
    seeds = list(target.seeds(arena))
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
        target.run(arena, seed)
    arena.guard.measure(lambda: target.run(arena, seeds[0]), INSTRUMENTED if guided else 1.0)
    if guided:
        arena.guard.settle()

    # a fuzzer that eats the machine is worse than none: what the mutations take is bounded too, if loosely
    resource.setrlimit(resource.RLIMIT_DATA, (ROOM, ROOM))

    def attempt(data: bytes) -> None:
        target.run(arena, data)

    def changed(data: bytes, limit: int, seed: int) -> bytes:
        from mutate import mutate

        return mutate(data, limit, seed, kind=target.kind, tokens=target.tokens)

    if not guided:
        _at_random(corpus, seconds, attempt, changed)
        return

    def mutated(data: bytes, limit: int, seed: int) -> bytes:
        return changed(data, limit, seed) if seed % 4 else atheris.Mutate(data, limit)

    fixed = [f"-max_total_time={int(seconds)}", f"-timeout={TIMEOUT}", f"-max_len={LENGTH}", "-rss_limit_mb=0"]
    arguments = [sys.argv[0], str(corpus), *fixed, "-print_final_stats=1", "-len_control=0", *options]
    atheris.Setup(arguments, attempt, custom_mutator=mutated)
    atheris.Fuzz()


def _at_random(corpus: Path, seconds: float, attempt: object, changed: object) -> None:
    pool = [path.read_bytes() for path in sorted(corpus.iterdir())]
    rng, stop, count = random.Random(0), time.monotonic() + seconds, 0
    while time.monotonic() < stop:
        data = changed(rng.choice(pool), LENGTH, rng.getrandbits(32))  # type: ignore[operator]
        (corpus / "current").write_bytes(data)
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        attempt(data)  # type: ignore[operator]
        count += 1
    faulthandler.cancel_dump_traceback_later()
    (corpus / "current").unlink(missing_ok=True)
    print(f"#{count} DONE", file=sys.stderr)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    place = Path(sys.argv[2]).absolute()
    if sys.argv[1] == "replay":
        replay(place, [Path(file).absolute() for file in sys.argv[3:]])
    else:
        fuzz(place, sys.argv[3], Path(sys.argv[4]).absolute(), float(sys.argv[5]), sys.argv[6:])
