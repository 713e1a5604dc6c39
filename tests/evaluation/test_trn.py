"""trn files, held to NIST's sclite."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from speech import errors_of, refusal, scored

from hsa.errors import DestinationError, RequestError
from hsa.evaluation.scores import UtteranceScore, scores_of
from hsa.evaluation.trn import check_trn_names, write_trn

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "it's", "größer", "大きい", "o'clock", "well", "being")
WORDS += ("of", "course")


def corrupted(drawn: random.Random, words: Sequence[str], share: float) -> str:
    """Words of which some are left out, replaced or followed by one more, as recognisers do."""
    heard = []
    for word in words:
        if drawn.random() < share:
            heard += drawn.choice(([], [drawn.choice(WORDS)], [word, drawn.choice(WORDS)]))
        else:
            heard.append(word)
    return " ".join(heard)


def some_scores(count: int, share: float, seed: int = 0) -> list[UtteranceScore]:
    drawn = random.Random(seed)
    found = []
    for place in range(count):
        words = [drawn.choice(WORDS) for _ in range(drawn.randrange(1, 15))]
        speaker = drawn.choice((None, "anna", "ben-2"))
        found.append(scored(f"clips/u {place}.flac", " ".join(words), corrupted(drawn, words, share), speaker=speaker))
    return found


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_line_is_the_text_and_a_name_that_begins_with_the_speaker(tmp_path: Path) -> None:
    scores = [
        scored("a b.wav", "one two", "one", speaker="an-na (x)"),
        scored("e", "", "left out"),
        scored("c", "größer", ""),
    ]
    reference, hypothesis = write_trn(tmp_path / "deep" / "trn", "out/merged model", scores)
    assert (reference, hypothesis) == tuple(
        tmp_path / "deep" / "trn" / f"out_merged_model.{kind}.trn" for kind in ("ref", "hyp")
    )
    assert reference.read_bytes().decode() == "one two (an_na__x_-test_a_b.wav)\ngrößer (unknown-test_c)\n"
    assert hypothesis.read_bytes().decode() == "one (an_na__x_-test_a_b.wav)\n (unknown-test_c)\n"


def test_names_differ_whatever_the_ids_are(tmp_path: Path) -> None:
    ids = ["a b", "a_b", "a(b", "a_b.2", "A_B", "a;b"]
    path, _ = write_trn(tmp_path, "m", [scored(id, "x", "x") for id in ids])
    names = re.findall(r"\((.*)\)", path.read_text())
    assert len({name.casefold() for name in names}) == len(ids)


@pytest.mark.parametrize(
    ("model", "stem"),
    [("../../etc/passwd", "_.._etc_passwd"), ("", "model"), ("..", "model"), ("größer-1.5", "größer-1.5")],
)
def test_a_models_name_is_no_path(model: str, stem: str, tmp_path: Path) -> None:
    write_trn(tmp_path, model, [scored("a", "x", "x")])
    assert sorted(os.listdir(tmp_path)) == [f"{stem}.hyp.trn", f"{stem}.ref.trn"]


@pytest.mark.parametrize("names", [("a b", "a_b"), ("x/y", "x_y"), ("", "model"), (".hidden", "hidden")])
def test_models_whose_files_would_have_one_name_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    message = refusal(RequestError, check_trn_names, ["other", *names])
    assert f"the trn files of {names[0]!r} and {names[1]!r} would have one name" in message
    assert write_trn(tmp_path, names[0], []) == write_trn(tmp_path, names[1], [])
    check_trn_names(["a", "b", "größer-1.5", "größer+1.5", "A"])


def test_files_are_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_trn(tmp_path, "m", [scored("a", "x", "x"), scored("b", "y", "y")])
    path, _ = write_trn(tmp_path, "m", [scored("a", "z", "z")])
    assert path.read_text() == "z (unknown-test_a)\n"
    assert sorted(os.listdir(tmp_path)) == ["m.hyp.trn", "m.ref.trn"]


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = refusal(DestinationError, write_trn, tmp_path / "file", "m", some_scores(1, 0))
    assert "file: the trn file cannot be written" in message and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "m.hyp.trn").mkdir()
    assert "m.hyp.trn: the trn file cannot be written: Is a directory" in refusal(
        DestinationError, write_trn, tmp_path, "m", some_scores(1, 0)
    )
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert "File name too long" in refusal(DestinationError, write_trn, tmp_path, "m" * 300, some_scores(1, 0))


# --- sclite -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sclite() -> list[str]:
    """How sclite is called; Debian's package sctk has it under the command sctk."""
    if shutil.which("sclite"):
        return ["sclite"]
    if shutil.which("sctk"):
        return ["sctk", "sclite"]
    pytest.skip("sclite is not installed: apt-get install sctk")


