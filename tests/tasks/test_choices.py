"""The grader `choice`: what a completion settles on, gold in all its forms, and options."""

import json
from pathlib import Path

import pytest

from unisd import tasks
from unisd.errors import UserError
from unisd.tasks.graders import GRADERS
from unisd.tasks.graders.choices import choice

TABLES = Path(__file__).parent / "tables"
OPTIONS = ["hell", "paradise", "limbo", "earth"]


def table(name):
    return json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["explained", "markup", "several-letters", "gold", "negated", "reasoning"])
def test_every_row_gets_the_verdict_of_a_careful_reader(kind):
    wrong = [
        (gold, completion, grade)
        for gold, completion, right, _ in table(f"choices-{kind}")["rows"]
        if (grade := GRADERS["choice"](completion, gold)).correct != right
    ]
    assert not wrong


def test_a_careful_reader_finds_the_same_letters():
    """None: no answer; "ambiguous": several, and none of them settled on."""
    wrong = []
    for letter, completion in table("choices-read"):
        found = choice.read(completion)
        got = found.chosen.value.letter if found.chosen else "ambiguous" if found.hedge else None
        if got != letter:
            wrong.append((completion, letter, got))
    assert not wrong


def test_what_is_not_taken_is_said():
    grade = choice("It might be C. Answer: B, or (B) again", "B")
    assert (
        grade.correct
        and grade.how == "stated"
        and ("C", "mention", "stated ranks before mention") in (grade.passed_over)
    )
    both = choice("B or C", "B")
    assert both.outcome == "ambiguous" and both.reason == "names B and C" and both.extracted is None
    assert choice("\\boxed{B}", "B").how == "boxed" and choice("#### B", "B").how == "final marker"
    assert choice("I see.\nB", "B").how == "last line" and choice("see (B)", "B").how == "mention"
    assert choice("no idea", "B").outcome == "unanswered" and choice("C", "B").outcome == "wrong"


GOLDS = [
    "B",
    "b",
    "(B)",
    "B.",
    "**B**",
    "Answer: B",
    "B) paradise",
    ["B"],
    ["B", "D"],
    ("B",),
    {"answer": "B"},
]


@pytest.mark.parametrize("gold", GOLDS, ids=repr)
def test_gold_is_a_letter_in_any_form(gold):
    assert choice("Answer: B", gold).correct and not choice("Answer: C", gold).correct


@pytest.mark.parametrize("gold", ["B", 1, "1", 1.0, "paradise", "Paradise.", ["paradise"], "Answer: B"])
def test_with_its_options_gold_is_a_text_or_an_index_too(gold):
    full = {"answer": gold, "options": OPTIONS}
    for right in (
        "B",
        "Answer: B",
        "paradise",
        "The answer is paradise.",
        "\\boxed{paradise}",
        "Well.\nParadise",
    ):
        assert choice(right, full).correct, right
    for wrong in ("A", "hell", "The answer is hell", "The answer is not paradise", "hell or paradise", "?"):
        assert not choice(wrong, full).correct, wrong


def test_options_come_in_the_forms_of_published_data():
    lettered = {"label": ["A", "B"], "text": ["x", "y"]}
    for options in (
        lettered,
        {"A": "x", "B": "y"},
        [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}],
    ):
        assert choice("B) y", {"answerKey": "B", "choices": options}).correct
        assert choice("y", {"answer": "y", "choices": options}).correct
    numbered = {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}
    assert choice("Answer: B", {"answerKey": "2", "choices": numbered}).correct
    prefixed = {"answer": "y", "options": ["A. x", "B. y"]}
    assert choice("y", prefixed).correct and choice("B", prefixed).correct
    numbers = {"answer": "2", "options": ["2", "3", "4"]}
    assert choice("A", numbers).correct and choice("The answer is 2.", numbers).correct
    many = {"answer": 12, "options": [f"option number {i}" for i in range(14)]}
    assert choice("Answer: M", many).correct and not choice("Answer: N", many).correct
    assert choice("The answer is 50", {"answer": "B", "options": ["5", "50"]}).correct


def test_a_text_without_options_is_compared_with_the_text_given():
    assert choice("Answer: B) paradise", "paradise").correct and choice("Paradise.", "paradise").correct
    assert not choice("Answer: C) hell", "paradise").correct
    bare = choice("B", "paradise")
    assert not bare.correct and bare.reason == (
        "a letter alone cannot be compared with gold's text: give the row's options"
    )


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        (None, "gold None is not an answer: give a letter"),
        ("", "gold '' is not an answer: give a letter"),
        (True, "gold True is not an answer"),
        ([], "gold [] is not an answer"),
        ({"best": "B"}, "gold {'best': 'B'} is not an answer"),
        ("B or C", "gold 'B or C' names several letters: give one, or a list of which any is right"),
        ({"answer": 4, "options": OPTIONS}, "gold 4 is not an index of 4 options, which count from 0"),
        ({"answer": "E", "options": OPTIONS}, "gold 'E' is beyond the row's 4 options"),
        ({"answer": "heaven", "options": OPTIONS}, "gold 'heaven' is none of the row's 4 options"),
        ({"answer": 2, "options": ["2", "3", "4"]}, "gold 2 is an index, and the text of another option"),
        ({"answer": "B", "options": ["B", "A"]}, "gold 'B' is one option's letter and another one's text"),
        ({"answer": "B", "options": "A or B"}, "the options 'A or B' are not a list of 2 to 26 texts"),
    ],
    ids=repr,
)
def test_gold_that_cannot_be_read_is_refused(gold, said):
    with pytest.raises(UserError) as error:
        choice.read_gold(gold)
    assert f"choice: {said}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("gold", [1, "2", 3.0, ["A", "1"]], ids=repr)
def test_a_number_of_a_row_without_options_is_refused(gold):
    """Nobody can say where it counts from; to a number alone either letter is right."""
    with pytest.raises(UserError, match=r"is a number, which may count from 0 or from 1: give the"):
        choice.gold_of({"answer": gold}, gold)
    assert choice.gold_of({"answer": gold, "options": OPTIONS}, gold)
    assert choice("Answer: B", "1").correct and choice("Answer: A", "1").correct
    assert not choice("Answer: C", "1").correct and choice("Answer: A", "0").correct


def test_letters_alone_are_extracted():
    assert choice("The answer is c.", "A").extracted == "C" and choice("B or C", "A").extracted is None


def test_own_rows_bring_their_options(tmp_path):
    """An index or a text as the answer scored 0 % without a word."""
    rows = [
        {"prompt": "Where?", "answer": 1, "options": OPTIONS},
        {"prompt": "Where else?", "answer": "limbo", "choices": json.dumps(OPTIONS)},
        {"prompt": "And then?", "answer": "D"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.get("jsonl", data_files=str(path), grader="choice")
    loaded = task.load("all")
    for row, letter, text in zip(loaded, "BCD", ("paradise", "limbo", "D) earth"), strict=True):
        assert task.grade(row, f"Answer: {letter}").correct and task.grade(row, f"It is {text}").correct
        assert not task.grade(row, "Answer: A").correct
    path.write_text(json.dumps({"prompt": "Where?", "answer": 1}) + "\n")
    with pytest.raises(
        UserError, match=r"^jsonl: [^ ]*rows.jsonl, row 0: choice: gold .* which may count from 0"
    ):
        task.load("all")
