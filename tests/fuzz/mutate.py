"""Mutations that know what a file is made of: JSON values changed, repeated, moved and nested; or bytes spliced."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
    -0.0,
    0.5,
    1e308,
    5e-324,
    "",
    "x",
    "\0",
    "\ud800",
    "\u202e\u2028",
    "../../x",
    "/etc/passwd",
    "F32",
    "auto",
    [],
    {},
    [[]],
    {"": {}},
)
_TEXTS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-0",
    b"9" * 5000,
    b'"\\ud800"',
    b'"\\u0000"',
    b"[" * 80 + b"]" * 80,
)
_MARK = "\x01mark\x01"


def mutate(data: bytes, limit: int, seed: int, *, kind: str, tokens: Sequence[str] = ()) -> bytes:
    """Another file of at most `limit` bytes; the same arguments give the same."""
    rng = random.Random(seed)
    if kind == "json" and rng.random() < 0.85:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return _bytes(data, rng, tokens)[:limit]
        return _document(document, rng, tokens)[:limit]
    return _bytes(data, rng, tokens)[:limit]


def _document(document: Any, rng: random.Random, tokens: Sequence[str]) -> bytes:
    holder = [document]
    written = b""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(holder))
        box, key = rng.choice(places)
        action = rng.randrange(9)
        if action <= 2:
            box[key] = deepcopy(rng.choice(VALUES))
        elif action == 3:
            box[key] = _near(box[key], rng)
        elif action == 4 and tokens:
            box[key] = rng.choice(tokens)
        elif action == 5 and isinstance(box, dict):
            name = rng.choice((*tokens, "", "x" * rng.choice((1, 300, 5000)), "\0", "é"))
            box[name] = box.pop(key) if rng.random() < 0.5 else deepcopy(box[key])
        elif action == 6:
            other, there = rng.choice(places)
            box[key], other[there] = other[there], box[key]
            if _is_cyclic(holder):
                return b"{}"
        elif action == 7:
            for _ in range(rng.choice((1, 10, 70))):
                box[key] = [box[key]]
        elif isinstance(box, dict) or len(holder) != 1 or box is not holder:
            del box[key]
        if rng.random() < 0.1 and not written and holder:
            places = list(_places(holder))
            box, key = rng.choice(places)
            box[key], written = _MARK, rng.choice(_TEXTS)
    text = json.dumps(holder[0] if holder else {}, separators=rng.choice(((",", ":"), (", ", ": ")))).encode()
    text = text.replace(json.dumps(_MARK).encode(), written or b"0")
    if rng.random() < 0.1 and text.startswith(b"{") and len(text) > 2:  # the same names again
        text = text[:-1] + b"," + text[1:]
    return text


def _places(box: Any) -> list[tuple[Any, Any]]:
    found, ahead = [], [box]
    while ahead:
        value = ahead.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        found += [(value, key) for key in keys]
        ahead += [value[key] for key in keys]
    return found


def _is_cyclic(box: Any) -> bool:
    try:
        json.dumps(box)
    except (ValueError, RecursionError):
        return True
    return False


def _near(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 8, -8, 2**32, value))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return (
            value[:at]
            + rng.choice(("", "\0", "é", "\U0001f600", "/", "..", "'", "`|<b>"))
            + value[at + rng.randrange(2) :]
        )
    if isinstance(value, list):
        return [*value, *deepcopy(value)]
    return [value]


def _bytes(data: bytes, rng: random.Random, tokens: Sequence[str]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(7)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1 and at < len(changed):
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action == 2:
            width = rng.choice((2, 4, 8))
            number = rng.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63, len(changed), rng.randrange(2**16)))
            changed[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif action == 3:
            del changed[at : at + rng.choice((1, 4, 30, len(changed) // 2))]
        elif action == 4 and tokens:
            changed[at:at] = rng.choice(tokens).encode()
        elif action == 5:
            start = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + rng.choice((1, 8, 64))]
        else:
            changed[at:at] = bytes([rng.randrange(256)]) * rng.choice((1, 2, 100))
    return bytes(changed)
