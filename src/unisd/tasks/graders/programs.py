"""Run the program that a completion holds against gold's tests.

Gold is Python source, or a list of such texts, all of which are run. Of the programs in a
completion the one is taken that defines what the tests name, the last of several; what it needs of
other blocks (imports, helpers) is joined with it.
"""

from __future__ import annotations

import ast
import html
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.tasks.base import Grade
from unisd.tasks.graders.base import TAIL, Candidate, Grader, Reading
from unisd.tasks.graders.program_text import BUDGET, Parser, Program, completed, indentation, programs

TAKES = "tests in Python, a text or a list of texts"


def read_gold(value: object) -> str:
    """The tests as one Python source.

    A list, also as text ('["assert f(1) == 2"]', as a table keeps it), is run whole.

    Raises:
        UserError: it is something else, empty, or no Python.
    """
    if isinstance(value, (list, tuple)):
        if not all(isinstance(part, str) for part in value):
            kinds = sorted({type(part).__name__ for part in value if not isinstance(part, str)})
            raise UserError(f"code takes {TAKES}, not a list with {', '.join(kinds)} in it")
        text = "\n".join(value)
    elif isinstance(value, str):
        text = value
    else:
        raise UserError(f"code takes {TAKES}, not {type(value).__name__} {str(value)[:60]!r}")
    text = text.replace("\r\n", "\n")
    if not text.strip():
        raise UserError(f"code takes {TAKES}; these are empty")
    if not text.lstrip("\n")[:1].strip():  # as a whole within something
        import textwrap

        text = textwrap.dedent(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"code takes {TAKES}; these are not Python ({error}): {text.strip().splitlines()[0][:60]!r}"
        ) from None
    listed = _listed(tree)
    return text if listed is None else read_gold(listed)


