"""One page that needs nothing else: of an inspection, heat maps that answer to controls; of an evaluation, tables.

Of heads, their selection follows sliders; of whole models, a choice says what the cells show.

The page's policy lets nothing be loaded and no script run but its own, by digest. What came from files stands in it as
JSON, without any character that could end its element, and reaches the document as text alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsa.inspection.inspect import Inspection, ModelInspection

TITLES: Mapping[str, str] = {
    "evaluation": "Word error rates",
    "models": "Models of a merge",
    "page": "Heads of a merge",
    "search": "Search of merges",
}
"""The pages by the names of their files, and what stands in the title bar until their scripts say more."""

_HERE = Path(__file__).parent
_ESCAPED = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def render(inspection: Inspection | ModelInspection) -> bytes:
    """The page of an inspection: the file's bytes."""
    return fill("page" if isinstance(inspection, Inspection) else "models", inspection.as_dict())


def fill(name: str, document: Mapping[str, Any]) -> bytes:
    """The page NAME over a document: the file's bytes, ASCII but for the page's own text. Floats read back exactly.

    NAME.html is the body of the page, without its scripts, and NAME.js its own script. frame.html is what stands around
    the body on every page.

    Example:
        >>> fill("models", inspection.as_dict())[:15]  # doctest: +SKIP
        b'<!doctype html>'
    """
    files = ("frame.html", f"{name}.html", "page.css", "common.js", f"{name}.js")
    frame, body, style, common, own_script = ((_HERE / each).read_text(encoding="utf-8") for each in files)
    script = common + own_script
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    parts = {
        "POLICY": policy,
        "TITLE": TITLES[name],
        "STYLE": style,
        "SCRIPT": script,
        "DATA": data.translate(_ESCAPED),
    }
    pieces = frame.replace("@BODY@", body).split("@")  # one pass: no document that is put in is looked at again
    return "".join(parts.get(piece, piece) for piece in pieces).encode("utf-8")


def _digest(text: str) -> str:
    """A source expression for exactly this inline text. Source: Content Security Policy level 3."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
