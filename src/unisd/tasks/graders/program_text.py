"""Find programs in what a model wrote: in fences, between prose, or as the rest of a function.

Fences do not say where a program ends: docstrings hold fences of their own, and some are never
closed. So a block ends at the first fence at which it can be parsed, and prose after a program
without fences is what cannot be parsed as more of it.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

MAX_FENCES = 60  # the last so many are looked at
MAX_CLOSINGS = 8  # fences that are tried as the end of one block
MAX_STARTS = 40  # lines without a fence that are tried as the beginning of a program
MAX_CUTS = 8  # ends that are tried of one such program
BUDGET = 40_000  # characters that are parsed, of one completion

_FENCE = re.compile(r"`{3,}|(?m:^[ \t>]{0,12}~{3,})")
_LANGUAGE = re.compile(r"[ \t{.]*([\w+#-]*)")
_PYTHON = {"", "python", "python3", "py", "py3", "python2", "ipython", "ipython3", "pycon", "code", "sage"}
_INLINE = re.compile(r"`([^`\n]{8,2000})`")
_START = re.compile(
    r"[ \t]*(?:(?:async[ \t]+)?def |class |import |from |@\w|if |for |while |try:|with "
    r"|[A-Za-z_][\w, ]{0,80}=[^=])"
)
_lock = threading.Lock()  # for the filter of warnings, which is the process's


@dataclass(frozen=True)
class Program:
    """A part of a completion that may be a program, and what it defines and leans on."""

    text: str
    how: str
    start: int
    tree: ast.Module | None = None
    defined: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()
    defines: bool = False
    """Whether there is a function or a class."""

    def has(self, name: str) -> bool:
        """Whether it defines a function or class of that name at its top level."""
        body = self.tree.body if self.tree is not None else []
        return any(isinstance(node, _NAMED) and node.name == name for node in body)


class Parser:
    """Parses parts of one completion until so many characters have been looked at."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.left = budget

    def parse(self, text: str) -> ast.Module | int:
        """The tree, or the number of the line at which it is no Python (0: it cannot be said)."""
        if self.left <= 0:
            return 0
        try:
            with _lock, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in the model's texts
                tree = ast.parse(text)
        except SyntaxError as error:
            line = error.lineno or 0
            lines = 1 + text.count("\n")  # an error is looked for twice
            self.left -= 50 + 2 * len(text) * min(line, lines) // lines
            return line
        except (ValueError, RecursionError, MemoryError):
            self.left -= len(text)
            return 0
        self.left -= len(text)
        return tree

    def longest(self, lines: list[str], least: int = 1) -> tuple[str, ast.Module] | None:
        """The longest beginning that is Python, of at least so many lines."""
        end = len(lines)
        for _ in range(MAX_CUTS):
            found = self.parse("\n".join(lines[:end]))
            if isinstance(found, ast.Module):
                return "\n".join(lines[:end]).rstrip(), found
            end = min(end, found) - 1
            if end < least:
                return None
        return None


def names_in(tree: ast.Module) -> tuple[frozenset[str], frozenset[str], bool]:
    """What a program defines at its top level, the names that it uses and binds nowhere, and
    whether it defines a function or a class.
    """
    defined: set[str] = set()
    bound: set[str] = set()
    used: set[str] = set()
    defines = False
    for statement in tree.body:
        named = isinstance(statement, _NAMED)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else bound if named else defined).add(node.id)
            elif isinstance(node, _NAMED):
                (bound if named and node is not statement else defined).add(node.name)
                defines = True
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                (bound if named else defined).add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.Lambda):
                defines = True
    return frozenset(defined), frozenset(used - bound - defined - _BUILT_IN), defines


_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BUILT_IN = set(vars(builtins))


def program(text: str, how: str, start: int, tree: ast.Module | None) -> Program:
    return Program(text, how, start, tree, *(names_in(tree) if tree else ()))


def programs(text: str, parser: Parser) -> list[Program]:
    """All parts of a text that may be programs, in their order; those in fences come first."""
    fenced: list[Program] = []
    outside: list[tuple[int, int]] = []
    done = 0
    for start, end, found in _blocks(text, parser):
        outside.append((done, start))
        done = end
        fenced += [found] if found is not None else []
    outside.append((done, len(text)))
    loose = [each for start, end in outside for each in _unfenced(text, start, end, parser)]
    return fenced + loose + ([] if fenced or loose else list(_inline(text, parser)))


