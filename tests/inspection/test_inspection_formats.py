"""`hsa inspect` in every format: CSV read back, pictures, tables, pages, and hostile names in them."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from forger import HOSTILE, forge
from helpers import run_hsa

import hsa
from hsa.inspection.inspect import Inspection
from hsa.outputs import provenance
from hsa.system.manifest import PROVENANCE
from hsa.views import csv_file, page, picture, table

Triple = dict[str, Path]


# --- formats ------------------------------------------------------------------------------------------------------


def test_csv_reads_back(mixed: Triple) -> None:
    found = hsa.inspect(**mixed, targets="attention-all", energy=False)
    rows = list(csv.DictReader(io.StringIO(csv_file.render(found).decode("utf-8"))))
    assert len(rows) == found.total_heads
    for row in rows:
        tensor, head = found.tensors[row["tensor"]], int(row["head"])
        assert tensor.squared is not None
        assert tensor.geometry is not None
        assert float(row["score"]) == tensor.scores[head]
        assert float(row["squared_score"]) == tensor.squared[head]
        assert row["selected"] == str(int(head in tensor.selected))
        assert float(row["lambda_i"]) == tensor.coefficient
        assert float(row["tv2_norm"]) == math.sqrt(tensor.geometry.secondary[head])
        cosine = tensor.geometry.cosines[head]
        assert row["cosine"] == ("" if cosine is None else repr(cosine))
        assert (row["stack"], int(row["layer"])) == (tensor.projection.stack, tensor.projection.layer)
    assert sum(row["cosine"] == "" for row in rows) == 1
    alone = next(csv.DictReader(io.StringIO(csv_file.render(hsa.inspect(**mixed, energy=False)).decode())))
    assert list(alone) == list(csv_file.COLUMNS)


def test_png_shows_the_maps(shared_triple: Triple) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws pictures")
    from matplotlib import image

    drawn = []
    for k in (0.0, 0.5):
        pages = picture.render(hsa.inspect(**shared_triple, k=k, energy=False))
        assert pages.keys() == {""}
        data = pages[""]
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert pages == picture.render(hsa.inspect(**shared_triple, k=k, energy=False))
        width, height = struct.unpack(">II", data[16:24])
        pixels = image.imread(io.BytesIO(data))
        assert pixels.shape[:2] == (height, width)
        assert width > 1000
        assert len({tuple(pixel) for pixel in (pixels[::7, ::7] * 255).astype(int).reshape(-1, 4).tolist()}) > 50
        drawn.append(pixels)
    assert drawn[0].shape == drawn[1].shape
    black = [(pixels[..., :3] < 0.02).all(-1).sum() for pixels in drawn]
    assert black[1] > black[0] + 10_000  # the frames of the heads merged


def test_a_picture_takes_any_title(merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws pictures")
    strange = tmp_path / "$x_{$ \\frac \u8a9e\U0001f600"
    strange.mkdir()
    shutil.copy(merged / PROVENANCE, strange)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.render(hsa.inspect(strange))[""][:4] == b"\x89PNG"


def size_of(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def like_large_v3(found: Inspection) -> Inspection:
    """The inspection of a model with 32 layers of 20 heads, its numbers repeated from a small one's."""
    tensors = {}
    for small in found.tensors.values():
        if small.projection.layer:
            continue
        for layer in range(32):
            name = small.name.replace("layers.0.", f"layers.{layer}.")
            place = replace(
                small.projection, layer=layer, name=small.projection.name.replace("layers.0.", f"layers.{layer}.")
            )
            scores = tuple(small.scores[head % small.heads] for head in range(20))
            selected = tuple(head for head in range(20) if head % small.heads in small.selected)
            tensors[name] = replace(
                small,
                name=name,
                projection=place,
                heads=20,
                layers=32,
                scores=scores,
                squared=None,
                selected=selected,
                geometry=None,
            )
    return replace(found, tensors=tensors)


