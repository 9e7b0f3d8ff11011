"""`unisd grade`, its statistics, tool calls and code in completions, and graders under 10,000
hostile completions each.
"""

from __future__ import annotations

import json
import random
import time
from itertools import combinations
from pathlib import Path

import pytest

from tests.helpers.commands import without_notes
from tests.helpers.data import DATA, needs_data
from unisd.cli.main import main
from unisd.evaluation.grading import bootstrap, pass_at_k, row_results, summarize
from unisd.tasks.base import Grade
from unisd.tasks.graders import GRADERS
from unisd.tasks.graders.call_grading import grade_calls
from unisd.tasks.graders.programs import read_program
from unisd.tasks.tool_calls import ToolStep, extract_calls


def rows_file(tmp_path: Path, count: int = 6) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"r{i}", "prompt": f"{i}+1?", "answer": str(i + 1)}) + "\n"
            for i in range(count)
        )
    )
    return str(path)


def completions_file(tmp_path: Path, rows: list[dict]) -> str:
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_grades_by_id_or_in_order(tmp_path, capsys):
    data = rows_file(tmp_path)
    by_id = [{"id": f"r{i}", "completion": f"It is {i + 1}."} for i in (4, 0, 2)] + [
        {"id": "r1", "completion": "It is 7."}
    ]
    out, figures = tmp_path / "o" / "out.jsonl", tmp_path / "f.json"
    flags = ["--data_files", data, "--grader", "number", "--rows", str(out), "--json", str(figures)]
    assert main(["grade", "--task", "jsonl", *flags, "--completions", completions_file(tmp_path, by_id)]) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["id"], r["correct"], r["score"]) for r in results] == [
        ("r0", True, 1.0), ("r1", False, 0.0), ("r2", True, 1.0), ("r4", True, 1.0),
    ]  # fmt: skip
    assert results[1]["extracted"].rstrip(".") == "7" and results[1]["reason"] == "wrong"
    assert json.loads(figures.read_text())["accuracy"]["value"] == 0.75
    in_order = [{"completion": str(i + 1)} for i in range(6)]
    file = completions_file(tmp_path, in_order)
    assert main(["grade", "--task", "jsonl", *flags, "--completions", file]) == 0
    assert json.loads(figures.read_text())["accuracy"]["value"] == 1.0
    assert "accuracy" in capsys.readouterr().out


def test_several_answers_a_row_give_pass_at_k(tmp_path):
    answers = [
        {"id": f"r{i}", "completion": str(i + 1 if sample < i else 0)}
        for i in range(4)
        for sample in range(5)
    ]
    figures = tmp_path / "f.json"
    flags = ["--data_files", rows_file(tmp_path), "--grader", "number", "--json", str(figures)]
    file = completions_file(tmp_path, answers)
    assert main(["grade", "--task", "jsonl", *flags, "--completions", file]) == 0
    found = json.loads(figures.read_text())
    assert found["pass_at_k"]["1"]["value"] == pytest.approx((0 + 1 + 2 + 3) / 20)
    assert found["pass_at_k"]["5"]["value"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"completion": "1"}], "1 completions without id for 6 rows"),
        ([{"id": "zz", "completion": "1"}], "id 'zz' is not among the 6 rows"),
        ([{"id": "r1"}], 'row 0 has no text in "completion"'),
        ([], "is empty"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, lines, message):
    assert (
        main(
            [
                "grade",
                "--task",
                "jsonl",
                "--data_files",
                rows_file(tmp_path),
                "--completions",
                completions_file(tmp_path, lines),
            ]
        )
        == 2
    )
    error = without_notes(capsys.readouterr().err)
    assert message in error and error.count("\n") == 1


@pytest.mark.long
@needs_data
def test_gold_of_toolalpaca_and_gsm8k_grades_right_by_the_command(tmp_path):
    from unisd import tasks

    for name, file, count in (
        ("toolalpaca", "toolalpaca/eval_simulated.json.gz", 100),
        ("gsm8k", "gsm8k/train.jsonl.gz", 7473),
    ):
        rows = tasks.get(name, data_files=str(DATA / file)).load("all")
        given = completions_file(tmp_path, [{"completion": row["completion"]} for row in rows])
        figures = tmp_path / "f.json"
        assert (
            main(
                [
                    "grade",
                    "--task",
                    name,
                    "--data_files",
                    str(DATA / file),
                    "--completions",
                    given,
                    "--json",
                    str(figures),
                ]
            )
            == 0
        )
        assert json.loads(figures.read_text())["accuracy"] == pytest.approx(
            {"value": 1.0, "low": 1.0, "high": 1.0, "n": count}, abs=0.04
        )


