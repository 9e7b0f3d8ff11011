"""The public names, their parameters and defaults: others call them, so that a change must be
meant.

After one that is meant: `python tests/house/test_public.py > tests/public.json`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import unisd

RECORD = Path(__file__).parents[1] / "public.json"


def parameters(thing: Any) -> dict[str, str]:
    """Kind and default of each parameter; of a dataclass the class's own fields."""
    if dataclasses.is_dataclass(thing):
        own = [
            field
            for field in dataclasses.fields(thing)
            if field.name in vars(thing).get("__annotations__", {})
        ]
        made = {
            field.name: field.default_factory
            for field in own
            if field.default_factory is not dataclasses.MISSING
        }
        defaults = {field.name: made[field.name]() if field.name in made else field.default for field in own}
        return {
            name: "" if default is dataclasses.MISSING else repr(default)
            for name, default in defaults.items()
        }
    found = inspect.signature(thing).parameters.values()
    return {p.name: p.kind.name + ("" if p.default is p.empty else f" = {p.default!r}") for p in found}


def described() -> dict[str, Any]:
    things = {name: getattr(unisd, name) for name in unisd.__all__}
    found: dict[str, Any] = {
        name: parameters(thing) for name, thing in things.items() if name not in ("__version__", "UserError")
    }
    return {"__all__": unisd.__all__, **found}


def test_public_names_and_signatures() -> None:
    assert described() == json.loads(RECORD.read_text(encoding="utf-8"))


def test_every_public_name_can_be_imported() -> None:
    assert set(unisd.__all__) == {*unisd._PUBLIC, "__version__"}
    assert issubclass(unisd.UserError, ValueError)


def test_the_citation_names_this_version() -> None:
    text = (Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [unisd.__version__]


if __name__ == "__main__":
    print(json.dumps(described(), indent=1))
