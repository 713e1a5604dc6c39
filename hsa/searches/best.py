"""The best candidate as a checkpoint: the output of `hsa merge` with its settings, and a card with its scores."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hsa.actions.merge import run_merge
from hsa.actions.request import Request
from hsa.methods.base import BASE
from hsa.methods.hsa import SECONDARY
from hsa.methods.registry import method_named
from hsa.methods.settings import declared
from hsa.option_names import command_line
from hsa.outputs.card import MAX_MODEL_INDEX
from hsa.outputs.report import MergeReport
from hsa.searches.candidates import Candidate
from hsa.searches.comparisons import Comparison
from hsa.searches.sources import SearchSources
from hsa.system.types import PathLike

TASK = "automatic-speech-recognition"

CHOSEN = "The settings were chosen from "
"""A text in the card of every best candidate, and in that of no other merge."""

MOST_NAMED = 10
"""Maximum sets whose names the card lists in a sentence."""


def merge_candidate(
    sources: SearchSources,
    candidate: Candidate,
    output: PathLike,
    card: Mapping[str, str] | None = None,
    **options: Any,
) -> MergeReport:
    """Write a candidate like `hsa.merge`. Raises the same errors."""
    assert candidate.method is not None
    arguments = {**sources.arguments(candidate.method), **candidate.settings, **options}
    if card:
        arguments["card"] = dict(card)
    return run_merge(Request.of(method=candidate.method, output=output, **arguments))


def command(sources: SearchSources, candidate: Candidate, output: str) -> str:
    """The command that repeats the merge, or a Python call if some settings cannot be given on the command line.

    Example:
        >>> command(SearchSources(None, ("m1", "m2"), "", ("m1", "m2")), Candidate("x", "soup", "linear"), "merged")
        'hsa merge --method linear --model m1 --model m2 --output merged'
    """
    assert candidate.method is not None
    arguments = sources.arguments(candidate.method)
    settings = _options(candidate, len(sources.models))
    if settings is None:
        values = {"method": candidate.method, **arguments, **candidate.settings, "output": output}
        return f"hsa.merge({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    words = ["hsa", "merge", command_line("method"), candidate.method]
    words += [command_line("base"), arguments[BASE]] if BASE in arguments else []
    for model in arguments["models"]:
        words += [command_line("models"), model]
    return shlex.join([*words, *settings, command_line("output"), output])


def _options(candidate: Candidate, models: int) -> list[str] | None:
    """The settings as command-line options; None if one is given by tensors or layers."""
    words: list[str] = []
    for each in declared(method_named(candidate.method or "").Settings):
        if each.name not in candidate.settings:
            continue
        value = candidate.settings[each.name]
        entries = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(value, Mapping) or any(isinstance(entry, (list, tuple, Mapping)) for entry in entries):
            return None
        if isinstance(value, (list, tuple)) and not each.about.repeated:
            return None
        if isinstance(each.default, bool):
            words.append(command_line(each.name, None if value else False))
            continue
        if each.about.per_model and not isinstance(value, (list, tuple)):
            entries = [value] * (models - (each.about.entries == SECONDARY))
        for entry in entries:
            words += [command_line(each.name), str(entry)]
    return words


def card_fields(
    name: str, rows: Sequence[Comparison], split: str, tried: int, dev: Sequence[str], objective: str
) -> dict[str, str]:
    """Fields of the card: the scores as the Hub's `model-index`, and how the settings were found.

    `rows` are those of the best candidate, on the sets of `split` (test or dev). If there are more scores than a card
    may have, it lists the first ones and says on how many sets.
    """
    results = [
        {
            "task": {"type": TASK, "name": "Automatic Speech Recognition"},
            "dataset": {"type": _slug(row.set), "name": _as_utf8(row.set), "split": split},
            "metrics": [
                {"type": "wer", "value": round(100.0 * row.score.words.rate, 2), "name": "WER"},
                {"type": "cer", "value": round(100.0 * row.score.characters.rate, 2), "name": "CER"},
            ],
        }
        for row in rows
    ]
    place = f" on {_named(dev)}; scores on these sets are optimistic" if dev else ""
    chosen = f"{CHOSEN}{tried} candidates by the {_as_utf8(objective)}{place}."
    index, kept = _model_index(_as_utf8(name), results)
    cut = f" It lists the scores on {kept} of {len(results)} sets." if kept < len(results) else ""
    inherited = "It inherits the limits, biases and licence terms of its sources."
    text = f"No weight was trained for this checkpoint. {chosen}{cut} {inherited}"
    return {"limitations": text, **({"model_index": index} if kept else {})}


def _model_index(name: str, results: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """The field of the card with as many results as it may have, and their number."""
    while True:
        text = json.dumps([{"name": name, "results": results}], ensure_ascii=False)
        if len(text) <= MAX_MODEL_INDEX or not results:
            return text, len(results)
        results = results[: len(results) * MAX_MODEL_INDEX // len(text)]


def _named(sets: Sequence[str]) -> str:
    more = f" and {len(sets) - MOST_NAMED} more sets" if len(sets) > MOST_NAMED else ""
    return f"{', '.join(map(_as_utf8, sets[:MOST_NAMED]))}{more}"


def _as_utf8(text: str) -> str:
    """The text as valid UTF-8, as a card requires. Names of files and directories may not be valid UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _slug(name: str) -> str:
    """A set's name in the form of a data set name on the Hub."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    return plain.strip("-.") or "data"
