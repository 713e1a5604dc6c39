"""Draws the settings on which racing is measured, and keeps them in racing_settings.json.

    python bench/racing_settings.py

Forty settings, eight of each method of METHODS in turn, drawn evenly from the ranges that `hsa search` draws from, for
three fine-tunes. They are drawn once, so that every run scores the same ones: run it again only when ranges change.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hsa.searches.space import Axis, space_of

METHODS = ("hsa", "linear", "task_arithmetic", "ties", "tsv_m")
FINE_TUNES = ("primary", "secondary", "tertiary")
COUNT = 40
SEED = 0
FILE = Path(__file__).resolve().parent / "racing_settings.json"


def draw(count: int = COUNT, seed: int = SEED) -> list[dict[str, Any]]:
    """Methods with settings, as keywords of `hsa.merge`."""
    generator = random.Random(seed)

    def value(axis: Axis) -> Any:
        return generator.choice(axis.choices) if axis.choices else generator.uniform(axis.low, axis.high)

    spaces = [space_of(method, len(FINE_TUNES), {}) for method in METHODS]
    drawn = [spaces[number % len(spaces)] for number in range(count)]
    return [
        {"method": space.method, "settings": space.settings({axis.name: value(axis) for axis in space.axes})}
        for space in drawn
    ]


def text(settings: list[dict[str, Any]]) -> str:
    """The settings as they are kept, one a line."""
    return "[\n" + ",\n".join(f" {json.dumps(each)}" for each in settings) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(text(draw()), encoding="utf-8")
