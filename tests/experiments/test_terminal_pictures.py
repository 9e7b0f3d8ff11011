"""The pictures of a terminal are those of today's code, and lose nothing on a narrow one."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len

from experiments.terminal import IMAGES, WIDTHS, draw, picture

CELL = 12.2  # pixels of a picture


def lines_of(svg: str) -> list[str]:
    """The lines of text of a picture, with the blanks that place them."""
    found: dict[float, str] = defaultdict(str)
    texts = [
        one
        for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        if one.get("clip-path")
    ]
    for one in texts:
        y, column = float(one.attrib["y"]), round(float(one.attrib["x"]) / CELL)
        found[y] = found[y].ljust(column) + (one.text or "").replace("\xa0", " ")
    return [found[y].rstrip() for y in sorted(found)]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_picture_is_what_the_terminal_shows(width: int) -> None:
    kept = json.loads((IMAGES / "terminal.json").read_text(encoding="utf-8"))
    lines = lines_of((IMAGES / f"terminal-{width}.svg").read_text(encoding="utf-8"))
    assert lines == lines_of(picture(draw(kept, width))), "draw it anew: python -m experiments.terminal"
    assert max(map(cell_len, lines)) <= width
    half = len(kept["metrics"]) // 2
    assert re.match(rf"training .*{half}/{2 * half} \d:\d\d:\d\d loss 0\.\d{{4}}  divergence", lines[0])
    shown, side = " ".join(lines), kept["results"]["after"]["task_accuracy"]
    for figure in (f"{100 * side['value']:.1f} %", f"[{100 * side['low']:.1f}, {100 * side['high']:.1f}]"):
        assert figure in shown