def test_pass_at_k_equals_counting_all_draws():
    for n, correct in ((5, 2), (6, 0), (4, 4), (7, 3)):
        marks = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = list(combinations(marks, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_bootstrap_interval_holds_the_mean():
    rng = random.Random(0)
    covered = 0
    for trial in range(40):
        found = bootstrap([float(rng.random() < 0.3) for _ in range(80)], seed=trial)
        assert found["low"] <= found["value"] <= found["high"]
        covered += found["low"] <= 0.3 <= found["high"]
    assert covered >= 34


def test_summary_and_results():
    rows = [{"id": "a", "skill": "x"}, {"id": "b", "skill": "y"}, {"id": "c", "skill": "y"}]
    grades = [
        [Grade(True, "1", details={"part": 1.0})],
        [Grade(False, None)],
        [Grade(False, "2", "far off", {"part": 0.5})],
    ]
    found = summarize(rows, grades)
    assert found["accuracy"]["value"] == pytest.approx(1 / 3) and found["by_skill"]["y"] == {
        **found["by_skill"]["y"],
        "value": 0.0,
        "n": 2,
    }
    assert found["extraction_rate"]["value"] == pytest.approx(2 / 3) and found["details"]["part"][
        "value"
    ] == pytest.approx(0.5)
    assert [r["reason"] for r in row_results(rows, grades)] == ["", "no answer found", "far off"]


def test_calls_in_both_forms():
    gold = [ToolStep("find", '{"q": "pen", "n": 3, "page": ""}'), ToolStep("buy", '{"id": ${id from find}}')]
    first = 'Thought: first look.\nAction: find\nAction Input: {"n": "3", "q": "Pen"}\nObservation: [..]\n'
    react = first + 'Action: buy\nAction Input: {"id": 17}\nDone.'
    chat = (
        '[{"name": "find", "arguments": {"q": "pen", "n": 3.0}}, {"name": "buy", "arguments": {"id": "x9"}}]'
    )
    renamed = chat.replace("name", "tool").replace("arguments", "parameters")
    for text in (react, chat, renamed):
        assert grade_calls(extract_calls(text), gold).correct
    once = grade_calls(extract_calls(react.partition("Action: buy")[0]), gold)
    assert not once.correct and once.details == {"name_accuracy": 0.5, "argument_accuracy": 0.5}
    other = grade_calls(extract_calls(react.replace("17", '""')), gold)
    assert (
        not other.correct
        and other.details == {"name_accuracy": 1.0, "argument_accuracy": 0.5}
        and other.reason == "wrong arguments"
    )
    assert not grade_calls(extract_calls(react + '\nAction: buy\nAction Input: {"id": 1}'), gold).correct
    assert grade_calls([], gold).reason == "no call"


def extract_code(completion):
    chosen = read_program(completion).chosen
    return None if chosen is None else chosen.text


def test_code_is_found_in_what_surrounds_it():
    assert (
        extract_code("Sure!\n```python\ndef f():\n    return 1\n```\nIt returns 1.")
        == "def f():\n    return 1"
    )
    assert extract_code("```\nx = 1\n```\nthen\n```py\ndef f(): pass\n```") == "def f(): pass"
    assert (
        extract_code("Here:\nimport math\ndef f():\n    return math.pi")
        == "import math\ndef f():\n    return math.pi"
    )
    assert extract_code("```python\ndef f(): return 2") == "def f(): return 2"
    assert extract_code("I cannot.") is None and extract_code("") is None and extract_code("``````") is None


def hostile(rng: random.Random) -> str:
    pieces = (
        *(
            "answer is ",
            "#### ",
            "\\boxed{",
            "{",
            "[",
            "(",
            '"',
            "$",
            "Action: ",
            "Action Input: ",
            '{"name": "',
            "```python\n",
            "```",
        ),
        *(
            "def f(",
            "\u202e",
            "\ud800",
            "\x00",
            "NaN",
            "Infinity",
            "1e999",
            "-",
            "1,2,",
            "\u0663",
            "\u2167",
            "A.",
            "B)",
            "\n",
            "\r",
        ),
        *(
            "${",
            "}",
            "]",
            " " * 7,
            "\u00e9",
            "\U0001d7d9",
            "9" * 30,
            "/0",
            "option ",
            "Answer: ",
            "**",
            "\\text{",
            "_" * 9,
            "a" * 40,
        ),
        *("\U0001f600", '{"a":' * 3),
    )
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 60)))


def adversarial() -> list[str]:
    """Megabytes, depth, and bait for backtracking."""
    return [
        *(
            piece * (10**6 // len(piece))
            for piece in ("1", "#", "answer ", "answer is ", "[", '{"a":', "(A", "A ", "\\boxed{", "1,", " ")
        ),
        *(
            piece * (10**6 // len(piece))
            for piece in ("\n", "```", "def f(", "Action: x\n", "${", '{"name": "', "\u0301", "-")
        ),
        "Answer:" + " " * 10**6 + "A",
        "[" * 10_000 + "]" * 10_000,
        '{"name":"f","arguments":' + '{"a":' * 10_000 + "1" + "}" * 10_001,
    ]


def timed(call):
    """The result, and the processor's seconds: the least of a few tries, for a collection or a cold
    cache is not the grader's.
    """
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
        if best < 0.04:
            break
    return result, best


GOLD = {
    "exact": "42",
    "contains": "42",
    "choice": "B",
    "number": "#### 42",
    "call": 'Action: f\nAction Input: {"a": 1}',
}


@pytest.mark.parametrize("count", [300, pytest.param(9_978, marks=pytest.mark.slow)])
@pytest.mark.long
@pytest.mark.parametrize("name", sorted(GOLD))
def test_no_grader_raises_or_hangs(name, count):
    rng = random.Random(7)
    texts = [hostile(rng) for _ in range(count)] + adversarial()
    slowest = 0.0
    for text in texts:
        grade, seconds = timed(lambda text=text: GRADERS[name](text, GOLD[name]))
        slowest = max(slowest, seconds)
        assert isinstance(grade, Grade)
        json.dumps({"extracted": grade.extracted})
    print(f"{name}: slowest {1e3 * slowest:.1f} ms")
    assert slowest <= 0.05


@pytest.mark.long
def test_extracting_code_never_raises_or_hangs():
    rng = random.Random(8)
    slowest = 0.0
    for text in [hostile(rng) for _ in range(9_978)] + adversarial():
        slowest = max(slowest, timed(lambda text=text: extract_code(text))[1])
    assert slowest <= 0.05
