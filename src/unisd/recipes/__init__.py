"""Published methods as short YAML files in `recipes/`; a new method is one more file.

A recipe holds a `description`, `options` (the published hyper-parameters, for real models) and
`pocket` (what changes on the embedded pocket model). `_published.yaml` and `_pocket.yaml` hold what
all recipes share; a recipe's own values win.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unisd.errors import UserError

FOLDER = Path(__file__).parent
DEFAULT = "unisd-star"


@dataclass(frozen=True)
class Recipe:
    """One method: option names to values. `null` in `pocket` removes what `options` set."""

    name: str
    description: str
    options: dict[str, Any]
    pocket: dict[str, Any]
    file: Path


def names() -> list[str]:
    """All recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("_"))


def load(name: str) -> Recipe:
    """The recipe called `name`, with what all recipes share.

    Raises:
        UserError: unknown name, with the nearest known one.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names())}."
        raise UserError(f"unknown recipe {name!r}: {hint}")
    file = FOLDER / f"{name}.yaml"
    own = _read(file)
    return Recipe(
        name=name,
        description=own["description"],
        options={**_read(FOLDER / "_published.yaml"), **own["options"]},
        pocket={**_read(FOLDER / "_pocket.yaml"), **own["pocket"]},
        file=file,
    )


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content