def _blocks(text: str, parser: Parser) -> Iterator[tuple[int, int, Program | None]]:
    """Where each fenced block begins and ends, and the program in it."""
    fences = list(_FENCE.finditer(text))[-MAX_FENCES:]
    number = 0
    while number < len(fences):
        opening = fences[number]
        line_end = text.find("\n", opening.end())
        following = fences[number + 1] if number + 1 < len(fences) else None
        if following is not None and (line_end < 0 or following.start() < line_end):
            content = re.sub(r"^\s*(?:python3?|py)\s+", "", text[opening.end() : following.start()])
            yield opening.start(), following.end(), _parsed(content, "fenced block", opening.start(), parser)
            number += 2
            continue
        if line_end < 0:
            return
        language = _LANGUAGE.match(text, opening.end())
        python = language is None or language[1].lower() in _PYTHON
        closings = [
            each
            for each in range(number + 1, min(len(fences), number + 1 + (MAX_CLOSINGS if python else 1)))
            if _closes(text, opening, fences[each])
        ]
        found, closing = None, None
        for each in closings:
            content = text[line_end + 1 : fences[each].start()]
            candidate = _parsed(content, "fenced block", opening.start(), parser)
            if candidate is not None and candidate.tree is not None:
                found, closing = candidate, each
                break
        if closing is None and closings:
            closing = closings[0]
        end = fences[closing].start() if closing is not None else len(text)
        content = text[line_end + 1 : end]
        if found is None and python:
            how = "fenced block" if closing is not None else "unclosed block"
            found = _begun(content, how, opening.start(), parser)
        yield (
            opening.start(),
            fences[closing].end() if closing is not None else end,
            found if python else None,
        )
        number = len(fences) if closing is None else closing + 1


def _closes(text: str, opening: re.Match[str], fence: re.Match[str]) -> bool:
    """Whether a fence may close the block: of the same kind, and not in a comment."""
    if fence[0].strip(" \t>")[0] != opening[0].strip(" \t>")[0]:
        return False
    before = text[text.rfind("\n", 0, fence.start()) + 1 : fence.start()]
    return not before.lstrip().startswith("#")


def _cleaned(content: str) -> str:
    """Without the marks and the indentation of a quotation or a list."""
    lines = content.split("\n")
    filled = [line for line in lines if line.strip()]
    if filled and all(
        line.lstrip().startswith(">") and not line.lstrip().startswith(">>>") for line in filled
    ):
        lines = [re.sub(r"^\s*> ?", "", line) for line in lines]
    text = "\n".join(lines)
    indented = all(line[:1] in (" ", "\t") for line in lines if line.strip())
    return (textwrap.dedent(text) if indented else text).strip("\n").rstrip()


def _parsed(content: str, how: str, start: int, parser: Parser) -> Program | None:
    """The whole content as a program; without a tree where it is none, None where it is blank."""
    content = _cleaned(content)
    if not content.strip():
        return None
    tree = parser.parse(content)
    return program(content, how, start, tree if isinstance(tree, ast.Module) else None)


def _begun(content: str, how: str, start: int, parser: Parser) -> Program | None:
    """The content as far as it is a program; the whole of it where it begins with none."""
    content = _cleaned(content)
    if not content.strip():
        return None
    longest = parser.longest(content.split("\n"))
    if longest is not None:
        begun = program(longest[0], how, start, longest[1])
        if begun.defines:
            return begun
    return program(content, how, start, None)


def _unfenced(text: str, start: int, end: int, parser: Parser) -> Iterator[Program]:
    """Programs between prose, without fences."""
    lines = text[start:end].split("\n")
    at = tries = 0
    while at < len(lines) and tries < MAX_STARTS:
        if not _START.match(lines[at]):
            at += 1
            continue
        tries += 1
        indent = len(lines[at]) - len(lines[at].lstrip())
        rest = lines[at:]
        if indent:
            rest = [line[indent:] if not line[:indent].strip() else line for line in rest]
        longest = parser.longest(rest)
        if longest is None or not longest[0].strip():
            at += 1
            continue
        found = program(longest[0], "unfenced", start + sum(len(line) + 1 for line in lines[:at]), longest[1])
        if found.defined:
            yield found
        at += longest[0].count("\n") + 1


def _inline(text: str, parser: Parser) -> Iterator[Program]:
    """Definitions on one line, between single backticks."""
    for match in list(_INLINE.finditer(text))[-MAX_STARTS:]:
        if _START.match(match[1]):
            found = _parsed(match[1], "inline", match.start(), parser)
            if found is not None and found.defines:
                yield found


def completed(stub: str, body: str, entry: str, parser: Parser) -> str | None:
    """`stub` with the rest of its function; None where `body` is no such rest.

    The indentation of the first line, or of all, may be missing.
    """
    before = stub.rstrip().split("\n")
    body = body.strip("\n").rstrip()
    indent = indentation(stub)
    forms = (body, indent + body.lstrip(), textwrap.indent(textwrap.dedent(body), indent))
    found: list[str] = []
    for rest in dict.fromkeys(forms):
        longest = parser.longest([*before, *rest.split("\n")], len(before) + 1)
        if longest is None or any(isinstance(node, ast.Return) for node in longest[1].body):
            continue
        for node in ast.walk(longest[1]):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == entry:
                own = [each for each in node.body if not _is_docstring(each)]
                if own and own[0].lineno > len(before):
                    found.append(longest[0])
    return max(found, key=lambda text: text.count("\n"), default=None)


def indentation(stub: str) -> str:
    """How the body of a stub is indented."""
    last = stub.rstrip().rpartition("\n")[2]
    return last[: len(last) - len(last.lstrip())] or "    "


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
