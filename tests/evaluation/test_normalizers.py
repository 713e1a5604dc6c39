"""Normalisers: Whisper's as transformers has them, and the plain one."""

from __future__ import annotations

import json
import random
import string
import sys
import unicodedata
from pathlib import Path

import pytest
from helpers import read_clips
from speech import refusal
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from hsa.errors import DataError, HeaderError, RequestError
from hsa.evaluation.normalizers import NORMALIZERS, normalizer, plain

SPELLINGS = {"colour": "color", "theatre": "theater"}

TEXTS = [
    "Uh, the visitors' well-known COLOUR theatre — it's $20.50, or twenty one pounds!",
    "Mr. O'Neill won't, can't and shan't; she'd've gone (laughs) [noise] <unk> at 5 p.m.",
    "one oh one, double oh seven, 1960s, the 274th and thirty-second, two and a half, 3.5 %",
    "Ça va très bien, größer Straße, naïve façade",
    "мама мыла раму, それはペンです。 ١٢٣",
    "um, hmm, uh-huh",
    "",
    " \t\n",
]


def model(folder: Path, **config: object) -> Path:
    """The directory of a checkpoint with its small files; `generation` is its generation config."""
    generation = config.pop("generation", None)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "normalizer.json").write_text(json.dumps(SPELLINGS))
    return folder


def words(text: object) -> list[str]:
    return str(text).split()


def random_texts() -> list[str]:
    drawn = random.Random(8)
    pieces = [*" ".join(TEXTS).split(), *string.printable, *"½²é\u2019", "e\u0301", "\ufb01", "\u200b"]
    pieces += ["one", "hundred", "point", "million", "dollars", "and", "zero", "third", "$5", "£1.5", "1,000", "9" * 30]
    lengths = [drawn.randrange(30) for _ in range(1500)]
    return ["".join(drawn.choice(pieces) + drawn.choice(("", " ")) for _ in range(length)) for length in lengths]


def equals(ours, theirs) -> None:  # type: ignore[no-untyped-def]
    """Our normaliser gives transformers' words on every text; where that fails, ours says so."""
    failures = 0
    for text in [*TEXTS, *random_texts()]:
        try:
            expected = words(theirs(text))
        except Exception:
            failures += 1
            refusal(DataError, ours, text)
        else:
            assert words(ours(text)) == expected, text
    assert failures < 15


def test_basic_is_transformers_own() -> None:
    equals(normalizer("basic"), BasicTextNormalizer())


@pytest.mark.parametrize("language", [None, "en", "English", "<|en|>", " EN "])
def test_whisper_in_english_is_transformers_own_with_the_checkpoints_spellings(
    language: str | None, tmp_path: Path
) -> None:
    ours = normalizer("whisper", language=language, model=model(tmp_path, model_type="whisper", vocab_size=51864))
    assert words(ours("The COLOUR, um, of twenty-one theatres")) == ["the", "color", "of", "21", "theatres"]
    if language is None:
        equals(ours, EnglishTextNormalizer(SPELLINGS))


@pytest.mark.parametrize("language", ["de", "german", "fr", "english-like"])
def test_whisper_in_other_languages_is_the_basic_one(language: str, tmp_path: Path) -> None:
    ours = normalizer("whisper", language=language, model=model(tmp_path, model_type="whisper", vocab_size=51864))
    for text in TEXTS:
        assert words(ours(text)) == words(BasicTextNormalizer()(text))


@pytest.mark.parametrize(
    ("config", "is_english"),
    [
        ({"generation": {"is_multilingual": False}}, True),
        ({"generation": {"is_multilingual": True}}, False),
        ({"generation": {"is_multilingual": True, "language": "en"}}, True),
        ({"generation": {"is_multilingual": True, "language": "<|de|>"}}, False),
        ({"generation": {"is_multilingual": True, "language": None}}, False),
        ({"vocab_size": 51864}, True),
        ({"vocab_size": 51865}, False),
        ({"vocab_size": 51866, "generation": {}}, False),
    ],
)
def test_the_language_is_what_the_model_says(config: dict[str, object], is_english: bool, tmp_path: Path) -> None:
    folder = model(tmp_path, model_type="whisper", **config)
    for name in ("auto", "whisper"):
        assert (words(normalizer(name, model=folder)("um, twenty-one")) == ["21"]) is is_english
    assert words(normalizer("auto", language="en", model=folder)("um, twenty-one")) == ["21"]
    assert words(normalizer("auto", language="de", model=folder)("um, twenty-one")) == ["um", "twenty", "one"]


