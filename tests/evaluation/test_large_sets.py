"""What huge sets cost, counted in lines read, files opened and utterances copied."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peak_memory import with_peak
from speech_sets import RATE, noise, write_ctc, write_set

import hsa
from hsa.errors import DataError, RequestError
from hsa.evaluation import files, tables
from hsa.evaluation.hypotheses import Hypotheses, Transcript
from hsa.evaluation.prepared import AudioDigests, open_sets, prepare
from hsa.evaluation.utterance import Utterance

ROWS = 100_000


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is opened, by its name."""
    counts: Counter[str] = Counter()
    real = files.open_file

    def counting(path: Any, *arguments: Any) -> int:
        counts[Path(path).name] += 1
        return real(path, *arguments)

    monkeypatch.setattr(files, "open_file", counting)
    return counts


def write_large(folder: Path, kind: str) -> Path:
    """A set of many rows, of whom the fifth is none that can be read, except in Kaldi's directory."""
    if kind == "kaldi":
        (folder / "wav.scp").write_text("".join(f"u{place} clips/{place}.wav\n" for place in range(ROWS)))
        (folder / "text").write_text("".join(f"u{place} the words\n" for place in reversed(range(ROWS))))
        (folder / "utt2spk").write_text("".join(f"u{place} s{place % 9}\n" for place in range(ROWS)))
        return folder
    if kind == "jsonl":
        lines = [json.dumps({"file": f"{place}.wav", "text": "the words"}) for place in range(ROWS)]
        lines[4] = "{"
    else:
        comma = {"tsv": "\t", "csv": ","}[kind]
        lines = [f"file{comma}text", *(f"{place}.wav{comma}the words" for place in range(ROWS))]
        lines[5] = comma.join("abc")
    path = folder / f"t.{kind}"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_a_limit_reads_no_line_after_its_rows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lines = write_large(tmp_path, kind), 0
    real = tables.read_lines

    def counting(path: Path) -> Iterator[tuple[int, str]]:
        nonlocal lines
        for each in real(path):
            lines += 1
            yield each

    monkeypatch.setattr(tables, "read_lines", counting)
    assert [each.id for each in hsa.data(path, limit=4).utterances] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert lines == (4 if kind == "jsonl" else 5)
    with pytest.raises(DataError, match=f"line {5 if kind == 'jsonl' else 6}"):
        hsa.data(path, limit=5)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "kaldi"])
def test_a_limit_bounds_the_memory(kind: str, tmp_path: Path) -> None:
    path = write_large(tmp_path, kind)
    bound = 2_000_000
    data, peak = with_peak(lambda: hsa.data(path, limit=3), bound)
    assert len(data.utterances) == 3
    assert peak < bound


def test_a_limit_of_a_kaldi_directory_takes_its_first_texts(tmp_path: Path) -> None:
    found = hsa.data(write_large(tmp_path, "kaldi"), limit=3)
    assert [(each.id, each.audio.name, each.speaker) for each in found.utterances] == [
        (f"u{place}", f"{place}.wav", f"s{place % 9}") for place in range(ROWS - 1, ROWS - 4, -1)
    ]
    assert found.notes == ()
    with (tmp_path / "wav.scp").open("a") as file:
        file.write("v sox a.wav |\n")
    with pytest.raises(DataError, match="is a command"):
        hsa.data(tmp_path, limit=3)


def test_a_limit_of_segments_takes_their_recordings(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("one 1.wav\ntwo 2.wav\n")
    (tmp_path / "text").write_text("b ab\na bee\nc cad\n")
    (tmp_path / "segments").write_text("a one 0 1\nb two 1 2\nc three 0 1\n")
    found = hsa.data(tmp_path, limit=2).utterances
    assert [(each.id, each.audio.name, each.start) for each in found] == [("b", "2.wav", 1.0), ("a", "1.wav", 0.0)]
    with pytest.raises(DataError, match=r"'three' is not in wav\.scp"):
        hsa.data(tmp_path, limit=3)


@pytest.mark.parametrize("limit", [0, -1, True, "3"])
def test_what_is_no_limit(limit: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="limit must be a whole number of at least 1"):
        hsa.data(tmp_path, limit=limit)


def test_audio_that_the_limit_leaves_out_is_not_looked_at(tmp_path: Path, opened: Counter[str]) -> None:
    table = write_set(tmp_path / "speech", (0.4, 0.5, 0.6, 0.3))
    (table.parent / "clip_003.wav").unlink()
    with table.open("a") as file:
        file.writelines(f"{place}.wav\tab\n" for place in range(ROWS))
    found = hsa.evaluate(write_ctc(tmp_path / "model"), table, limit=3, device="cpu")
    assert found.decoded == 3
    clips = {name: count for name, count in opened.items() if name.endswith((".wav", ".tsv"))}
    assert clips == {"set.tsv": 1, **{f"clip_00{place}.wav": 3 for place in range(3)}}  # digest, header, decoding


def test_a_recording_is_opened_twice_however_many_utterances_lie_in_it(tmp_path: Path, opened: Counter[str]) -> None:
    import soundfile

    for name in ("one.wav", "two.wav"):
        soundfile.write(tmp_path / name, noise(2.0, 1), RATE)
    rows = [f"{'one' if place % 2 else 'two'}.wav\tab\t{place / 2000}\t{place / 2000 + 0.5}" for place in range(3000)]
    table = tmp_path / "t.tsv"
    table.write_text("\n".join(["file\ttext\tstart\tend", *rows]))
    sets = open_sets([f"first={table}", f"second={table}"])
    assert all(len({id(each.audio) for each in data.utterances}) == 2 for data in sets)
    digests = AudioDigests()
    ready = [prepare(each, None, digests) for each in sets]
    assert opened == {"t.tsv": 2, "one.wav": 2, "two.wav": 2}
    assert ready[0].digest == ready[1].digest
    assert set(ready[0].seconds.values()) == {0.5}


def test_the_digest_of_a_set_is_that_of_its_lines(tmp_path: Path) -> None:
    from blake3 import blake3

    data = hsa.data(write_set(tmp_path, (0.4, 0.5)))
    audio = [blake3(each.audio.read_bytes()).hexdigest() for each in data.utterances]
    lines = [json.dumps([each.id, digest, None, None]) for each, digest in zip(data.utterances, audio, strict=True)]
    assert prepare(data, None, AudioDigests()).digest == blake3("\n".join(lines).encode()).hexdigest()


class CountedTuple(tuple[Utterance, ...]):
    """Counts the items that are taken from it, one by one or in slices."""

    taken = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        type(self).taken += len(found) if isinstance(place, slice) else 1
        return found


def test_batches_take_each_utterance_a_fixed_number_of_times() -> None:
    count, batch = 1000, 4
    order = CountedTuple(Utterance(f"u{place}", Path("/a.wav"), "") for place in range(count))
    kept = Hypotheses(None, "x", {}, order, batch)
    with kept.appending():
        while found := kept.missing[:batch]:
            kept.add([Transcript(each.id, "ab") for each in found])
    assert list(kept.texts) == [each.id for each in order]
    assert len(kept.missing) == 0
    assert count <= CountedTuple.taken <= 3 * count
