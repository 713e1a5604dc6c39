"""What libFuzzer cannot do with JSON: change one value, name or entry of it, and leave it JSON."""

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


def mutate_json(data: bytes, limit: int, seed: int, tokens: Sequence[str]) -> bytes | None:
    """Another document of at most `limit` bytes, None where `data` is none; the same arguments give the same."""
    rng = random.Random(seed)
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(root, rng, tokens)
    return json.dumps(root[0]).encode()[:limit]


def _change(root: list[Any], rng: random.Random, tokens: Sequence[str]) -> None:
    """Another value, another word, another name, or one entry less."""
    parent, key = rng.choice(_places(root))
    action = rng.randrange(4)
    if action == 1 and tokens:
        parent[key] = rng.choice(tokens)
    elif action == 2 and isinstance(parent, dict):
        parent[rng.choice((*tokens, "", "x" * rng.choice((1, 300, 5000)), "\0", "é"))] = parent.pop(key)
    elif action == 3 and parent is not root:
        del parent[key]
    else:
        parent[key] = deepcopy(rng.choice(VALUES))


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Every value of a document, as what holds it and its name or number there."""
    places, ahead = [], [root]
    while ahead:
        parent = ahead.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        places += [(parent, key) for key in keys]
        ahead += [parent[key] for key in keys]
    return places
