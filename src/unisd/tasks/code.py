"""Python problems whose answer is a program: graded by running it against tests in the sandbox."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator

from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.tasks import sandbox
from unisd.tasks.base import Grade, Row
from unisd.tasks.benchmark import Benchmark
from unisd.tasks.graders.base import Reading
from unisd.tasks.graders.programs import read_program, run_tests

TRIES = 12  # mutants of a reference that are run before it goes without a wrong version


class CodeTask(Benchmark):
    """Rows have `tests` (Python source with assertions)."""

    runs_code = True
    max_new_tokens = 512
    negative_prompt_template = (
        "{prompt}\n\nThis program passes:\n{privileged_context}\n\nWrite the same program with one subtle bug"
        " in it, of the kind that a careful programmer makes, so that a test fails. Reply with one Python"
        " code block and do not point the bug out."
    )
    timeout_s = 10.0

    def read(self, row: Row, completion: str) -> Reading:
        """The programs that a completion gives, best first."""
        return read_program(completion, row["tests"])

    def grade(self, row: Row, completion: str) -> Grade:
        """pass@1 of one completion: its program passes the row's tests."""
        return run_tests(self.read(row, answer_of(completion)), row["tests"], self.timeout_s)

    def wrong_program(self, code: str, tests: str, rng: random.Random) -> str | None:
        """A slip away from `code`, and proved wrong: it fails `tests`.

        None where none was found, or nothing can be run here.
        """
        try:
            sandbox.require()
        except UserError:
            return None
        candidates = list(mutants(code))
        rng.shuffle(candidates)
        for candidate in candidates[:TRIES]:
            if sandbox.run_program(candidate, tests, 3.0).reason == "wrong":
                return candidate
        return None


def fenced(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


_OPERATORS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+",
    "//": "*", "/": "*", "%": "//", "in": "not in", "not in": "in", "and": "or", "or": "and",
}  # fmt: skip


def mutants(code: str) -> Iterator[str]:
    """`code` with one operator or whole number changed, everything else as it was written."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = code.encode().split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    source = code.encode()

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    def between(left: ast.expr, right: ast.expr) -> Iterator[str]:
        first = place(left.end_lineno or 1, left.end_col_offset or 0)
        last = place(right.lineno, right.col_offset)
        text = source[first:last].decode()
        word = text.strip(" ()\n\t\\")
        if word in _OPERATORS and text.count(word) == 1:
            yield (source[:first] + text.replace(word, _OPERATORS[word]).encode() + source[last:]).decode()

    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            yield from between(node.left, node.right)
        elif isinstance(node, ast.Compare):
            yield from between(node.left, node.comparators[0])
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1])
        elif isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**6:
            first, last = place(node.lineno, node.col_offset), place(node.lineno, node.end_col_offset or 0)
            yield (source[:first] + str(node.value + 1).encode() + source[last:]).decode()
