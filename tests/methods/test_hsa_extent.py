"""How much a merge merged: the figures of every report, against the written output in float64."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merge_arguments, read_tensors, run_hsa, write_tensors
from processes import ROOT

import hsa
from hsa.methods.hsa import HsaSettings
from hsa.methods.hsa_extent import Extent, merge_more_hint, percent
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = Mapping[str, Path]


def measured(sources: Triple, output: Path, report: Any) -> dict[str, float]:
    """The sizes by torch in float64, over the tensors of a report."""
    held = {role: read_tensors(place) for role, place in {**sources, "output": output}.items()}
    total = dict.fromkeys(("base", "one", "two", "product", "moved"), 0.0)
    for name in report.tensors:
        b, m1, m2, out = (held[role][name].double() for role in ("base", "primary", "secondary", "output"))
        pairs = {"base": (b, b), "one": (m1 - b, m1 - b), "two": (m2 - b, m2 - b), "product": (m1 - b, m2 - b)}
        for key, (x, y) in {**pairs, "moved": (out - m1, out - m1)}.items():
            total[key] += float((x * y).sum())
    return {
        "primary": math.sqrt(total["one"] / total["base"]),
        "secondary": math.sqrt(total["two"] / total["base"]),
        "cosine": total["product"] / math.sqrt(total["one"] * total["two"]),
        "change": math.sqrt(total["moved"] / total["one"]),
    }


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"k": 0.3, "lam": 0.1, "alpha": 1.0, "targets": "attention-all"},
        {"attention_scale": 1.5, "k": 0.5, "lam": 0.2},
        {"attention_scale": -0.5, "non_attention_scale": 2.0},
        {"k": 0.0, "attention_scale": 0.25},
        {"k": 1.0, "lam": 0.0},
        {"numerics": "reference"},
        {"targets": "attention-qkv", "backend": "cpu", "threads": 1},
    ],
    ids=str,
)
def test_the_extent_is_that_of_the_written_output(
    shared_triple: Triple, parameters: dict[str, Any], tmp_path: Path
) -> None:
    report = hsa.merge(**shared_triple, output=tmp_path / "out", sync=False, **parameters)
    right = measured(shared_triple, tmp_path / "out", report)
    found = {name: getattr(report.extent, name) for name in right}
    assert found == pytest.approx(right, rel=2e-4, abs=1e-6), "the float32 output is rounded"
    weights = [1 - tensor.coefficient for tensor in report.tensors.values() if tensor.selected]
    assert report.extent.weights == ((min(weights), max(weights)) if weights else None)
    assert (report.extent.merged_heads, report.extent.total_heads) == (report.selected_heads, report.total_heads)


def test_the_extent_of_the_real_triple(real: Triple, tmp_path: Path) -> None:
    report = hsa.merge(**real, output=tmp_path / "out", sync=False, dtype="float32")
    right = measured(real, tmp_path / "out", report)
    assert {name: getattr(report.extent, name) for name in right} == pytest.approx(right, rel=1e-4)
    assert report.extent.text.startswith("secondary weighs 3 to 13 % in 80 of 120 heads; ")


def test_nearly_equal_fine_tunes_have_a_change_with_correct_digits(shared_triple: Triple, tmp_path: Path) -> None:
    one = read_tensors(shared_triple["primary"])
    generator = torch.Generator().manual_seed(0)
    near = {name: t + torch.randn(t.shape, generator=generator) * 1e-5 for name, t in one.items()}
    place = tmp_path / "near"
    place.mkdir()
    for name in ("config.json", "generation_config.json"):
        (place / name).write_bytes((shared_triple["primary"] / name).read_bytes())
    write_tensors(place, near)
    sources = {**shared_triple, "secondary": place}
    report = hsa.merge(**sources, output=tmp_path / "out", sync=False, lam=0.0, k=1.0)
    right = measured(sources, tmp_path / "out", report)["change"]
    assert 0.005 < right < 0.02
    assert report.extent.change == pytest.approx(right, rel=1e-3)


def test_huge_values_neither_overflow_nor_vanish(shared_triple: Triple, tmp_path: Path) -> None:
    """Squares of these lie beyond float32."""
    sources = {}
    for role, place in shared_triple.items():
        sources[role] = tmp_path / role
        sources[role].mkdir()
        for name in ("config.json", "generation_config.json"):
            (sources[role] / name).write_bytes((place / name).read_bytes())
        write_tensors(sources[role], {name: t * 2.0**100 for name, t in read_tensors(place).items()})
    plain = hsa.merge(**shared_triple, output=tmp_path / "plain", sync=False).extent
    found = hsa.merge(**sources, output=tmp_path / "out", sync=False)
    for name in ("primary", "secondary", "cosine", "change"):
        assert getattr(found.extent, name) == pytest.approx(getattr(plain, name), rel=1e-5)
    assert not any("hardly" in warning or "nothing" in warning for warning in found.warnings)


BACKENDS = """
import json, sys
import gpu  # which makes the interpreter faster
import hsa
for number, backend in enumerate(("cpu", "triton")):
    for code, parameters in enumerate(({}, {"targets": "attention-all", "attention_scale": 0.5})):
        report = hsa.merge(
            base=sys.argv[1], primary=sys.argv[2], secondary=sys.argv[3], output=f"{sys.argv[4]}/{number}{code}",
            backend=backend, sync=False, **parameters,
        )
        print(json.dumps([report.backend, report.extent.as_dict()]))
