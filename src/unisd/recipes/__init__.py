"""Published methods as short YAML files in `recipes/`; a new method is one more file.

A recipe holds a `description`, the `evidence` for it with its weakness, `options` (the published
hyper-parameters, for real models) and `pocket` (what changes on the embedded pocket model).
`_published.yaml` and `_pocket.yaml` hold what all recipes share; a recipe's own values win.
`based_on` names a recipe whose values it has where it gives none.
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
    evidence: str
    options: dict[str, Any]
    pocket: dict[str, Any]
    files: tuple[Path, ...]
    """Its own, and that of the recipe that it is based on."""


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
    files = (file, *(FOLDER / f"{base}.yaml" for base in [own.get("based_on")] if base))
    parts = {
        part: {name: value for each in files[::-1] for name, value in _read(each)[part].items()}
        for part in ("options", "pocket")
    }
    return Recipe(
        name=name,
        description=own["description"],
        evidence=own["evidence"],
        options={**_read(FOLDER / "_published.yaml"), **parts["options"]},
        pocket={**_read(FOLDER / "_pocket.yaml"), **parts["pocket"]},
        files=files,
    )


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content
