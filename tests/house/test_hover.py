"""What an editor shows of an option is what the table of options says.

After a change of the table: `python tests/house/test_hover.py`.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from unisd.options.option import declared
from unisd.options.table import UniSDOptions

STUB = Path(__file__).parents[2] / "src" / "unisd" / "options" / "hover.pyi"
HEAD = '''\
"""What an editor shows of an option, made from the table: `python tests/house/test_hover.py`."""

from dataclasses import dataclass
from typing import Any, Literal

from unisd.options import table

@dataclass
class UniSDOptions(table.UniSDOptions):
'''


def stub() -> str:
    """The text of the stub: of each option its type, its help and its default."""
    parts = [HEAD]
    for item in declared(UniSDOptions):
        default = f"Default: {getattr(UniSDOptions(), item.name)!r}."
        told = textwrap.wrap(
            f'"""{item.metadata["help"]} {default}"""',
            96,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        if len(told) > 1:
            told[-1:] = [told[-1].removesuffix('"""'), '    """']
        kind = str(item.type).replace("'", '"')
        parts.append(f"    {item.name}: {kind} = ...\n    " + "\n".join(told) + "\n\n")
    return "".join(parts).rstrip() + "\n"


def test_an_editor_shows_what_the_table_says() -> None:
    assert STUB.read_text(encoding="utf-8") == stub()


def test_every_option_has_a_docstring_below_it() -> None:
    (options,) = (node for node in ast.parse(stub()).body if isinstance(node, ast.ClassDef))
    names = [node.target.id for node in options.body if isinstance(node, ast.AnnAssign)]  # type: ignore[union-attr]
    texts = [node.value.value for node in options.body if isinstance(node, ast.Expr)]  # type: ignore[attr-defined]
    table = declared(UniSDOptions)
    assert names == [item.name for item in table]
    for item, text in zip(table, texts, strict=True):
        assert " ".join(text.split()).startswith(item.metadata["help"])


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
