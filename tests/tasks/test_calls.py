"""Tool calls: the forms that are read, values by their types, gold, and ToolAlpaca's own."""

import json
from pathlib import Path

import pytest

from tests.helpers.data import DATA, needs_data
from unisd.errors import UserError
from unisd.tasks.graders import GRADERS
from unisd.tasks.graders.calls import call
from unisd.tasks.tool_calls import ToolStep

TABLES = Path(__file__).parent / "tables"
FORMS = json.loads((TABLES / "calls-forms.json").read_text(encoding="utf-8"))
ARGUMENTS = json.dumps(FORMS["gold"]["arguments"])


def test_every_row_gets_the_verdict_of_a_careful_reader():
    rows = json.loads((TABLES / "calls.json").read_text(encoding="utf-8"))["rows"]
    found = [(row, GRADERS["call"](row[1], row[0])) for row in rows]
    assert not [(row, grade) for row, grade in found if grade.correct != row[2]]


@pytest.mark.parametrize("completion", FORMS["right"])
def test_a_right_call_is_found_in_all_forms(completion):
    assert call(completion, json.dumps(FORMS["gold"])).correct


@pytest.mark.parametrize("completion", FORMS["wrong"])
def test_other_calls_are_wrong_in_any_form(completion):
    assert not call(completion, json.dumps(FORMS["gold"])).correct


GOLDS = [
    FORMS["gold"],
    [FORMS["gold"]],
    json.dumps([FORMS["gold"]]),
    {"tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}]},
    [{"type": "tool_use", "name": "get_weather", "input": FORMS["gold"]["arguments"]}],
    [["get_weather", ARGUMENTS]],
    f"Action: get_weather\nAction Input: {ARGUMENTS}",
    {"get_weather": FORMS["gold"]["arguments"]},
]


@pytest.mark.parametrize("gold", GOLDS, ids=repr)
def test_gold_may_have_any_form_too(gold):
    right = call(json.dumps(FORMS["gold"]), gold)
    assert right.correct and right.how == "json" and right.outcome == "right"
    assert not call('{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}', gold).correct


@pytest.mark.parametrize(
    "gold", ["72", "", None, [], {}, {"name": "Bob"}, "[]", float("nan"), [1, 2]], ids=repr
)
def test_gold_without_a_call_is_refused(gold):
    with pytest.raises(UserError, match=r"call: gold .* holds no call: give \{\"name\": ..., \"arguments\""):
        call.read_gold(gold)
    with pytest.raises(UserError, match=r"call: gold .*: the arguments of f are not a JSON object"):
        call.read_gold({"name": "f", "arguments": "no JSON"})


@pytest.mark.parametrize(
    ("gold", "given", "right"),
    [
        *[("007", 7, False), (7, "007", False), ("7", 7, True), (7, "7", True), ("02134", "2134", False)],
        *[
            ("1.10", 1.1, False),
            ("1.10", "1.1", False),
            ("1.1", 1.1, True),
            (3, 3.0, True),
            ("3.0", 3, False),
        ],
        *[(2**53, 2**53 + 1, False), (10**30, 10**30 + 1, False), (10**30, 10**30, True), (0.1, 0.1, True)],
        *[("1e5", 100000, False), ("1e5", "100000", False), ("0x10", 16, False), ("10,000", 10000, False)],
        *[(True, 1, False), (0, False, False), (True, "true", True), ("", None, True), (None, "null", False)],
        *[(float("nan"), float("nan"), True), ("nan", float("nan"), False), ("Nan", "Nan", True)],
        *[("Paris", " paris ", True), ("Zo\u00eb", "Zoe\u0308", True), ("it's", "it\u2019s", True)],
        *[("aB3xY", "ab3xy", False), ("/home/Bob", "/home/bob", False), ("2PM", "2pm", True)],
        *[
            ([1, 2], [2, 1], False),
            ({"a": 1}, {"a": 1.0}, True),
            ("a\nb", "a\nb", True),
            ("${A}", "x", False),
        ],
    ],
)
def test_values_are_compared_by_their_types(gold, given, right):
    texts = [json.dumps({"name": "f", "arguments": {"x": value}}) for value in (gold, given)]
    assert call(texts[1], texts[0]).correct == right
    assert call(texts[1], {"name": "f", "arguments": {"x": gold}}).correct == right


def test_the_last_part_of_a_long_completion_is_read():
    text = json.dumps(FORMS["gold"])
    assert call("Let me think {about it}. " * 2000 + text, text).correct
    long = json.dumps({"name": "write", "arguments": {"text": "word " * 20_000}})
    assert call("Now:\n" + long, long).correct


@needs_data
def test_gold_of_toolalpaca_is_right_as_react_json_and_messages():
    from unisd import tasks

    task = tasks.get("toolalpaca", data_files=str(DATA / "toolalpaca/eval_simulated.json.gz"))
    rows = task.load("all")
    assert len(rows) == 100
    for row in rows:
        parsed = [(name, ToolStep(name, text).parsed()) for name, text in row["gold"]]
        calls = [
            {"name": name, "arguments": text if value is None else value}
            for (name, value), (_, text) in zip(parsed, row["gold"], strict=True)
        ]
        functions = [{"name": name, "arguments": text} for name, text in row["gold"]]
        message = {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": f} for f in functions],
        }
        used = [{"type": "tool_use", "name": one["name"], "input": one["arguments"]} for one in calls]
        forms = [row["completion"], *(json.dumps(one, default=float) for one in (calls, message, used))]
        assert [task.grade(row, form).correct for form in forms] == [True] * 4, row["gold"]
        assert not task.grade(row, row.get("negative_context", "")).correct
