"""The public names, their parameters and defaults: others call them, so that a change must be
meant.

After one that is meant: `python tests/house/test_public.py > tests/public.json`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import unisd

RECORD = Path(__file__).parents[1] / "public.json"
ROOT = Path(__file__).parents[2]
TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.py")),
]


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


def methods(thing: Any) -> dict[str, Any]:
    """Methods that the class adds to those of its bases, by name; none of the trainer."""
    if thing is unisd.UniSDTrainer:
        return {}
    inherited = {name for base in thing.__mro__[1:] for name in vars(base)}
    found = {name: getattr(value, "__func__", value) for name, value in vars(thing).items()}
    return {
        name: value
        for name, value in found.items()
        if inspect.isfunction(value) and not name.startswith("_") and name not in inherited
    }


def described() -> dict[str, Any]:
    found: dict[str, Any] = {"__all__": unisd.__all__}
    for name in unisd.__all__:
        thing = getattr(unisd, name)
        if name in ("__version__", "UserError"):
            continue
        if not getattr(thing, "_is_protocol", False):
            found[name] = parameters(thing)
        if inspect.isclass(thing):
            for own, method in methods(thing).items():
                _, *rest = parameters(method).items()  # without self or the class
                found[f"{name}.{own}"] = dict(rest)
    return found


def test_public_names_and_signatures() -> None:
    assert described() == json.loads(RECORD.read_text(encoding="utf-8"))


def test_every_public_name_can_be_imported() -> None:
    assert unisd.__all__ == sorted({*unisd._PUBLIC, "__version__"})
    tree = ast.parse(Path(unisd.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))  # what a type checker sees
    assert {name: module for module, name in imports(typed)} == unisd._PUBLIC
    assert issubclass(unisd.UserError, ValueError)


def test_dir_and_help_show_the_public_names_alone() -> None:
    assert dir(unisd) == unisd.__all__
    text = pydoc.render_doc(unisd, renderer=pydoc.plaintext)
    for name in unisd._PUBLIC:
        thing = getattr(unisd, name)
        assert thing.__name__ == name
        first = (thing.__doc__ or "").strip().splitlines()[0]
        assert first in text and not first.startswith(f"{name}("), name  # a dataclass's own signature
        for own in methods(thing) if inspect.isclass(thing) else ():
            assert inspect.getdoc(getattr(thing, own)), f"{name}.{own}"
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = unisd.torch


def test_importing_the_package_is_light() -> None:
    code = "import sys, unisd; dir(unisd); print(*{'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Module and name of whatever is imported of this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unisd":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "unisd")


def private(source: str) -> list[tuple[str, str]]:
    """The imports that are not public."""
    return [
        (module, name)
        for module, name in imports(ast.parse(source))
        if not (module == "unisd" and name in {"", "testing", *unisd.__all__}) and module != "unisd.testing"
    ]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_texts_and_examples_import_public_names_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL) if path.suffix == ".md" else [text]
    assert [private(block) for block in blocks if private(block)] == []


def test_what_is_not_public_is_found() -> None:
    inner = "from unisd.tasks import get_task\nfrom unisd import config, UniSDConfig\nimport unisd.trainer"
    assert private(inner) == [("unisd.tasks", "get_task"), ("unisd", "config"), ("unisd.trainer", "")]
    assert private("import unisd\nfrom unisd import Task, testing\nfrom unisd.testing import model") == []


def test_the_citation_names_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [unisd.__version__]


if __name__ == "__main__":
    print(json.dumps(described(), indent=1))
