"""The named graders: what counts as an answer, and that no completion breaks or stalls them."""

import json
import random
import time

import pytest

from unisd.errors import UserError
from unisd.tasks.base import Grade
from unisd.tasks.graders import GRADERS
from unisd.tasks.graders.numbers import extract_number, number
from unisd.tasks.graders.text import contains, exact


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("steps\n#### 72", "#### 72"),
        ("#### 72", "72"),
        ("#### $1,234.00", "1234"),
        ("####72 clips.", "72"),
        ("#### -5", "-5"),
        ("#### \u22125", "-5"),
        ("first #### 3\nno, #### 4", "4"),
        (r"so \boxed{42} it is, from 40 and 2", "42"),
        (r"\boxed{\$1,000}", "1000"),
        ("The answer is 18.", "18"),
        ("The final answer is: **18**. I checked 3 times", "18"),
        ("Answer: 10 dollars, not 12", "10"),
        ("the answer to the question is $5", "5"),
        ("She has 3 apples, then 4, so 7 apples.", "7"),
        ("It costs 20%", "20"),
        ("5-3=2", "2"),
        ("half: 0.5", ".5"),
        ("#### 1/2", "0.5"),
        ("#### 12.", "12"),
        ("\u20ac 7", "7"),
        ("1e3", "1000"),
        ("#### \nThe answer is 6", "6"),
    ],
)
def test_number_accepts(completion, gold):
    grade = number(completion, gold)
    assert grade.correct and grade.extracted == extract_number(completion) and grade.how


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("#### 71", "72"),
        ("", "72"),
        ("none", "72"),
        ("#### 7.2", "72"),
        ("72\n#### 1", "72"),
        ("5", "-5"),
        ("#### 1/0", "1"),
        ("nan", "1"),
        ("result of 10-3", "3"),
    ],
)
def test_number_refuses(completion, gold):
    assert not number(completion, gold).correct


def test_number_says_when_nothing_was_found():
    assert number("I don't know", "3").extracted is None
    assert number("#### 4", "3").extracted == "4"


def test_exact_and_contains():
    assert exact("  Paris\n", "paris").correct
    assert not exact("Paris, France", "Paris").correct
    assert not exact("", "").correct
    assert contains("The capital is Paris.", "paris").correct
    assert not contains("category", "cat").correct
    assert contains("category, cat", "cat").correct
    assert not contains("anything", "").correct


def adversarial(rng: random.Random, size: int) -> str:
    """Noise made of the pieces that the graders look for."""
    pieces = [
        "####",
        "\\boxed{",
        "{",
        "}",
        "answer",
        " is",
        ":",
        "the answer to ",
        "-",
        "$",
        ",",
        ".",
        "/",
        "0",
        "9" * 50,
        " ",
        "\n",
        "(",
        "A",
        "B)",
        "e",
        "e9",
        "**",
        "\u0661\u0662",
        "\u00bd",
        "\u2212",
        "\x00",
        "\ud83d\ude00",
        "nan",
        "inf",
        "[" * 20,
        "option ",
        '{"a":',
        "\u202e",
    ]
    if rng.random() < 0.3:
        pieces = [rng.choice(pieces)]
    text = "".join(rng.choice(pieces) for _ in range(min(size, 20_000)))
    return (text * (size // max(len(text), 1) + 1))[:size]


@pytest.mark.parametrize("name", sorted(GRADERS))
def test_no_completion_breaks_a_grader(name):
    rng = random.Random(name)
    for i in range(1500):
        completion = adversarial(rng, rng.choice([0, 1, 5, 40, 300]))
        gold = "A" if name == "choice" else adversarial(rng, 6) if i % 2 else "#### 7"
        assert is_graded(name, completion, gold)
    for completion in (None, 3, float("nan"), b"A", ["A"], json.dumps([[]] * 3), "\ud800"):
        assert is_graded(name, completion, GOLD.get(name, "A"))
        assert is_graded(name, "A", completion)


GOLD = {"number": "7", "exact": "A", "contains": "A", "choice": "B", "call": '{"f": {"x": 1}}'}


def is_graded(name, completion, gold):
    """Whether a grader judges, or refuses gold in one line; nothing else may happen."""
    if name not in GOLD:
        return isinstance(GRADERS[name](completion, gold), Grade)
    try:
        parsed = GRADERS[name].read_gold(gold)
    except UserError as error:
        return "gold " in str(error) and "\n" not in str(error)
    assert GRADERS[name].grade(str(completion), parsed) is not None
    return isinstance(GRADERS[name](completion, gold), Grade)


@pytest.mark.parametrize("name", sorted(GRADERS))
def test_a_megabyte_takes_no_longer_than_reading_it(name):
    """Time grows linearly: catastrophic backtracking would take minutes here."""
    baits = [
        "1",
        "1,",
        "-",
        "$ ",
        "answer",
        "answer to ",
        "answer is ",
        "#",
        "#### ",
        "\\boxed{",
        "(",
        "* ",
        "A ",
        "A",
        " ",
        "\n",
        "0." * 3,
        "1/",
    ]
    for bait in baits:
        completion = bait * (1_000_000 // len(bait))
        start = time.process_time()
        assert is_graded(name, completion, bait)
        GRADERS[name](completion, GOLD.get(name, bait))
        assert time.process_time() - start < 1.0, bait  # about 0.05 s alone; a loaded machine gets room
