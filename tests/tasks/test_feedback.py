"""What graders tell the one who answered: what is wrong with this answer, never the right one."""

from __future__ import annotations

import json
import random

import pytest

from unisd.data.text import words
from unisd.pocket.task import PocketTask
from unisd.rollout.verdicts import Judge, as_verdict, tells_reference
from unisd.tasks.base import Verdict
from unisd.tasks.graders import get_grader
from unisd.tasks.graders.call_grading import grade_calls
from unisd.tasks.graders.programs import _WHAT_HAPPENED
from unisd.tasks.tool_calls import ToolStep

CALLS = [{"name": "find", "arguments": {"city": "Oslo", "day": 3}}, {"name": "book", "arguments": {"id": 7}}]


def told(grader: str, completion: str, gold: object) -> str:
    verdict = as_verdict(get_grader(grader)(completion, gold))
    assert verdict is not None
    return verdict.feedback


@pytest.mark.parametrize(
    ("grader", "completion", "gold", "feedback"),
    [
        ("number", "It is 7.", "7", ""),
        ("number", "So the answer is 5.", "7", "The answer 5 is wrong."),
        ("number", "I do not know.", "7", "No answer is given in the form that is asked for."),
        ("number", "The answer is 3 or 5.", "7", "No single answer is given: 3 or 5 are several numbers."),
        ("choice", "The answer is B.", "C", "The answer B is wrong."),
        ("exact", "Paris", "Rome", "The answer Paris is wrong."),
        ("call", "no calls", CALLS, "No answer is given in the form that is asked for."),
    ],
)
def test_feedback_says_what_is_wrong(grader: str, completion: str, gold: object, feedback: str) -> None:
    assert told(grader, completion, gold) == feedback


def calls(*steps: tuple[str, object]) -> list[ToolStep]:
    return [ToolStep(name, json.dumps(arguments)) for name, arguments in steps]


@pytest.mark.parametrize(
    ("found", "feedback"),
    [
        (calls(("find", {"city": "Rome", "day": 3})),
         "0 of 1 calls right; call 1, find: argument city is wrong; calls are missing."),
        (calls(("find", {"city": "Oslo", "to": 3}), ("book", {"id": 7})),
         "1 of 2 calls right; call 1, find: argument to is not wanted, an argument is missing."),
        (calls(("find", {"city": "Oslo", "day": 3}), ("buy", {"id": 7})),
         "1 of 2 calls right; call 2: buy is the wrong function."),
        (calls(("find", {"city": "Oslo", "day": 3}), ("book", {"id": 7}), ("book", {"id": 7})),
         "2 of 3 calls right; there are more calls than needed."),
        (calls(("find", {"city": "Rome", "day": 3, "unit": ""}), ("book", {"id": 7})),
         "1 of 2 calls right; call 1, find: argument city is wrong."),
        ([ToolStep("find", "Oslo"), *calls(("book", {"id": 7}))],
         "1 of 2 calls right; call 1, find: its arguments are not a JSON object."),
    ],
)  # fmt: skip
def test_feedback_on_calls(found: list[ToolStep], feedback: str) -> None:
    gold = calls(*((call["name"], call["arguments"]) for call in CALLS))  # type: ignore[misc]
    assert grade_calls(found, gold).feedback == feedback
    assert grade_calls(gold, gold).feedback == ""


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("program", "feedback"),
    [
        ("def f(x):\n    return x", "The program fails a test: assert f(1) == 2"),
        ("def f(x):\n    return 1 / 0", "Under a test the program raises an error: ZeroDivisionError"),
        ("def f(x)\n    return 1", "The program is not Python: SyntaxError"),
        ("def f(x):\n    return x + 1", ""),
    ],
)
def test_feedback_on_programs(program: str, feedback: str) -> None:
    found = told("code", f"```python\n{program}\n```", "assert f(0) == 0 + 1 or True\nassert f(1) == 2")
    assert found.startswith(feedback) and bool(found) == bool(feedback)


def test_every_end_of_a_program_is_told() -> None:
    ends = {"wrong", "error", "syntax", "timeout", "memory", "ended", "untested", "sandbox"}
    assert set(_WHAT_HAPPENED) == ends  # not `passed`


def test_feedback_of_the_pocket() -> None:
    task = PocketTask()
    rows = task.load("train")
    code = next(row for row in rows if row["skill"] == "code")
    grade = task.grade(code, f"Answer: {code['variable']} + 1000003")
    assert grade.feedback.startswith(f"For {code['variable']} = -12 the expression gives 999991, which is")
    arith = next(row for row in rows if row["skill"] == "arith")
    assert as_verdict(task.grade(arith, "Answer: -1")) == Verdict(0.0, False, "The answer -1 is wrong.")
    for row in rows[:200]:
        right = as_verdict(task.grade(row, f"Answer: {row['answer']}"))
        assert row["skill"] == "tool" or right == Verdict(1.0, True)


def test_no_feedback_holds_the_reference() -> None:
    """Whatever the answer: also where it quotes the reference, or settles on nothing."""
    rng = random.Random(0)
    graders = {"number": "7", "choice": "C", "exact": "Rome", "contains": "Rome", "call": CALLS}
    pieces = [
        *("the answer is", "7", "5", "or", "C", "B", "Rome", "Paris", "\n", "####", "\\boxed{7}", "not", "{"),
        *(json.dumps(CALLS), json.dumps(CALLS[0]), '{"name": "book", "arguments": {"id": 8}}', "because"),
    ]
    said = 0
    for name, gold in graders.items():
        text = gold if isinstance(gold, str) else json.dumps(gold)
        row = {"id": name, "prompt": "?", "answer": text, "privileged_context": f"Thus the answer is {text}"}
        judge = Judge(lambda row, completion, name=name, gold=gold: get_grader(name)(completion, gold))
        texts = [" ".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(150)]
        for verdict in judge.verdicts([row] * len(texts), texts):
            assert verdict is not None
            said += bool(verdict.feedback)
            assert not tells_reference(verdict.feedback, row)
            assert verdict.passed or words(text) != words(verdict.feedback)
            if len(words(text)) > 3:
                assert " ".join(words(text)) not in " ".join(words(verdict.feedback))
    assert said > 200
