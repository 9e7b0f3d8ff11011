"""Write docs/models.md: which families of models train here, and how.

`python -m experiments.families [--store docs/results/families.jsonl] [--page docs/models.md]`.

The store is what the tests of the families append:
`UNISD_FAMILIES=docs/results/families.jsonl pytest -m 'families or breadth' tests/families`.
Of a cell that was measured several times the last line counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.pages import update
from unisd.console import markdown_table

COLUMNS = {
    "full": ("reference-full", "saved-full", "resumed-full", "best", "command-full"),
    "LoRA": ("reference-lora", "saved-lora", "resumed-lora", "command-lora"),
    "padded = alone": ("layouts",),
    "probe": ("probe",),
    "FSDP2": ("blocks",),
}
"""Headings, and the cells that must pass for a yes."""

Outcomes = dict[str, dict[str, dict[str, object]]]  # by family and cell


def read(store: Path) -> Outcomes:
    """The last outcome of every cell."""
    found: Outcomes = {}
    for line in store.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        found.setdefault(cell["family"], {})[cell["cell"]] = cell
    return found


def verdict(cells: dict[str, dict[str, object]], names: Sequence[str]) -> str:
    """yes; no, with what fails; or - where nothing was measured."""
    known = [name for name in names if name in cells]
    failed = [name for name in known if not cells[name]["passed"]]
    if failed:
        return f"no ({', '.join(name.partition('-')[0] for name in failed)})"
    return "yes" if len(known) == len(names) else "-"


def remarks(cells: dict[str, dict[str, object]]) -> str:
    """What the failed cells said, shortened, and how rows are laid out."""
    said = [" ".join(str(cell["said"]).split())[:120] for cell in cells.values() if not cell["passed"]]
    layout = cells.get("read", {}).get("note")
    return "; ".join(dict.fromkeys([*([str(layout)] if layout else []), *said])).replace("|", "/")


def table(found: Outcomes) -> list[str]:
    """One line a family."""
    rows = [
        (family, *(verdict(cells, names) for names in COLUMNS.values()), remarks(cells))
        for family, cells in sorted(found.items())
    ]
    return markdown_table(("family", *COLUMNS, "remarks"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page from its store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("docs/results/families.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"))
    given = parser.parse_args(arguments)
    update(given.page, "Families of models", "\n".join(table(read(given.store))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
