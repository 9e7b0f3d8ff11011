"""The task `general`: its items, its graders, and checks of an answer's form."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.helpers.data import DATA, needs_data
from unisd import tasks
from unisd.cli.contamination import contamination
from unisd.errors import UserError
from unisd.tasks.base import Grade
from unisd.tasks.general import PARTS, General, items
from unisd.tasks.instructions import CHECKS, unmet
from unisd.tasks.python_values import python

TASK = tasks.get("general")
ROWS = {row["id"]: row for row in TASK.load("test")}
GRADED = [item for item in items() if item["skill"] != "chat"]


def answers(item: dict) -> list[str]:
    """All answers of an item that are right."""
    gold = item["right"] if item["grader"] == "format" else item["answer"]
    return [str(one) for one in (gold if isinstance(gold, list) else [gold])]


def wrong_answers(item: dict) -> list[str]:
    return [item["wrong"]] if "wrong" in item else [one for one in "ABCD" if one != item["answer"]]


def test_parts_have_the_same_number_of_different_items():
    assert isinstance(TASK, General) and TASK.splits == ("test", "chat") and TASK.evaluation_only
    assert "general" in tasks.names()
    found = items()
    assert Counter(item["skill"] for item in found) == dict.fromkeys((*PARTS, "chat"), 34)
    assert [item["id"] for item in found if item["skill"] == "code"][6] == "general-code-007"
    assert len({item["id"] for item in found}) == len({item["prompt"] for item in found}) == len(found)
    letters = Counter(item["answer"] for item in found if item["skill"] == "choice")
    assert set(letters) == set("ABCD") and max(letters.values()) - min(letters.values()) <= 1
    used = {name for item in found for name in item.get("checks", {})}
    assert used == set(CHECKS)


def test_a_limit_takes_evenly_and_always_the_same():
    rows = TASK.load("test")
    assert len(rows) == 6 * 34 and all(isinstance(row["prompt"], str) for row in rows)
    for limit in (6, 50, 120):
        few = TASK.load("test", limit=limit, seed=limit)
        assert few == rows[:limit]
        counts = Counter(row["skill"] for row in few)
        assert len(counts) == 6 and max(counts.values()) - min(counts.values()) <= 1
    chat = TASK.load("chat", limit=5)
    assert [set(row) for row in chat] == 5 * [{"id", "prompt", "skill"}]
    assert {row["skill"] for row in chat} == {"chat"} and len(TASK.load("chat")) == 34
    with pytest.raises(UserError, match="no split 'train'; it has test, chat"):
        TASK.load("train")
    with pytest.raises(UserError, match="no option 'subject'"):
        TASK.load("test", subject="history")


@pytest.mark.parametrize("form", ["{}", "{}.", "The answer is {}.", "**{}**", "`{}`", "Answer: {}"])
def test_gold_is_right_and_a_plausible_wrong_answer_is_not(form):
    plain = form == "{}"
    for item in GRADED:
        if item["grader"] == "format" and not plain:
            continue  # the form is what is graded
        row = ROWS[item["id"]]
        for right in answers(item):
            grade = TASK.grade(row, form.format(right))
            assert grade.correct and grade.extracted and not grade.feedback, (item["id"], right, grade)
        for wrong in wrong_answers(item):
            assert not TASK.grade(row, form.format(wrong)).correct, (item["id"], wrong)


def test_empty_and_foreign_answers_are_wrong():
    nothing = ("", " \n", "I don't know.", "<think>never ends", "Sure! Here is what you asked for:", "\x00")
    assert not any(TASK.grade(row, text).correct for row in ROWS.values() for text in nothing)
    assert TASK.grade(ROWS["general-format-001"], "").outcome == "unanswered"
    # another item's gold is right by chance only
    for item, other in zip(GRADED, GRADED[35:] + GRADED[:35], strict=True):
        if item["grader"] not in ("format", "choice"):
            assert not TASK.grade(ROWS[item["id"]], answers(other)[0]).correct or item["grader"] == "number"


def test_a_thought_before_the_answer_is_not_looked_at():
    for item in GRADED:
        text = f"<think>\nIt could be {wrong_answers(item)[0]}, or not.\n</think>\n\n{answers(item)[0]}"
        assert TASK.grade(ROWS[item["id"]], text).correct, item["id"]


@pytest.mark.parametrize(
    ("completion", "gold", "right"),
    [
        ("[1,2]", "[1, 2]", True),
        ("print([1, 2])\n\nThis prints [1, 2].", "[1, 2]", True),
        ("The line `print('ab' * 2)` prints `abab`.", "abab", True),
        ('```python\n["a", "b"]\n```', "['a', 'b']", True),
        ("The output of this code is:\n\nHELLO", "HELLO", True),
        ("The result is 'hello', not HELLO", "HELLO", False),
        ("It prints True because 7 is more than 5.", "True", True),
        ("w[-1]", "w[- 1]", True),
        ("print('ab' * 2)", "abab", False),
        ("n = ___(word)", "len", False),
        ("(" * 150, "()", False),
    ],
)
def test_python_is_compared_by_its_syntax(completion, gold, right):
    assert python(completion, gold).correct is right


def test_gold_that_is_no_python_is_refused():
    with pytest.raises(UserError, match="piece of Python"):
        python("1", "two words")


@pytest.mark.parametrize(
    ("checks", "right", "wrong"),
    [
        ({"capitals": True}, "A 1.", "1."),
        ({"bullets": 1}, "Here:\n- a b", "-a"),
        ({"numbered": 2}, "1) a\n2) b", "1. a\n3. b"),
        ({"ends_with": "again"}, 'He came "again".', "He came against"),
        ({"starts_with": "Well"}, "Well, no", "Welcome"),
        ({"json": {"a": 1}}, '```json\n{"a": 1}\n```', 'Sure: {"a": 1}'),
        ({"json_list": 2}, '["a", "b"]', '["a", "a"]'),
        ({"sentences": 1}, "It costs 3.5 dollars.", "It costs. No."),
        ({"sentences": 1}, "He said yes!", "He said yes. And"),
        ({"separated": [",", 2]}, "a, b.", "a,, b"),
        ({"wrapped": ["**", "**"]}, "**Oslo**", "**Oslo** is large"),
        ({"count": ["warm", 1]}, "Warm, warmer", "warmer"),
        ({"divided": ["***", 2]}, "a\n***\nb", "a\n***\n"),
        ({"one_of": ["60"]}, "60.", "60 min"),
    ],
)
def test_checks_of_form(checks, right, wrong):
    assert unmet(right, checks) == []
    assert unmet(wrong, checks) == list(checks)


PIECES = (
    *("answer is ", "#### ", "\\boxed{", "```python\n", "```", "`", "'", '"', "[", "]", "{", "}", "(", ")"),
    *(
        "\ud800",
        "\x00",
        "\u202e",
        "9" * 400,
        "1e999",
        "-",
        "- ",
        "1. ",
        "\n",
        "\r",
        "\t",
        "***",
        "#",
        "<think>",
    ),
    *(
        "is ",
        "prints ",
        "result: ",
        "not ",
        "A",
        "B. ",
        " or ",
        "P.S.",
        "Yes",
        "True",
        "___",
        "lambda ",
        "=",
        ";",
    ),
    *(
        "the sea ",
        "warm ",
        "echo ",
        "\u201c",
        "\u0130",
        "a" * 50,
        " " * 30,
        "f'{",
        "\\N{",
        "0x",
        "**",
        "print(",
    ),
)


def fuzz(seed: int, count: int) -> None:
    rng = random.Random(seed)
    rows = list(ROWS.values())
    for _ in range(count):
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 60)))
        assert isinstance(TASK.grade(rng.choice(rows), text), Grade)
        assert unmet(text, rng.choice([item["checks"] for item in GRADED if "checks" in item])) is not None


def test_fuzzed_answers_raise_nothing():
    fuzz(0, 300)


@pytest.mark.long
def test_ten_thousand_fuzzed_answers_and_huge_ones_raise_nothing():
    fuzz(1, 10_000)
    for piece in PIECES:
        for row in list(ROWS.values())[::7]:
            assert isinstance(TASK.grade(row, piece * 5000), Grade)


@pytest.mark.long
@needs_data
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("gsm8k", "gsm8k/train.jsonl.gz"),
        ("mbpp", "mbpp/mbpp.jsonl"),
        ("cos_e", "commonsenseqa/*.jsonl.gz"),
        ("scienceqa", "scienceqa/text_only.jsonl.gz"),
        ("medmcqa", "medmcqa/validation.jsonl.gz"),
    ],
)
def test_no_item_is_of_a_benchmark(name, files):
    task = tasks.get(name, data_files=str(DATA / files), num_auxiliary_contexts=0)
    known = [{"id": f"{i}", "prompt": question(row)} for i, row in enumerate(task.load("all"))]
    ours = [{"id": item["id"], "prompt": item["prompt"]} for item in items()]
    assert len(known) > 500
    found = contamination(known, ours)
    assert found.exact == found.near == []
    taken = {"id": "copy", "prompt": known[3]["prompt"]}
    assert contamination(known, [*ours, taken]).exact == [("copy", "3")]


def question(row: dict) -> str:
    """A problem of a benchmark without its options, as our items are compared without theirs."""
    return row["prompt"].partition("\n\nOptions:\n")[0]