def test_auto_is_plain_for_what_is_no_whisper(tmp_path: Path) -> None:
    folder = model(tmp_path, model_type="wav2vec2")
    for ours in (normalizer(model=folder), normalizer(), normalizer("auto", language="en"), normalizer("plain")):
        assert words(ours("Um, it's TWENTY-one (sic)!")) == ["um", "it's", "twenty", "one", "sic"]
    assert words(normalizer("whisper", model=folder)("Um, it's TWENTY-one!")) == ["it", "is", "21"]


def test_none_leaves_texts_as_they_are() -> None:
    for text in TEXTS:
        assert normalizer("none")(text) == text


def test_a_checkpoint_without_spellings_keeps_them_apart(tmp_path: Path) -> None:
    folder = model(tmp_path, model_type="whisper", vocab_size=51864)
    (folder / "normalizer.json").unlink()
    assert words(normalizer(model=folder)("Um, colour")) == ["colour"]


def test_the_real_normalizer_json_gives_what_its_tokenizer_gives(
    real: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    from transformers import WhisperTokenizer

    base = real["base"]
    tokenizer = WhisperTokenizer.from_pretrained(base, local_files_only=True)
    ours = normalizer("auto", model=base)
    texts = [text for _, text, _ in read_clips(request.getfixturevalue("clips"))]
    for text in [*texts, *TEXTS, "The colour of the theatre was analysed."]:
        assert words(ours(text)) == words(tokenizer.normalize(text))
    assert words(ours("colour")) == ["color"]


# --- plain ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Uh, the visitors, asked for pepper.", "uh the visitors asked for pepper"),
        ("well-known, it's o'clock; ROCK 'n' ROLL", "well known it's o'clock rock 'n' roll"),
        ("it\u2019s \u2018so\u2019", "it's 'so'"),
        ("a_b/c\\d@e#f 1.5 3,000", "a b c d e f 1 5 3 000"),
        ("GRÖSSER Straße", "grösser straße"),
        ("cafe\u0301", "café"),
        ("नमस्ते, दुनिया।", "नमस्ते दुनिया"),
        ("日本語。それは", "日本語 それは"),
        ("😀 ok — “yes”…", "ok yes"),
        ("", ""),
    ],
)
def test_plain(text: str, expected: str) -> None:
    assert " ".join(plain(text).split()) == expected


def test_plain_keeps_letters_digits_and_apostrophes_and_nothing_else() -> None:
    for text in random_texts():
        found = plain(text)
        assert plain(found) == found
        kept = [c for c in found if c != " "]
        assert all(c == "'" or c.isalnum() or unicodedata.category(c).startswith("M") for c in kept)
        expected = [c for c in unicodedata.normalize("NFC", text.lower()) if c.isalnum()]
        assert [c for c in kept if c.isalnum()] == expected


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Whisper", "", "english", None, 3])
def test_an_unknown_normaliser_is_refused(name: object) -> None:
    message = refusal(RequestError, normalizer, name)
    assert "normalizer must be auto, whisper, basic, plain or none, got" in message
    assert set(NORMALIZERS) == {"auto", "whisper", "basic", "plain", "none"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not valid JSON"),
        ('{"colour": 3}', "'colour' is 3, expected a spelling"),
        ('{"colour": "color", "colour": "x"}', "twice"),
        ("[]", "must be a JSON object"),
    ],
)
def test_a_damaged_normalizer_json_is_refused(content: str, expected: str, tmp_path: Path) -> None:
    folder = model(tmp_path, model_type="whisper", vocab_size=51864)
    (folder / "normalizer.json").write_text(content)
    message = refusal(HeaderError, normalizer, "whisper", model=folder)
    assert expected in message and "normalizer.json" in message


@pytest.mark.parametrize("name", ["basic", "whisper"])
def test_hostile_texts_take_no_longer_than_their_length_allows(name: str) -> None:
    ours = normalizer(name, language="en")
    for bracket in "<[(":
        text = bracket * 1_000_000
        assert "more than 1000 brackets that are never closed" in refusal(DataError, ours, text)
        assert words(ours(f"{bracket} one two")) != []
    assert words(ours(" " * 1_000_000 + "a")) == ["a"]
    assert words(ours("[noise] a " * 20_000)) == ["a"] * 20_000


def test_numbers_that_transformers_cannot_write_out_are_refused() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(4300)  # as Python begins; a library of another test may have lifted it
    try:
        for text in ("9" * 5000, "9" * 4300 + " trillion"):
            assert "cannot be normalised" in refusal(DataError, normalizer("whisper", language="en"), text)
    finally:
        sys.set_int_max_str_digits(before)