def test_pictures_of_a_large_model_are_pages_that_fit_a_screen(shared_triple: Triple, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws pictures")
    large = like_large_v3(hsa.inspect(**shared_triple, targets="attention-all", energy=False))
    pages = picture.render(large)
    assert pages.keys() == {"", "decoder-self_attn", "decoder-encoder_attn"}
    for png in pages.values():
        width, height = size_of(png)
        assert 1000 < width < 6000 and 1000 < height < 3000


def test_pages_are_written_beside_each_other_or_none(shared_triple: Triple, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws pictures")
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    command = ["inspect", *sources, "--targets=attention-qkv", "--no-energy", f"--png={tmp_path / 'heads.png'}"]
    names = ["heads-decoder-encoder_attn.png", "heads-decoder-self_attn.png", "heads.png"]
    (tmp_path / names[0]).write_text("somebody's")
    refused = run_hsa(*command)
    assert refused.returncode == 2 and names[0] in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == names[:1]
    done = run_hsa(*command, "--overwrite", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert sorted(json.loads(done.stdout)["written"]["png"]) == sorted(str(tmp_path / name) for name in names)


def test_tables_fit_80_columns_and_break_neither_words_nor_rows_of_heads(shared_triple: Triple, merged: Path) -> None:
    small = hsa.inspect(**shared_triple, targets="attention-all")
    for found in (small, like_large_v3(small)):
        text = table.render(found)
        assert max(map(len, text.splitlines())) <= 80
        words = set(text.split())
        for tensor in found.tensors.values():
            row = "".join("#" if head in tensor.selected else "." for head in range(tensor.heads))
            assert row in words
        assert {"projection", "lambda_i", "margin", "merged", "chance", "Jaccard", "self_attn"} <= words
        wide = table.render(found, wide=True)
        assert {"least", "greatest"} <= set(wide.split())
        assert max(map(len, wide.splitlines())) > 80


def test_a_row_of_very_many_heads_is_shown_whole_or_not_at_all(shared_triple: Triple) -> None:
    found = hsa.inspect(**shared_triple, energy=False)
    many = replace(next(iter(found.tensors.values())), heads=200, selected=tuple(range(0, 200, 2)), scores=(1.0,) * 200)
    text = table.render(replace(found, tensors={many.name: many}))
    assert max(map(len, text.splitlines())) <= 80
    assert "see --wide" in text
    assert "#." * 100 in table.render(replace(found, tensors={many.name: many}), wide=True)


def test_every_format_from_the_command_line(shared_triple: Triple, merged: Path, tmp_path: Path) -> None:
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    files = {name: tmp_path / f"view.{name}" for name in ("csv", "png", "html")}
    options = [f"--{name}={path}" for name, path in files.items()]
    done = run_hsa("inspect", *sources, *options, "--json", "--k=0.3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document.pop("written") == {name: [str(path)] for name, path in files.items()}
    expected = hsa.inspect(**shared_triple, k=0.3)
    assert document == json.loads(json.dumps(expected.as_dict()))
    assert document["energy"]["primary"]["inside"] + document["energy"]["primary"]["elsewhere"] == pytest.approx(1)
    assert files["csv"].read_bytes() == csv_file.render(expected)
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert files["html"].read_bytes() == page.render(expected)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files.values()}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {(tmp_path / "view.csv").stat().st_mode & 0o777}
    again = run_hsa("inspect", os_path(merged), options[0])
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists; give another name, or --overwrite" in again.stderr
    replaced = run_hsa("inspect", os_path(merged), options[0], "--overwrite", "--quiet")
    assert (replaced.returncode, replaced.stdout) == (0, "")
    assert files["csv"].read_bytes() == csv_file.render(hsa.inspect(merged))


def os_path(path: Path) -> str:
    return str(path)


def test_the_table_of_an_output_answers_what_how_and_which(merged: Path) -> None:
    done = run_hsa("inspect", merged)
    assert done.returncode == 0, done.stderr
    record = provenance.load(merged).record
    for source in record.sources.values():
        assert source.identity.id in done.stdout
        assert source.targets[:16] in done.stdout
    assert "k 0.6, lambda 0.5, alpha 0.2, targets encoder-qkv, numerics exact" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    for target in record.targets:
        p = target.projection
        heads = "".join("#" if head in target.selected else "." for head in range(target.heads))
        (row,) = [line for line in lines if line[:3] == [str(p.layer), p.kind, p.part] and len(line) > 4]
        assert row[3] == heads
        assert row[6] == f"{target.coefficient:.4f}"
    assert "hsa: note: cosines" in done.stderr
    assert f"bytes: still what was written, {len(list(merged.iterdir()))} files read" in done.stdout


def test_one_command_says_whether_the_bytes_are_what_was_written(merged: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(merged, tmp_path / "out"))
    weights = output / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = run_hsa("inspect", output)
    assert done.returncode == 2
    assert "hsa: problem: model.safetensors: " in done.stderr
    assert "bytes: not what was written, 1 problem\n" in done.stdout
    document = json.loads(run_hsa("inspect", output, "--json").stdout)
    assert document["verification"]["ok"] is False
    assert [problem["file"] for problem in document["verification"]["problems"]] == ["model.safetensors"]
    quick = run_hsa("inspect", output, "--no-verify", "--json")
    assert quick.returncode == 0
    assert json.loads(quick.stdout) == json.loads(json.dumps(hsa.inspect(output).as_dict()))


def test_without_digests_the_verdict_claims_no_more_than_it_can(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**shared_triple, output=tmp_path / "out", digest=False, sync=False)
    done = run_hsa("inspect", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "without digests no more can be told" in done.stdout
    assert "still what was written" not in done.stdout


def test_hostile_names_are_plain_text(merged: Path, tmp_path: Path) -> None:
    shutil.copy(merged / PROVENANCE, tmp_path)
    script = "</script><script>hit()</script><!-- @DATA@ " + HOSTILE
    forge(tmp_path, sources__base__id=script, parameters__card={"notes": HOSTILE})
    done = run_hsa("inspect", tmp_path, "--no-verify")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "[red]x[/red]\\x1b[31m<img src=x onerror=hit()>" in done.stdout
    html = page.render(hsa.inspect(tmp_path)).decode("utf-8")
    assert html.count("<script") == 2
    assert html.count("</script>") == 2
    assert "<img" not in html
    assert "<!-- @" not in html
    start = html.index('id="data">') + len('id="data">')
    held = json.loads(html[start : html.index("</script>", start)])
    assert held["sources"]["base"]["id"] == script
    assert held == json.loads(json.dumps(hsa.inspect(tmp_path).as_dict()))


# --- refusals -----------------------------------------------------------------------------------------------------


def test_without_matplotlib_the_picture_is_refused_before_anything_is_read(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(hsa.RequestError, match=r'pip install "hsa-merge\[plot\]"'):
        picture.check_installed()
