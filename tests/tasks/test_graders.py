"""The named graders: what counts as an answer, and that no completion breaks or stalls them."""

import gzip
import json
import random
import time
from datetime import date
from decimal import Decimal

import pytest

from tests.helpers.data import DATA, needs_data
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
    assert not exact("", "x").correct
    assert contains("The capital is Paris.", "paris").correct
    assert not contains("category", "cat").correct
    assert contains("category, cat", "cat").correct
    with pytest.raises(UserError, match="gold '' is not a text"):
        contains("anything", "")


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


@pytest.mark.parametrize("name", sorted(set(GRADERS) - {"math"}))
def test_no_completion_breaks_a_grader(name):
    rng = random.Random(name)
    for i in range(1500):
        completion = adversarial(rng, rng.choice([0, 1, 5, 40, 300]))
        gold = "A" if name == "choice" else adversarial(rng, 6) if i % 2 else "#### 7"
        assert is_graded(name, completion, gold)
    for completion in (None, 3, float("nan"), b"A", ["A"], json.dumps([[]] * 3), "\ud800"):
        assert is_graded(name, completion, GOLD.get(name, "A"))
        assert is_graded(name, "A", completion)


GOLD = {
    "number": "7",
    "exact": "A",
    "contains": "A",
    "choice": "B",
    "call": '{"f": {"x": 1}}',
    "code": "assert f(1) == 1",
    "similarity": "A",
}


def is_graded(name, completion, gold):
    """Whether a grader judges, or refuses gold in one line; nothing else may happen."""
    try:
        parsed = GRADERS[name].read_gold(gold)
    except UserError as error:
        said = "code takes tests in Python" if name == "code" else "gold "
        return said in str(error) and "\n" not in str(error)
    assert GRADERS[name].grade(str(completion), parsed) is not None
    return isinstance(GRADERS[name](completion, gold), Grade)


@pytest.mark.parametrize("name", sorted(set(GRADERS) - {"math"}))
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


@pytest.mark.parametrize(
    ("name", "gold", "message"),
    [
        (
            "number",
            "12,34,5",
            "gold '12,34,5' is not a number: give one number (1234, 0.5, 3/4, 2.5e3), or a list",
        ),
        ("number", "seven or eight", "is not a number"),
        ("number", "5 or 7", "gold '5 or 7' holds no single number: 5 or 7 are several numbers"),
        ("number", True, "gold True is not a number"),
        ("number", None, "gold None is not a number"),
        ("number", [], "gold [] is not a number"),
        ("number", [["5"]], "is not a number"),
        ("number", ["5", "x"], "gold 'x' is not a number"),
        ("number", {"level": 5}, "is not a number"),
        ("number", "3:45", "gold '3:45' is not a number"),
        (
            "exact",
            "",
            "gold '' is not a text: give a text that is not empty, or a list of those that are right",
        ),
        ("exact", float("nan"), "gold nan is not a text"),
        ("contains", {}, "gold {} is not a text"),
        ("contains", " \u200b", "is not a text"),
    ],
)
def test_gold_that_cannot_be_read_is_refused(name, gold, message):
    with pytest.raises(UserError) as caught:
        GRADERS[name].read_gold(gold)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_grade_says_how_the_answer_was_found_and_what_was_passed_over():
    grade = number("The answer is 5. So \\boxed{6}.\n#### 7", "7")
    assert (grade.outcome, grade.extracted, grade.how) == ("right", "7", "final marker")
    assert ("6", "boxed", "final marker ranks before boxed") in grade.passed_over
    assert ("5", "stated", "final marker ranks before stated") in grade.passed_over
    asked = number("Is the answer 5? The answer is 5? The answer is 6.", "6")
    assert asked.correct and ("5", "stated", "it is a question") in asked.passed_over
    hedged = number("#### 5 or 7", "5")
    assert hedged.outcome == "ambiguous" and hedged.reason == "5 or 7 are several numbers"
    assert number("no idea", "5").outcome == "unanswered" and number("6", "5").outcome == "wrong"
    assert contains("It is not Paris.", "Paris").reason == "paris is rejected there"


FORMS = {
    "as given": lambda steps, value: f"{steps}\n#### {value}",
    "boxed": lambda steps, value: f"So \\boxed{{{value}}}.",
    "worked out": lambda steps, value: f"{steps}\nSo the answer is {value - 3} * 2 = {value}.",
    "separators": lambda steps, value: f"{steps}\nIt is {value:,} in total.",
    "bold": lambda steps, value: f"{steps.strip()} **{value}** units",
}


def check_written_forms(rows):
    for raw in rows:
        steps, _, written = raw["answer"].rpartition("####")
        plain = written.strip().replace(",", "")
        value = float(plain) if "." in plain else int(plain)
        assert number(raw["answer"], written.strip()).correct
        # a solution that says "the answer is" means it: it is no text to put another number behind
        steps = "\n".join(line for line in steps.split("\n") if "answer" not in line.lower())
        for name, form in FORMS.items():
            assert number(form(steps, value), written.strip()).correct, (name, raw["answer"])
            assert not number(form(steps, value + 1), written.strip()).correct, (name, raw["answer"])


def gsm8k():
    with gzip.open(DATA / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@needs_data
def test_references_are_right_however_they_are_written_and_off_by_one_is_wrong():
    check_written_forms(gsm8k()[::60])


@pytest.mark.slow
@needs_data
def test_all_references_are_right_however_they_are_written_and_off_by_one_is_wrong():
    rows = gsm8k()
    assert len(rows) == 7473
    check_written_forms(rows)


def test_gold_of_tables_with_types_is_read():
    assert GRADERS["number"]("It is 3.50", Decimal("3.5")) and not GRADERS["number"](
        "It is 3.51", Decimal("3.5")
    )
    assert GRADERS["exact"]("2024-05-13", date(2024, 5, 13))