def counted(sclite: list[str], folder: Path, scores: Sequence[UtteranceScore]) -> list[tuple[int, int, int, int]]:
    """Substitutions, deletions, insertions and words of each utterance, as sclite counts them in the files."""
    reference, hypothesis = write_trn(folder, "m", scores)
    call = ["-s", "-e", "utf-8", "-i", "spu_id", "-r", str(reference), "trn", "-h", str(hypothesis), "trn"]
    done = subprocess.run([*sclite, *call, "-o", "pralign", "stdout"], capture_output=True, check=False, timeout=60)
    output = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, output + done.stderr.decode("utf-8", "replace")
    found = {
        name: tuple(int(number) for number in numbers.split())
        for name, numbers in re.findall(r"id: \((.*)\)\nScores: \(#C #S #D #I\) ([\d ]+)\n", output)
    }
    names = re.findall(r" \((\S*)\)\n", reference.read_text(encoding="utf-8"))
    assert len(found) == len(names) == len(scores)
    return [
        (changed, left_out, put_in, right + changed + left_out)
        for right, changed, left_out, put_in in (found[name] for name in names)
    ]


def test_sclite_counts_the_same_errors_in_what_recognisers_write(sclite: list[str], tmp_path: Path) -> None:
    scores = some_scores(300, 0.15)
    found = counted(sclite, tmp_path, scores)
    wrong = 0
    for (changed, left_out, put_in, words), score in zip(found, scores, strict=True):
        assert words == score.words.reference
        assert changed + left_out + put_in == score.words.errors, (score.reference, score.hypothesis)
        wrong += score.words.errors
    total = scores_of(scores)[0].words
    assert (total.errors, total.reference) == (wrong, sum(words for *_, words in found)) and wrong > 200


def test_sclite_finds_the_cheapest_alignment_by_its_weights_in_any_texts(sclite: list[str], tmp_path: Path) -> None:
    """By 4 for a substitution and 3 for the others that may be more errors than the least number, and never fewer."""
    scores = some_scores(300, 0.9, seed=1)
    more = 0
    for (changed, left_out, put_in, _), score in zip(counted(sclite, tmp_path, scores), scores, strict=True):
        cost = errors_of(score.reference.split(), score.hypothesis.split(), substitution=4, gap=3)
        assert 4 * changed + 3 * (left_out + put_in) == cost
        assert changed + left_out + put_in >= score.words.errors
        more += changed + left_out + put_in > score.words.errors
    assert 0 < more < 50


def test_sclite_takes_any_character_for_a_part_of_a_word(sclite: list[str], tmp_path: Path) -> None:
    characters = [*map(chr, range(33, 127)), *"é大😀\u2019«؟\u00ad\u200b\ufeff", "e\u0301"]
    characters += [";;", "**", "{a / b}", "(x)", "<a>"]
    shapes = ("{}", "{0}{0}", "a{}", "{}a", "a{}b")
    scores = [
        scored(f"{place} {shape} {number}", f"{text} same left", f"{text} same right {text}")
        for place, character in enumerate(characters)
        for number, shape in enumerate(shapes)
        for text in ["".join(shape.format(character).split())]
    ]
    for counts, score in zip(counted(sclite, tmp_path, scores), scores, strict=True):
        assert counts == (1, 0, 1, 3), score.reference


def test_sclite_reads_ids_and_speakers_of_any_kind(sclite: list[str], tmp_path: Path) -> None:
    ids = ["A1", "a1", "clips/ü.flac", "a.flac:0.5-1.25", "x-y-z", '"q"', "<b>", "a&b", "a\\b", "a[1]", "大", "*", ";;"]
    ids += ["(", "i" * 200]
    scores = [scored(id, "x y", "x z") for id in ids]
    scores += [replace(score, id=f"s {score.id}", speaker=score.id) for score in scores]
    assert counted(sclite, tmp_path, scores) == [(1, 0, 0, 2)] * len(scores)


def test_sclite_reads_an_hour_in_one_line(sclite: list[str], tmp_path: Path) -> None:
    words = [WORDS[place % 7] for place in range(9000)]
    assert counted(sclite, tmp_path, [scored("a", " ".join(words), " ".join(words[:-2]))]) == [(0, 2, 0, 9000)]
