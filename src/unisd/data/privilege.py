"""How much the teacher is told: levels of privilege, from the whole reference to nothing.

| level | the teacher sees |
|---|---|
| `full` | the problem and the reference |
| `half` | the problem and the first half of the reference (by words) |
| `hints` | the problem and the row's `hints` (*) |
| `answer` | the problem and the final answer (**) |
| `unconditioned` | the reference without the problem |
| `plain` | the problem, as the student does |
| `wrong` | the problem and the row's wrong reference, `negative_context` |
| `other` | the problem after another one, solved: the first of `auxiliary_contexts` |

The last three are controls of what a reference is worth.
(*) Without such a column: the reference without its last sentence, or without its blocks of code;
results of equations hidden.
(**) The row's `answer`, or what follows "Answer:", "####" or \\boxed in the reference.
"""

from __future__ import annotations

import re
from typing import Any

from unisd.errors import by_caller

LEVELS = ("full", "half", "hints", "answer", "unconditioned", "plain", "wrong", "other")
BUILT = {
    "wrong": ("negative_context", "negatives", "corrupt"),
    "other": ("auxiliary_contexts", "agreement_contexts", "retrieval"),
}
"""The column that a level shows, and how it is built; the others show parts of the reference."""


def built_by(option: str, kind: str) -> str:
    """Say what builds a column of rows."""
    return by_caller(f"--{option} {kind}", f'prepare(rows, {option}="{kind}")')


def what_gives(level: str) -> str:
    """Say what gives rows something for a level."""
    if level not in BUILT:
        return "add a column answer or hints"
    column, option, kind = BUILT[level]
    return f"add a column {column}, or build it with {built_by(option, kind)}"


_RESULT = re.compile(r"(=\s*)[-+]?[\d.,]*\d")
_CODE = re.compile(r"^ {0,3}```[^\n]*\n.*?(?:^ {0,3}```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
MARK = r"(?:(?:[Aa]nswer\s*(?:is|:)|####)\s*|\\boxed\{)"  # what a final answer is stated after
_MARKED = re.compile(r"(?:[Aa]nswer\s*(?:is|:)|####)\s*(\S[^\n]*)")


def reference_at(row: dict[str, Any], level: str) -> str | None:
    """Return the part of the row's reference that the level shows.

    None where there is no such part (`plain` shows none).
    """
    if level == "other":
        return next((str(context) for context in row.get("auxiliary_contexts") or ()), None)
    if level == "wrong":
        return str(row["negative_context"]) if row.get("negative_context") else None
    reference = str(row.get("privileged_context") or "")
    if not reference.strip() or level == "plain":
        return None
    if level == "half":
        return first_half(reference)
    if level == "hints":
        return str(row["hints"]) if row.get("hints") else hints(reference)
    if level == "answer":
        answer = str(row["answer"]) if row.get("answer") is not None else final_answer(reference)
        return f"Answer: {answer}" if answer else None
    return reference


def wrong_twin(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row as if its `negative_context` were the reference.

    So :func:`reference_at` shows a wrong one.

    None where there is none, or it is the reference itself (noise). Its final answer is the row's
    `negative_answer`, or what that reference names.
    """
    if not row.get("negative_context") or row["negative_context"] == row.get("privileged_context"):
        return None
    wrong = {"privileged_context": row["negative_context"], "answer": row.get("negative_answer")}
    return {name: value for name, value in row.items() if name not in ("hints", "teacher_prompt")} | wrong


def first_half(text: str) -> str:
    """The first half of the words (rounded up), with the space between them as it was."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[(len(ends) + 1) // 2 - 1]] if ends else text


def hints(reference: str) -> str | None:
    """Return the steps without their results.

    There is no last sentence and no block of code (which hold the answer), and `?` for numbers
    after an equals sign.
    """
    sentences = [part for part in _SENTENCE.split(_CODE.sub("\n", reference).strip()) if part]
    steps = sentences if reference.rstrip().endswith("```") else sentences[:-1]
    return "\n".join(_RESULT.sub(r"\1?", sentence) for sentence in steps) or None


def final_answer(reference: str) -> str | None:
    """Return the last marked answer.

    Where nothing is marked, the last line if it is short (at most 8 words) and ends no code.
    """
    start = reference.rfind("\\boxed{")
    if start >= 0:
        return _braced(reference[start + len("\\boxed{") :])
    if marked := _MARKED.findall(reference):
        return str(marked[-1]).strip().rstrip(".")
    last = reference.strip().rpartition("\n")[2]
    return last if 0 < len(last.split()) <= 8 and not last.lstrip().startswith("```") else None


def _braced(text: str) -> str | None:
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return None
