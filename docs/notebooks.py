"""Writes tutorials as notebooks beside their pages: `python docs/notebooks.py`.

The page is what a person edits; a test says when the notebook is older.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

TUTORIALS = Path(__file__).parent / "tutorials"
NAMES = ("own-method", "from-trl")
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.M | re.S)


def notebook(page: str) -> str:
    """The page with its Python blocks as cells of code, all else as text."""
    cells = []
    for number, part in enumerate(BLOCK.split(page)):
        if text := part.strip("\n"):
            cell = {"cell_type": "markdown", "id": f"part-{number}", "metadata": {}, "source": text}
            if number % 2:
                cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
            cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in NAMES:
        page = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
        (TUTORIALS / f"{name}.ipynb").write_text(notebook(page), encoding="utf-8")
