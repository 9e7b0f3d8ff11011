"""The pieces of a page.

Everything that a model wrote passes through `escape` or `data_block`: model output is hostile
input.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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


def escape(text: Any) -> str:
    """Text for element content and quoted attributes."""
    return html.escape(clean(text), quote=True)


def data_block(name: str, content: Any) -> str:
    """Data for the page's script, in a block that no text inside can leave."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def table(rows: Sequence[Sequence[str]], links: dict[str, str] | None = None) -> str:
    """A table whose first row is its header; first cells found in `links` become links."""

    def first(cell: str) -> str:
        target = (links or {}).get(cell)
        return escape(cell) if target is None else f'<a href="{escape(target)}">{escape(cell)}</a>'

    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f"<tr><td>{first(row[0])}</td>{''.join(f'<td>{escape(c)}</td>' for c in row[1:])}</tr>"
        for row in rows[1:]
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile">{escape(n)}<b>{escape(v)}</b></div>' for n, v in pairs)
        + "</div>"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """Left out where it has no content."""
    content = "".join(parts)
    if not content:
        return ""
    said = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>"


def page(title: str, body: str) -> str:
    """The whole file. The policy in its head forbids every request and every script but ours."""
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta'
        f' http-equiv="Content-Security-Policy" content="{policy}"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1"><link rel="icon"'
        f' href="data:,"><title>{escape(title)}</title><style>{style}</style></head><body><main><header'
        f' class="top"><h1>{escape(title)}</h1><button id="theme" type="button">light /'
        f' dark</button></header>{body}</main><div id="tip" role="tooltip"'
        f" hidden></div><script>{script}</script></body></html>\n"
    )
