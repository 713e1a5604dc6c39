"""An inspection as one page that needs nothing else: heat maps that answer to controls, in the browser.

Of heads, their selection follows sliders; of whole models, a choice says what the cells show.

The page's policy lets nothing be loaded and no script run but its own, by digest. What came from files stands in it as
JSON, without any character that could end its element, and reaches the document as text alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from hsa.inspection.inspect import Inspection, ModelInspection

_HERE = Path(__file__).parent
_ESCAPED = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def render(inspection: Inspection | ModelInspection) -> bytes:
    """The file's bytes, ASCII but for the page's own text; floats read back exactly."""
    own = "page" if isinstance(inspection, Inspection) else "models"
    template, style, common, own_script = (
        (_HERE / name).read_text(encoding="utf-8") for name in (f"{own}.html", "page.css", "common.js", f"{own}.js")
    )
    script = common + own_script
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(inspection.as_dict(), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": data.translate(_ESCAPED)}
    pieces = template.split("@")  # one pass: nothing that is put in is looked at again
    return "".join(parts.get(piece, piece) for piece in pieces).encode("utf-8")


def _digest(text: str) -> str:
    """A source expression for exactly this inline text. Source: Content Security Policy level 3."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
