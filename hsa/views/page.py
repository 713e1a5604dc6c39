"""A self-contained HTML page: interactive heat maps of an inspection, or tables of an evaluation.

For heads, sliders change the selection. For whole models, a menu chooses what the cells show.

The page's Content Security Policy blocks all loading, and all scripts except its own, which it names by digest. Data
from files is embedded as JSON, without any character that could end its element, and is inserted into the document only
as text.
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
"""The pages by the names of their files, with the titles that they have until their scripts set others."""

_HERE = Path(__file__).parent
_ESCAPED = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def render(inspection: Inspection | ModelInspection) -> bytes:
    """The page of an inspection, as the bytes of its file."""
    return fill("page" if isinstance(inspection, Inspection) else "models", inspection.as_dict())


def fill(name: str, document: Mapping[str, Any]) -> bytes:
    """The page NAME with a document embedded, as the bytes of its file.

    The bytes are ASCII except for the page's own text. Floats parse back exactly. NAME.html is the body of the page
    without its scripts, and NAME.js is its own script. frame.html surrounds the body on every page.

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
    pieces = frame.replace("@BODY@", body).split("@")  # one pass, so that inserted text is not searched again
    return "".join(parts.get(piece, piece) for piece in pieces).encode("utf-8")


def _digest(text: str) -> str:
    """The CSP source expression for exactly this inline text. Source: Content Security Policy level 3."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