def _listed(tree: ast.Module) -> list[str] | None:
    """The texts of a source that is one list of texts."""
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.Expr):
        return None
    only = tree.body[0].value
    if not isinstance(only, (ast.List, ast.Tuple)) or not only.elts:
        return None
    texts = [
        part.value for part in only.elts if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    return texts if len(texts) == len(only.elts) else None


_END_OF_TURN = re.compile(r"<\|\w+\|>|</s>")
# What may stand on the line of a program in a page of HTML, or after a word that announces it.
_AROUND = re.compile(r"</?(?:code|pre)\b[^>\n]{0,80}>|(?m:^[^\n:`]{1,40}: (?=(?:def|class|async def) ))")


@lru_cache(1024)
def names_of(tests: str) -> frozenset[str]:
    """Names that the tests use and do not bind, built-in ones among them: the program's."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    return frozenset(node.id for node in names) - bound


def read_program(completion: str, tests: str = "", stub: str = "", entry: str = "") -> Reading:
    """The programs that a completion gives, best first, each whole.

    Args:
        tests: whose names the program must define.
        stub, entry: the beginning of a function, and its name, that the completion may complete.
    """
    text = completion[-TAIL:].replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = _END_OF_TURN.sub("\n", text).lstrip("\ufeff")
    parser = Parser()
    rest = None
    if stub and text.lstrip("\n")[:1] in (" ", "\t"):
        rest = completed(stub, text, entry, Parser(BUDGET // 2))
    found = programs(text, parser)
    if not any(each.tree for each in found) and (bare := html.unescape(_AROUND.sub("\n", text))) != text:
        found = programs(bare, parser) or found
    wanted = names_of(tests) | ({entry} if entry else frozenset())
    if rest is None and stub and not any(each.has(entry) for each in found):
        spare = Parser(BUDGET // 2)
        bodies = (completed(stub, body, entry, spare) for body in _bodies(text))
        rest = next((body for body in bodies if body is not None), None)
    ranked = sorted(found, key=lambda each: _rank(each, wanted), reverse=True)
    candidates = [_joined(each, found, wanted, parser) for each in ranked]
    if stub:
        whole = [_after_stub(each, stub, parser) for each in candidates if entry in each.defined]
        begun = [] if rest is None else [Program(rest, "completed function", 0)]
        others = [each for each in candidates if entry not in each.defined]
        candidates = begun + whole + others
    listed = tuple(Candidate(each.text, each.text, each.how) for each in candidates)
    return Reading(listed, listed[0] if listed else None)


def _rank(found: Program, wanted: frozenset[str]) -> tuple[int, bool, bool, bool, int]:
    """What the tests name comes first, then what can be parsed, defines something, stands last."""
    fenced = found.how in ("fenced block", "unclosed block")
    return len(found.defined & wanted), found.tree is not None, found.defines, fenced, found.start


def _joined(best: Program, found: list[Program], wanted: frozenset[str], parser: Parser) -> Program:
    """A program with the parts of others that define what it, or the tests, lack."""
    parts = [best]
    while best.tree is not None:
        have = frozenset().union(*(part.defined for part in parts))
        lacking = (wanted | frozenset().union(*(part.needed for part in parts))) - have
        others = [each for each in found if each not in parts and each.defined & lacking]
        if not others:
            break
        parts.append(max(others, key=lambda each: (len(each.defined & lacking), each.start)))
    if len(parts) == 1:
        return best
    parts = sorted(parts, key=lambda each: (each is best, each.start))
    text = "\n\n".join(part.text for part in parts)
    joined = replace(best, text=text, how="joined blocks")
    return joined if isinstance(parser.parse(text), ast.Module) else best


def _after_stub(found: Program, stub: str, parser: Parser) -> Program:
    """A whole function after its stub, whose imports and helpers it may take for granted."""
    text = f"{stub.rstrip()}\n{indentation(stub)}pass\n\n\n{found.text}"
    return replace(found, text=text) if isinstance(parser.parse(text), ast.Module) else found


def _bodies(text: str) -> list[str]:
    """What may be the rest of a function: what stands in a fence, else the text."""
    blocks = [block.strip("\n") for block in _FENCED.findall(text)[-8:] if block.strip()]
    return blocks[::-1] or [text]


_FENCED = re.compile(r"(?<![`~])(?:`{3,}+|~{3,}+)[^\n`~]*\n((?:(?!`{3}|~{3}).)*)", re.DOTALL)


def run_tests(found: Reading, tests: str, timeout_s: float = 10.0) -> Grade:
    """Judge the program that a completion settles on by tests.

    Raises:
        UserError: nothing can be isolated here.
    """
    from unisd.tasks import sandbox

    if found.chosen is None:
        return Grade(False, None, "no code")
    verdict = sandbox.run_program(found.chosen.text, tests, timeout_s)
    reason = f"{verdict.reason}: {verdict.detail}" if verdict.detail else verdict.reason
    feedback = _WHAT_HAPPENED.get(verdict.reason, "").format(verdict.detail)
    return Grade(verdict.passed, found.chosen.text, reason, how=found.chosen.how, feedback=feedback)


_WHAT_HAPPENED = {
    "wrong": "The program fails a test: {}",
    "error": "Under a test the program raises an error: {}",
    "syntax": "The program is not Python: {}",
    "timeout": "The program is too slow, or does not end: {}.",
    "memory": "The program needs too much memory.",
    "ended": "The program ends itself, or is killed, under a test.",
    "untested": "The program does not define what is asked for.",
    "sandbox": "The program could not be run here.",
}


class Programs(Grader):
    """The grader `code`: the program passes the tests that gold gives."""

    name = "code"
    takes = TAKES

    def read_gold(self, value: object) -> str:
        return read_gold(value)

    def gold_of(self, row: Mapping[str, Any], answer: object) -> object:
        """The column `tests`, where a row has one."""
        return answer if row.get("tests") in (None, "") else row["tests"]

    def read(self, completion: str) -> Reading:
        return read_program(completion)

    def grade(self, completion: str, gold: str) -> Grade:
        return run_tests(read_program(answer_of(completion), gold), gold)


code = Programs()
