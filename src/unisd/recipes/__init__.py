"""Published methods as short YAML files in `recipes/`; a new method is one more file.

A recipe holds a `description`, the `evidence` for it with its weakness, `options` (the published
hyper-parameters, for real models) and `pocket` (what changes on the embedded pocket model).
`_published.yaml` and `_pocket.yaml` hold what all recipes share; a recipe's own values win.
`based_on` names a recipe whose values it has where it gives none. A recipe of your own is given by
the path of its file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unisd.errors import UserError, by_caller, one_line, unknown

FOLDER = Path(__file__).parent
DEFAULT = "unisd-star"
KEYS = ("description", "evidence", "based_on", "options", "pocket")
OF_ROWS = ("agreement_contexts", "negatives", "embedder")
"""Options that are about rows, not about their training: `unisd.prepare` takes them in Python."""


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
    """The recipe called `name`, or in the file of this path, with what all recipes share.

    Raises:
        UserError: unknown name, with the nearest known one; a file that is no recipe.
    """
    is_file = Path(name).suffix in (".yaml", ".yml")
    if not is_file and name not in names():
        raise unknown("recipe", name, names())
    file = Path(name) if is_file else FOLDER / f"{name}.yaml"
    own = _of_the_user(file) if is_file else _read(file)
    files = (file, *(FOLDER / f"{base}.yaml" for base in [own.get("based_on")] if base))
    parts = {
        part: {k: value for each in files[::-1] for k, value in (_read(each).get(part) or {}).items()}
        for part in ("options", "pocket")
    }
    return Recipe(
        name=name,
        description=own.get("description", ""),
        evidence=own.get("evidence", ""),
        options={**_read(FOLDER / "_published.yaml"), **parts["options"]},
        pocket={**_read(FOLDER / "_pocket.yaml"), **parts["pocket"]},
        files=files,
    )


def _of_the_user(file: Path) -> dict[str, Any]:
    """The content of a file of the user's own, checked."""
    try:
        own = _read(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"recipe {file} cannot be read: {one_line(error)}: correct its path or form."
        ) from None
    flat = by_caller("a flat file is for --config", "flat values are given as UniSDConfig(**values)")
    if not isinstance(own, dict) or not all(
        isinstance(own.get(k) or {}, dict) for k in ("options", "pocket")
    ):
        raise UserError(f"{file} is not a recipe: put its values under the key options ({flat}).")
    if unknown := [key for key in own if key not in KEYS]:
        known = ", ".join(KEYS)
        raise UserError(
            f"{file} is not a recipe: it has {unknown[0]!r} beside {known}: move it to options ({flat})."
        )
    if (base := own.get("based_on")) is not None and base not in names():
        raise UserError(f"{file}: based_on is {base!r}: name one of {', '.join(names())}.")
    return own


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content
