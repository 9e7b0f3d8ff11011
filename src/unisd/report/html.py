"""Fills the templates of a page.

Everything that a template shows is cleaned and escaped, unless a function here or the figures made
it: model output is hostile input.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from markupsafe import escape as escaped

ASSETS = Path(__file__).parent
MAX_TEXT = 200_000
"""Most characters of one text on a page."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]")


def clean(text: Any) -> str:
    """Text that is valid UTF-8 and shows what is in it.

    Broken code points, controls and direction marks become visible.
    """
    whole = str(text).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    whole = _CONTROL.sub(lambda m: chr(0x2400 + ord(m[0])) if ord(m[0]) < 0x20 else "\ufffd", whole)
    whole = _BIDI.sub(lambda m: f"\u27e8U+{ord(m[0]):04X}\u27e9", whole)
    if len(whole) > MAX_TEXT:
        whole = f"{whole[:MAX_TEXT]}\u2026 ({len(whole) - MAX_TEXT} more characters)"
    return whole


def escape(text: Any) -> Markup:
    """Text for element content and quoted attributes."""
    return escaped(clean(text))


def data_block(name: str, content: Any) -> Markup:
    """Data for the page's script, in a block that no text inside can leave."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{name}">{text}</script>')


def _shown(value: Any) -> Any:
    """What a template may show of a value: autoescaping follows, but for what is HTML already."""
    return value if isinstance(value, Markup) else clean(value)


@cache
def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(ASSETS / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    # It forbids every request, and every script but ours.
    policy = Markup(f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'")
    found.globals |= {"style": Markup(style), "script": Markup(script), "policy": policy}
    return found


def render(template: str, **values: Any) -> Markup:
    """A whole page (its `title` among the values), or a part of one."""
    return Markup(_templates().get_template(template).render(values))
