"""`hsa search` beside the loop that people write, and what racing and workers bring, side by side in one run.

    python bench/bench_search.py [--triple DIR] [--clips DIR] [--trials 40] [--limit N] [--workers] [--ray]

The triple holds `base`, `primary`, `secondary` and `tertiary` (default: HSA_REAL_TRIPLE), the clips FLAC files and
`transcripts.tsv` (default: `clips_noisy_dev` beside HSA_REAL_CLIPS). Without them it measures nothing, and says so.

Search: `hsa search` with one worker, then search_loop.py over the candidates that the search scored, both as programs
of their own with two torch threads and batches of 16. One list for both is fairer than settings that the loop draws
itself: some settings make a Whisper write on and on, so that the times of two lists differ by chance. With one list the
same best is to be found, so that what racing loses would show. The loop gets for nothing what the sampler has learned.
Racing: see racing_case.py. Workers: see workers_case.py.

No figures without a correctness gate: what the search's model writes for some candidates must be what the loop's
checkpoints write; afterwards the transcripts of all candidates are compared. Appends rows to bench/results/search.csv.
Rates are in % of all words, by Whisper's own normaliser; intervals are 95 % bootstraps over clips.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import rows
import torch
from bench_wer import model_name, why_not
from cases import CAVEATS
from programs import Program, compile_package, measure
from racing_case import measure_racing
from racing_settings import FINE_TUNES
from search_setup import BATCH, SEARCH, Setup, described, rates, row, search_program, timed, warm
from workers_case import ONE, RAY, TWO, measure_workers

from hsa.searches.candidates import Candidate
from hsa.searches.dev_sets import DevSets
from hsa.searches.transcripts import Transcripts

PACKAGES = ("torch", "numpy", "transformers", "optuna", "jiwer", "soundfile")
LOOP = "the loop"
GATED = ("primary", "average", "ties defaults", "tsv_m defaults")
MOST_DIFFERING = 0.01
"""Share of transcripts that may differ between search and loop: clips are batched otherwise, and sums of floats
rounded otherwise then."""


def loop_program(setup: Setup, candidates: Path, threads: int) -> Program:
    script = str(Path(__file__).resolve().parent / "search_loop.py")
    command = ["env", f"OMP_NUM_THREADS={threads}", "HF_HUB_OFFLINE=1", sys.executable, script, str(candidates)]
    command += ["{out}", f"--processor={setup.triple / FINE_TUNES[0]}", f"--clips={setup.clips}", f"--batch={BATCH}"]
    command += [f"--threads={threads}"]
    return Program(LOOP, [*command, *([f"--limit={setup.limit}"] if setup.limit else [])])


def candidates_of(study: Mapping[str, Any]) -> list[Candidate]:
    """What a search scored, in its order, without what could not be merged."""
    names = ("name", "kind", "method", "settings", "source")
    return [Candidate(**{name: trial[name] for name in names}) for trial in study["trials"] if not trial["failure"]]


# The search beside the loop -------------------------------------------------------------------------------------


def gate(setup: Setup, folder: Path) -> None:
    """The model of a search must write what the written and loaded checkpoints of the loop write."""
    import search_loop
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    processor = search_loop.WhisperProcessor.from_pretrained(setup.triple / FINE_TUNES[0], local_files_only=True)
    dev = setup.dev(min(setup.limit or BATCH, BATCH))
    evaluator = setup.evaluator(dev)
    for candidate in setup.baselines:
        if candidate.name not in GATED:
            continue
        result = evaluator.evaluate(candidate, None)
        if result.failure is not None:
            raise SystemExit(f"correctness gate: {candidate.name} could not be scored: {result.failure}")
        entry = setup.of_loop(candidate)
        path = Path(entry.get("folder") or folder / candidate.name)
        if "merge" in entry:
            search_loop.hsa.merge(**entry["merge"], output=path, digest=False, sync=False)
        texts, _ = search_loop.transcribe(path, processor, [item.utterance.audio for item in dev.items], BATCH)
        if texts != list(result.texts):
            number = next(
                place for place, pair in enumerate(zip(texts, result.texts, strict=True)) if len(set(pair)) > 1
            )
            raise SystemExit(
                f"correctness gate: of {dev.items[number].utterance.id} {candidate.name} writes {result.texts[number]} "
                f"in a search, and {texts[number]} from its checkpoint; no figures are reported"
            )


def measure_search(setup: Setup, trials: int, threads: int, rounds: int, folder: Path) -> Iterator[dict[str, object]]:
    """A row of the search and one of the loop over the same candidates."""
    gate(setup, folder)
    dev = setup.dev()
    out, listed = folder / "search", folder / "candidates.json"
    search, loop = search_program(setup, trials, threads), loop_program(setup, listed, threads)
    candidates: list[Candidate] = []
    for number in range(rounds):
        order = [search, loop] if number % 2 == 0 else [loop, search]
        for program in order:
            place = out if program is search else folder / "loop"
            run = measure(program, place, partial(warm, setup))
            program.runs.setdefault("warm", []).append(run)
            print(f"{program.name}: {run.seconds:.1f} s", file=sys.stderr, flush=True)
            if program is search and not number:
                candidates = candidates_of(run.report)
                listed.write_text(json.dumps(list(map(setup.of_loop, candidates))), encoding="utf-8")
    study, looped = (program.runs["warm"][0].report for program in (search, loop))
    known = {each.name: each for each in candidates}
    texts = {each["name"]: each["texts"] for each in looped["found"]}
    written = texts_of(study, dev, Transcripts(out, study["request"]))
    note = differing(written, texts)
    shared = {"set": dev.names[0], "clips": len(dev.items), "candidates": len(candidates), "workers": 1}
    seconds, merging = (sum(each[key] for each in study["trials"]) for key in ("seconds", "merging"))
    best = known[study["best"]]
    yield row(
        "search", SEARCH, **shared, threads=threads, **timed(search.runs["warm"]),
        trials_s=f"{seconds:.2f}", decoding_s=f"{seconds - merging:.2f}", best=described(best),
        **rates(dev, written[best.name]), **study["savings"], note=note,
    )  # fmt: skip
    chosen = min((each for each in looped["found"] if known[each["name"]].is_merge), key=lambda each: each["wer"])
    found = rates(dev, chosen["texts"])
    if round(100 * chosen["wer"], 2) != found["wer"]:
        raise SystemExit(
            f"correctness gate: the loop scores {chosen['name']} as {100 * chosen['wer']:.2f} %, the search as "
            f"{found['wer']:.2f} %; no figures are reported"
        )
    outside = looped["writing"] + looped["loading"]
    yield row(
        "search", LOOP, **shared, threads=threads, **timed(loop.runs["warm"]),
        trials_s=f"{outside + looped['decoding']:.2f}", decoding_s=f"{looped['decoding']:.2f}",
        best=described(known[chosen["name"]]), **found, decoded=len(candidates) * len(dev.items), raced=0, equal=0,
        note=f"{looped['writing']:.1f} s of writing, {looped['loading']:.1f} s of loading",
    )  # fmt: skip


def texts_of(study: Mapping[str, Any], dev: DevSets, kept: Transcripts) -> dict[str, dict[str, str]]:
    """What each candidate wrote in a search, by utterance, as far as it was decoded."""
    found = {}
    for trial in study["trials"]:
        texts = kept.get(trial["weights"])[: trial["utterances"]]
        found[trial["name"]] = {item.utterance.id: text for item, text in zip(dev.items, texts, strict=False)}
    return found


def differing(search: Mapping[str, Mapping[str, str]], loop: Mapping[str, Mapping[str, str]]) -> str:
    """How many transcripts differ, in words. SystemExit where that are more than rounding explains."""
    pairs = [(text, loop[name][clip]) for name, texts in search.items() for clip, text in texts.items()]
    count = sum(one != other for one, other in pairs)
    if count > MOST_DIFFERING * len(pairs):
        raise SystemExit(
            f"correctness gate: {count} of {len(pairs)} transcripts differ between search and loop; no figures are "
            f"reported"
        )
    return f"{count} of {len(pairs)} transcripts differ from the loop's"


# ----------------------------------------------------------------------------------------------------------------


def noisy_dev() -> Path | None:
    """The noisy dev set of the real case, which lies beside its clips."""
    clips = os.environ.get("HSA_REAL_CLIPS")
    return Path(clips).resolve().parent / "clips_noisy_dev" if clips else None


def reason_for_nothing(triple: Path | None, clips: Path | None) -> str:
    """Why nothing can be measured, or nothing."""
    if triple is not None and clips is None:
        return "HSA_REAL_CLIPS is not set and --clips not given"
    lacking = [name for name in ("optuna", "scipy", "cmaes") if importlib.util.find_spec(name) is None]
    return why_not(triple, clips, ("base", *FINE_TUNES)) or (
        f"{' and '.join(lacking)} must be installed" if lacking else ""
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triple", type=Path, default=os.environ.get("HSA_REAL_TRIPLE") or None)
    parser.add_argument("--clips", type=Path, default=noisy_dev())
    parser.add_argument("--limit", type=int, default=0, help="only the first clips (default: all)")
    parser.add_argument("--trials", type=int, default=40, help="models of a search, and settings that race")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of search, loop and racing")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every program, in turn")
    parser.add_argument("--cases", nargs="*", choices=("search", "racing"), default=["search", "racing"])
    parser.add_argument("--workers", action="store_true", help="also two workers beside one process")
    parser.add_argument("--ray", action="store_true", help="also two Ray actors beside one process")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of search.csv")
    options = parser.parse_args(arguments)
    reason = reason_for_nothing(options.triple, options.clips)
    if reason:
        print(f"bench_search measured nothing: {reason}")
        return
    compile_package()
    torch.set_num_threads(options.threads)
    about = {**rows.about(PACKAGES), "model": model_name(options.triple)}
    setup = Setup(options.triple, options.clips, options.limit)
    ways = [ONE, *([TWO] if options.workers else []), *([RAY] if options.ray else [])]
    measured: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="hsa-bench-") as scratch:
        folder, rounds = Path(scratch), options.rounds
        cases = {
            "search": lambda: measure_search(setup, options.trials, options.threads, rounds, folder),
            "racing": lambda: measure_racing(setup, options.trials, options.threads),
            "workers": lambda: measure_workers(setup, options.trials, ways, rounds, folder),
        }
        for case in (*options.cases, *(["workers"] if len(ways) > 1 else [])):
            found = list(cases[case]())
            rows.append("search", [{**about, **each} for each in found], options.results)
            measured += found
    shown = ("case", "way", "candidates", "seconds", "best", "wer", "wer_low", "wer_high", "decoded", "raced", "note")
    print(rows.markdown(shown, ([each[name] for name in shown] for each in measured)))
    print(f"\n{CAVEATS}")


if __name__ == "__main__":
    main()
