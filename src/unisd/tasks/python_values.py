"""Compare a piece of Python that a completion gives with gold, by syntax; nothing is run.

Candidates, best first: the first line if it is Python, a block in fences, what is announced
("prints", "the output is", "answer:"), a piece in back quotes, a list, text or constant that is
mentioned. `[1,2]` is `[1, 2]`, and a text is the same with its quotes and, as printed, without.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable

from unisd.tasks.graders.base import TAIL, AliasGrader, Candidate, Reading

LONGEST = 200  # characters of a candidate
MOST = 50  # candidates of a kind

_FENCED = re.compile(r"```[a-z]{0,10}\n([^`]{1,2000})\n?```")
_STATED = re.compile(
    r"\b(?:is|be|prints?|printed|outputs?|returns?|answer|result)\b(?!\()\s{0,3}:?\s{0,3}(?=([^\n]{1,200}))",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"(?<!`)`([^`\n]{1,200})`(?!`)")
_MENTIONED = re.compile(
    r"(\[[^\[\]\n]{0,200}\]|\{[^{}\n]{1,200}\}|'[^'\n]{1,200}'|\"[^\"\n]{1,200}\"|\b(?:True|False|None)\b)"
)


def canonical(text: str) -> str | None:
    """One expression or assignment as Python writes it, a text without quotes; None if it is none.

    A call of `print` is none: it is the question again.
    """
    if not text.strip() or len(text) > LONGEST or "___" in text:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd code, such as `1 is 1`
            (node,) = ast.parse(text.strip()).body
            written = ast.unparse(node)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return node.value.value
        return None if written.startswith("print(") else written
    return written if isinstance(node, ast.Assign) else None


def _candidates(texts: Iterable[str], how: str) -> list[Candidate]:
    """Those texts that are Python, the last first."""
    trimmed = [text.strip().strip("`*").rstrip(".") for text in list(texts)[-MOST:]]
    return [Candidate(text, value, how) for text in trimmed[::-1] if (value := canonical(text)) is not None]


class PythonValue(AliasGrader):
    """The piece of Python that the completion settles on is gold's."""

    name = "python"
    takes = "a piece of Python"
    remedy = "give an expression, or a list of them"

    def read_one(self, value: object) -> str:
        found = canonical(str(value))
        if found is None:
            raise self.refuse(value)
        return found

    def same(self, value: str, gold: str) -> bool:
        return value == gold

    def read(self, completion: str) -> Reading:
        text = completion[-TAIL:]
        lines = [line for line in text.splitlines() if line.strip()]
        blocks = [block.strip().splitlines()[-1:] for block in _FENCED.findall(text)]
        found = [
            *_candidates([] if text.lstrip().startswith("```") else lines[:1], "first line"),
            *_candidates((line for block in blocks for line in block), "fenced block"),
            *_candidates(_STATED.findall(text), "stated"),
            *_candidates(_QUOTED.findall(text), "inline code"),
            *_candidates(_MENTIONED.findall(text), "mention"),
        ]
        return Reading(tuple(found), found[0] if found else None)


python = PythonValue()
