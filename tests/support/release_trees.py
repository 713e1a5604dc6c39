"""What the tests of releases share: recipes, and what a run made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import hsa


def write_recipe(path: Path, sources: Mapping[str, Path], *merges: dict[str, Any], **defaults: Any) -> Path:
    """A recipe of merges in group `g` of the same three sources."""
    shared = {"group": "g", **{role: str(place) for role, place in sources.items()}, **defaults}
    path.write_text(yaml.safe_dump({"defaults": shared, "merges": list(merges)}, sort_keys=False), encoding="utf-8")
    return path


def build(recipe: Path, output: Path, **options: Any) -> hsa.ReleaseReport:
    return hsa.release(recipe, output, sync=False, threads=2, **options)


def results(report: hsa.ReleaseReport) -> dict[str, str]:
    return {entry.path: entry.result for entry in report.entries}
