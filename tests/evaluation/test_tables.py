"""Tables of utterances: .tsv, .csv and .jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from speech import refusal

import hsa
from hsa.errors import DataError
from hsa.evaluation.tables import MAX_ROW_LINES
from hsa.evaluation.utterance import DataSet, Utterance

ROWS = [
    {"file": "a.wav", "text": "Good morning, all.", "id": "u1", "speaker": "anna", "domain": "near"},
    {"file": "deep/b.wav", "text": 'She said "no"; twice', "id": "u2", "speaker": "ben", "domain": "far"},
    {"file": "a.wav", "text": "größer, 大きい", "id": "u3", "speaker": "", "domain": "far"},
]
TIMES = [("", ""), ("0.5", "1.25"), ("2", "")]


def table(folder: Path, ending: str, audio: str = "file", text: str = "text") -> Path:
    """The three rows as a table of this kind."""
    path = folder / f"small.{ending}"
    rows = [
        {audio: row["file"], text: row["text"], **{name: row[name] for name in ("id", "speaker", "domain")}}
        for row in ROWS
    ]
    for row, (start, end) in zip(rows, TIMES, strict=True):
        row.update(start=start, end=end)
    if ending == "jsonl":
        numbers = [{name: float(row[name]) if row[name] else None for name in ("start", "end")} for row in rows]
        lines = [json.dumps({**row, **times}) for row, times in zip(rows, numbers, strict=True)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif ending == "tsv":
        lines = ["\t".join(each) for each in (list(rows[0]), *(list(row.values()) for row in rows))]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) for row in rows]
        path.write_text("\r\n".join([",".join(rows[0]), *quoted]) + "\r\n", encoding="utf-8")
    return path


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def texts(data: DataSet) -> list[str]:
    return [each.text for each in data.utterances]


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("audio", "text"), [("file", "text"), ("path", "sentence"), ("audio", "transcript"), ("file", "transcription")]
)
def test_each_kind_of_table_gives_the_same_utterances(ending: str, audio: str, text: str, tmp_path: Path) -> None:
    data = hsa.data(table(tmp_path, ending, audio, text))
    assert data.utterances == (
        Utterance("u1", tmp_path / "a.wav", ROWS[0]["text"], "anna", "near"),
        Utterance("u2", tmp_path / "deep" / "b.wav", ROWS[1]["text"], "ben", "far", 0.5, 1.25),
        Utterance("u3", tmp_path / "a.wav", ROWS[2]["text"], None, "far", 2.0, None),
    )
    assert (data.name, data.path, data.notes) == ("small", tmp_path / f"small.{ending}", ())


def test_names_of_columns_in_any_case_and_columns_that_are_not_asked_for(tmp_path: Path) -> None:
    content = "client_id\tPath\tSentence\tup_votes\nx\ta.mp3\tHello.\t2\n"
    (one,) = hsa.data(written(tmp_path, "validated.tsv", content)).utterances
    assert one == Utterance("a.mp3", tmp_path / "a.mp3", "Hello.")


def test_quotation_marks_of_a_tsv_are_text(tmp_path: Path) -> None:
    content = 'file\ttext\na.wav\t"Stay, he said\nb.wav\tno "end\n'
    assert texts(hsa.data(written(tmp_path, "t.tsv", content))) == ['"Stay, he said', 'no "end']


def test_a_cell_of_a_csv_may_hold_commas_quotes_and_ends_of_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", 'file,text\na.wav,"one, ""two""\nthree"\n\nb.wav,four\nc.wav\n')
    assert "line 6" in refusal(DataError, hsa.data, path)
    path.write_text(path.read_text().removesuffix("c.wav\n"))
    assert texts(hsa.data(path)) == ['one, "two"\nthree', "four"]


def test_without_ids_the_path_and_the_times_tell_utterances_apart(tmp_path: Path) -> None:
    content = "file\ttext\tstart\tend\na.wav\tone\t0\t1\na.wav\ttwo\t1\t\na.wav\tthree\t\t\n"
    data = hsa.data(written(tmp_path, "t.tsv", content))
    assert [each.id for each in data.utterances] == ["a.wav:0.0-1.0", "a.wav:1.0-", "a.wav"]


def test_whole_numbers_of_a_jsonl_serve_as_ids_and_speakers(tmp_path: Path) -> None:
    (one,) = hsa.data(written(tmp_path, "t.jsonl", '{"file": "a", "text": "b", "id": 7, "speaker": 0}')).utterances
    assert (one.id, one.speaker) == ("7", "0")


@pytest.mark.parametrize("ending", ["tsv", "csv"])
def test_a_table_of_two_columns_may_lack_their_names(ending: str, tmp_path: Path) -> None:
    comma = "\t" if ending == "tsv" else ","
    path = written(tmp_path, f"t.{ending}", f"a.wav{comma}one\nb.wav{comma}two\n")
    assert "expected one column named file, path" in refusal(DataError, hsa.data, path)
    (tmp_path / "a.wav").touch()
    data = hsa.data(path)
    assert texts(data) == ["one", "two"]
    assert data.notes == (f"{path} has no column names: its two columns are taken as file and text",)


def test_transcripts_tsv_needs_no_column_names_and_may_have_them(tmp_path: Path) -> None:
    path = written(tmp_path, "transcripts.tsv", "a.wav\tone\nb.wav\ttwo\n")
    assert texts(hsa.data(path)) == texts(hsa.data(tmp_path)) == ["one", "two"]
    assert hsa.data(path).name == hsa.data(tmp_path).name == tmp_path.name
    path.write_text("file\ttext\na.wav\tone\n")
    assert texts(hsa.data(path)) == ["one"]


# --- what is wrong with a table ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.tsv", "", "is empty"),
        ("t.tsv", "\n\n", "is empty"),
        ("t.tsv", "file\ttext\n", "holds no utterance"),
        ("t.jsonl", "\n", "holds no utterance"),
        ("t.txt", "file\ttext\na\tb\n", "ends in '.txt'"),
        ("t", "file\ttext\na\tb\n", "expected a table that ends in .tsv, .csv or .jsonl"),
        ("t.tsv", "file\ttext\na.wav\n", "line 2 has 1 cells, expected 2"),
        ("t.tsv", "file\ttext\na.wav\tone\ttwo\n", "line 2 has 3 cells, expected 2"),
        ("t.tsv", "file\ttext\na.wav\tone\n \nb.wav\ttwo\n", "line 3 has 1 cells"),
        ("t.csv", "file,text\na.wav,one,two\n", "line 2 has 3 cells, expected 2"),
        ("t.csv", 'file,text\na.wav,"one" more\n', "line 2 is no row of a .csv"),
        ("t.csv", 'file,text\na.wav,"one\n', "is no row of a .csv"),
        ("t.csv", f"file,text\na.wav,{'x' * 200_000}\n", "line 2 is no row of a .csv"),
        ("t.tsv", "file\twords\na.wav\tone\n", "line 1: expected one column named text, sentence, transcript"),
        ("t.tsv", "file\tpath\ttext\na\tb\tc\n", "file and path are given"),
        ("t.tsv", "file\ttext\ttext\na\tb\tc\n", "text and text are given"),
        ("t.tsv", "file\ttext\tid\tid\na\tb\tc\td\n", "names the column id 2 times"),
        ("t.tsv", "file\ttext\n\tone\n", "line 2 names no audio file"),
        ("t.tsv", "file\ttext\tid\na\tb\tc\nd\te\tc\n", "line 3: id 'c' occurs a second time"),
        ("t.tsv", "file\ttext\na\tb\na\tc\n", "line 3: 'a' occurs a second time; give the rows ids"),
        ("t.tsv", "file\ttext\tstart\tend\na\tb\t1\t2\na\tc\t1.0\t2.0\n", "line 3: 'a:1.0-2.0' occurs a second time"),
        ("t.tsv", "\t" * 2000 + "\nx\n", "has 2001 columns, at most 1000"),
        ("t.tsv", f"file\ttext\na.wav\t{'x' * (1 << 20)}\n", "line 2 has more than 1048576 bytes"),
        ("t.csv", 'file,text\na.wav,"' + "x\n" * (MAX_ROW_LINES + 1), "line 2 begins a row of more than 1000 lines"),
        ("t.jsonl", '{"file": "a", "text": "b"', "line 1 is not valid JSON"),
        ("t.jsonl", '["a", "b"]', "expected a JSON object"),
        ("t.jsonl", '{"file": "a", "text": "b", "file": "c"}', "it names 'file' twice"),
        ("t.jsonl", '{"file": "a", "text": "b", "end": NaN}', "it holds NaN"),
        ("t.jsonl", '{"file": "a", "text": null}', "text is None, expected a text"),
        ("t.jsonl", '{"file": {"bytes": ""}, "text": "b"}', "file is {'bytes': ''}, expected a text"),
        ("t.jsonl", '{"file": "a", "text": "b"}\n{"text": "b"}', "line 2: file is None"),
        ("t.jsonl", '{"file": "a", "text": "b", "speaker": [1]}', "speaker is [1], expected a text"),
        ("t.jsonl", '{"file": "a", "text": "b", "id": true}', "id is True, expected a text"),
        ("t.jsonl", '{"file": "a\\u0000", "text": "b"}', "no valid text"),
        ("t.jsonl", '{"file": "a", "text": "\\ud800"}', "no valid text"),
        ("t.jsonl", "[" * 100_000, "nested too deeply"),
        ("t.jsonl", '{"file": "a", "text": "b", "start": ' + "9" * 6000 + "}", "line 1"),
        ("t.jsonl", '{"file": "a", "text": "b", "start": 1e999}', "start is inf"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(name: str, content: str, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    message = refusal(DataError, hsa.data, path)
    assert expected in message and str(path) in message


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("soon", "", "start is 'soon', expected seconds such as 1.25"),
        ("1_0", "", "start is '1_0'"),
        ("nan", "", "start is nan, expected seconds of at least 0"),
        ("", "inf", "end is inf"),
        ("-0.5", "", "start is -0.5"),
        ("", "0", "end is 0.0, expected more than the start, 0.0"),
        ("2", "1.5", "end is 1.5, expected more than the start, 2.0"),
    ],
)
def test_times_that_are_none_are_refused(start: str, end: str, expected: str, ending: str, tmp_path: Path) -> None:
    row = {"file": "a.wav", "text": "one", "start": start, "end": end}
    comma = "," if ending == "csv" else "\t"
    content = json.dumps(row) if ending == "jsonl" else f"{comma.join(row)}\n{comma.join(row.values())}\n"
    assert expected in refusal(DataError, hsa.data, written(tmp_path, f"t.{ending}", content))


# --- encodings --------------------------------------------------------------------------------------------------------

ENCODED = {
    "tsv": "file\ttext\na.wav\tgrößer\n",
    "csv": "file,text\na.wav,größer\n",
    "jsonl": '{"file": "a.wav", "text": "größer"}\n',
}


@pytest.mark.parametrize("ending", ENCODED)
@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-16", "line 1 begins with the mark of UTF-16; save the file as UTF-8"),
        ("utf-16-le", "line 1 holds a NUL byte"),
        ("utf-16-be", "line 1 holds a NUL byte"),
        ("utf-32", "line 1 begins with the mark of UTF-16"),
        ("latin-1", "is not UTF-8 (byte 0xf6 at position"),
        ("cp1252", "is not UTF-8"),
    ],
)
def test_other_encodings_are_refused(ending: str, encoding: str, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"t.{ending}", ENCODED[ending].encode(encoding))
    assert expected in refusal(DataError, hsa.data, path)


@pytest.mark.parametrize("ending", ENCODED)
def test_a_byte_order_mark_of_utf_8_is_no_part_of_the_table(ending: str, tmp_path: Path) -> None:
    plain = hsa.data(written(tmp_path, f"t.{ending}", ENCODED[ending]))
    marked = hsa.data(written(tmp_path, f"t.{ending}", ENCODED[ending].encode("utf-8-sig")))
    assert marked == plain and texts(plain) == ["größer"]


@pytest.mark.parametrize("ending", ENCODED)
def test_ends_of_lines_of_windows_make_no_difference(ending: str, tmp_path: Path) -> None:
    plain = hsa.data(written(tmp_path, f"t.{ending}", ENCODED[ending]))
    assert hsa.data(written(tmp_path, f"t.{ending}", ENCODED[ending].replace("\n", "\r\n"))) == plain


# --- audio folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", 'file_name,transcription\nclips/a.wav,"Hello, you."\n'),
        ("metadata.jsonl", '{"file_name": "clips/a.wav", "transcription": "Hello, you."}\n'),
    ],
)
def test_an_audio_folder_is_read_by_its_metadata(name: str, content: str, tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    folder.mkdir()
    written(folder, name, content)
    data = hsa.data(folder)
    assert data.utterances == (Utterance("clips/a.wav", folder / "clips" / "a.wav", "Hello, you."),)
    assert data.name == hsa.data(folder / name).name == "speech"
    assert hsa.data(folder / name).utterances == data.utterances


def test_an_audio_folder_without_file_name_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "metadata.csv", "file,text\na.wav,b\n")
    assert "expected one column named file_name" in refusal(DataError, hsa.data, tmp_path)