"""


def test_every_backend_reports_the_same_extent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    sources = write_triple(tmp_path / "sources", SHAPES["test"], dtype="bfloat16", processor=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support"))
    done = subprocess.run(
        [sys.executable, "-c", BACKENDS, *map(str, sources.values()), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [backend for backend, _ in lines] == ["cpu", "cpu", "triton", "triton"]
    for (_, ours), (_, theirs) in zip(lines[:2], lines[2:], strict=True):
        assert theirs["secondary_weight"] == ours["secondary_weight"]
        assert theirs["change"] == pytest.approx(ours["change"], rel=1e-5)
        assert theirs["task_vectors"] == pytest.approx(ours["task_vectors"], rel=1e-5, abs=1e-6)


# --- where it is said -------------------------------------------------------------------------------------------


def test_every_report_says_how_much_was_merged(shared_triple: Triple, tmp_path: Path) -> None:
    """A merge, a patch, a patch applied, a dry run, a sweep."""
    merge = hsa.merge(**shared_triple, output=tmp_path / "out", sync=False)
    patch = hsa.merge_patch(**shared_triple, output=tmp_path / "patch.safetensors", sync=False)
    applied = hsa.apply(shared_triple["primary"], tmp_path / "patch.safetensors", output=tmp_path / "a", sync=False)
    swept = hsa.sweep(**shared_triple, output=tmp_path / "sweep", lam=[0.5, 0.1], sync=False)
    again = hsa.sweep(**shared_triple, output=tmp_path / "sweep", lam=[0.5, 0.1], sync=False)
    assert patch.extent == merge.extent
    assert swept.extents["encoder-qkv_k0.6_lambda0.5_alpha0.2"] == merge.extent
    assert len(swept.extents) == 2
    assert again.extents == {}, "points that were there are not merged again"
    assert (applied.extent.weights, applied.extent.merged_heads) == (merge.extent.weights, merge.extent.merged_heads)
    assert applied.extent.change is None, "a patch does not hold base"
    for report in (merge, patch, applied):
        said = report.as_dict()
        assert said["secondary_weight"] == {"least": merge.extent.weights[0], "greatest": merge.extent.weights[1]}
    assert merge.as_dict()["change"] == merge.extent.change
    assert merge.as_dict()["task_vectors"]["cosine"] == merge.extent.cosine
    assert swept.as_dict()["extents"].keys() == swept.extents.keys()


def test_the_console_says_how_much_was_merged_and_what_would_merge_more(shared_triple: Triple, tmp_path: Path) -> None:
    share = r"secondary weighs 7 to 13 % in \d+ of 40 heads"
    change = r"the output differs from primary by [\d.]+ % of its task vector \(on the target tensors\)"
    hint = r"--alpha 1 \(secondary weighs 29 to 50 %\), --lambda 0.1 \(21 to 37 %\) or a larger --k merges more"
    merge = run_hsa(*merge_arguments(shared_triple, tmp_path / "out", "--no-sync"))
    assert re.search(f"{share}; {change}", merge.stdout), merge.stdout
    assert re.search(hint, merge.stdout)
    plan = run_hsa(*merge_arguments(shared_triple, tmp_path / "plan", "--dry-run"))
    assert re.search(share, plan.stdout) and re.search(hint, plan.stdout)
    other = run_hsa(*merge_arguments(shared_triple, tmp_path / "other", "--no-sync", "--lambda=0.1"))
    assert "merges more" not in other.stdout
    quiet = run_hsa(*merge_arguments(shared_triple, tmp_path / "quiet", "--no-sync", "--quiet"))
    assert quiet.stdout == ""
    arguments = merge_arguments(shared_triple, tmp_path / "sweep", "--no-sync", "--lambda=0.1,0.5")
    sweep = run_hsa("sweep", *arguments[1:])
    assert re.search(r"differs from primary by [\d.]+ % \(.*lambda0.5.*\) to [\d.]+ % \(.*lambda0.1.*\)", sweep.stdout)
    patch = run_hsa(*merge_arguments(shared_triple, tmp_path / "p.safetensors", "--patch", "--no-sync"))
    assert re.search(f"{share}; {change}", patch.stdout)
    applied = run_hsa(
        "apply", shared_triple["primary"], tmp_path / "p.safetensors", f"--output={tmp_path / 'a'}", "--no-sync"
    )
    assert re.search(share, applied.stdout), applied.stderr


def test_the_hint_is_what_these_parameters_would_give(shared_triple: Triple, tmp_path: Path) -> None:
    plain = hsa.merge(**shared_triple, output=tmp_path / "out", sync=False)
    text = merge_more_hint(HsaSettings(), plain.extent.weights)
    assert text is not None
    for parameters in ({"alpha": 1.0}, {"lam": 0.1}):
        found = hsa.merge(**shared_triple, output=tmp_path / "out", sync=False, overwrite=True, **parameters)
        assert found.hint is None
        assert found.extent.weights is not None
        least, greatest = found.extent.weights
        assert f"{100 * least:.0f} to {100 * greatest:.0f} %" in text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0"),
        (1e-9, "0.00000010"),
        (0.000123, "0.012"),
        (0.0344, "3.4"),
        (0.09, "9.0"),
        (0.0996, "10"),
        (1.046, "105"),
    ],
)
def test_percentages_have_two_digits_and_no_exponent(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_merge_of_no_head_says_so() -> None:
    assert Extent(20, 0, 120, None).text == "none of 120 heads is merged"
    assert merge_more_hint(HsaSettings(), None) is None


def test_kept_is_not_said_of_heads() -> None:
    """Merged heads are called merged or selected; what is kept is primary's."""
    root = Path(hsa.__file__).parents[1]
    texts = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "hsa").rglob("*.py")]
    texts += [path for suffix in ("html", "js") for path in (root / "hsa").rglob(f"*.{suffix}")]
    said = re.compile(r"\bheads? (were to be |are |is )?kept\b|\bkept heads?\b", re.IGNORECASE)
    assert len(texts) > 100
    found = [f"{path.name}: {match[0]}" for path in texts for match in said.finditer(path.read_text(encoding="utf-8"))]
    assert found == []
