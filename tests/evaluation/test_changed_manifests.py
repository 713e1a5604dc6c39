"""Manifests with changed bytes: each is read or refused in one line, and what is read could be written again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import hsa
from hsa.errors import HsaError

SOUND = {
    "t.tsv": "file\ttext\tid\tstart\tend\na.wav\tone, größer\tu1\t0\t1.5\n../b.wav\ttwo\tu2\t\t\n",
    "t.csv": 'file,text,speaker\na.wav,"one, ""größer""\nthree",anna\nb.wav,two,ben\n',
    "t.jsonl": '{"file": "a.wav", "text": "one \\u00e9", "id": 3, "start": 0.5}\n{"file": "b", "text": ""}\n',
    "wav.scp": "r1 a.wav\nr2 ../b c.wav\n",
    "text": "u1 one größer\nu2 two\n",
    "segments": "u1 r1 0 1.5\nu2 r2 1 -1\n",
    "utt2spk": "u1 anna\nu2 ben\n",
}
PIECES = [b"\t", b"\n", b"\r", b'"', b",", b"|", b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\\u0000", b"\\ud800", b"1e999"]
PIECES += [b"{", b"[", b"}", b"-1", b"nan", b"/", b"..", b" ", b"\xe9", b"\xc3\xa9", b"9" * 40, b"u1", b"\x0b", b"\x85"]


def changed(drawn: random.Random, data: bytes) -> bytes:
    for _ in range(drawn.choice((1, 1, 2, 5))):
        place = drawn.randrange(len(data) + 1)
        end = place + drawn.choice((0, 0, 1, 3))
        data = data[:place] + drawn.choice((drawn.choice(PIECES), drawn.randbytes(1), b"")) + data[end:]
    return data


@pytest.mark.parametrize("name", SOUND)
def test_a_changed_manifest_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    is_kaldi = not name.startswith("t.")
    for each in SOUND:
        if is_kaldi != each.startswith("t."):
            (tmp_path / each).write_text(SOUND[each], encoding="utf-8")
    path = tmp_path if is_kaldi else tmp_path / name
    drawn = random.Random(name)
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        (tmp_path / name).write_bytes(changed(drawn, SOUND[name].encode("utf-8")))
        try:
            data = hsa.data(path)
        except HsaError as error:
            assert str(error).isprintable() and str(tmp_path) in str(error)
            outcomes[False] += 1
        else:
            outcomes[True] += 1
            assert len({each.id for each in data.utterances}) == len(data.utterances) > 0
            for each in data.utterances:
                assert "\0" not in f"{each.id}{each.audio}{each.text}{each.speaker}{each.domain}"
                assert f"{each.id}{each.audio}{each.text}{each.speaker}{each.domain}".encode()
                assert each.audio.is_absolute() and 0 <= (each.start or 0.0) < (each.end or float("inf"))
    assert all(count > 20 for count in outcomes.values()), outcomes
